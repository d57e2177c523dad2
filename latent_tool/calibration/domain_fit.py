"""Fit a domain check: what usual pictures look like, what damage looks like, and held-back questions to compare with.

No label is needed. Reference questions fit the parts, held-back questions give the scores that p-values count; no
question does both. This module knows numbers; it needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from latent_tool.calibration.domain import (
    MOST_HELD_BACK,
    MOST_NUMBERS,
    PIXELS,
    USUAL,
    Damage,
    DomainCheck,
    Gaussian,
    Neighbours,
    NoDomainCheck,
    held_back_needed,
    round_off,
)
from latent_tool.errors import CalibrationError, MissingExtraError

__all__ = ["LEVELS", "Shares", "fit_domain", "needed_questions", "parts_of", "shares"]

Array = NDArray[np.float64]
Pictures = Sequence[Sequence[float]]  # of one question, each described by D numbers

LEVELS = (0.01, 0.02, 0.05)  # rates of false alarms, the best that there are questions for is taken
MIN_REFERENCE = 100
_MOST_REFERENCE = 1_000
_MOST_DIRECTIONS = 64
_MOST_NEIGHBOURS = 500
_FLOOR = 0.2  # added to the variances of the pixels' standardised numbers, which are whitened
_LEAST_SCALE = 1e-3  # added to every deviation
_STRENGTH = 0.03  # of the logistic regressions: scikit-learn's C


class Shares(NamedTuple):
    """How many questions fit the parts, how many are held back, and the level that this allows."""

    reference: int
    held_back: int
    level: float


def shares(questions: int, parts: int, level: float | None = None, *, labelled: bool = False) -> Shares | None:
    """Share out questions between reference and held-back part; ``None``: there are too few for any level.

    Args:
        questions: how many there are.
        parts: of the check.
        level: the rate of false alarms that is wanted; ``None``: the smallest of ``LEVELS`` there are enough for.
        labelled: they also are what a threshold is found on, so that at least a half of them is left for that.
    """
    room = questions // 2 if labelled else questions
    for wanted in LEVELS if level is None else (level,):
        least = held_back_needed(wanted, parts)
        if room < least + MIN_REFERENCE:
            continue
        if labelled:  # what the threshold is found on is worth more than a better check
            reference = min(room - least, max(MIN_REFERENCE, 2 * least // 3))
            return Shares(reference, least, wanted)
        held_back = min(max(least, questions // 2), questions - MIN_REFERENCE, MOST_HELD_BACK)
        return Shares(min(questions - held_back, _MOST_REFERENCE), held_back, wanted)
    return None


def needed_questions(parts: int, level: float) -> int:
    """Return how many questions without labels a check with this rate of false alarms takes."""
    return held_back_needed(level, parts) + MIN_REFERENCE


def fit_domain(
    reference: Sequence[Pictures],
    damaged: Mapping[str, Sequence[Sequence[float]]],
    held_back: Sequence[Pictures],
    pixels: int,
    level: float | None = None,
) -> DomainCheck | NoDomainCheck:
    """Fit a domain check.

    Args:
        reference: questions that fit the parts, each with its pictures.
        damaged: name of a kind of damage -> pictures of the reference questions that were given it.
        held_back: other questions drawn like them, which fit nothing and give the p-values their scale.
        pixels: how many of a picture's numbers, the last ones, are of its pixels and not of the model's features.
        level: rate of false alarms; ``None``: the smallest of ``LEVELS`` there are enough held-back questions for.

    Raises ``CalibrationError`` for numbers that are not finite or of several sizes, and ``MissingExtraError`` without
    scikit-learn.
    """
    if find_spec("sklearn") is None:
        raise MissingExtraError("Fitting a domain check", "evaluation")
    parts = parts_of(damaged)
    levels = LEVELS if level is None else (level,)
    allowed = next((each for each in levels if len(held_back) >= held_back_needed(each, parts)), None)
    if allowed is None or len(reference) < MIN_REFERENCE:
        needed = needed_questions(parts, levels[-1])
        found = len(reference) + len(held_back)
        return NoDomainCheck(
            reason=f"{found} questions with their pictures are too few for a domain check with {levels[-1]:.0%} false "
            f"alarms; {max(needed - found, 1)} more would do, and they need no labels.",
            needed_pictures=max(needed, found + 1),
        )
    whole = _table([picture for pictures in reference for picture in pictures])
    size = whole.shape[1] - pixels
    usual = _gaussian(whole[:, :size])
    z = usual.standardised(whole[:, :size])
    check = DomainCheck(
        level=allowed,
        reference=len(reference),
        usual=usual,
        pixels=_neighbours(whole[:, size:]),
        damages={name: _damage(z, usual.standardised(_table(rows)[:, :size])) for name, rows in damaged.items()},
        held_back=dict.fromkeys((USUAL, PIXELS, *damaged), (0.0,) * len(held_back)),
    )
    scores = [check.scores(pictures) for pictures in held_back]
    compared = {part: tuple(each[part] for each in scores) for part in check.held_back}
    if not all(np.isfinite(values).all() for values in compared.values()):
        raise CalibrationError("Some pictures are described by numbers that are not finite.", "Check the model.")
    return DomainCheck(**{**dict(check), "held_back": compared})


def parts_of(damages: Collection[str]) -> int:
    """Return how many parts a check has that knows these kinds of damage."""
    return len((USUAL, PIXELS)) + len(damages)


def _table(rows: Sequence[Sequence[float]]) -> Array:
    if len({len(row) for row in rows}) != 1:
        raise CalibrationError("The pictures are described by numbers of several sizes.", "Describe all by one model.")
    table = np.asarray(rows, dtype=np.float64)
    if not np.isfinite(table).all():
        raise CalibrationError("Some pictures are described by numbers that are not finite.", "Check the model.")
    return table


def _gaussian(rows: Array) -> Gaussian:
    """The Gaussian of rows ``(n, D)``: principal directions, and the mean variance of the others."""
    center, scale = rows.mean(0), rows.std(0) + _LEAST_SCALE
    z = (rows - center) / scale
    count, size = z.shape
    kept = max(1, min(_MOST_DIRECTIONS, count // 2, size, MOST_NUMBERS // size))
    _, lengths, directions = np.linalg.svd(z - z.mean(0), full_matrices=False)
    variances = lengths**2 / max(1, count - 1)
    # The sign of a direction is nobody's choice: the largest entry is positive, whatever the linear algebra says.
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(1)])
    rest = max(0.0, float((z.var(0, ddof=1).sum() - variances[:kept].sum()) / max(1, size - kept)))
    return Gaussian(
        center=_plain(center),
        scale=_plain(scale),
        directions=tuple(map(_plain, (directions * signs[:, None])[:kept])),
        variances=_plain(variances[:kept]),
        rest=_plain(np.array([rest]))[0],
    )


def _neighbours(rows: Array) -> Neighbours:
    """The reference pictures, rows ``(n, P)``, along whitening axes."""
    center, scale = rows.mean(0), rows.std(0) + _LEAST_SCALE
    lengths, directions = np.linalg.eigh(np.cov((rows - center).T / scale[:, None]).reshape(len(scale), -1))
    axes = (directions / np.sqrt(np.maximum(lengths, 0) + _FLOOR) / scale[:, None]).T
    middle, along = _plain(center), tuple(map(_plain, axes))
    whitened = (rows[:_MOST_NEIGHBOURS] - np.array(middle)) @ np.array(along).T
    return Neighbours(center=middle, axes=along, rows=tuple(map(_plain, whitened)))


def _damage(whole: Array, damaged: Array) -> Damage:
    from sklearn.linear_model import LogisticRegression

    rows = np.concatenate([whole, damaged])
    labels = np.repeat([0, 1], [len(whole), len(damaged)])
    model = LogisticRegression(C=_STRENGTH, max_iter=2000).fit(rows, labels)
    return Damage(weights=_plain(model.coef_[0]), intercept=float(model.intercept_[0]))


def _plain(values: Array) -> tuple[float, ...]:
    """Numbers to six significant digits, as a file keeps them."""
    return tuple(round_off(value) for value in values.tolist())
