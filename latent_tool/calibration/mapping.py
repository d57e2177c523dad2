"""Map a raw score to the probability of being right: the stored function. Knows nothing of how it is fitted."""

from __future__ import annotations

import bisect
import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Count", "Number", "Part", "Probability", "ProbabilityMapping", "log_odds", "logistic"]

# Probabilities nearer to 0 or 1 than this are not told apart: float32 does not hold them.
_EPSILON = 1e-7

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """Base of everything in a calibration file: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProbabilityMapping(Part):
    """A non-decreasing function from a score, larger meaning surer, to a probability.

    ``platt`` and ``temperature``: the logistic function of ``slope * z + intercept``, where ``z`` is the score or, with
    ``logit``, its log-odds. ``isotonic``: straight lines between the points ``(x, y)``, flat beyond the first and last.
    """

    kind: Literal["isotonic", "platt", "temperature"]
    logit: bool = Field(False, description="Whether z is the log-odds of the score, which then lies in [0, 1].")
    slope: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    intercept: Number = 0.0
    x: tuple[Number, ...] = ()
    y: tuple[Probability, ...] = ()

    @model_validator(mode="after")
    def _non_decreasing(self) -> Self:
        if self.kind == "isotonic":
            if not self.x or len(self.x) != len(self.y):
                raise ValueError("an isotonic mapping needs as many x as y, and at least one")
            if any(b <= a for a, b in zip(self.x, self.x[1:], strict=False)):
                raise ValueError("x must rise")
            if any(b < a for a, b in zip(self.y, self.y[1:], strict=False)):
                raise ValueError("y must not fall")
        return self

    def __call__(self, score: float) -> float:
        """The probability, in [0, 1], that belongs to a finite score."""
        if self.kind == "isotonic":
            place = bisect.bisect_left(self.x, score)
            if place == 0:
                return self.y[0]
            if place == len(self.x):
                return self.y[-1]
            left, right = self.x[place - 1], self.x[place]
            low, high = self.y[place - 1], self.y[place]
            return min(high, low + (high - low) * (score - left) / (right - left))
        return logistic(self.slope * (log_odds(score) if self.logit else score) + self.intercept)


def log_odds(probability: float) -> float:
    """Return log-odds of a probability that is kept away from 0 and 1."""
    kept = min(max(probability, _EPSILON), 1 - _EPSILON)
    return math.log(kept / (1 - kept))


def logistic(value: float) -> float:
    """Return the inverse of ``log_odds``, for any finite value."""
    if value < 0:
        power = math.exp(max(value, -700.0))
        return power / (1 + power)
    return 1 / (1 + math.exp(-value))
