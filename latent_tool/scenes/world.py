"""What a scene is made of: colours, shapes, objects, questions; and the words for places. It draws and asks nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image

Split = Literal["train", "held_out", "hard", "canvas"]
SceneKind = Literal["shapes", "text", "bars"]
Box = tuple[float, float, float, float]
Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "white": (250, 250, 250),
    "red": (220, 25, 25),
    "green": (25, 150, 40),
    "blue": (30, 50, 225),
    "yellow": (240, 220, 20),
    "teal": (0, 140, 140),
    "brown": (130, 75, 25),
    "orange": (250, 135, 10),
    "purple": (130, 30, 165),
    "pink": (250, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "rectangle", "star", "cross", "diamond", "ring")
LETTERS = "ABCDEFGHJKLMNPRSTUVXYZ"
CHARACTERS = "0123456789" + LETTERS
QUESTION_TYPES = (
    "color",
    "shape",
    "count",
    "exist",
    "spatial",
    "relation",
    "where",
    "larger",
    "extreme",
    "more",
    "same",
    "read",
    "number",
    "bar",
    "bar_compare",
    "describe",
)
UNSEEN_COMBINATIONS = (
    ("teal", "star"),
    ("pink", "cross"),
    ("brown", "ring"),
    ("orange", "diamond"),
    ("purple", "triangle"),
    ("gray", "square"),
    ("white", "circle"),
    ("blue", "cross"),
)
SEEDS_PER_SPLIT = 10**9


@dataclass(frozen=True)
class SceneObject:
    """One thing in the picture.

    Args:
        name: one of ``SHAPES``, ``"bar"``, or a single character of ``CHARACTERS``.
        color: a key of ``COLORS``.
        box: bounding box in pixels.
        center: ``(x, y)`` in pixels.
        area: pixels covered by its outline (a ring counts with its hole).
    """

    name: str
    color: str
    box: Box
    center: tuple[float, float]
    area: float

    @property
    def label(self) -> str:
        return f"{self.color} {self.name}"


@dataclass(frozen=True)
class Question:
    """A question about a picture; ``reasoning`` is short, true and leads to ``answer``."""

    type: str
    text: str
    answer: str
    reasoning: str
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Scene:
    """A picture with its questions.

    Args:
        image: an RGB Pillow image of any size and aspect ratio.
        window: where on a canvas the things lie that are asked about, in pixels; ``None`` for other scenes.
    """

    image: Image.Image
    kind: SceneKind
    objects: tuple[SceneObject, ...]
    questions: tuple[Question, ...]
    seed: int
    split: Split
    window: Box | None = None


@dataclass(frozen=True)
class Assets:
    """What the caller lends the generator for variety; without it scenes have plain backgrounds and one font.

    Args:
        photographs: RGB images used as distractor backgrounds.
        fonts: paths of TrueType files used beside Pillow's own font.
    """

    photographs: tuple[Image.Image, ...] = ()
    fonts: tuple[str, ...] = ()


def tenths(position: float, extent: float) -> str:
    """Return a position as the digit ``0`` to ``9`` of its tenth of the canvas."""
    return str(max(0, min(9, int(10 * position / extent))))


def location(center: tuple[float, float], size: tuple[int, int]) -> str:
    """``"top left"``, ``"left"``, ..., ``"center"``: the third of the canvas in which a centre lies."""
    x, y = center[0] / size[0], center[1] / size[1]
    vertical = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else ""
    horizontal = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    return f"{vertical} {horizontal}".strip() or "center"
