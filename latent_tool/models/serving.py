"""How requests are served: those of one kind in one batch where that is possible, in smaller ones where it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from latent_tool.errors import NotEnoughMemoryError
from latent_tool.method.asking import Request, all_or_error, contained
from latent_tool.method.reward import Logits
from latent_tool.models.decoding import Decoded
from latent_tool.models.memory import out_of_memory
from latent_tool.models.options import score_options_many
from latent_tool.models.prefix import Prefix
from latent_tool.models.requests import (
    Attend,
    Decode,
    DecodeEach,
    Prefill,
    PrefillEach,
    Reason,
    Sample,
    Score,
    ScoredOptions,
    ScoreOptions,
    TokenEntropies,
    TokenLogProbabilities,
)
from latent_tool.models.vlm import VisionLanguageModel

__all__ = ["together"]

R = TypeVar("R")
Served = Callable[[VisionLanguageModel, Sequence[Any]], Sequence[object]]


def _by(
    kind: Callable[..., Request[R]], serve: Callable[[VisionLanguageModel, Sequence[Any]], Sequence[R | Exception]]
) -> Served:
    """Return ``serve``; the types of this function prove that it gives the reply that requests of the kind await."""
    return serve


def _prefill_each(vlm: VisionLanguageModel, requests: Sequence[PrefillEach]) -> list[list[Prefix | Exception]]:
    """All prefixes of all requests together; one that fails has its error in its place."""
    found = iter(vlm.prefill_many([one for request in requests for one in request.each]))
    return [[next(found) for _ in request.each] for request in requests]


def _decode_each(vlm: VisionLanguageModel, requests: Sequence[DecodeEach]) -> list[list[Decoded | Exception]]:
    """All prefixes of all requests in one batch."""
    asked = [
        Decode(prefix, None, (), each.max_new_tokens, each.stop, each.generation)
        for each in requests
        for prefix in each.prefixes
    ]
    decoded = iter(vlm.decode_many(asked))
    return [[next(decoded) for _ in each.prefixes] for each in requests]


_SERVED: dict[type[Request[Any]], Served] = {
    Prefill: _by(Prefill, VisionLanguageModel.prefill_many),
    PrefillEach: _by(PrefillEach, _prefill_each),
    Reason: _by(Reason, VisionLanguageModel.reason_many),
    Score: _by(Score, VisionLanguageModel.score_many),
    ScoreOptions: _by(ScoreOptions, score_options_many),
    Attend: _by(Attend, VisionLanguageModel.attend_many),
    Decode: _by(Decode, VisionLanguageModel.decode_many),
    DecodeEach: _by(DecodeEach, _decode_each),
    Sample: _by(Sample, VisionLanguageModel.sample_many),
    TokenLogProbabilities: _by(TokenLogProbabilities, VisionLanguageModel.token_log_probabilities_many),
    TokenEntropies: _by(TokenEntropies, VisionLanguageModel.token_entropies_many),
}


def together(vlm: VisionLanguageModel, requests: Sequence[Request[Any]]) -> list[object]:
    """Serve requests of one kind, in one batch where that is possible; an exception takes the place of its reply.

    A batch that fails as a whole (for lack of memory, say) is halved and tried again, down to single states. What does
    not fit into memory alone gets a ``NotEnoughMemoryError``.
    """
    with vlm.few_threads():
        return _together(vlm, requests)


def _together(vlm: VisionLanguageModel, requests: Sequence[Request[Any]]) -> list[object]:
    kind = type(requests[0])
    if len(requests) == 1:
        return [_alone(vlm, request) for request in requests]
    try:
        return list(_SERVED[kind](vlm, requests))
    except BaseException as error:
        contained(error)  # whoever is at fault fails again below, on its own
    half = len(requests) // 2
    return _together(vlm, requests[:half]) + _together(vlm, requests[half:])


def _alone(vlm: VisionLanguageModel, request: Request[Any]) -> object:
    """Serve one request; what goes wrong takes the place of its reply."""
    try:
        (reply,) = _SERVED[type(request)](vlm, [request])
        if isinstance(reply, Exception):
            raise reply
        return reply
    except BaseException as error:
        if not isinstance(request, PrefillEach) and not out_of_memory(error):
            return contained(error)
        contained(error)
    # Outside the handler, whose traceback holds on to the tensors of the attempt.
    if isinstance(request, PrefillEach):
        return [_alone(vlm, each) for each in request.each]  # whoever is at fault fails again, on its own
    parts = _halves(request)
    if parts is not None:
        replies = all_or_error([_alone(vlm, part) for part in parts])
        return replies if isinstance(replies, Exception) else _joined(request, replies)
    return NotEnoughMemoryError(
        "The question does not fit into the device's memory.",
        "Use a smaller image, a smaller model or a smaller dtype, or ask fewer questions at a time.",
    )


def _halves(request: Request[Any]) -> list[Any] | None:
    """A request in two parts of about half its rows; ``None`` if it has one row."""
    if isinstance(request, Score | ScoreOptions) and (rows := len(request.patches)) > 1:
        halves = [
            replace(request, latents=_rows(request.latents, part), patches=request.patches[part])
            for part in _parts(rows)
        ]
        if isinstance(request, Score):
            return [
                replace(half, attended=min(max(0, request.attended - part.start), part.stop - part.start))
                for half, part in zip(halves, _parts(rows), strict=True)
            ]
        return halves
    if isinstance(request, ScoreOptions) and (count := len(request.options)) > 1:
        return [replace(request, options=request.options[part]) for part in _parts(count)]
    if isinstance(request, DecodeEach) and (count := len(request.prefixes)) > 1:
        return [replace(request, prefixes=request.prefixes[part]) for part in _parts(count)]
    if isinstance(request, Sample) and (count := request.sampling.samples) > 1:
        return [
            replace(
                request,
                sampling=request.sampling.model_copy(update={"samples": part.stop - part.start}),
                first=request.first + part.start,
            )
            for part in _parts(count)
        ]
    return None


def _rows(latents: torch.Tensor | None, part: slice) -> Any:
    return None if latents is None else latents[part]


def _parts(count: int) -> list[slice]:
    return [slice(0, count // 2), slice(count // 2, count)]


def _joined(request: Request[Any], replies: Sequence[Any]) -> object:
    """The reply to a request from those to its halves."""
    if isinstance(request, Score):
        read = [reply.attention for reply in replies if reply.attention is not None]
        return Logits(
            torch.cat([reply.latents for reply in replies]),
            torch.cat([reply.answer for reply in replies]),
            torch.cat(read) if read else None,
        )
    if isinstance(request, ScoreOptions):
        apart = len(request.patches) == 1  # in options, not in states
        decoded = [reply.decoded for reply in replies]
        return ScoredOptions(
            torch.cat([reply.log_probabilities for reply in replies], dim=1 if apart else 0),
            replies[0].answer if apart else torch.cat([reply.answer for reply in replies]),
            tuple(sum(rows, ()) for rows in zip(*decoded, strict=True)) if apart else sum(decoded, ()),
        )
    return [one for reply in replies for one in reply]
