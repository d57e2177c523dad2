"""Find the threshold that bounds the share of errors among the accepted answers, by an exact test.

The items are split at random, once. The scores of the smaller part, without their labels, choose a falling sequence of
thresholds and where it starts: high, but low enough that the larger part is expected to leave so many accepted items
that a few errors are allowed. Then the larger part tests one threshold after another with the exact binomial tail,
``P(Binomial(accepted, target) <= errors) <= 1 - confidence level``, and stops at the first that fails (fixed-sequence
testing). What passed last is the threshold. Since sequence and start do not depend on the items that test them, the
chance that the true error rate among the accepted exceeds the target is at most ``1 - confidence level``.

This module knows labelled scores. Finding a threshold needs scipy; comparing a score with one does not.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from latent_tool.calibration.mapping import Count, Number, Part, Probability

__all__ = ["NoThreshold", "Threshold", "find_threshold", "passing_threshold", "split_items", "threshold_sequence"]

Array = NDArray[np.float64]
Labels = NDArray[np.bool_]

_DESIGN_SHARE = 0.15  # of the items, to choose the sequence
_STEPS = 100  # thresholds in the sequence, at most
_START_ERRORS = 3  # errors that the first threshold should be able to bear
_LEAST_SHARE = 20  # accepted items below which a share of errors is not looked at


class Threshold(Part):
    """Accept what scores at least ``score``: the share of errors among the accepted is then at most ``target_error``.

    This holds with probability ``confidence_level`` over the draw of the calibration items, for questions drawn like
    them.
    """

    score: Number = Field(description="The raw score that is compared, in its own units and direction.")
    probability: Probability = Field(description="The calibrated probability of that score.")
    target_error: Annotated[float, Field(gt=0, lt=1)]
    confidence_level: Annotated[float, Field(gt=0, lt=1)]
    tested: Count = Field(description="Scored items that the threshold was tested on; none of them chose the sequence.")
    accepted: Count = Field(description="Items among them that reach the threshold.")
    errors: Count = Field(description="Wrong answers among the accepted.")
    p_value: Probability = Field(description="P(so few errors or fewer) if the error rate were the target.")
    coverage: Probability = Field(description="Share of all tested items accepted; what has no score is not.")


class NoThreshold(Part):
    """Why there is no threshold, and what would be needed."""

    reason: str
    target_error: Annotated[float, Field(gt=0, lt=1)]
    confidence_level: Annotated[float, Field(gt=0, lt=1)]
    needed_items: Count | None = Field(
        description="Labelled items, in all, that would be about enough if the shares of errors stayed as they are; "
        "None: more would not be expected to help."
    )
    reachable_error: Probability | None = Field(
        description="The smallest target error for which these items give a threshold. A hint for a fresh set of "
        "items: chosen after the fact, it carries no guarantee."
    )


def split_items(count: int, seed: int) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Return indices of the items that choose the sequence of thresholds, and of those that test it."""
    order = np.random.default_rng(seed).permutation(count)
    cut = max(1, round(_DESIGN_SHARE * count))
    return order[:cut], order[cut:]


def threshold_sequence(design: Array, tested: int, target_error: float, confidence_level: float) -> Array:
    """Falling thresholds to be tested in this order, from the scores (larger: surer) of a few design items.

    Args:
        design: scores without labels; NaN where there is none.
        tested: how many items the thresholds will be tested on.
    """
    scored = design[np.isfinite(design)]
    if not len(scored):
        return np.empty(0)
    steps = np.unique(np.quantile(scored, np.linspace(0, 1, _STEPS + 1), method="higher"))[::-1]
    wanted = 0
    for errors in range(_START_ERRORS, -1, -1):
        wanted = _accepted_for(errors, target_error, confidence_level)
        if wanted <= tested / 3:
            break
    expected = np.searchsorted(-np.sort(scored)[::-1], -steps, side="right") * (tested / len(design))
    populated = np.flatnonzero(expected >= wanted)
    return steps[populated[0] :] if len(populated) else steps[-1:]


@lru_cache(maxsize=4096)
def _accepted_for(errors: int, target_error: float, confidence_level: float) -> int:
    """The smallest number of accepted items that passes the test with so many errors."""
    from scipy.stats import binom

    low, high = errors, 64 * (errors + 1)
    while binom.cdf(errors, high, target_error) > 1 - confidence_level:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if binom.cdf(errors, middle, target_error) > 1 - confidence_level:
            low = middle
        else:
            high = middle
    return high


