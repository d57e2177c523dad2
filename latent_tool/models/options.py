"""Exact probabilities of given answers: every spelling of every option behind one state, in one batch.

An answer is spelled by its tokens and ended by a token that ends the decoding, so that the spellings of all options
are events of which at most one happens: their probabilities add up to the mass that the model gives to the options.
Spellings that begin alike share a row as far as one is the beginning of the other.

    [ prefix | V | opening | T | closing, tail ]         one row per state: what predicts the first token
                                                 [path]  one row per state and path through the trie of spellings
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from latent_tool.errors import ModelNotSupportedError, QuestionError
from latent_tool.models.continuing import Continuing, RowsKind, grouped
from latent_tool.models.decoding import Decoded, generation_rules
from latent_tool.models.prompts import spells_control
from latent_tool.models.requests import ScoredOptions, ScoreOptions, Spellings
from latent_tool.models.vlm import VisionLanguageModel

__all__ = ["score_options", "score_options_many", "spell"]

# Logits that are held at once, as in teacher forcing.
_MOST_LOGITS = 2**26
# What a token that the model rules out counts, in nats: JSON has no minus infinity.
_NEVER = -1e4


# ---------------------------------------------------------------------------------------------------- spelling


def spell(vlm: VisionLanguageModel, options: Sequence[Sequence[str]]) -> tuple[Spellings, ...]:
    """Return the token sequences that spell every option, the most literal one first.

    An option is spelled as it is given, in lower case and with its first letter in upper case, each with and without a
    blank before it: what the model writes where the prompt ends depends on its tokenizer and its habits, and means the
    same. A spelling that belongs to two options belongs to the one that was given so, else to none.

    Args:
        options: per option, the texts that mean it; usually one.

    Raises ``QuestionError`` for an option that is no text of the model's or spells a control token, and for options
    that the tokenizer does not tell apart.
    """
    for text in _controls(vlm, [text for texts in options for text in texts]):
        raise QuestionError(f"The option {text!r} spells a control token of the model.", "Put it into other words.")
    literal = _tokens(vlm, options)
    cases = [[case for text in texts for case in (text.lower(), text[:1].upper() + text[1:])] for texts in options]
    claims: dict[tuple[int, ...], set[int]] = {}
    for index, spellings in enumerate(_tokens(vlm, cases)):
        for tokens in spellings:
            claims.setdefault(tokens, set()).add(index)
    owner: dict[tuple[int, ...], int] = {}
    for index, spellings in enumerate(literal):
        if not spellings:
            raise QuestionError(
                f"The option {options[index][0]!r} cannot be spelled in the model's tokens.", "Put it into other words."
            )
        for tokens in spellings:
            if owner.setdefault(tokens, index) != index:
                raise QuestionError(
                    f"The model's tokens do not tell the option {options[owner[tokens]][0]!r} from "
                    f"{options[index][0]!r}.",
                    "Give options that differ in more than case or white space.",
                )
    spelled = [list(spellings) for spellings in literal]
    for tokens, indices in claims.items():
        if tokens not in owner and len(indices) == 1:
            spelled[indices.pop()].append(tokens)
    return tuple(map(tuple, spelled))


def _controls(vlm: VisionLanguageModel, texts: Sequence[str]) -> list[str]:
    """Those of the texts that spell a control token; one look at all of them together is enough if there is none."""
    with vlm.processor_lock:
        if not spells_control("\n".join(texts), vlm.processor):
            return []
        return [text for text in texts if spells_control(text, vlm.processor)]


def _tokens(vlm: VisionLanguageModel, options: Sequence[Sequence[str]]) -> list[list[tuple[int, ...]]]:
    """Tokens of the texts of every option, with and without a blank before them, each sequence once.

    Texts that a tokenizer has no tokens for are left out.
    """
    forms = [form for texts in options for text in texts for form in (text, f" {text}")]
    with vlm.processor_lock:
        ids = iter(vlm.tokenizer(forms, add_special_tokens=False, verbose=False).input_ids)
    barred = {vlm.tokenizer.unk_token_id, *generation_rules(vlm.model, 0).stop_tokens}
    found = []
    for texts in options:
        spelled = dict.fromkeys(tuple(next(ids)) for _ in range(2 * len(texts)))
        found.append([tokens for tokens in spelled if tokens and barred.isdisjoint(tokens)])
    return found


# ---------------------------------------------------------------------------------------------------- the trie


class _Place(NamedTuple):
    """Where a spelling is read: in which row of the trie, and how many of its tokens it takes."""

    path: int
    length: int


@dataclass(frozen=True)
class _Trie:
    """The rows that hold all spellings, none the beginning of another, and where each option's spellings are."""

    paths: tuple[tuple[int, ...], ...]
    places: tuple[tuple[_Place, ...], ...]

    @classmethod
    def of(cls, options: Sequence[Spellings]) -> _Trie:
        ordered = sorted({tokens for spellings in options for tokens in spellings})
        # In this order whatever continues a spelling comes right after it.
        paths = [
            tokens
            for tokens, following in zip(ordered, [*ordered[1:], ()], strict=True)
            if following[: len(tokens)] != tokens
        ]
        at: dict[tuple[int, ...], _Place] = {}
        path = 0
        for tokens in ordered:
            while paths[path][: len(tokens)] != tokens:
                path += 1
            at[tokens] = _Place(path, len(tokens))
        return cls(tuple(paths), tuple(tuple(at[tokens] for tokens in spellings) for spellings in options))


