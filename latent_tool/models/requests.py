"""What the engine asks of a model, as values, so that requests of several questions can be served in one batch.

Each request knows how to be served alone; ``together`` serves many of one kind at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from latent_tool.method.reward import Logits
from latent_tool.models.decoding import Decoded
from latent_tool.settings import GenerationSettings

if TYPE_CHECKING:
    from latent_tool.models.vlm import Inputs, Prefix, VisionLanguageModel

__all__ = ["Attend", "Decode", "Prefill", "Reason", "Request", "Score", "TokenLogProbabilities", "never", "together"]


def never() -> bool:
    """The stop condition of a request that is never stopped."""
    return False


@dataclass(frozen=True)
class Prefill:
    """Run the prefix through the model: a ``Prefix``."""

    inputs: Inputs

    def alone(self, vlm: VisionLanguageModel) -> Prefix:
        return vlm.prefill(self.inputs)


@dataclass(frozen=True)
class Score:
    """``Logits`` of ``N`` states: latents ``(N, L, d)``, one tuple of cells each.

    ``answer_only``: the logits at the latents are not needed. ``attention``: the attention is wanted, too, if it can be
    read in the same pass.
    """

    prefix: Prefix
    latents: Tensor
    patches: Sequence[Sequence[int]]
    answer_only: bool = False
    attention: bool = False

    def alone(self, vlm: VisionLanguageModel) -> Logits:
        return vlm.score_many([self])[0]


@dataclass(frozen=True)
class Attend:
    """Attention ``(L, C)`` of latents ``(L, d)`` to the image cells."""

    prefix: Prefix
    latents: Tensor
    patches: Sequence[int]

    def alone(self, vlm: VisionLanguageModel) -> Tensor:
        return vlm.attend(self.prefix, self.latents, self.patches)


@dataclass(frozen=True)
class Reason:
    """The model's own thinking text: token ids, and the forward passes it took."""

    prefix: Prefix
    max_tokens: int
    stop: Callable[[], bool] = never

    def alone(self, vlm: VisionLanguageModel) -> tuple[tuple[int, ...], int]:
        return vlm.reason(self.prefix, self.max_tokens, self.stop)


@dataclass(frozen=True)
class Decode:
    """An answer from a state, ``Decoded``; latents ``(L, d)``, or ``None`` for the plain model."""

    prefix: Prefix
    latents: Tensor | None
    patches: Sequence[int]
    max_new_tokens: int
    stop: Callable[[], bool] = never
    generation: GenerationSettings | None = None

    def alone(self, vlm: VisionLanguageModel) -> Decoded:
        return vlm.decode(self.prefix, self.latents, self.patches, self.max_new_tokens, self.stop, self.generation)


@dataclass(frozen=True)
class TokenLogProbabilities:
    """Teacher-forced log-probabilities ``(n,)`` of tokens after a state."""

    prefix: Prefix
    latents: Tensor | None
    patches: Sequence[int]
    tokens: Sequence[int]

    def alone(self, vlm: VisionLanguageModel) -> Tensor:
        return vlm.token_log_probabilities(self.prefix, self.latents, self.patches, self.tokens)


Request = Prefill | Score | Attend | Reason | Decode | TokenLogProbabilities


def together(vlm: VisionLanguageModel, requests: Sequence[Request]) -> list[Any]:
    """Serve requests of one kind, in one batch where that is possible; an exception takes the place of its reply.

    When a batch fails as a whole (for lack of memory, say), its requests are served one by one.
    """
    batched: dict[type[Request], Callable[[Any], list[Any]]] = {
        Score: vlm.score_many,
        Attend: vlm.attend_many,
        Reason: vlm.reason_many,
        Decode: vlm.decode_many,
    }
    many = batched.get(type(requests[0]))
    if many is not None and len(requests) > 1:
        try:
            return many(requests)
        except Exception:  # whoever is at fault fails again below, on its own
            pass
    return [_alone(vlm, request) for request in requests]


def _alone(vlm: VisionLanguageModel, request: Request) -> Any:
    try:
        return request.alone(vlm)
    except Exception as error:
        return error
