"""Whether a question's pictures are like those that a threshold was made for: a p-value per question.

Several parts look at the numbers that describe a picture (``latent_tool.models.looks``). ``usual`` is one Gaussian over
the reference pictures' features; ``pixels`` is how far the numbers of the pixels are from those of the reference
pictures that are nearest, since an empty page and a full one are both usual and what lies between them need not be; and
there is one logistic regression for every kind of damage that the reference pictures were given when the check was
fitted. Each gives a score, larger for stranger. A part's p-value is conformal, among the question and the n held-back
ones,

    p = (1 + number of held-back scores that are at least as large) / (n + 1).

The parts together are conformal, too: every one of the n + 1 questions has the sum of 1 / p**2 over its parts, with p
counted among the same n + 1, and ``p_value`` is the share of them whose sum is at least this question's. The n + 1 are
treated alike, so that it is at most alpha for at most a share alpha of questions drawn like the held-back ones,
whatever the parts are worth and however they hang together. (The harmonic mean p-value of Wilson 2019 has 1 / p.
Squared, the strangest in one of up to four parts comes before what is second in every part, so that it is refused.) The
question is refused if ``p_value`` is at most the level, and a score that is no number is stranger than all. Of several
pictures the strangest counts.

This module knows numbers. It knows nothing of pictures, models or of how a check is fitted (``domain_fit``); using one
takes numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, model_validator

from latent_tool.calibration.mapping import Count, Number, Part
from latent_tool.errors import CalibrationMismatchError
from latent_tool.schema import Domain

__all__ = [
    "MOST_HELD_BACK",
    "MOST_NUMBERS",
    "PIXELS",
    "USUAL",
    "Damage",
    "DomainCheck",
    "Gaussian",
    "Neighbours",
    "NoDomainCheck",
    "held_back_needed",
    "round_off",
]

Array = NDArray[np.float64]
Numbers = tuple[Number, ...]

MOST_NUMBERS = 262_144  # in the directions of a check, so that its file stays small
MOST_HELD_BACK = 5_000
_NEAREST = 3  # the neighbour whose distance counts: one picture that is as strange proves nothing
_RIDGE = 0.003  # added to every variance of the standardised numbers
USUAL, PIXELS = "usual", "pixels"


@dataclass(frozen=True, eq=False)
class _Arrays:
    """A part's numbers as arrays, made once of its fields, by which parts are compared."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))


@dataclass(frozen=True, eq=False)
class _OfGaussian(_Arrays):
    """``directions``: ``(D, k)``, of ``variances`` ``(k,)``."""

    center: Array
    scale: Array
    directions: Array
    variances: Array


@dataclass(frozen=True, eq=False)
class _OfNeighbours(_Arrays):
    """``axes``: ``(P, P)``, one in a column; ``rows``: ``(n, P)``; ``lengths``: of those, squared."""

    center: Array
    axes: Array
    rows: Array
    lengths: Array


@dataclass(frozen=True, eq=False)
class _OfCheck(_Arrays):
    """``weights``: ``(D, damages)``; ``held_back``: scores ``(parts, n)``; ``ranks``: how many of a part's are at least
    as large as each, itself among them; ``alone`` and ``joined``: what a part adds to each one's sum where the question
    scores less, and where it scores as much or more.
    """

    weights: Array
    intercepts: Array
    held_back: Array
    ranks: Array
    alone: Array
    joined: Array


