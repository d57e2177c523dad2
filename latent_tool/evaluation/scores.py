"""The scores that are compared as confidences: what each means, and which way it points.

A score that could not be measured is ``None``, is counted as missing, and is never taken for 0. Measured ones are kept
to six significant digits, those that compare two images to a thousandth of a nat: what follows is float32's noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latent_tool.calibration.calibration import SCORES as CALIBRATED
from latent_tool.calibration.calibration import score_of

if TYPE_CHECKING:
    from latent_tool.engine.engine import Examined, Sampled
    from latent_tool.schema import ReasoningResult

__all__ = ["FUSED_FROM", "SCORES", "Score", "answer_scores", "measured", "vote"]


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
    "visual_dependency": Score("mean S of the answer's tokens, nats"),
    "masked_entropy_gain": Score("mean entropy of the answer's tokens, image masked minus image shown, nats"),
}
# What the fused score is made of; those that a run lacks are left out.
FUSED_FROM = tuple(SCORES)


def measured(value: float | None) -> float | None:
    """The value to six significant digits; ``None`` if it is no finite number."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _nats(value: float | None) -> float | None:
    """A difference of two images' logarithms to three decimals: theirs is the noise of both, some 1e-6."""
    return round(value, 3) if value is not None and math.isfinite(value) else None


def answer_scores(result: ReasoningResult, examined: Examined | None) -> dict[str, float | None]:
    """The scores of one answer, by name; ``None`` where not measured."""
    grounding = None if examined is None else examined.grounding
    seen = result.model_copy(update={"grounding": grounding})
    plain = [name for name in SCORES if name in CALIBRATED and name != "visual_dependency"]
    return {
        **{name: measured(score_of(result, name)) for name in plain},
        "visual_dependency": _nats(score_of(seen, "visual_dependency")),
        "masked_entropy_gain": None if examined is None else _nats(examined.masked_entropy_gain),
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
