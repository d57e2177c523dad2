"""Answers token by token: decoded from a state, drawn from the plain model, or the model's own thinking text.

A decoding is a generator that is sent its tokens, one by one, and what the model says of each. ``_run`` feeds many of
them from the same passes; those that end leave, and those that fail harm no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from latent_tool.errors import NumericalError
from latent_tool.method.asking import all_or_error, contained
from latent_tool.models.choosing import Chooser, Said, choose, seeded
from latent_tool.models.continuing import Continuing, RowsKind, grouped
from latent_tool.models.decoding import Decoded, GenerationRules, generation_rules
from latent_tool.models.prompts import Markers
from latent_tool.models.requests import Decode, Reason, Sample, never
from latent_tool.models.rows import Beginning
from latent_tool.settings import GenerationSettings, SamplingSettings

__all__ = ["decode_many", "reason_many", "sample_many"]

Decoding = Generator[None, Said, Decoded]

# Tokens that a decoding writes at least before it can be paused.
_SLICE = 16


@dataclass(frozen=True)
class _Row:
    """A decoding, what it begins after, and how it chooses its tokens."""

    beginning: Beginning
    chooser: Chooser
    decoding: Decoding


def decode_many(model: Continuing, requests: Sequence[Decode]) -> list[Decoded | Exception]:
    """Decode answers from states; see ``Decode``."""
    if not requests:
        return []
    kind = model.kind_of_rows(requests[0].prefix)
    rows = []
    for each in requests:
        written = each.begun.tokens if each.begun is not None else ()
        beginning = model.beginning(kind, each.prefix, each.latents, each.patches, written)
        floor = _Floor(each.floor, each.prefix.inputs.markers, each.latents is None) if each.floor else None
        rows.append(
            decode_from(
                model,
                beginning,
                each.max_new_tokens,
                each.stop,
                generation=each.generation,
                pause=each.pause,
                begun=each.begun,
                floor=floor,
            )
        )
    return _run(model, kind, rows)


def sample_many(model: Continuing, requests: Sequence[Sample]) -> list[list[Decoded] | Exception]:
    """Draw answers of the plain model; the ``k``-th answer to a question depends on its seed and ``k`` alone."""
    if not requests:
        return []
    kind = model.kind_of_rows(requests[0].prefix)
    rows = []
    for each in requests:
        opening = each.prefix.inputs.markers.opening if each.sampling.think else ()
        beginning = model.beginning(kind, each.prefix, None, (), opening)
        for k in range(each.sampling.samples):
            rows.append(
                decode_from(
                    model,
                    beginning,
                    each.max_new_tokens,
                    each.stop,
                    generation=each.generation,
                    sampling=each.sampling,
                    draws=seeded(each.seed, each.first + k),
                )
            )
    drawn = iter(_run(model, kind, rows))
    return [all_or_error([next(drawn) for _ in range(each.sampling.samples)]) for each in requests]


def reason_many(model: Continuing, requests: Sequence[Reason]) -> list[tuple[tuple[int, ...], int] | Exception]:
    """Decode the model's own thinking texts, and count the forward passes each took; see ``Reason``."""
    asked = [each for each in requests if each.prefix.inputs.markers.closing]
    rows = []
    for each in asked:
        markers = each.prefix.inputs.markers
        beginning = Beginning(each.prefix, None, model.written(markers.opening))
        rows.append(decode_from(model, beginning, each.max_tokens, each.stop, frozenset(markers.closing[:1])))
    texts = _run(model, model.kind_of_rows(asked[0].prefix), rows) if asked else []
    decoded = dict(zip(map(id, asked), texts, strict=True))
    found: list[tuple[tuple[int, ...], int] | Exception] = []
    for each in requests:
        text = decoded.get(id(each))
        if text is None:
            found.append(((), 0))
        elif isinstance(text, Exception):
            found.append(text)
        else:
            markers = each.prefix.inputs.markers
            silent = {*markers.closing[:1], *generation_rules(model.model, each.prefix.length).stop_tokens}
            # The last token is not run; without an opening marker the first one comes from the prefix.
            calls = max(len(text.tokens) - (0 if markers.opening else 1), 0)
            found.append((tuple(token for token in text.tokens if token not in silent), calls))
    return found


def decode_from(
    model: Continuing,
    beginning: Beginning,
    max_new_tokens: int,
    stop: Callable[[], bool],
    ends: frozenset[int] = frozenset(),
    generation: GenerationSettings | None = None,
    pause: Callable[[], bool] = never,
    begun: Decoded | None = None,
    sampling: SamplingSettings | None = None,
    draws: torch.Generator | None = None,
    floor: _Floor | None = None,
) -> _Row:
    """Return a decoding that takes the most probable tokens, or draws them as ``sampling`` says."""
    inputs = beginning.prefix.inputs
    # What the logits processors see: the prompt and the tail, as in `generate`; latents and patches have no ids.
    written = [*inputs.tensors["input_ids"][0].tolist(), *inputs.tail]
    rules = generation_rules(model.model, len(written), generation)
    before = Decoded((), torch.zeros(0), torch.zeros(0), "paused") if begun is None else begun
    chooser = Chooser(rules, [*written, *before.tokens], max_new_tokens - len(before.tokens), sampling, draws)
    decoding = _decoding(model, rules, before, max_new_tokens, stop, ends, pause, floor)
    return _Row(beginning, chooser, decoding)


