"""The one table of scores: every number that the confidence in an answer can be made of.

A score has a name, a meaning, a direction, and either is a probability or is not. Those with a ``read`` are carried by
a ``ReasoningResult``; the others need several answers, or a second image, and are measured by an evaluation. A score
that was not measured is ``None`` and never taken for 0. This module knows no model and computes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from latent_tool.errors import SettingsError
from latent_tool.schema import ReasoningResult

__all__ = ["COMPARED", "RESULT_SCORES", "SCORES", "ConfidenceScore", "score_of"]


@dataclass(frozen=True)
class ConfidenceScore:
    """Describe one score.

    Args:
        name: its key in results, runs and calibrations.
        meaning: what it is, in a few words.
        higher_is_surer: whether a larger value means a surer answer.
        probability: whether it claims to be the probability of being right, in [0, 1]; others may lie there by chance.
        read: takes it off a result, ``None`` where it was not measured; no function where no result carries it.
        compared: whether an evaluation compares it with the others as a confidence.
    """

    name: str
    meaning: str
    higher_is_surer: bool = True
    probability: bool = False
    read: Callable[[ReasoningResult], float | None] | None = None
    compared: bool = True

    def surer(self, value: float) -> float:
        """Turn a value so that larger means surer."""
        return value if self.higher_is_surer else -value


def _visual_dependency(result: ReasoningResult) -> float | None:
    tokens = [] if result.grounding is None else result.grounding.tokens
    spread = [token.dependency for token in tokens if token.in_answer]
    return math.fsum(spread) / len(spread) if spread else None


_TABLE = (
    ConfidenceScore(
        "pooled_probability",
        "geometric mean of the answer's probability with latents and without",
        probability=True,
        read=lambda result: result.scores.pooled_probability,
    ),
    ConfidenceScore(
        "answer_probability",
        "joint probability of the answer's tokens and of the token that ends it",
        probability=True,
        read=lambda result: result.scores.answer_probability,
    ),
    ConfidenceScore(
        "plain_probability",
        "the same of the same tokens by the plain model",
        probability=True,
        read=lambda result: result.scores.plain_probability,
    ),
    ConfidenceScore(
        "option_probability",
        "probability of the answer among the options that were given",
        probability=True,
        read=lambda result: result.scores.option_probability,
    ),
    ConfidenceScore(
        "mean_token_probability",
        "geometric mean of the same probabilities",
        probability=True,
        read=lambda result: result.scores.mean_token_probability,
    ),
    ConfidenceScore(
        "first_token_entropy",
        "entropy of the first answer token, nats",
        higher_is_surer=False,
        read=lambda result: result.scores.first_token_entropy,
    ),
    ConfidenceScore("reward", "reward of the decoded state", read=lambda result: result.scores.reward),
    ConfidenceScore(
        "initial_reward", "reward of the latents where they start", read=lambda result: result.scores.initial_reward
    ),
    ConfidenceScore(
        "top_k_mass",
        "probability mass of the top k tokens",
        read=lambda result: result.scores.top_k_mass,
        compared=False,
    ),
    ConfidenceScore("agreement", "share of the self-consistency samples that give this answer", probability=True),
    ConfidenceScore("visual_dependency", "mean S of the answer's tokens, nats", read=_visual_dependency),
    ConfidenceScore("masked_entropy_gain", "mean entropy of the answer's tokens, image masked minus image shown, nats"),
)
SCORES = {score.name: score for score in _TABLE}
# Those that an evaluation compares as confidences.
COMPARED = {name: score for name, score in SCORES.items() if score.compared}
# Those that every ``ReasoningResult`` can carry; a calibration of any other is of use to its maker alone.
RESULT_SCORES = tuple(score.name for score in _TABLE if score.read is not None)


def score_of(result: ReasoningResult, name: str) -> float | None:
    """Read the raw score ``name`` off a result; ``None`` where it was not measured.

    Raises ``SettingsError`` for a name that is not one of ``RESULT_SCORES``.
    """
    score = SCORES.get(name)
    if score is None or score.read is None:
        raise SettingsError(f"No result carries the score {name!r}.", f"Use one of: {', '.join(RESULT_SCORES)}.")
    return score.read(result)
