"""Make a calibration from labelled scores: a mapping chosen by cross-validation, a threshold by an exact test.

*Mapping.* Isotonic regression, Platt scaling (logistic regression on the score, or on its log-odds where it is a
probability) and temperature scaling (the same without an intercept) are compared by their log-loss on left-out items;
the best is fitted on all items.

*Threshold.* The items are split at random, once. The scores of the smaller part, without their labels, choose a falling
sequence of thresholds and where it starts: high, but low enough that the larger part is expected to leave so many
accepted items that a few errors are allowed. Then the larger part tests one threshold after another with the exact
binomial tail, ``P(Binomial(accepted, target) <= errors) <= 1 - confidence level``, and stops at the first that fails
(fixed-sequence testing). What passed last is the threshold. Since sequence and start do not depend on the items that
test them, the chance that the true error rate among the accepted exceeds the target is at most
``1 - confidence level``.

The mapping is fitted on the items that the threshold was tested on, too. That takes nothing from the guarantee: it is
the raw score that is compared with the threshold, and the mapping has no part in that.

This module knows labelled scores. It knows nothing of runs, files or models; it needs scikit-learn and scipy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from latent_tool.calibration.calibration import (
    Calibration,
    NoThreshold,
    ProbabilityMapping,
    Quality,
    Threshold,
    digest,
    log_odds,
)
from latent_tool.errors import CalibrationError, MissingExtraError, TooFewItemsError

__all__ = [
    "MIN_ITEMS",
    "MIN_OF_EACH",
    "expected_calibration_error",
    "find_threshold",
    "fit",
    "passing_threshold",
    "split_items",
    "threshold_sequence",
]

MappingKind = Literal["isotonic", "platt", "temperature"]
Array = NDArray[np.float64]
Labels = NDArray[np.bool_]

MIN_ITEMS = 100  # labelled and scored items below which nothing is fitted
MIN_OF_EACH = 10  # right answers, and wrong ones, below which nothing is fitted
FOLDS = 10
# Scores that are surer the lower they are.
LOWER_IS_SURER = frozenset({"first_token_entropy"})
# Scores that are probabilities, whatever their values: others may lie in [0, 1] by chance.
PROBABILITIES = frozenset(
    {
        "pooled_probability",
        "answer_probability",
        "plain_probability",
        "mean_token_probability",
        "agreement",
    }
)

_DESIGN_SHARE = 0.15  # of the items, to choose the sequence
_STEPS = 100  # thresholds in the sequence, at most
_START_ERRORS = 3  # errors that the first threshold should be able to bear
_LEAST_SHARE = 20  # accepted items below which a share of errors is not looked at
_REFERENCE = 1000  # scores kept for the drift check, at most
_NOISE_DRAWS = 200


def fit(
    scores: Sequence[float | None],
    correct: Sequence[bool],
    *,
    score: str,
    configuration: Mapping[str, Any] | None = None,
    fingerprint: str | None = None,
    mapping: MappingKind | Literal["auto"] = "auto",
    target_error: float = 0.05,
    confidence_level: float = 0.9,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> Calibration:
    """A calibration from raw scores (``None``: not measured) and whether each answer was right.

    Args:
        score: name of the score.
        configuration, fingerprint: what the scores were made with; one of the two is needed.
        mapping: ``"auto"`` chooses by cross-validation.
        target_error, confidence_level: the guarantee that is wanted of the threshold.
        seed: of the split and the folds.

    Raises ``TooFewItemsError`` for fewer than ``MIN_ITEMS`` scored items, or fewer than ``MIN_OF_EACH`` right or wrong
    ones; ``CalibrationError`` for values out of range; ``MissingExtraError`` without scikit-learn and scipy.
    """
    _require_libraries()
    _require_range("target_error", target_error)
    _require_range("confidence_level", confidence_level)
    if len(scores) != len(correct):
        raise CalibrationError("There must be one label for every score.", "Give both in the same order.")
    if configuration is not None:
        fingerprint = digest(configuration)
    if fingerprint is None:
        raise CalibrationError("A calibration needs the configuration it is made for.", "Pass it, or its fingerprint.")
    sign = -1.0 if score in LOWER_IS_SURER else 1.0
    labels = np.asarray(correct, dtype=bool)
    values = np.array([math.nan if each is None else each for each in scores], dtype=np.float64) * sign
    known = np.isfinite(values)
    sure, right = values[known], labels[known]
    _require_items(len(sure), int(right.sum()))

    probability = score in PROBABILITIES
    if probability and not (sure.min() >= 0 and sure.max() <= 1):
        raise CalibrationError(f"{score} is a probability, and some lie outside [0, 1].", "The scores were changed.")
    chosen, losses, left_out = _choose(sure, right, probability, mapping, seed)
    fitted = _FIT[chosen](sure, right, probability)
    found = find_threshold(values, labels, target_error, confidence_level, seed)
    threshold = None
    if isinstance(found, Threshold):
        at = found.score
        threshold = found.model_copy(update={"score": sign * at, "probability": fitted(at)})
    rng = np.random.default_rng(seed)
    kept = rng.permutation(len(sure))[:_REFERENCE]
    return Calibration(
        fingerprint=fingerprint,
        configuration=None if configuration is None else dict(configuration),
        score=score,
        higher_is_surer=sign > 0,
        mapping=fitted,
        threshold=threshold,
        no_threshold=found if isinstance(found, NoThreshold) else None,
        items=len(sure),
        right=int(right.sum()),
        unscored=int((~known).sum()),
        quality=_quality(sure, right, probability, losses, left_out, target_error, confidence_level, seed),
        reference=tuple(sorted((sign * sure[kept]).tolist())),
        provenance=dict(provenance or {}),
    )


def _require_libraries() -> None:
    if find_spec("scipy") is None or find_spec("sklearn") is None:
        raise MissingExtraError("Making a calibration", "evaluation")


def _require_range(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise CalibrationError(f"{name} must lie between 0 and 1, both excluded.", "Use 0.05 and 0.9, for example.")


def _require_items(count: int, right: int) -> None:
    wrong = count - right
    if count < MIN_ITEMS:
        raise TooFewItemsError(
            f"{count} labelled and scored items are too few to calibrate on; {MIN_ITEMS} are needed.",
            f"Label {MIN_ITEMS - count} more. A threshold usually takes several hundred.",
        )
    if min(right, wrong) < MIN_OF_EACH:
        kind, has = ("right", right) if right < wrong else ("wrong", wrong)
        more = math.ceil((MIN_OF_EACH - has) * count / max(has, 1))
        raise TooFewItemsError(
            f"Among {count} items {has} were answered {kind}; {MIN_OF_EACH} are needed to tell the two apart.",
            f"Add about {more} items like these, or harder ones if those are what will be asked.",
        )


# ---------------------------------------------------------------------- mapping


def _fit_isotonic(sure: Array, right: Labels, probability: bool) -> ProbabilityMapping:
    from sklearn.isotonic import IsotonicRegression

    edge = 1 / (len(sure) + 2)  # no number of items makes anything certain
    model = IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip").fit(sure, right.astype(float))
    y = np.clip(np.maximum.accumulate(model.y_thresholds_), edge, 1 - edge)
    x = np.asarray(model.X_thresholds_, dtype=np.float64)
    keep = np.concatenate(([True], np.diff(x) > 0))
    return ProbabilityMapping(kind="isotonic", x=tuple(x[keep].tolist()), y=tuple(y[keep].tolist()))


def _fit_logistic(kind: Literal["platt", "temperature"], sure: Array, right: Labels, logit: bool) -> ProbabilityMapping:
    from sklearn.linear_model import LogisticRegression

    z = np.array([log_odds(each) for each in sure]) if logit else sure
    free = kind == "platt"
    center, spread = (float(z.mean()) if free else 0.0), float(z.std()) or 1.0
    model = LogisticRegression(C=1e4, fit_intercept=free, max_iter=1000).fit(((z - center) / spread)[:, None], right)
    slope = float(model.coef_[0, 0]) / spread
    if slope <= 0:  # the score ranks wrong above right: it says nothing that could be used
        base = log_odds(float(right.mean())) if free else 0.0
        return ProbabilityMapping(kind=kind, logit=logit, slope=0.0, intercept=base)
    intercept = float(model.intercept_[0]) - slope * center if free else 0.0
    return ProbabilityMapping(kind=kind, logit=logit, slope=slope, intercept=intercept)


_FIT: dict[MappingKind, Callable[[Array, Labels, bool], ProbabilityMapping]] = {
    "temperature": lambda sure, right, logit: _fit_logistic("temperature", sure, right, logit),
    "platt": lambda sure, right, logit: _fit_logistic("platt", sure, right, logit),
    "isotonic": _fit_isotonic,
}


def _folds(count: int, right: Labels, seed: int) -> list[NDArray[np.int_]]:
    """Indices of every fold; right and wrong answers are spread evenly."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    order = order[np.argsort(right[order], kind="stable")]
    return [order[start::FOLDS] for start in range(FOLDS)]


