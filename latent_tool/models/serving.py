"""How requests are served: those of one kind in one batch where that is possible, in smaller ones where it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from latent_tool.errors import NotEnoughMemoryError
from latent_tool.method.asking import Request, contained
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
    Reason,
    Sample,
    Score,
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


def _prefill(vlm: VisionLanguageModel, requests: Sequence[Prefill]) -> list[Prefix]:
    """Prompts differ in length and images, so that prefixes are computed one after another."""
    return [
        vlm.prefill(each.inputs, each.check, each.cached, attend=each.attend, begins=each.begins) for each in requests
    ]


def _decode_each(vlm: VisionLanguageModel, requests: Sequence[DecodeEach]) -> list[list[Decoded] | Exception]:
    """All prefixes of all requests in one batch; a request with one that fails, fails."""
    asked = [
        Decode(prefix, None, (), each.max_new_tokens, each.stop, each.generation)
        for each in requests
        for prefix in each.prefixes
    ]
    decoded = iter(vlm.decode_many(asked))
    found: list[list[Decoded] | Exception] = []
    for each in requests:
        answers = [next(decoded) for _ in each.prefixes]
        failed = next((answer for answer in answers if isinstance(answer, Exception)), None)
        found.append(failed or [answer for answer in answers if not isinstance(answer, Exception)])
    return found


_SERVED: dict[type[Request[Any]], Served] = {
    Prefill: _by(Prefill, _prefill),
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
    if kind is Prefill or len(requests) == 1:
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
        if not out_of_memory(error):
            return contained(error)
    # Outside the handler, whose traceback holds on to the tensors of the attempt.
    if isinstance(request, Score) and len(request.patches) > 1:
        return _halved(vlm, request)
    return NotEnoughMemoryError(
        "The question does not fit into the device's memory.",
        "Use a smaller image, a smaller model or a smaller dtype, or ask fewer questions at a time.",
    )


def _halved(vlm: VisionLanguageModel, request: Score) -> object:
    """Score the states of one question half by half."""
    half = len(request.patches) // 2
    parts: list[Logits] = []
    for rows in (slice(None, half), slice(half, None)):
        part = _alone(vlm, Score(request.prefix, request.latents[rows], request.patches[rows]))
        if not isinstance(part, Logits):
            return part
        parts.append(part)
    return Logits(torch.cat([part.latents for part in parts]), torch.cat([part.answer for part in parts]))
