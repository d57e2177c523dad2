"""Make a calibration from labelled scores: a mapping chosen by cross-validation, a threshold by an exact test.

Isotonic regression, Platt scaling (logistic regression on the score, or on its log-odds where it is a probability) and
temperature scaling (the same without an intercept) are compared by their log-loss on left-out items; the best is fitted
on all items. ``threshold`` says how the threshold is found. The mapping is fitted on the items that the threshold was
tested on, too. That takes nothing from the guarantee: it is the raw score that is compared with the threshold, and the
mapping has no part in that.

This module knows labelled scores. It knows nothing of runs, files or models; it needs scikit-learn and scipy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from latent_tool.calibration.calibration import Calibration, Quality
from latent_tool.calibration.configuration import digest
from latent_tool.calibration.domain import DomainCheck, NoDomainCheck
from latent_tool.calibration.mapping import ProbabilityMapping, log_odds
from latent_tool.calibration.threshold import NoThreshold, Threshold, find_threshold, passing_threshold
from latent_tool.errors import CalibrationError, MissingExtraError, TooFewItemsError
from latent_tool.scores import SCORES, ConfidenceScore
from latent_tool.statistics import auroc, ece, ece_noise_floor

__all__ = ["MIN_ITEMS", "MIN_OF_EACH", "fit"]

MappingKind = Literal["isotonic", "platt", "temperature"]
Array = NDArray[np.float64]
Labels = NDArray[np.bool_]

MIN_ITEMS = 100  # labelled and scored items below which nothing is fitted
MIN_OF_EACH = 10  # right answers, and wrong ones, below which nothing is fitted
FOLDS = 10
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
    domain: DomainCheck | NoDomainCheck | None = None,
    tested: Sequence[bool] | None = None,
    refused: Sequence[bool] | None = None,
) -> Calibration:
    """Fit a calibration to raw scores (``None``: not measured) and whether each answer was right.

    Args:
        score: name of the score; one that ``latent_tool.scores`` does not know is taken to rise with confidence.
        configuration, fingerprint: what the scores were made with; one of the two is needed.
        mapping: ``"auto"`` chooses by cross-validation.
        target_error, confidence_level: the guarantee that is wanted of the threshold.
        seed: of the split and the folds.
        domain: the domain check that belongs to it; ``None``: there is none, and the calibration says so.
        tested: which items the threshold is found on: none that had a part in the domain check; ``None``: all.
        refused: which items the domain check refuses; for the threshold, those are not accepted. ``None``: none.

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
    facts = SCORES.get(score, ConfidenceScore(score, "a score of the caller's own"))
    sign = 1.0 if facts.higher_is_surer else -1.0
    labels = np.asarray(correct, dtype=bool)
    values = np.array([math.nan if value is None else value for value in scores], dtype=np.float64) * sign
    known = np.isfinite(values)
    sure, right = values[known], labels[known]
    _require_items(len(sure), int(right.sum()))

    probability = facts.probability
    if probability and not (sure.min() >= 0 and sure.max() <= 1):
        raise CalibrationError(f"{score} is a probability, and some lie outside [0, 1].", "The scores were changed.")
    chosen, losses, left_out = _choose(sure, right, probability, mapping, seed)
    fitted = _FIT[chosen](sure, right, probability)
    gated = np.where(_flags(refused, len(values), False), math.nan, values)
    own = _flags(tested, len(values), True)
    verdict = find_threshold(gated[own], labels[own], target_error, confidence_level, seed)
    threshold = None
    if isinstance(verdict, Threshold):
        threshold = verdict.model_copy(update={"score": sign * verdict.score, "probability": fitted(verdict.score)})
    rng = np.random.default_rng(seed)
    kept = rng.permutation(len(sure))[:_REFERENCE]
    return Calibration(
        fingerprint=fingerprint,
        configuration=None if configuration is None else dict(configuration),
        score=score,
        higher_is_surer=sign > 0,
        mapping=fitted,
        threshold=threshold,
        no_threshold=verdict if isinstance(verdict, NoThreshold) else None,
        domain=domain if isinstance(domain, DomainCheck) else None,
        no_domain=None if isinstance(domain, DomainCheck) else domain or NoDomainCheck(reason=_NO_PICTURES),
        refused=int((_flags(refused, len(values), False) & own).sum()),
        items=len(sure),
        right=int(right.sum()),
        unscored=int((~known).sum()),
        quality=_quality(sure, right, probability, losses, left_out, seed).model_copy(
            update=_on_new_items(gated[own & known], labels[own & known], target_error, confidence_level, seed)
        ),
        reference=tuple(sorted((sign * sure[kept]).tolist())),
        provenance=dict(provenance or {}),
    )


_NO_PICTURES = "It was fitted to scores alone, without their pictures."


def _flags(given: Sequence[bool] | None, count: int, default: bool) -> Labels:
    if given is None:
        return np.full(count, default)
    if len(given) != count:
        raise CalibrationError("There must be one flag for every score.", "Give all in the same order.")
    return np.asarray(given, dtype=bool)


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

    z = np.array([log_odds(value) for value in sure]) if logit else sure
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
            predicted[kind][fold] = [mapping(value) for value in sure[fold]]
    losses = {kind: _log_loss(predicted[kind], right) for kind in kinds}
    best = min(kinds, key=lambda kind: losses[kind])
    return best, {str(kind): loss for kind, loss in losses.items()}, predicted[best]


def _log_loss(predicted: Array, right: Labels) -> float:
    kept = np.clip(predicted, 1e-9, 1 - 1e-9)
    return float(-np.where(right, np.log(kept), np.log1p(-kept)).mean())


# ---------------------------------------------------------------------- what it is worth


def _quality(
    sure: Array, right: Labels, probability: bool, losses: dict[str, float], left_out: Array, seed: int
) -> Quality:
    return Quality(
        folds=FOLDS,
        auroc=auroc(sure, right),
        ece_before=ece(sure, right) if probability else None,
        ece_after=ece(left_out, right),
        ece_noise_floor=ece_noise_floor(left_out, draws=_NOISE_DRAWS, seed=seed)[0],
        log_loss=losses,
        thresholds_found=None,
        coverage=None,
        error=None,
    )


def _on_new_items(
    gated: Array, right: Labels, target_error: float, confidence_level: float, seed: int
) -> dict[str, float | None]:
    """What thresholds found on nine folds do on the tenth; NaN where the domain check refuses."""
    passed, coverages, accepted, errors = 0, [], 0, 0
    for number, fold in enumerate(_folds(len(gated), right, seed + 1)):
        rest = np.setdiff1d(np.arange(len(gated)), fold)
        threshold = passing_threshold(gated[rest], right[rest], target_error, confidence_level, seed + number)
        if threshold is None or not len(fold):
            continue
        taken = gated[fold] >= threshold.score
        passed += 1
        coverages.append(float(taken.mean()))
        accepted += int(taken.sum())
        errors += int((taken & ~right[fold]).sum())
    return {
        "thresholds_found": passed / FOLDS,
        "coverage": float(np.mean(coverages)) if coverages else None,
        "error": errors / accepted if accepted else None,
    }