def _decoding(
    model: Continuing,
    rules: GenerationRules,
    before: Decoded,
    max_new_tokens: int,
    stop: Callable[[], bool],
    ends: frozenset[int],
    pause: Callable[[], bool],
    floor: _Floor | None,
) -> Decoding:
    """One decoding: yields whenever it wants another token, and is sent that."""
    tokens = list(before.tokens)
    log_probabilities: list[float] = []
    entropies: list[float] = []
    finish_reason = "length"
    for token, log_probability in zip(tokens, before.log_probabilities.tolist(), strict=True):
        if floor is not None:
            floor.passed(token, log_probability)
    while len(tokens) < max_new_tokens:
        if stop():
            finish_reason = "deadline"
            break
        if len(entropies) >= _SLICE and pause():
            finish_reason = "paused"
            break
        said = yield
        tokens.append(said.token)
        log_probabilities.append(said.log_probability)
        entropies.append(said.entropy)
        ended = said.token in rules.stop_tokens or said.token in ends
        if ended or _spells(model.tokenizer, tokens, rules.stop_strings):
            finish_reason = "stop"
            break
        if floor is not None and not floor.passed(said.token, said.log_probability):
            finish_reason = "unsure"
            break
    if not entropies:
        return Decoded(tuple(tokens), before.log_probabilities, before.entropies, finish_reason)
    if not all(map(math.isfinite, log_probabilities)):
        raise NumericalError(
            "The model's logits are not finite while it answers.", "Load the model in float32 or bfloat16."
        )
    log_p = torch.cat([before.log_probabilities, torch.tensor(log_probabilities)])
    return Decoded(tuple(tokens), log_p, torch.cat([before.entropies, torch.tensor(entropies)]), finish_reason)


class _Floor:
    """Whether the answer that is being written can still be as probable as it has to be.

    What a model thinks in words before it answers does not count: it says nothing of how sure the answer will be.

    Args:
        least: the joint probability of the answer's tokens below which no further token is of use.
        opening, closing: tokens of the model's thinking markers.
        reasons: whether the decoding may begin with such a text.
    """

    def __init__(self, least: float, markers: Markers, reasons: bool) -> None:
        self._least = math.log(least)
        self._opening, self._closing = list(markers.opening), list(markers.closing)
        self._tokens: list[int] = []
        self._joint = 0.0  # log-probability of the answer's tokens so far
        # A template may have opened the marker itself.
        self._thinks = reasons and bool(self._closing) and not self._opening

    def passed(self, token: int, log_probability: float) -> bool:
        """Note a token; whether the answer may still reach the least probability."""
        self._tokens.append(token)
        self._joint += log_probability
        if self._closing and self._tokens[-len(self._closing) :] == self._closing:
            self._thinks, self._joint = False, 0.0
        elif self._opening and self._tokens[-len(self._opening) :] == self._opening:
            self._thinks = True
        begins = self._tokens == self._opening[: len(self._tokens)]  # perhaps the marker's first tokens
        return self._thinks or begins or self._joint >= self._least


def _run(model: Continuing, kind: RowsKind, rows: Sequence[_Row]) -> list[Decoded | Exception]:
    """Feed decodings from forward passes, together where prefixes can be shared; results in the order of rows."""
    return [result for some in kind.batches(rows) for result in _run_together(model, kind, some)]


def _run_together(model: Continuing, kind: RowsKind, rows: Sequence[_Row]) -> list[Decoded | Exception]:
    results = [_step(row.decoding, None) for row in rows]  # up to the first token
    # Rows of one prefix stand together.
    live = [index for index in grouped([row.beginning.prefix for row in rows]) if results[index] is None]
    if live:
        batch, logits = model.begin(kind, [rows[index].beginning for index in live])
    while live:
        said = choose([rows[index].chooser for index in live], logits)
        for index, each in zip(live, said, strict=True):
            results[index] = _step(rows[index].decoding, each)
        going = [place for place, index in enumerate(live) if results[index] is None]
        if not going:
            break
        if len(going) < len(live):
            batch.select(going)
            live = [live[place] for place in going]
        logits = batch.write([[said[place].token] for place in going], [-1])[:, -1]
    return [result for result in results if result is not None]


def _spells(tokenizer: Any, tokens: Sequence[int], strings: Sequence[str]) -> bool:
    """Whether the text of the tokens contains one of the strings."""
    if not strings:
        return False
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return any(string in text for string in strings)


def _step(decoding: Decoding, said: Said | None) -> Decoded | Exception | None:
    """Advance a decoding; its result, or what it raised, or ``None`` while it wants another token."""
    try:
        if said is None:
            next(decoding)
        else:
            decoding.send(said)
        return None
    except StopIteration as end:
        decoded: Decoded = end.value
        return decoded
    except BaseException as error:
        return contained(error)
