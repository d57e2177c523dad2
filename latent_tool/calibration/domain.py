"""Whether a question's pictures are like those that a threshold was made for: a p-value per question.

Two kinds of parts look at the numbers that describe a picture (``latent_tool.models.looks``): ``usual``, one Gaussian
over the reference pictures, and one logistic regression for every kind of damage that the reference pictures were
given when the check was fitted. Each gives a score, larger for stranger. A part's p-value is conformal,

    p = (1 + number of held-back scores that are at least as large) / (held-back scores + 1),

and so is at most alpha for at most a share alpha of questions drawn like the held-back ones, whatever the parts are
worth. The question is refused if the least of the k p-values, times k, is at most the level. Of several pictures the
strangest counts.

This module knows numbers. It knows nothing of pictures, models or of how a check is fitted (``domain_fit``); using one
takes numpy alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, model_validator

from latent_tool.calibration.mapping import Count, Number, Part
from latent_tool.errors import CalibrationMismatchError
from latent_tool.schema import Domain

__all__ = ["MOST_HELD_BACK", "MOST_NUMBERS", "DomainCheck", "NoDomainCheck", "held_back_needed", "round_off"]

Array = NDArray[np.float64]
Numbers = tuple[Number, ...]

MOST_NUMBERS = 262_144  # in the directions of a check, so that its file stays small
MOST_HELD_BACK = 5_000
_RIDGE = 0.003  # added to every variance of the standardised numbers
USUAL = "usual"


class Usual(Part):
    """One Gaussian over the standardised numbers: some principal directions, and one variance for all others."""

    directions: tuple[Numbers, ...] = Field(description="Orthonormal, k of D numbers each.")
    variances: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(description="Along those.")
    rest: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(description="Along every other direction.")


class Damage(Part):
    """One logistic regression: from the standardised numbers to the log-odds of one kind of damage."""

    weights: Numbers
    intercept: Number


@dataclass(frozen=True)
class _Arrays:
    """A check's numbers as arrays; ``rows`` ``(D, k + damages)`` has the directions, then the weights."""

    center: Array
    scale: Array
    rows: Array
    variances: Array
    intercepts: Array
    names: tuple[str, ...]


