"""What one question needs, and what it led to, tensors included."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from PIL.Image import Image
from torch import Tensor

from latent_tool.cannot_tell import PHRASES_OF_ALL
from latent_tool.engine.choosing import Chosen
from latent_tool.engine.signals import Signal
from latent_tool.method.search import Outcome as SearchOutcome
from latent_tool.models.decoding import Decoded, ExtractedAnswer
from latent_tool.models.prefix import Inputs
from latent_tool.schema import Controls, Grounding, MeasuredConfidence, Usage, View
from latent_tool.settings import Budget, GenerationSettings, NoiseSettings, SearchSettings

__all__ = ["Examined", "Job", "Outcome", "Reached", "Sampled", "joint", "pooled"]


@dataclass(frozen=True)
class Job:
    """Everything one question needs.

    ``options`` are what the answer is chosen from, ``None`` if it is free; with ``unsure`` the last of them says that
    the image does not tell. ``cannot_tell``: answers that mean that it cannot be told (``says_cannot_tell``), which are
    abstentions. ``attention``, ``grounding`` (with its noise) and ``controls`` say what to measure once there is an
    answer; ``deadline`` is a time of the engine's clock (``time.monotonic`` unless replaced); ``cancelled`` is looked
    at before every forward pass; ``images_first`` puts the images before the question; ``image_seconds`` is what
    opening the images took, ``queue_seconds`` the wait before that.
    """

    images: tuple[Image, ...]
    question: str
    system: str | None = None
    options: tuple[str, ...] | None = None
    unsure: bool = False
    settings: SearchSettings = field(default_factory=SearchSettings)
    budget: Budget = field(default_factory=Budget)
    generation: GenerationSettings | None = None
    images_first: bool = True
    seed: int = 0
    confidence: MeasuredConfidence = "pooled_probability"
    min_confidence: float | None = None
    attention: bool = False
    grounding: NoiseSettings | None = None
    controls: bool = False
    cannot_tell: tuple[str, ...] = PHRASES_OF_ALL
    deadline: float | None = None
    cancelled: Signal | None = None
    image_seconds: float = 0.0
    queue_seconds: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reached:
    """An answer, and how it was reached, tensors included.

    ``latents``: ``(L, d)`` of the decoded state, or ``None`` for the plain model; ``patches``: its injected cells;
    ``plain_probability``: of the answer by the model without either, see ``Scores``; ``stop_reason``: why no more was
    done for it; ``chosen``: what was said of the options, if there were any.
    """

    latents: Tensor | None
    patches: tuple[int, ...]
    search: SearchOutcome | None
    decoded: Decoded
    answer: ExtractedAnswer
    plain_probability: float | None
    stop_reason: str
    chosen: Chosen | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome(Reached):
    """What one question led to, tensors included.

    ``inputs``: what the answer was decoded after, with the windows that stayed; ``attention``: of the latents to every
    image cell, if that was measured; ``pictures``: every picture in the numbers that a domain check compares;
    ``support``: how far all that was said supports an answer found with a window, see ``method.views.support``;
    1 for one of given options.
    """

    job: Job
    inputs: Inputs
    attention: tuple[float, ...] | None
    grounding: Grounding | None
    controls: Controls | None
    usage: Usage
    views: tuple[View, ...]
    warnings: tuple[str, ...]
    pictures: tuple[tuple[float, ...], ...] = ()
    support: float = 1.0


@dataclass(frozen=True)
class Examined:
    """How much an answer depends on the image.

    ``grounding``: visual dependency of its tokens, ``None`` if there are none; ``masked_entropy_gain``: by how many
    nats the answer's tokens, in the mean, are less certain with the image masked (processed pixels 0).
    """

    grounding: Grounding | None
    masked_entropy_gain: float | None
    seconds: float


@dataclass(frozen=True)
class Sampled:
    """Several drawn answers to one question, and what they cost together."""

    job: Job
    decoded: tuple[Decoded, ...]
    answers: tuple[ExtractedAnswer, ...]
    usage: Usage

    @property
    def probabilities(self) -> list[float]:
        """Joint probability of every answer's tokens given the reasoning before them, in [0, 1]."""
        return [
            joint(decoded.log_probabilities, answer) or 0.0
            for decoded, answer in zip(self.decoded, self.answers, strict=True)
        ]


def joint(log_probabilities: Tensor, answer: ExtractedAnswer) -> float | None:
    """Return the joint probability of the answer's tokens and of the one that ends it, or ``None`` without tokens.

    ``log_probabilities``: ``(n,)`` of the decoded tokens, at least up to the end of the answer.
    """
    log_p = log_probabilities[answer.start : answer.stop]
    return min(1.0, float(log_p.double().sum().exp())) if len(log_p) else None


def pooled(answer_probability: float, plain_probability: float, support: float = 1.0) -> float:
    """Return the geometric mean of an answer's probability with and without latents (a logarithmic opinion pool).

    ``support``: what all else that was said leaves of it, see ``method.views.support``.
    """
    return math.sqrt(answer_probability * plain_probability) * support
