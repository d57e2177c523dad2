"""How good answers and confidences are, as plain functions of plain sequences.

Scores are "larger is surer"; ``correct`` is a sequence of bools of the same length. A score that is missing or not
finite is an error here: whoever calls decides what to do about it. This module knows nothing of runs or of models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latent_tool.errors import InputError, MissingExtraError

__all__ = [
    "Comparison",
    "Interval",
    "accuracy_interval",
    "aurc",
    "auroc",
    "auroc_interval",
    "coverage_at_risk",
    "ece",
    "ece_noise_floor",
    "holm",
    "mcnemar",
    "paired_bootstrap",
    "reliability",
    "risk_coverage",
]

# Nearer than this to 0 or 1 no area is looked at.
_EDGE = 1e-12
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Interval(NamedTuple):
    """An estimate with the bounds of its interval (95 % unless said otherwise)."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Two methods on the same questions: answers fixed and broken, and McNemar's exact two-sided p value."""

    fixed: int
    broken: int
    p: float


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("Evaluation", "evaluation") from error
    return stats


def _paired(scores: Sequence[float | None], correct: Sequence[bool]) -> tuple[Floats, Bools]:
    """Both as arrays; refuses what is missing, not finite, empty or of different lengths."""
    if len(scores) != len(correct):
        raise InputError("There are not as many scores as answers.", "Pass one score for each answer.")
    if not len(scores):
        raise InputError("There are no answers to measure.", "Pass at least one.")
    if any(value is None for value in scores):
        raise InputError("A score is missing.", "Leave such answers out and report how many there are.")
    values, flags = np.asarray(scores, dtype=np.float64), np.asarray(correct)
    if not np.isfinite(values).all():
        raise InputError("A score is not a finite number.", "Leave such answers out and report how many there are.")
    if flags.dtype != np.bool_:
        raise InputError("`correct` must be bools.", "Leave answers without a label out.")
    return values, flags


def _probabilities(scores: Sequence[float | None], correct: Sequence[bool]) -> tuple[Floats, Bools]:
    values, flags = _paired(scores, correct)
    if values.min() < 0 or values.max() > 1:
        raise InputError(
            "Calibration is measured on probabilities, and a score lies outside [0, 1].",
            "Calibrate the score first (latent-tool calibrate), or use AUROC, AURC or coverage, which need no scale.",
        )
    return values, flags


# --- accuracy ----------------------------------------------------------------------------------------------------


def accuracy_interval(
    right: int, total: int, level: float = 0.95, method: Literal["wilson", "exact"] = "wilson"
) -> Interval:
    """Share of right answers with Wilson's or Clopper and Pearson's (``"exact"``) interval."""
    if not 0 <= right <= total or total == 0:
        raise InputError(f"{right} of {total} is no share.", "Pass 0 <= right <= total, and at least one answer.")
    bounds = _stats().binomtest(right, total).proportion_ci(level, method=method)
    return Interval(right / total, float(bounds.low), float(bounds.high))


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> Comparison:
    """McNemar's exact test: of the answers that differ, are as many fixed as broken?"""
    fixed = sum(bool(new) and not old for old, new in zip(before, after, strict=True))
    broken = sum(bool(old) and not new for old, new in zip(before, after, strict=True))
    p = float(_stats().binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0
    return Comparison(fixed, broken, p)


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for being several, by Holm's step-down method (Scandinavian Journal of Statistics 6, 1979).

    ``adjusted(i) = max over j <= i of min(1, (m - j + 1) p(j))`` for the ``m`` values in rising order, ``j`` from 1.
    """
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = highest
    return adjusted


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Mean difference after minus before over the same questions, with its percentile bootstrap interval."""
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if not len(difference):
        raise InputError("There are no answers to compare.", "Pass at least one pair.")
    rng = np.random.default_rng(seed)
    # Only how often each value is drawn matters, and differences of bools have three.
    values, counts = np.unique(difference, return_counts=True)
    drawn = rng.multinomial(len(difference), counts / len(difference), size=draws)
    low, high = np.quantile(drawn @ values / len(difference), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference.mean()), float(low), float(high))


# --- ranking -----------------------------------------------------------------------------------------------------


def auroc(scores: Sequence[float | None], correct: Sequence[bool]) -> float:
    """Probability that a right answer scores higher than a wrong one, ties counting half; ``nan`` if one is missing."""
    return auroc_interval(scores, correct).value