class Gaussian(Part):
    """One Gaussian over standardised numbers: some principal directions, and one variance for all others."""

    center: Numbers = Field(min_length=1, description="Mean of the numbers over the reference pictures, D of them.")
    scale: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(description="Their deviation.")
    directions: tuple[Numbers, ...] = Field(description="Orthonormal, k of D numbers each.")
    variances: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(description="Along those.")
    rest: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(description="Along every other direction.")

    _arrays: _OfGaussian = PrivateAttr()

    @model_validator(mode="after")
    def _whole(self) -> Self:
        size = len(self.center)
        if any(len(row) != size for row in (self.scale, *self.directions)):
            raise ValueError(f"every direction of the domain check needs {size} numbers")
        if len(self.directions) != len(self.variances):
            raise ValueError("every direction of the domain check needs one variance")
        if size * max(1, len(self.directions)) > MOST_NUMBERS:
            raise ValueError(f"the domain check holds more than {MOST_NUMBERS} numbers")
        self._arrays = _OfGaussian(
            center=np.array(self.center),
            scale=np.array(self.scale),
            directions=np.array(self.directions).reshape(-1, size).T.copy(),
            variances=np.array(self.variances) + _RIDGE,
        )
        return self

    def standardised(self, rows: Array) -> Array:
        """Return rows ``(n, D)`` in deviations from the mean."""
        known = self._arrays
        found: Array = (rows - known.center) / known.scale
        return found

    def distance(self, z: Array) -> Array:
        """Return how far standardised rows ``(n, D)`` are from the mean, ``(n,)``: 1 is usual."""
        known = self._arrays
        first = (z @ known.directions) ** 2  # (n, k)
        left = np.maximum((z**2).sum(1) - first.sum(1), 0)
        found: Array = np.sqrt((first @ (1 / known.variances) + left / (self.rest + _RIDGE)) / z.shape[1])
        return found


class Neighbours(Part):
    """Reference pictures, each a row of whitened numbers, to whose nearest ones a picture is compared."""

    center: Numbers = Field(min_length=1, description="Mean of the numbers over the reference pictures, P of them.")
    axes: tuple[Numbers, ...] = Field(description="P of P numbers each; along them the numbers have about variance 1.")
    rows: tuple[Numbers, ...] = Field(min_length=_NEAREST, description="The pictures along the axes, P numbers each.")

    _arrays: _OfNeighbours = PrivateAttr()

    @model_validator(mode="after")
    def _whole(self) -> Self:
        size = len(self.center)
        if len(self.axes) != size or any(len(row) != size for row in (*self.axes, *self.rows)):
            raise ValueError(f"every axis and every row of the domain check's pixels needs {size} numbers")
        if size * max(size, len(self.rows)) > MOST_NUMBERS:
            raise ValueError(f"the domain check holds more than {MOST_NUMBERS} numbers")
        rows = np.array(self.rows)
        with np.errstate(over="ignore"):
            lengths = (rows**2).sum(1)
        self._arrays = _OfNeighbours(
            center=np.array(self.center), axes=np.array(self.axes).T.copy(), rows=rows, lengths=lengths
        )
        return self

    def distance(self, rows: Array) -> Array:
        """Return how far rows ``(n, P)`` are from their third nearest reference picture, ``(n,)``."""
        known = self._arrays
        own = (rows - known.center) @ known.axes
        squares = (own**2).sum(1)[:, None] + known.lengths - 2 * own @ known.rows.T
        nearest = np.partition(squares, _NEAREST - 1, axis=1)[:, _NEAREST - 1]
        found: Array = np.sqrt(np.maximum(nearest, 0))
        return found


class Damage(Part):
    """One logistic regression: from the features' standardised numbers to the log-odds of one kind of damage."""

    weights: Numbers
    intercept: Number