def _choose(
    sure: Array, right: Labels, probability: bool, wanted: MappingKind | Literal["auto"], seed: int
) -> tuple[MappingKind, dict[str, float], Array]:
    """The mapping to use, the log-loss of every one tried, and the left-out probabilities of the one chosen."""
    kinds: list[MappingKind] = [wanted] if wanted != "auto" else list(_FIT)
    if not set(kinds) <= set(get_args(MappingKind)):
        raise CalibrationError(f"There is no mapping {wanted!r}.", f"Use auto, {', '.join(get_args(MappingKind))}.")
    if not probability:
        if wanted == "temperature":
            raise CalibrationError(
                "Temperature scaling needs a score that is a probability; this one is not.", "Use platt or isotonic."
            )
        kinds = [kind for kind in kinds if kind != "temperature"]
    predicted = {kind: np.empty(len(sure)) for kind in kinds}
    for fold in _folds(len(sure), right, seed):
        rest = np.setdiff1d(np.arange(len(sure)), fold)
        for kind in kinds:
            mapping = _FIT[kind](sure[rest], right[rest], probability)
            predicted[kind][fold] = [mapping(each) for each in sure[fold]]
    losses = {kind: _log_loss(predicted[kind], right) for kind in kinds}
    best = min(kinds, key=lambda kind: losses[kind])
    return best, {str(kind): loss for kind, loss in losses.items()}, predicted[best]


