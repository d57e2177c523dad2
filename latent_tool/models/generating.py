"""Answers token by token: decoded from a state, drawn from the plain model, or the model's own thinking text.

A decoding is a generator that is sent what the model says of its next token and yields the one it chooses. ``_run``
feeds many of them from the same passes; those that end leave, and those that fail harm no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latent_tool.errors import NumericalError
from latent_tool.method.asking import contained
from latent_tool.method.reward import entropy_of
from latent_tool.models.continuing import Continuing, RowsKind, grouped
from latent_tool.models.decoding import Decoded, generation_rules, greedy, sampler
from latent_tool.models.prefix import Prefix
from latent_tool.models.requests import Decode, Reason, Sample, never
from latent_tool.models.rows import Beginning
from latent_tool.settings import GenerationSettings

__all__ = ["decode_many", "reason_many", "sample_many"]

Decoding = Generator[int | None, "_Next", Decoded]

# Tokens that a decoding writes at least before it can be paused.
_SLICE = 16


class _Next(NamedTuple):
    """What a model says of the next token of one row: logits and log-probabilities ``(vocabulary,)``, float32, entropy
    ``()``, and the most probable token."""

    logits: Tensor
    log_p: Tensor
    entropy: Tensor
    best: int


@dataclass(frozen=True)
class _Row:
    """A decoding, and what it begins after."""

    beginning: Beginning
    decoding: Decoding


def decode_many(model: Continuing, requests: Sequence[Decode]) -> list[Decoded | Exception]:
    """Decode answers from states; see ``Decode``."""
    if not requests:
        return []
    kind = model.kind_of_rows(requests[0].prefix)
    rows = []
    for each in requests:
        written = each.begun.tokens if each.begun is not None else ()
        decoding = decode_from(
            model,
            each.prefix,
            each.max_new_tokens,
            each.stop,
            generation=each.generation,
            pause=each.pause,
            begun=each.begun,
            floor=each.floor,
        )
        rows.append(_Row(model.beginning(kind, each.prefix, each.latents, each.patches, written), decoding))
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
            choose = sampler(each.sampling, each.seed, k)
            decoding = decode_from(
                model, each.prefix, each.max_new_tokens, each.stop, generation=each.generation, choose=choose
            )
            rows.append(_Row(beginning, decoding))
    drawn = iter(_run(model, kind, rows))
    found: list[list[Decoded] | Exception] = []
    for each in requests:
        answers = [next(drawn) for _ in range(each.sampling.samples)]
        failed = next((answer for answer in answers if isinstance(answer, Exception)), None)
        found.append(failed or [answer for answer in answers if not isinstance(answer, Exception)])
    return found


def reason_many(model: Continuing, requests: Sequence[Reason]) -> list[tuple[tuple[int, ...], int] | Exception]:
    """Decode the model's own thinking texts, and count the forward passes each took; see ``Reason``."""
    asked = [each for each in requests if each.prefix.inputs.markers.closing]
    rows = []
    for each in asked:
        markers = each.prefix.inputs.markers
        decoding = decode_from(model, each.prefix, each.max_tokens, each.stop, frozenset(markers.closing[:1]))
        rows.append(_Row(Beginning(each.prefix, None, model.written(markers.opening)), decoding))
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
    prefix: Prefix,
    max_new_tokens: int,
    stop: Callable[[], bool],
    ends: frozenset[int] = frozenset(),
    generation: GenerationSettings | None = None,
    pause: Callable[[], bool] = never,
    begun: Decoded | None = None,
    choose: Callable[[Tensor], int] | None = None,
    floor: float = 0.0,
) -> Decoding:
    """One decoding: is sent what the model says at every step, yields the token that is chosen next.

    ``choose``: from scores ``(vocabulary,)``; by default the most probable one. ``floor``: see ``Decode``.
    """
    # What the logits processors see: the prompt and the tail, as in `generate`; latents and patches have no ids.
    written = [*prefix.inputs.tensors["input_ids"][0].tolist(), *prefix.inputs.tail]
    rules = generation_rules(model.model, len(written), generation)
    ids: Tensor | None = None  # the same tokens for the logits processors, with room for those to come
    empty = torch.zeros(0)
    before = Decoded((), empty, empty, "paused") if begun is None else begun
    tokens = list(before.tokens)
    log_probabilities: list[Tensor] = []
    entropies: list[Tensor] = []
    finish_reason = "length"
    joint = math.exp(float(before.log_probabilities.sum()))
    while len(tokens) < max_new_tokens:
        if stop():
            finish_reason = "deadline"
            break
        if len(entropies) >= _SLICE and pause():
            finish_reason = "paused"
            break
        said = yield tokens[-1] if tokens else None
        scores, token = said.logits, said.best
        if rules.processors:
            count = len(written) + len(tokens)
            if ids is None:
                ids = torch.zeros(1, len(written) + max_new_tokens, dtype=torch.long, device=scores.device)
                ids[0, :count] = torch.tensor(written + tokens)
            elif tokens:
                ids[0, count - 1] = tokens[-1]
            scores = rules.processors(ids[:, :count], scores[None].clone())[0]
        if choose is not None or rules.processors:
            token = (choose or greedy)(scores)
        tokens.append(token)
        log_probabilities.append(said.log_p[token].clone())  # a view would hold the whole vocabulary's
        entropies.append(said.entropy)
        if token in rules.stop_tokens or token in ends or _spells(model.tokenizer, tokens, rules.stop_strings):
            finish_reason = "stop"
            break
        if floor:
            joint *= math.exp(float(log_probabilities[-1]))
            if joint < floor:
                finish_reason = "unsure"
                break
    if not entropies:
        return Decoded(tuple(tokens), before.log_probabilities, before.entropies, finish_reason)
    log_p = torch.cat([before.log_probabilities, torch.stack(log_probabilities).cpu()])
    if not bool(log_p.isfinite().all()):
        raise NumericalError(
            "The model's logits are not finite while it answers.", "Load the model in float32 or bfloat16."
        )
    return Decoded(tuple(tokens), log_p, torch.cat([before.entropies, torch.stack(entropies).cpu()]), finish_reason)


