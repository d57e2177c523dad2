"""What the engine asks of a model, as values, so that requests of several questions can be served in one batch.

Each request knows how to be served alone; ``together`` serves many of one kind at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latent_tool.errors import NotEnoughMemoryError
from latent_tool.method.reward import Logits
from latent_tool.models.decoding import Decoded
from latent_tool.settings import GenerationSettings, SamplingSettings

if TYPE_CHECKING:
    from latent_tool.models.vlm import Inputs, Prefix, VisionLanguageModel

__all__ = [
    "Attend",
    "Decode",
    "Prefill",
    "Reason",
    "Request",
    "Sample",
    "Score",
    "TokenEntropies",
    "TokenLogProbabilities",
    "contained",
    "never",
    "out_of_memory",
    "together",
]


def contained(error: BaseException) -> Exception:
    """The error as one that a single question can end with; what ends the whole thread is raised again.

    Tokenizers written in Rust raise their panics past ``except Exception``.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    if isinstance(error, Exception):
        return error
    found = RuntimeError(f"{type(error).__name__}: {error}")
    found.__cause__ = error
    return found


def never() -> bool:
    """The stop condition of a request that is never stopped."""
    return False


@dataclass(frozen=True)
class Prefill:
    """Run the prefix through the model: a ``Prefix``.

    ``check`` is called before every layer and may raise. ``cached``: whether the prefix cache may be used, which is not
    for images that nobody will ask about again.
    """

    inputs: Inputs
    check: Callable[[], object] | None = None
    cached: bool = True

    def alone(self, vlm: VisionLanguageModel) -> Prefix:
        return vlm.prefill(self.inputs, self.check, self.cached)


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
    """An answer from a state, ``Decoded``; latents ``(L, d)``, or ``None`` for the plain model.

    ``pause`` is asked after some tokens; ``True`` ends this request with ``finish_reason="paused"``, and another one
    that has ``begun`` with its reply goes on from there.
    """

    prefix: Prefix
    latents: Tensor | None
    patches: Sequence[int]
    max_new_tokens: int
    stop: Callable[[], bool] = never
    generation: GenerationSettings | None = None
    pause: Callable[[], bool] = never
    begun: Decoded | None = None

    def alone(self, vlm: VisionLanguageModel) -> Decoded:
        (decoded,) = vlm.decode_many([self])
        if isinstance(decoded, Exception):
            raise decoded
        return decoded


@dataclass(frozen=True)
class Sample:
    """Several drawn answers of the plain model, a list of ``Decoded``."""

    prefix: Prefix
    max_new_tokens: int
    sampling: SamplingSettings
    seed: int = 0
    stop: Callable[[], bool] = never
    generation: GenerationSettings | None = None

    def alone(self, vlm: VisionLanguageModel) -> list[Decoded]:
        return vlm.sample(self)


@dataclass(frozen=True)
class TokenLogProbabilities:
    """Teacher-forced log-probabilities ``(n,)`` of tokens after a state."""

    prefix: Prefix
    latents: Tensor | None
    patches: Sequence[int]
    tokens: Sequence[int]

    def alone(self, vlm: VisionLanguageModel) -> Tensor:
        return vlm.token_log_probabilities_many([self])[0]


@dataclass(frozen=True)
class TokenEntropies:
    """Teacher-forced entropies ``(n,)`` of the distributions that tokens after a state were drawn from, in nats."""

    prefix: Prefix
    latents: Tensor | None
    patches: Sequence[int]
    tokens: Sequence[int]

    def alone(self, vlm: VisionLanguageModel) -> Tensor:
        return vlm.token_entropies_many([self])[0]


Request = Prefill | Score | Attend | Reason | Decode | Sample | TokenLogProbabilities | TokenEntropies


def together(vlm: VisionLanguageModel, requests: Sequence[Request]) -> list[Any]:
    """Serve requests of one kind, in one batch where that is possible; an exception takes the place of its reply.

    A batch that fails as a whole (for lack of memory, say) is halved and tried again, down to single states. What does
    not fit into memory alone gets a ``NotEnoughMemoryError``.
    """
    batched: dict[type[Request], Callable[[Any], list[Any]]] = {
        Score: vlm.score_many,
        Attend: vlm.attend_many,
        Reason: vlm.reason_many,
        Decode: vlm.decode_many,
        Sample: vlm.sample_many,
        TokenLogProbabilities: vlm.token_log_probabilities_many,
        TokenEntropies: vlm.token_entropies_many,
    }
    many = batched.get(type(requests[0]))
    if many is None or len(requests) == 1:
        return [_alone(vlm, request) for request in requests]
    try:
        return many(requests)
    except BaseException as error:
        contained(error)  # whoever is at fault fails again below, on its own
    half = len(requests) // 2
    return together(vlm, requests[:half]) + together(vlm, requests[half:])


def _alone(vlm: VisionLanguageModel, request: Request) -> Any:
    try:
        return request.alone(vlm)
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


_NO_MEMORY = re.compile(r"out of memory|can(no|')t allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; the CPU's allocator raises a bare ``RuntimeError``."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