class DomainCheck(Part):
    """Tells pictures that are unlike the reference pictures, with a stated rate of false alarms."""

    level: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="Share of questions drawn like the held-back ones that are refused, at most, in the mean over "
        "such checks."
    )
    reference: Count = Field(description="Questions whose pictures the parts were fitted on.")
    center: Numbers = Field(description="Mean of the numbers over the reference pictures, D of them.")
    scale: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(description="Their deviation.")
    usual: Usual
    damages: dict[str, Damage]
    held_back: dict[str, Numbers] = Field(
        description="For every part, the scores of the held-back questions, rising; they fitted no part."
    )

    _arrays: _Arrays | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        size, usual = len(self.center), self.usual
        rows = [*usual.directions, *(damage.weights for damage in self.damages.values()), self.scale]
        if not size or any(len(row) != size for row in rows):
            raise ValueError(f"every direction of the domain check needs {size} numbers")
        if len(usual.directions) != len(usual.variances):
            raise ValueError("every direction of the domain check needs one variance")
        if size * max(1, len(usual.directions)) > MOST_NUMBERS:
            raise ValueError(f"the domain check holds more than {MOST_NUMBERS} numbers")
        if set(self.held_back) != {USUAL, *self.damages} or USUAL in self.damages:
            raise ValueError("every part of the domain check needs its held-back scores")
        lengths = {len(scores) for scores in self.held_back.values()}
        if len(lengths) != 1 or not 0 < min(lengths) <= MOST_HELD_BACK:
            raise ValueError(f"the parts of the domain check need equally many held-back scores, 1 to {MOST_HELD_BACK}")
        if any(list(scores) != sorted(scores) for scores in self.held_back.values()):
            raise ValueError("the held-back scores of the domain check must rise")
        if min(lengths) < held_back_needed(self.level, len(self.held_back)):
            raise ValueError("the domain check has too few held-back scores for its level: it could refuse nothing")
        return self

    @property
    def size(self) -> int:
        """D, how many numbers describe a picture."""
        return len(self.center)

    @property
    def held(self) -> int:
        """How many questions were held back."""
        return len(self.held_back[USUAL])

    def scores(self, pictures: Sequence[Sequence[float]]) -> dict[str, float]:
        """For every part, how strange the strangest of a question's pictures is; ``inf`` if that is no number.

        Raises ``CalibrationMismatchError`` for no picture, or for pictures described by other numbers.
        """
        size = self.size
        if not len(pictures) or any(len(picture) != size for picture in pictures):
            raise CalibrationMismatchError(
                f"The domain check is one of pictures described by {size} numbers; these are not.",
                "Use the model it was fitted for, or calibrate this one.",
            )
        worst = self.table(np.asarray(pictures, dtype=np.float64)).max(0).tolist()
        return dict(zip(self._known().names, map(round_off, worst), strict=True))

    def table(self, pictures: Array) -> Array:
        """Return scores ``(n, parts)`` of pictures ``(n, D)``, in the order of ``scores``; ``inf`` where that is no
        number.
        """
        known = self._known()
        with np.errstate(over="ignore", invalid="ignore"):
            z = (pictures - known.center) / known.scale  # (n, D)
            along = z @ known.rows  # (n, k + damages)
            first = along[:, : len(known.variances)] ** 2  # along the Gaussian's directions
            left = np.maximum((z**2).sum(1) - first.sum(1), 0)
            usual = np.sqrt(((first / known.variances).sum(1) + left / (self.usual.rest + _RIDGE)) / self.size)
            table: Array = np.column_stack([usual, along[:, len(known.variances) :] + known.intercepts])
        return np.where(np.isfinite(table), table, math.inf)

    def verdict(self, pictures: Sequence[Sequence[float]]) -> Domain:
        """Tell whether a question about pictures, each described by ``D`` numbers, is like the reference questions.

        Raises what ``scores`` raises.
        """
        return self.verdict_of(self.scores(pictures))

    def verdict_of(self, scores: Mapping[str, float]) -> Domain:
        """Return the verdict that belongs to the parts' scores."""
        parts = {}
        for name, score in scores.items():
            held = self.held_back[name]
            larger = 0 if math.isnan(score) else len(held) - bisect_left(held, score)
            parts[name] = (1 + larger) / (len(held) + 1)
        p_value = min(1.0, len(parts) * min(parts.values()))
        # Equal but for rounding counts as equal: the level is a bound that is meant to be reached.
        return Domain(p_value=p_value, parts=parts, refused=p_value <= self.level * (1 + 1e-9))

    def _known(self) -> _Arrays:
        if self._arrays is None:
            usual, damages = self.usual, self.damages
            weights = [damage.weights for damage in damages.values()]
            self._arrays = _Arrays(
                center=np.array(self.center),
                scale=np.array(self.scale),
                rows=np.array([*usual.directions, *weights]).reshape(-1, self.size).T.copy(),
                variances=np.array(usual.variances) + _RIDGE,
                intercepts=np.array([damage.intercept for damage in damages.values()]),
                names=(USUAL, *damages),
            )
        return self._arrays


class NoDomainCheck(Part):
    """Why a calibration has no domain check, and how many more pictures, without labels, would do."""

    reason: str
    needed_pictures: Count | None = Field(None, description="In all; None: it is not for want of pictures.")


def round_off(value: float) -> float:
    """Return the number to six significant digits: what follows is rounding, and files do not keep it."""
    return float(f"{value:.6g}")


def held_back_needed(level: float, parts: int) -> int:
    """Return how many held-back questions ``parts`` parts need at least, to be able to refuse anything at ``level``."""
    return math.ceil(parts / level * (1 - 1e-12)) - 1
