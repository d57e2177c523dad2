"""Measure answers and confidences: shares, tests, intervals, rankings and calibration errors, each written once.

Scores are "larger is surer"; ``correct`` is a sequence of bools of the same length. A score that is missing or not
finite is an error here: the caller decides what to do about it. Everything that scipy has is scipy's. This module knows
nothing of runs or of models; what needs scipy raises ``MissingExtraError`` without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from latent_tool.errors import InputError, MissingExtraError

__all__ = [
    "Comparison",
    "Estimate",
    "Interval",
    "accuracy_interval",
    "aurc",
    "auroc",
    "auroc_gain",
    "auroc_interval",
    "bootstrap",
    "coverage_at_risk",
    "ece",
    "ece_noise_floor",
    "holm",
    "mcnemar",
    "paired_bootstrap",
    "reliability",
    "risk_coverage",
    "spearman",
]

T = TypeVar("T")

# Nearer than this to 0 or 1 no area is looked at.
_EDGE = 1e-12
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
# What the functions take: a list, a tuple or an array, with one entry per answer.
Values = Sequence[float | None] | Floats
Flags = Sequence[bool] | Bools


class Interval(NamedTuple):
    """An estimate with the bounds of its interval (95 % unless said otherwise)."""

    value: float
    low: float
    high: float


class Estimate(NamedTuple):
    """A value with its 95 % interval, and the two-sided p value of its being the null."""

    value: float
    low: float
    high: float
    p: float


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


def _paired(scores: Values, correct: Flags) -> tuple[Floats, Bools]:
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


def _probabilities(scores: Values, correct: Flags) -> tuple[Floats, Bools]:
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
    """Return the share of right answers with Wilson's or Clopper and Pearson's (``"exact"``) interval."""
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
    """Return the mean difference after minus before over the same questions, with its percentile bootstrap interval."""
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if not len(difference):
        raise InputError("There are no answers to compare.", "Pass at least one pair.")
    rng = np.random.default_rng(seed)
    # Only how often each value is drawn matters, and differences of bools have three.
    values, counts = np.unique(difference, return_counts=True)
    drawn = rng.multinomial(len(difference), counts / len(difference), size=draws)
    low, high = np.quantile(drawn @ values / len(difference), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference.mean()), float(low), float(high))


def bootstrap(
    groups: Sequence[T],
    statistic: Callable[[Sequence[T]], float | None],
    null: float = 0.0,
    seed: int = 0,
    draws: int = 1000,
    fewest: int = 30,
) -> Estimate | None:
    """Resample whole groups: a statistic with its 95 % percentile interval; ``None`` where it is not defined.

    The p value is twice the share of resamples on the side of ``null`` that has fewer, ``2 (1 + fewer) / (1 + draws)``
    (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 4.4). Resamples in which the statistic
    is not defined are left out; with more than a tenth of them, or less than ``fewest`` groups, there is nothing.
    """
    value = statistic(groups)
    if value is None or len(groups) < fewest:
        return None
    rng = np.random.default_rng(seed)
    tried = (statistic([groups[i] for i in rng.integers(len(groups), size=len(groups))]) for _ in range(draws))
    drawn = np.array([result for result in tried if result is not None])
    if len(drawn) < 0.9 * draws:
        return None
    low, high = np.quantile(drawn, [0.025, 0.975])
    beyond = min(int((drawn <= null).sum()), int((drawn >= null).sum()))
    return Estimate(value, float(low), float(high), min(1.0, 2 * (1 + beyond) / (1 + len(drawn))))


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation of pairs, in [-1, 1]; ``None`` for fewer than three, or if one side does not vary."""
    if len(pairs) < 3 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return None
    return float(_stats().spearmanr(np.asarray(pairs, dtype=np.float64)).statistic)


# --- ranking -----------------------------------------------------------------------------------------------------


def auroc(scores: Values, correct: Flags) -> float:
    """Return the probability that a right answer scores higher than a wrong one, ties counting half; ``nan`` if one is
    missing.
    """
    return _area(*_paired(scores, correct))


def _area(values: Floats, flags: Bools) -> float:
    """The area from the ranks of the right answers (Mann and Whitney)."""
    right, wrong = int(flags.sum()), int((~flags).sum())
    if not right or not wrong:
        return math.nan
    ranks = _stats().rankdata(values)
    return float((ranks[flags].sum() - right * (right + 1) / 2) / (right * wrong))