# ---------------------------------------------------------------------------------------------------- scoring


def score_options(vlm: VisionLanguageModel, request: ScoreOptions) -> ScoredOptions:
    """Score the options of one question; see ``ScoreOptions``."""
    return score_options_many(vlm, [request])[0]


def score_options_many(vlm: VisionLanguageModel, requests: Sequence[ScoreOptions]) -> list[ScoredOptions]:
    """Score the options of several questions: in one batch where prefixes can be shared, else one after another.

    Raises ``ModelNotSupportedError`` for a model that does not say which token ends an answer.
    """
    stops = sorted(generation_rules(vlm.model, 0).stop_tokens)
    if not stops:
        raise ModelNotSupportedError(
            "The model does not say which token ends an answer, so that answers that begin alike cannot be told apart.",
            "Set eos_token_id in the checkpoint's generation_config.json.",
        )
    kind = vlm.kind_of_rows(requests[0].prefix)
    return [scored for some in kind.batches(requests) for scored in _score(vlm, kind, some, stops)]


def _score(
    model: Continuing, kind: RowsKind, requests: Sequence[ScoreOptions], stops: Sequence[int]
) -> list[ScoredOptions]:
    """Run all states in one pass, and all paths behind them in another, or as many at a time as there is room for."""
    tries = [_Trie.of(each.options) for each in requests]
    # Rows of one prefix stand together.
    states = [
        (index, row)
        for index in grouped([each.prefix for each in requests])
        for row in range(len(requests[index].patches))
    ]
    begun = []
    for index, row in states:
        request = requests[index]
        latents = None if request.latents is None else request.latents[row]
        begun.append(model.beginning(kind, request.prefix, latents, request.patches[row]))
    batch, first = model.begin(kind, begun)

    rows = [(state, path) for state, (index, _) in enumerate(states) for path in range(len(tries[index].paths))]
    longest = max(len(path) for trie in tries for path in trie.paths)
    most = max(1, _MOST_LOGITS // (longest * first.shape[-1])) if kind.shared else 1
    read: dict[tuple[int, int], _Read] = {}
    for begin in range(0, len(rows), most):
        some = rows[begin : begin + most]
        paths = [tries[states[state][0]].paths[path] for state, path in some]
        length = max(map(len, paths))
        filled = [(*path, *path[-1:] * (length - len(path))) for path in paths]
        logits = batch.fork([state for state, _ in some]).write(filled, range(-length, 0))
        tokens = [requests[states[state][0]].tokens for state, _ in some]
        read.update(zip(some, _read(logits, paths, stops, any(tokens)), strict=True))

    found = []
    for index, request in enumerate(requests):
        at = [state for state, (other, _) in enumerate(states) if other == index]
        reads = [[read[state, path] for path in range(len(tries[index].paths))] for state in at]
        found.append(_scored(request, tries[index], first[at], reads, stops))
    return found


class _Read(NamedTuple):
    """What the logits after the tokens of a path say, on the CPU, each ``(n,)``: log-probability of the path's next
    token (nothing follows the last), of any end, of the likeliest end, and which that is; entropy, if it was wanted."""

    following: Tensor
    end: Tensor
    likeliest_end: Tensor
    which_end: Tensor
    entropy: Tensor


def _read(logits: Tensor, paths: Sequence[tuple[int, ...]], stops: Sequence[int], entropies: bool) -> list[_Read]:
    """Read logits ``(R, S, vocabulary)`` at the tokens of ``R`` paths, the first of which each row begins with."""
    logits = logits.float()
    total = logits.logsumexp(-1)  # (R, S)
    device = logits.device
    ahead = torch.tensor(
        [[*path[1:], *path[-1:] * (logits.shape[1] - len(path) + 1)] for path in paths], device=device
    )  # (R, S)
    following = logits.gather(-1, ahead[..., None])[..., 0] - total
    ends = logits[..., torch.tensor(list(stops), device=device)] - total[..., None]  # (R, S, stops)
    spread = total
    if entropies:
        log_p = logits - total[..., None]
        spread = -(log_p.exp() * log_p.clamp_min(_NEVER)).sum(-1)
    likeliest = ends.max(-1)
    read = torch.stack(
        [following, ends.logsumexp(-1), likeliest.values, likeliest.indices.to(total.dtype), spread]
    ).cpu()  # (5, R, S)
    return [_Read(*read[:, row, : len(path)]) for row, path in enumerate(paths)]


def _scored(
    request: ScoreOptions, trie: _Trie, first: Tensor, reads: Sequence[Sequence[_Read]], stops: Sequence[int]
) -> ScoredOptions:
    """Put together what was read of the states ``(N, vocabulary)`` and of every path behind each."""
    log_p = first.float().log_softmax(-1)
    begin = log_p[:, [path[0] for path in trie.paths]].cpu()  # (N, paths)
    found, best = [], []
    for row, paths in enumerate(reads):
        spelled = [
            torch.stack([_joint(begin[row, place.path], paths[place.path], place.length) for place in places])
            for places in trie.places
        ]
        found.append(torch.stack([each.logsumexp(0) for each in spelled]))
        if request.tokens:
            entropy = -(log_p[row].exp() * log_p[row].clamp_min(_NEVER)).sum().cpu()
            best.append(
                tuple(
                    _decoded(trie, places[int(each.argmax())], begin[row], paths, entropy, stops)
                    for places, each in zip(trie.places, spelled, strict=True)
                )
            )
    return ScoredOptions(torch.stack(found).float(), first, tuple(best))


def _joint(begin: Tensor, read: _Read, length: int) -> Tensor:
    """Joint log-probability of the first ``length`` tokens of a path and of an end, float64; never minus infinity."""
    parts = torch.stack([begin, *read.following[: length - 1], read.end[length - 1]]).double()
    return parts.clamp_min(_NEVER).sum()


def _decoded(
    trie: _Trie, place: _Place, begin: Tensor, paths: Sequence[_Read], entropy: Tensor, stops: Sequence[int]
) -> Decoded:
    """Return a spelling and its likeliest end as if they had been decoded."""
    read, last = paths[place.path], place.length - 1
    tokens = trie.paths[place.path][: place.length]
    log_p = torch.stack([begin[place.path], *read.following[:last], read.likeliest_end[last]])
    entropies = torch.stack([entropy, *read.entropy[: place.length]])
    return Decoded((*tokens, stops[int(read.which_end[last])]), log_p.clamp_min(_NEVER), entropies, "stop")