def _run(model: Continuing, kind: RowsKind, rows: Sequence[_Row]) -> list[Decoded | Exception]:
    """Feed decodings from forward passes, together where prefixes can be shared; results in the order of rows."""
    return [result for some in kind.batches(rows) for result in _run_together(model, kind, some)]


def _run_together(model: Continuing, kind: RowsKind, rows: Sequence[_Row]) -> list[Decoded | Exception]:
    results: list[Decoded | Exception | None] = [_step(row.decoding, None)[1] for row in rows]  # up to the first token
    # Rows of one prefix stand together.
    live = [index for index in grouped([row.beginning.prefix for row in rows]) if results[index] is None]
    if live:
        batch, logits = model.begin(kind, [rows[index].beginning for index in live])
    while live:
        steps = [_step(rows[index].decoding, said) for index, said in zip(live, _read(logits), strict=True)]
        for index, (_, result) in zip(live, steps, strict=True):
            results[index] = result
        going = [place for place, (token, _) in enumerate(steps) if token is not None]
        if not going:
            break
        if len(going) < len(live):
            batch.select(going)
            live = [live[place] for place in going]
        chosen = [steps[place][0] for place in going]
        logits = batch.write([[token] for token in chosen if token is not None], [-1])[:, -1]
    return [result for result in results if result is not None]


def _spells(tokenizer: Any, tokens: Sequence[int], strings: Sequence[str]) -> bool:
    """Whether the text of the tokens contains one of the strings."""
    if not strings:
        return False
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return any(string in text for string in strings)


def _read(logits: Tensor) -> list[_Next]:
    """What logits ``(R, vocabulary)`` say; one transfer from the device for all rows."""
    logits = logits.float()
    log_p = logits.log_softmax(-1)
    return list(map(_Next, logits, log_p, entropy_of(log_p), logits.argmax(-1).tolist()))


def _step(decoding: Decoding, said: _Next | None) -> tuple[int | None, Decoded | Exception | None]:
    """Advance a decoding: the next token, or else its result, or what it raised."""
    try:
        return (next(decoding) if said is None else decoding.send(said)), None
    except StopIteration as end:
        decoded: Decoded = end.value
        return None, decoded
    except BaseException as error:
        return None, contained(error)
