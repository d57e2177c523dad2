"""Requests are served: one alone, or many of one kind in one batch; what fails takes the place of its reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from latent_tool.errors import NotEnoughMemoryError
from latent_tool.method.asking import Request, contained
from latent_tool.method.reward import Logits
from latent_tool.models.memory import out_of_memory
from latent_tool.models.requests import (
    Attend,
    Decode,
    Prefill,
    Reason,
    Sample,
    Score,
    TokenEntropies,
    TokenLogProbabilities,
)
from latent_tool.models.vlm import VisionLanguageModel

__all__ = ["together"]


def together(vlm: VisionLanguageModel, requests: Sequence[Request[Any]]) -> list[Any]:
    """Serve requests of one kind, in one batch where that is possible; an exception takes the place of its reply.

    A batch that fails as a whole (for lack of memory, say) is halved and tried again, down to single states. What does
    not fit into memory alone gets a ``NotEnoughMemoryError``.
    """
    if len(requests) == 1 or isinstance(requests[0], Prefill):
        return [_alone(vlm, request) for request in requests]
    try:
        return _serve(vlm, requests)
    except BaseException as error:
        contained(error)  # whoever is at fault fails again below, on its own
    half = len(requests) // 2
    return together(vlm, requests[:half]) + together(vlm, requests[half:])


def _serve(vlm: VisionLanguageModel, requests: Sequence[Request[Any]]) -> list[Any]:
    """Serve requests of one kind in one batch."""
    kinds: dict[type[Request[Any]], Callable[[Any], list[Any]]] = {
        Prefill: lambda each: [vlm.prefill(prefill.inputs, prefill.check, prefill.cached) for prefill in each],
        Score: vlm.score_many,
        Attend: vlm.attend_many,
        Reason: vlm.reason_many,
        Decode: vlm.decode_many,
        Sample: vlm.sample_many,
        TokenLogProbabilities: vlm.token_log_probabilities_many,
        TokenEntropies: vlm.token_entropies_many,
    }
    return kinds[type(requests[0])](requests)


def _alone(vlm: VisionLanguageModel, request: Request[Any]) -> Any:
    try:
        (reply,) = _serve(vlm, [request])
        if isinstance(reply, Exception):
            raise reply
        return reply
    except BaseException as error:
        if not out_of_memory(error):
            return contained(error)
    # Outside the handler, whose traceback holds on to the tensors of the attempt.
    if isinstance(request, Score) and len(request.patches) > 1:
        half = len(request.patches) // 2
        parts = [
            _alone(vlm, Score(request.prefix, request.latents[rows], request.patches[rows]))
            for rows in (slice(None, half), slice(half, None))
        ]
        failed = [part for part in parts if isinstance(part, Exception)]
        if failed:
            return failed[0]
        return Logits(torch.cat([part.latents for part in parts]), torch.cat([part.answer for part in parts]))
    return NotEnoughMemoryError(
        "The question does not fit into the device's memory.",
        "Use a smaller image, a smaller model or a smaller dtype, or ask fewer questions at a time.",
    )
