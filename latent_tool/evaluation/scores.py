"""The scores that are compared as confidences: what each means, and which way it points.

A score that could not be measured is ``None``, is counted as missing, and is never taken for 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latent_tool.engine import Examined, Sampled
    from latent_tool.schema import ReasoningResult

__all__ = ["FUSED_FROM", "SCORES", "Score", "answer_scores", "finite", "vote"]


@dataclass(frozen=True)
class Score:
    """A score: what it is, whether a larger one means surer, and whether it is a probability in [0, 1]."""

    meaning: str
    larger_is_surer: bool = True
    probability: bool = False

    def surer(self, value: float) -> float:
        """The score turned so that larger means surer."""
        return value if self.larger_is_surer else -value


SCORES: dict[str, Score] = {
    "pooled_probability": Score("geometric mean of the answer's probability with latents and without", True, True),
    "answer_probability": Score("joint probability of the answer's tokens and of the token that ends it", True, True),
    "plain_probability": Score("the same of the same tokens by the plain model", True, True),
    "mean_token_probability": Score("geometric mean of the same probabilities", True, True),
    "first_token_entropy": Score("entropy of the first answer token, nats", False),
    "reward": Score("reward of the decoded state"),
    "initial_reward": Score("reward of the latents where they start"),
    "agreement": Score("share of the self-consistency samples that give this answer", True, True),
    "visual_dependency": Score("mean S of the generated tokens, nats"),
    "masked_entropy_gain": Score("mean entropy of the answer's tokens, image masked minus image shown, nats"),
}
# What the fused score is made of; those that a run lacks are left out.
FUSED_FROM = tuple(SCORES)


def finite(value: float | None) -> float | None:
    """The value, or ``None`` if it is no finite number."""
    return value if value is not None and math.isfinite(value) else None


def answer_scores(result: ReasoningResult, examined: Examined | None) -> dict[str, float | None]:
    """The scores of one answer, by name; ``None`` where not measured."""
    scores = result.scores
    grounding = None if examined is None else examined.grounding
    return {
        "pooled_probability": finite(scores.pooled_probability),
        "plain_probability": finite(scores.plain_probability),
        "answer_probability": finite(scores.answer_probability),
        "mean_token_probability": finite(scores.mean_token_probability),
        "first_token_entropy": finite(scores.first_token_entropy),
        "reward": finite(scores.reward),
        "initial_reward": finite(scores.initial_reward),
        "visual_dependency": None if grounding is None else finite(grounding.mean),
        "masked_entropy_gain": None if examined is None else finite(examined.masked_entropy_gain),
    }


def vote(sampled: Sampled, canonical: Mapping[int, str]) -> tuple[int, float, float]:
    """The most common answer among samples: which sample stands for it, its share, its mean probability.

    ``canonical``: the form in which each sample's answer is counted. Ties go to the larger sum of probabilities.
    """
    chances = sampled.probabilities
    groups: dict[str, list[int]] = {}
    for place, form in canonical.items():
        groups.setdefault(form, []).append(place)
    best = max(groups.values(), key=lambda places: (len(places), sum(chances[place] for place in places)))
    first = max(best, key=lambda place: chances[place])
    return first, len(best) / len(canonical), sum(chances[place] for place in best) / len(best)