def _log_loss(predicted: Array, right: Labels) -> float:
    kept = np.clip(predicted, 1e-9, 1 - 1e-9)
    return float(-np.where(right, np.log(kept), np.log1p(-kept)).mean())


# ---------------------------------------------------------------------- threshold


def split_items(count: int, seed: int) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Indices of the items that choose the sequence of thresholds, and of those that test it."""
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
    """The lowest threshold whose error rate is at most the target, at the confidence level; see the module's text.

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


# ---------------------------------------------------------------------- what it is worth


def expected_calibration_error(probabilities: Array, right: Labels, bins: int = 15) -> float:
    """ECE with bins of equal width: mean distance of confidence and accuracy, weighted by the items in a bin.

    Raises ``CalibrationError`` for probabilities outside [0, 1], which no bin would hold.
    """
    if not len(probabilities) or not np.all((probabilities >= 0) & (probabilities <= 1)):
        raise CalibrationError("ECE is defined for probabilities in [0, 1] only.", "Calibrate the score first.")
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=probabilities - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(probabilities))


def _noise_floor(probabilities: Array, seed: int) -> float:
    """Mean ECE of answers that are right exactly as often as the probabilities say."""
    rng = np.random.default_rng(seed)
    draws = rng.random((_NOISE_DRAWS, len(probabilities))) < probabilities
    return float(np.mean([expected_calibration_error(probabilities, draw) for draw in draws]))


def _quality(
    sure: Array,
    right: Labels,
    probability: bool,
    losses: dict[str, float],
    left_out: Array,
    target_error: float,
    confidence_level: float,
    seed: int,
) -> Quality:
    from sklearn.metrics import roc_auc_score

    found, coverages, accepted, errors = 0, [], 0, 0
    for number, fold in enumerate(_folds(len(sure), right, seed + 1)):
        rest = np.setdiff1d(np.arange(len(sure)), fold)
        threshold = passing_threshold(sure[rest], right[rest], target_error, confidence_level, seed + number)
        if threshold is None:
            continue
        taken = sure[fold] >= threshold.score
        found += 1
        coverages.append(float(taken.mean()))
        accepted += int(taken.sum())
        errors += int((taken & ~right[fold]).sum())
    return Quality(
        folds=FOLDS,
        auroc=float(roc_auc_score(right, sure)),
        ece_before=expected_calibration_error(sure, right) if probability else None,
        ece_after=expected_calibration_error(left_out, right),
        ece_noise_floor=_noise_floor(left_out, seed),
        log_loss=losses,
        thresholds_found=found / FOLDS,
        coverage=float(np.mean(coverages)) if coverages else None,
        error=errors / accepted if accepted else None,
    )
