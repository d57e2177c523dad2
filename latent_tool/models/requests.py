"""What work asks of a model, as values to await, so that requests of several questions can be served in one batch.

``await Score(prefix, latents, patches)`` gives ``Logits``: the type parameter of a request is the type of its reply.
``serving`` serves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from latent_tool.method.asking import Request
from latent_tool.method.reward import Logits
from latent_tool.models.decoding import Decoded
from latent_tool.models.prefix import Inputs, Prefix
from latent_tool.settings import GenerationSettings, SamplingSettings

__all__ = [
    "Attend",
    "Decode",
    "DecodeEach",
    "Prefill",
    "PrefillEach",
    "Reason",
    "Sample",
    "Score",
    "ScoreOptions",
    "ScoredOptions",
    "Spellings",
    "TokenEntropies",
    "TokenLogProbabilities",
    "never",
]


def never() -> bool:
    """Return ``False``: the stop condition of a request that is never stopped."""
    return False


@dataclass(frozen=True)
class Prefill(Request[Prefix]):
    """Run the prefix through the model: a ``Prefix``.

    ``check`` is called before every layer and may raise. ``cached``: whether the prefix cache may be used, which is not
    for images that nobody will ask about again. ``attend``: read the attention of the last position, too. ``begins``:
    a prompt with the same question and the first of the same pictures, whose images need not be computed again.
    """

    inputs: Inputs
    check: Callable[[], object] | None = None
    cached: bool = True
    attend: bool = False
    begins: Inputs | None = None


@dataclass(frozen=True)
class PrefillEach(Request[list[Prefix | Exception]]):
    """Several prefixes, those of one shape in one pass: a list of ``Prefix``, or of what one of them failed with."""

    each: Sequence[Prefill]


@dataclass(frozen=True)
class Score(Request[Logits]):
    """``Logits`` of ``N`` states: latents ``(N, L, d)``, one tuple of cells each.

    ``answer_only``: the logits at the latents are not needed. ``attended``: of so many states, the first ones, the
    attention is wanted, too, if it can be read in the same pass.
    """

    prefix: Prefix
    latents: Tensor
    patches: Sequence[Sequence[int]]
    answer_only: bool = False
    attended: int = 0


# The token sequences that spell one option.
Spellings = tuple[tuple[int, ...], ...]


class ScoredOptions(NamedTuple):
    """What ``N`` states say of ``n`` options.

    ``log_probabilities``: ``(N, n)``, joint, of the tokens and of an end, summed over the spellings, float32 on the
    CPU. ``answer``: logits ``(N, vocabulary)`` of the first token. ``decoded``: per state and option, its likeliest
    spelling as if it had been decoded, if that was wanted.
    """

    log_probabilities: Tensor
    answer: Tensor
    decoded: tuple[tuple[Decoded, ...], ...]


@dataclass(frozen=True)
class ScoreOptions(Request[ScoredOptions]):
    """Log-probabilities of options after ``N`` states: latents ``(N, L, d)`` or ``None``, one tuple of cells each.

    ``tokens``: the tokens of every option are wanted, too, with what the model says of each.
    """

    prefix: Prefix
    latents: Tensor | None
    patches: Sequence[Sequence[int]]
    options: tuple[Spellings, ...]
    tokens: bool = False


@dataclass(frozen=True)
class Attend(Request[Tensor]):
    """Attention ``(L, C)`` of latents ``(L, d)`` to the image cells."""

    prefix: Prefix
    latents: Tensor
    patches: Sequence[int]


@dataclass(frozen=True)
class Reason(Request[tuple[tuple[int, ...], int]]):
    """The model's own thinking text: token ids, and the forward passes it took."""

    prefix: Prefix
    max_tokens: int
    stop: Callable[[], bool] = never


@dataclass(frozen=True)
class Decode(Request[Decoded]):
    """An answer from a state, ``Decoded``; latents ``(L, d)``, or ``None`` for the plain model.

    ``pause`` is asked after some tokens; ``True`` ends this request with ``finish_reason="paused"``, and another one
    that has ``begun`` with its reply goes on from there. So does a request that ended with ``"unsure"``: the joint
    probability of the answer's tokens has fallen below ``floor``, and no further token could raise it. What the model
    thinks in words before it answers does not count.
    """

    prefix: Prefix
    latents: Tensor | None
    patches: Sequence[int]
    max_new_tokens: int
    stop: Callable[[], bool] = never
    generation: GenerationSettings | None = None
    pause: Callable[[], bool] = never
    begun: Decoded | None = None
    floor: float = 0.0


@dataclass(frozen=True)
class DecodeEach(Request[list[Decoded | Exception]]):
    """An answer of the plain model from each of several prefixes, in one batch: ``Decoded``, or what went wrong."""

    prefixes: Sequence[Prefix]
    max_new_tokens: int
    stop: Callable[[], bool] = never
    generation: GenerationSettings | None = None


@dataclass(frozen=True)
class Sample(Request[list[Decoded]]):
    """Several drawn answers of the plain model, a list of ``Decoded``; ``first``: the number of the first of them."""

    prefix: Prefix
    max_new_tokens: int
    sampling: SamplingSettings
    seed: int = 0
    stop: Callable[[], bool] = never
    generation: GenerationSettings | None = None
    first: int = 0


@dataclass(frozen=True)
class TokenLogProbabilities(Request[Tensor]):
    """Teacher-forced log-probabilities ``(n,)`` of tokens after a state."""

    prefix: Prefix
    latents: Tensor | None
    patches: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True)
class TokenEntropies(Request[Tensor]):
    """Teacher-forced entropies ``(n,)`` of the distributions that tokens after a state were drawn from, in nats."""

    prefix: Prefix
    latents: Tensor | None
    patches: Sequence[int]
    tokens: Sequence[int]
