"""Plain answers to the questions of a study, and how good they are: what is kept of them, and what is read off them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from latent_tool.evaluation.datasets import Box
from latent_tool.evaluation.matching import normalise

__all__ = ["Drawn", "Question", "attention_lift", "word_f1"]


class Part(BaseModel):
    """Base of what is collected: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Drawn(Part):
    """One drawn reasoning sequence with its answer."""

    correct: bool
    confidence: float | None
    reasoning: str
    quality: float | None
    reasoning_dependency: tuple[float, ...]
    answer_dependency: tuple[float, ...]

    @property
    def dependency(self) -> float:
        """Mean S over all tokens of the sequence."""
        values = (*self.reasoning_dependency, *self.answer_dependency)
        return math.fsum(values) / len(values)


class Question(Part):
    """One question: the search's answer, and the sequences that were drawn for it."""

    id: str
    correct: bool
    confidence: float | None
    rewards: tuple[float, ...]
    grounding: float | None
    sequences: tuple[Drawn, ...]


def word_f1(text: str, truth: str) -> float:
    """Return the harmonic mean of precision and recall of the words of a text, in [0, 1]; order does not count."""
    one, other = Counter(normalise(text).split()), Counter(normalise(truth).split())
    shared = (one & other).total()
    return 2 * shared / (one.total() + other.total()) if shared else 0.0


def attention_lift(attention: Sequence[float], cells: Sequence[Box | None], boxes: Sequence[Box]) -> float | None:
    """Return the share of the attention on the relevant boxes less the share of the picture they cover, in [-1, 1].

    ``None`` without relevant boxes, without attention, or where the place of a cell is not known.
    """
    if not boxes or not attention or len(attention) != len(cells) or math.fsum(attention) <= 0:
        return None
    covered = []
    for cell in cells:
        if cell is None:
            return None
        covered.append(max(_overlap(cell, box) for box in boxes))
    on_boxes = math.fsum(a * c for a, c in zip(attention, covered, strict=True)) / math.fsum(attention)
    return on_boxes - math.fsum(covered) / len(covered)


def _overlap(cell: Box, box: Box) -> float:
    """Share of a cell that a box covers."""
    wide = min(cell[2], box[2]) - max(cell[0], box[0])
    high = min(cell[3], box[3]) - max(cell[1], box[1])
    area = (cell[2] - cell[0]) * (cell[3] - cell[1])
    return max(wide, 0.0) * max(high, 0.0) / area if area > 0 else 0.0