def find_threshold(
    values: Array, right: Labels, target_error: float, confidence_level: float, seed: int = 0
) -> Threshold | NoThreshold:
    """Return the lowest threshold whose error rate is at most the target, at the confidence level; see the module's
    text.

    Args:
        values: scores, larger meaning surer; NaN (never accepted) where there is none.
        right: whether each answer was right.
    """
    found = passing_threshold(values, right, target_error, confidence_level, seed)
    return found or _explain(values, right, target_error, confidence_level, seed)


def passing_threshold(
    values: Array, right: Labels, target_error: float, confidence_level: float, seed: int = 0
) -> Threshold | None:
    """``find_threshold`` without an explanation of why there is none; its probability is not known yet, and 0."""
    from scipy.stats import binom

    design, test = split_items(len(values), seed)
    scores, good = values[test], right[test]
    steps = threshold_sequence(values[design], len(test), target_error, confidence_level)
    if not len(steps):
        return None
    known = np.isfinite(scores)
    order = np.argsort(-scores[known])
    wrong = np.concatenate(([0], np.cumsum(~good[known][order])))
    accepted = np.searchsorted(-scores[known][order], -steps, side="right")
    errors = wrong[accepted]
    p_values = binom.cdf(errors, accepted, target_error)
    failed = np.flatnonzero(p_values > 1 - confidence_level)
    last = (int(failed[0]) if len(failed) else len(steps)) - 1
    if last < 0:
        return None
    return Threshold(
        score=float(steps[last]),
        probability=0.0,
        target_error=target_error,
        confidence_level=confidence_level,
        tested=len(test),
        accepted=int(accepted[last]),
        errors=int(errors[last]),
        p_value=float(p_values[last]),
        coverage=float(accepted[last] / len(test)),
    )


def _explain(values: Array, right: Labels, target_error: float, confidence_level: float, seed: int) -> NoThreshold:
    """What stands in the way of a threshold, and how far away one is."""
    needed = _needed_items(values, right, target_error, confidence_level)
    higher = (round(step / 100, 2) for step in range(1, 51) if step / 100 > target_error)
    reachable = next(
        (error for error in higher if passing_threshold(values, right, error, confidence_level, seed) is not None), None
    )
    if needed is None:
        reason = (
            f"However few of the surest answers are taken, {target_error:.1%} of them or more are wrong: more items "
            "like these are not expected to give a threshold."
        )
    else:
        reason = (
            f"{len(values)} items do not show, at {confidence_level:.0%} confidence, that any share of the surest "
            f"answers has at most {target_error:.1%} errors; about {needed} would if the shares of errors stay as "
            "they are."
        )
    if reachable is not None:
        reason += f" A target error of {reachable:.0%} is within reach of as many new items."
    return NoThreshold(
        reason=reason,
        target_error=target_error,
        confidence_level=confidence_level,
        needed_items=needed,
        reachable_error=reachable,
    )


def _needed_items(values: Array, right: Labels, target_error: float, confidence_level: float) -> int | None:
    """Items in all that would let some threshold pass if its share of errors stayed; ``None``: no number would.

    Where no error was seen among the surest, half the target is assumed at most.
    """
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(-values[known], kind="stable")]
    wrong = np.cumsum(~right[order])
    best: int | None = None
    for share in np.linspace(0.05, 1, 39):
        accepted = math.ceil(share * len(order))
        if accepted < _LEAST_SHARE:
            continue
        seen = int(wrong[accepted - 1])
        rate = seen / accepted if seen else min(0.5 / accepted, target_error / 2)
        if rate >= target_error:
            continue
        # The smallest count that passes with its expected errors, by doubling and then by tenths.
        errors = 0
        while errors <= rate * _accepted_for(errors, target_error, confidence_level) and errors < 2000:
            errors += max(1, errors // 10)
        if errors >= 2000:
            continue
        items = math.ceil(
            _accepted_for(errors, target_error, confidence_level) / (accepted / len(values)) / (1 - _DESIGN_SHARE)
        )
        best = items if best is None else min(best, items)
    return None if best is None else max(best, len(values) + 1)