def auroc_interval(scores: Values, correct: Flags, level: float = 0.95) -> Interval:
    """AUROC with a score interval: the areas ``A`` from which the one found is less than ``z`` deviations away.

    ``V(A) = A (1 - A) (1 + N (1 - A) / (2 - A) + N A / (1 + A)) / (m n)`` for ``m`` right and ``n`` wrong answers,
    where ``N = (m + n) / 2 - 1`` (Newcombe, Statistics in Medicine 25, 2006, pages 559 to 573, method 5). The variance
    is that at ``A``, not at the area found: with 20 wrong answers of 448 and an area of 0.93, DeLong's interval
    (Biometrics 44, 1988) covers it in 86 % of all cases, on the log-odds' scale in 90 %, this one in 97 %.
    """
    values, flags = _paired(scores, correct)
    area = _area(values, flags)
    if math.isnan(area):
        return Interval(math.nan, math.nan, math.nan)
    right, wrong = int(flags.sum()), int((~flags).sum())
    z, half = float(_stats().norm.ppf((1 + level) / 2)), (right + wrong) / 2 - 1

    def deviation(at: float) -> float:
        return math.sqrt(at * (1 - at) * (1 + half * (1 - at) / (2 - at) + half * at / (1 + at)) / (right * wrong))

    def bound(far: float, near: float) -> float:
        """Tell where an area is ``z`` deviations away, by halving: it is further away at ``far`` and nearer at
        ``near``.
        """
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


def auroc_gain(before: Values, after: Values, correct: Flags, draws: int = 500) -> Interval:
    """AUROC of one score minus that of another on the same answers, with its paired bootstrap interval.

    Right and wrong answers are resampled each for themselves, so that every resample has both.
    """
    old, flags = _paired(before, correct)
    new, _ = _paired(after, correct)
    rng = np.random.default_rng(0)
    right, wrong = np.flatnonzero(flags), np.flatnonzero(~flags)
    drawn_flags = np.arange(len(flags)) < len(right)
    gains = []
    for _ in range(draws):
        places = np.concatenate([rng.choice(right, len(right)), rng.choice(wrong, len(wrong))])
        gains.append(_area(new[places], drawn_flags) - _area(old[places], drawn_flags))
    low, high = np.quantile(gains, [0.025, 0.975])
    return Interval(_area(new, flags) - _area(old, flags), float(low), float(high))


def risk_coverage(scores: Values, correct: Flags) -> tuple[Floats, Floats]:
    """Return the coverage and error ``(n,)`` when the ``1..n`` surest answers are accepted.

    Among equal scores the order is not known: the error is the expected one over all orders.
    """
    values, flags = _paired(scores, correct)
    order = np.argsort(-values, kind="stable")
    values, wrong = values[order], (~flags[order]).astype(np.float64)
    for low, high in _ties(values):
        wrong[low:high] = wrong[low:high].mean()
    number = np.arange(1, len(values) + 1)
    return number / len(values), np.cumsum(wrong) / number


def aurc(scores: Values, correct: Flags) -> float:
    """Return the area under the risk-coverage curve: the mean error over all numbers of accepted answers. Lower is
    better.
    """
    return float(risk_coverage(scores, correct)[1].mean())


def coverage_at_risk(scores: Values, correct: Flags, risk: float = 0.05) -> float:
    """Return the largest share of answers that a threshold accepts with an error of at most ``risk``; 0 if none does.

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


def reliability(probabilities: Values, correct: Flags, bins: int = 15) -> list[tuple[float, float, int]]:
    """Return the mean probability, accuracy and number of answers in every bin of equal width that has any."""
    values, flags = _probabilities(probabilities, correct)
    index = _bins(values, bins)
    rows = [index == place for place in range(bins)]
    return [(float(values[row].mean()), float(flags[row].mean()), int(row.sum())) for row in rows if row.any()]


def ece(probabilities: Values, correct: Flags, bins: int = 15) -> float:
    """Return expected calibration error over bins of equal width. Raises ``InputError`` for scores outside [0, 1]."""
    values, flags = _probabilities(probabilities, correct)
    return float(_gaps(values, flags.astype(np.float64)[None], bins)[0])


def ece_noise_floor(probabilities: Values, bins: int = 15, draws: int = 500, seed: int = 0) -> tuple[float, float]:
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