class DomainCheck(Part):
    """Tells pictures that are unlike the reference pictures, with a stated rate of false alarms."""

    level: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="Share of questions drawn like the held-back ones that are refused, at most, in the mean over "
        "such checks."
    )
    reference: Count = Field(description="Questions whose pictures the parts were fitted on.")
    usual: Gaussian = Field(description="Of the reference pictures' features.")
    pixels: Neighbours = Field(description="Of the numbers of their pixels.")
    damages: dict[str, Damage]
    held_back: dict[str, Numbers] = Field(
        description="For every part, the scores of the held-back questions, in one order; they fitted no part."
    )

    _arrays: _OfCheck = PrivateAttr()

    @model_validator(mode="after")
    def _whole(self) -> Self:
        size = len(self.usual.center)
        if any(len(damage.weights) != size for damage in self.damages.values()):
            raise ValueError(f"every direction of the domain check needs {size} numbers")
        if set(self.held_back) != set(self._names()) or len(self.held_back) != len(self._names()):
            raise ValueError("every part of the domain check needs its held-back scores")
        lengths = {len(scores) for scores in self.held_back.values()}
        if len(lengths) != 1 or not 0 < min(lengths) <= MOST_HELD_BACK:
            raise ValueError(f"the parts of the domain check need equally many held-back scores, 1 to {MOST_HELD_BACK}")
        if min(lengths) < held_back_needed(self.level, len(self.held_back)):
            raise ValueError("the domain check has too few held-back scores for its level: it could refuse nothing")
        damages, held_back = self.damages.values(), np.array([self.held_back[name] for name in self._names()])
        below = [np.searchsorted(np.sort(scores), scores) for scores in held_back]
        ranks = held_back.shape[1] - np.array(below, dtype=np.float64)
        self._arrays = _OfCheck(
            weights=np.array([damage.weights for damage in damages]).reshape(-1, size).T.copy(),
            intercepts=np.array([damage.intercept for damage in damages]),
            held_back=held_back,  # (parts, n)
            ranks=ranks,
            alone=1 / ranks**2,
            joined=1 / (ranks + 1) ** 2,
        )
        return self

    @property
    def size(self) -> int:
        """How many numbers describe a picture: those of its features, then those of its pixels."""
        return len(self.usual.center) + len(self.pixels.center)

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
        return dict(zip(self._names(), map(round_off, worst), strict=True))

    def table(self, pictures: Array) -> Array:
        """Return scores ``(n, parts)`` of pictures ``(n, size)``, in the order of ``scores``; ``inf`` where that is no
        number.
        """
        known, split = self._arrays, len(self.usual.center)
        with np.errstate(over="ignore", invalid="ignore"):
            z = self.usual.standardised(pictures[:, :split])  # (n, D)
            pixels = self.pixels.distance(pictures[:, split:])
            table = np.column_stack([self.usual.distance(z), pixels, z @ known.weights + known.intercepts])
        return np.where(np.isfinite(table), table, math.inf)

    def verdict(self, pictures: Sequence[Sequence[float]]) -> Domain:
        """Tell whether a question about pictures, each described by ``size`` numbers, is like the reference questions.

        Raises what ``scores`` raises.
        """
        return self.verdict_of(self.scores(pictures))

    def verdict_of(self, scores: Mapping[str, float]) -> Domain:
        """Return the verdict that belongs to the parts' scores."""
        known, names = self._arrays, self._names()
        count = known.held_back.shape[1] + 1
        own = [math.inf if math.isnan(score := scores[name]) else score for name in names]
        less = known.held_back < np.array(own)[:, None]  # (parts, n)
        reached = known.held_back <= np.array(own)[:, None]
        rank = [count - below for below in less.sum(1).tolist()]
        sums = np.where(reached, known.joined, known.alone).sum(0)
        mine = math.inf if math.inf in own else sum(1 / each**2 for each in rank)
        # Equal but for rounding counts as equal, here and at the level, which is a bound that is meant to be reached.
        p_value = (1 + int((sums >= mine * (1 - 1e-9)).sum())) / count
        parts = {name: each / count for name, each in zip(names, rank, strict=True)}
        return Domain(p_value=p_value, parts=parts, refused=p_value <= self.level * (1 + 1e-9))

    def _names(self) -> tuple[str, ...]:
        return (USUAL, PIXELS, *self.damages)

    def held_back_p_values(self, part: str) -> Array:
        """Return for every held-back question ``(n,)`` the p-value in a part of another one that scores the same."""
        ranks = self._arrays.ranks[self._names().index(part)]
        found: Array = (1 + ranks) / (len(ranks) + 1)
        return found


class NoDomainCheck(Part):
    """Why a calibration has no domain check, and how many more pictures, without labels, would do."""

    reason: str
    needed_pictures: Count | None = Field(None, description="In all; None: it is not for want of pictures.")


def round_off(value: float) -> float:
    """Return the number to six significant digits: what follows is rounding, and files do not keep it."""
    return float(f"{value:.6g}")


def held_back_needed(level: float, parts: int) -> int:
    """Return how many held-back questions ``parts`` parts need at least, so that ``level`` has room for a question
    that is the strangest in one part alone, beside those that are it in the others.
    """
    return math.ceil(parts / level * (1 - 1e-12)) - 1