def auroc_interval(scores: Sequence[float | None], correct: Sequence[bool], level: float = 0.95) -> Interval:
    """AUROC with a score interval: the areas ``A`` from which the one found is less than ``z`` deviations away.

    ``V(A) = A (1 - A) (1 + N (1 - A) / (2 - A) + N A / (1 + A)) / (m n)`` for ``m`` right and ``n`` wrong answers,
    where ``N = (m + n) / 2 - 1`` (Newcombe, Statistics in Medicine 25, 2006, pages 559 to 573, method 5). The variance
    is that at ``A``, not at the area found: with 20 wrong answers of 448 and an area of 0.93, DeLong's interval
    (Biometrics 44, 1988) covers it in 86 % of all cases, on the log-odds' scale in 90 %, this one in 97 %.
    """
    values, flags = _paired(scores, correct)
    if flags.all() or not flags.any():
        return Interval(math.nan, math.nan, math.nan)
    stats = _stats()
    right, wrong = int(flags.sum()), int((~flags).sum())
    ranks = stats.rankdata(values)
    area = float((ranks[flags].sum() - right * (right + 1) / 2) / (right * wrong))
    z, half = float(stats.norm.ppf((1 + level) / 2)), (right + wrong) / 2 - 1

    def deviation(at: float) -> float:
        return math.sqrt(at * (1 - at) * (1 + half * (1 - at) / (2 - at) + half * at / (1 + at)) / (right * wrong))

    def bound(far: float, near: float) -> float:
        """Where an area is ``z`` deviations away, by halving: it is further away at ``far`` and nearer at ``near``."""
        for _ in range(60):
            middle = (far + near) / 2
            if abs(area - middle) > z * deviation(middle):
                far = middle
            else:
                near = middle
        return near

    low = bound(0.0, min(area, 1 - _EDGE)) if area > 0 else 0.0
    high = bound(1.0, max(area, _EDGE)) if area < 1 else 1.0
    return Interval(area, low, high)


def risk_coverage(scores: Sequence[float | None], correct: Sequence[bool]) -> tuple[Floats, Floats]:
    """Coverage and error ``(n,)`` when the ``1..n`` surest answers are accepted.

    Among equal scores the order is not known: the error is the expected one over all orders.
    """
    values, flags = _paired(scores, correct)
    order = np.argsort(-values, kind="stable")
    values, wrong = values[order], (~flags[order]).astype(np.float64)
    for low, high in _ties(values):
        wrong[low:high] = wrong[low:high].mean()
    number = np.arange(1, len(values) + 1)
    return number / len(values), np.cumsum(wrong) / number


def aurc(scores: Sequence[float | None], correct: Sequence[bool]) -> float:
    """Area under the risk-coverage curve: the mean error over all numbers of accepted answers. Lower is better."""
    return float(risk_coverage(scores, correct)[1].mean())


def coverage_at_risk(scores: Sequence[float | None], correct: Sequence[bool], risk: float = 0.05) -> float:
    """Largest share of answers that a threshold accepts with an error of at most ``risk``; 0 if none does.

    Answers with equal scores are accepted together or not at all.
    """
    values, _ = _paired(scores, correct)
    coverage, errors = risk_coverage(scores, correct)
    ends = [high for _, high in _ties(np.sort(values)[::-1])]
    allowed = [float(coverage[end - 1]) for end in ends if errors[end - 1] <= risk + 1e-12]
    return max(allowed, default=0.0)


def _ties(ordered: Floats) -> list[tuple[int, int]]:
    """Ranges ``[low, high)`` of equal values in ordered ones."""
    cuts = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(ordered)]
    return list(pairwise(cuts))


# --- calibration -------------------------------------------------------------------------------------------------


def reliability(
    probabilities: Sequence[float | None], correct: Sequence[bool], bins: int = 15
) -> list[tuple[float, float, int]]:
    """Mean probability, accuracy and number of answers in every bin of equal width that has any."""
    values, flags = _probabilities(probabilities, correct)
    index = _bins(values, bins)
    rows = [index == place for place in range(bins)]
    return [(float(values[row].mean()), float(flags[row].mean()), int(row.sum())) for row in rows if row.any()]


def ece(probabilities: Sequence[float | None], correct: Sequence[bool], bins: int = 15) -> float:
    """Expected calibration error over bins of equal width. Raises ``InputError`` for scores outside [0, 1]."""
    values, flags = _probabilities(probabilities, correct)
    return float(_gaps(values, flags.astype(np.float64)[None], bins)[0])


def ece_noise_floor(
    probabilities: Sequence[float | None], bins: int = 15, draws: int = 500, seed: int = 0
) -> tuple[float, float]:
    """ECE that answers right with exactly these probabilities would show: mean and 95 % quantile.

    A perfect confidence has an ECE above 0 on any finite data set; what counts is the ECE above this floor.
    """
    values, _ = _probabilities(probabilities, [True] * len(probabilities))
    drawn = np.random.default_rng(seed).random((draws, len(values))) < values
    gaps = _gaps(values, drawn.astype(np.float64), bins)
    return float(gaps.mean()), float(np.quantile(gaps, 0.95))


def _bins(values: Floats, bins: int) -> NDArray[np.int64]:
    return np.minimum((values * bins).astype(np.int64), bins - 1)


def _gaps(values: Floats, flags: Floats, bins: int) -> Floats:
    """ECE of every row of ``flags``, ``(draws, n)``: sum over bins of |sum of probabilities - sum of right| / n."""
    member = np.zeros((len(values), bins))
    member[np.arange(len(values)), _bins(values, bins)] = 1
    result: Floats = np.abs(values @ member - flags @ member).sum(-1) / len(values)
    return result
