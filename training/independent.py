"""A second world, kept apart: training never draws with it, and it shares no drawing code and no wording with it.

Shapes are signed distance functions, anti-aliased analytically on their own palette, sizes, canvases and
backgrounds; characters use other fonts; bars have round corners. Questions use sentences of their own. Only the
vocabulary (names of colours, shapes and directions) and the definitions (what counts as ``left of``) are shared.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from latent_tool.errors import MissingExtraError
from latent_tool.scenes import Box, Question

Array = NDArray[np.float64]
Distance = Callable[[Array, Array], Array]

PALETTE = {
    "black": (30, 30, 34),
    "gray": (120, 124, 130),
    "white": (242, 242, 238),
    "red": (204, 36, 29),
    "green": (44, 160, 44),
    "blue": (40, 70, 200),
    "yellow": (250, 210, 40),
    "teal": (10, 130, 130),
    "brown": (120, 66, 30),
    "orange": (255, 127, 20),
    "purple": (120, 40, 150),
    "pink": (245, 140, 185),
}


@dataclass(frozen=True)
class Picture:
    """A picture with questions; boxes are in its pixels."""

    image: Image.Image
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class _Thing:
    shape: str
    color: str
    x: float
    y: float
    radius: float
    area: float
    box: Box

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


def picture(seed: int) -> Picture:
    """The picture of a seed."""
    rng = random.Random(f"independent {seed}")
    draw = rng.random()
    if draw < 0.15:
        return _characters(rng)
    return _chart(rng) if draw < 0.3 else _shapes(rng)


# --- signed distances, in pixels, negative inside ----------------------------------------------------------------


def _circle(r: float) -> Distance:
    return lambda x, y: np.hypot(x, y) - r


def _rectangle(a: float, b: float, round_by: float = 0.0) -> Distance:
    def distance(x: Array, y: Array) -> Array:
        u, v = np.abs(x) - a + round_by, np.abs(y) - b + round_by
        outside = np.hypot(np.maximum(u, 0), np.maximum(v, 0))
        return outside + np.minimum(np.maximum(u, v), 0) - round_by

    return distance


def _wedges(corners: list[tuple[float, float]]) -> Distance:
    """A polygon: distance to the nearest edge, with the sign of an even-odd test."""

    def distance(x: Array, y: Array) -> Array:
        best, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
            dx, dy = x2 - x1, y2 - y1
            t = np.clip(((x - x1) * dx + (y - y1) * dy) / (dx * dx + dy * dy), 0, 1)
            best = np.minimum(best, np.hypot(x - x1 - t * dx, y - y1 - t * dy))
            crosses = (y1 > y) != (y2 > y)
            inside ^= crosses & (x < (y - y1) * dx / (dy if dy else 1e-9) + x1)
        return np.where(inside, -best, best)

    return distance


def _build(rng: random.Random, shape: str, r: float) -> tuple[Distance, float, tuple[float, float]]:
    """Distance, area and half extents of a shape of size ``r``."""
    if shape == "circle":
        return _circle(r), math.pi * r * r, (r, r)
    if shape == "ring":
        band = r * rng.uniform(0.16, 0.22)
        return (lambda x, y: np.abs(np.hypot(x, y) - (r - band)) - band), math.pi * r * r, (r, r)
    if shape == "square":
        a = 0.86 * r
        return _rectangle(a, a, r * rng.choice((0.0, 0.12))), 4 * a * a, (a, a)
    if shape == "rectangle":
        a, b = (r, r * rng.uniform(0.4, 0.5))
        if rng.random() < 0.5:
            a, b = b, a
        return _rectangle(a, b), 4 * a * b, (a, b)
    if shape == "cross":
        w = rng.uniform(0.28, 0.36) * r
        one, other = _rectangle(r, w), _rectangle(w, r)
        return (lambda x, y: np.minimum(one(x, y), other(x, y))), 8 * r * w - 4 * w * w, (r, r)
    if shape == "diamond":
        w = 0.78 * r
        return _wedges([(0, -r), (w, 0), (0, r), (-w, 0)]), 2 * r * w, (w, r)
    if shape == "triangle":
        corners = [(r * math.sin(a), -r * math.cos(a)) for a in (0.0, math.tau / 3, 2 * math.tau / 3)]
        return _wedges(corners), 1.3 * r * r, (0.87 * r, r)
    spokes = [(r if k % 2 == 0 else 0.42 * r, k * math.pi / 5) for k in range(10)]
    return _wedges([(q * math.sin(a), -q * math.cos(a)) for q, a in spokes]), 1.25 * r * r, (r, r)


def _paint(canvas: Array, distance: Distance, x: float, y: float, turn: float, color: tuple[int, int, int]) -> None:
    """Blend a colour into ``(high, wide, 3)`` by analytic coverage."""
    high, wide, _ = canvas.shape
    v, u = np.mgrid[0:high, 0:wide].astype(np.float64) + 0.5
    u, v = u - x, v - y
    u, v = u * math.cos(turn) + v * math.sin(turn), v * math.cos(turn) - u * math.sin(turn)
    cover = np.clip(0.5 - distance(u, v), 0, 1)[..., None]
    canvas += cover * (np.asarray(color, np.float64) - canvas)


def _paper(rng: random.Random) -> tuple[Array, Array]:
    """A canvas and its mean colour."""
    short = rng.randint(110, 300)
    aspect = rng.choice((1.0, 1.0, 4 / 3, 3 / 4, 1.25, 0.8, 1.6))
    wide, high = round(short * max(1, aspect)), round(short * max(1, 1 / aspect))
    base = np.asarray(rng.choice(((255, 255, 255), (236, 240, 241), (250, 244, 225), (24, 26, 32), (222, 226, 240))))
    canvas = np.ones((high, wide, 3)) * base
    style = rng.random()
    v, u = np.mgrid[0:high, 0:wide]
    if style < 0.25:
        far = np.hypot(u / wide - 0.5, v / high - 0.5)[..., None]
        canvas += far * rng.choice((-40, 30))
    elif style < 0.4:
        canvas += (((u // 12 + v // 12) % 2) * 2 - 1)[..., None] * 4
    return np.clip(canvas, 0, 255), base


def _photo(canvas: Array) -> Image.Image:
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))


# --- shapes ----------------------------------------------------------------------------------------------------


def _shapes(rng: random.Random) -> Picture:
    canvas, base = _paper(rng)
    high, wide, _ = canvas.shape
    short = min(high, wide)
    colors = [c for c, rgb in PALETTE.items() if np.abs(np.asarray(rgb) - base).sum() > 170]
    shapes = ["circle", "triangle", "star", "cross", "diamond", "ring"]
    if max(high, wide) / short < 1.34:
        shapes += ["square", "rectangle"]
    if rng.random() < 0.4:
        shapes = rng.sample(shapes, 2)
    if rng.random() < 0.4:
        colors = rng.sample(colors, 3)
    count = rng.choices(range(1, 9), (2, 3, 3, 3, 2, 2, 1, 1))[0]
    things: list[_Thing] = []
    for _ in range(count * 40):
        if len(things) == count:
            break
        r = short * rng.uniform(0.07, 0.2 if count < 4 else 0.13)
        x, y = rng.uniform(r + 2, wide - r - 2), rng.uniform(r + 2, high - r - 2)
        if any(max(abs(x - t.x), abs(y - t.y)) < r + t.radius + 0.02 * short for t in things):
            continue
        shape, color = rng.choice(shapes), rng.choice(colors)
        distance, area, (a, b) = _build(rng, shape, r)
        shade = tuple(max(0, min(255, v + rng.randint(-10, 10))) for v in PALETTE[color])
        turn = rng.uniform(-0.15, 0.15) if rng.random() < 0.3 else 0.0
        _paint(canvas, distance, x, y, turn, shade)  # type: ignore[arg-type]
        things.append(_Thing(shape, color, x, y, r, area, (x - a, y - b, x + a, y + b)))
    return Picture(_photo(canvas), tuple(_ask(rng, things, (wide, high))))


def _many(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _ask(rng: random.Random, things: list[_Thing], size: tuple[int, int]) -> list[Question]:
    pick = rng.choice
    wide, high = size
    colors = [t.color for t in things]
    shapes = [t.shape for t in things]
    names = [t.name for t in things]
    alone = [t for t in things if names.count(t.name) == 1]
    asked: list[Question] = []

    def add(kind: str, text: str, answer: str, *about: _Thing) -> None:
        asked.append(Question(kind, text, answer, "", tuple(t.box for t in about)))

    for t in things:
        if shapes.count(t.shape) == 1:
            add(
                "color",
                pick(
                    (
                        f"what color would you say the {t.shape} is?",
                        f"the color of this {t.shape} is?",
                        f"I see one {t.shape}, what is its color?",
                        f"which color was used for the {t.shape}?",
                    )
                ),
                t.color,
                t,
            )
        if colors.count(t.color) == 1:
            add(
                "shape",
                pick(
                    (
                        f"what shape would you call the {t.color} one?",
                        f"there is something {t.color} here, what shape is it?",
                        f"what do you see that is {t.color}?",
                        f"the {t.color} one is what kind of shape?",
                    )
                ),
                t.shape,
                t,
            )
    shape, color = pick(shapes), pick(colors)
    same_shape = [t for t in things if t.shape == shape]
    same_color = [t for t in things if t.color == color]
    add(
        "count",
        pick(
            (
                f"tell me how many {_many(shape)} there are.",
                f"how many of the shapes are {_many(shape)}?",
                f"in this picture, how many {_many(shape)} are there?",
            )
        ),
        str(len(same_shape)),
        *same_shape,
    )
    add(
        "count",
        pick(
            (
                f"how many shapes are {color}?",
                f"tell me how many {color} shapes there are.",
                f"how many of the objects are {color}?",
            )
        ),
        str(len(same_color)),
        *same_color,
    )
    add(
        "count",
        pick(
            (
                "how many shapes are there in all?",
                "what is the total number of shapes here?",
                "in this picture, how many objects are there?",
            )
        ),
        str(len(things)),
        *things,
    )
    t = pick(things)
    add(
        "exist",
        pick(
            (f"can a {t.name} be seen?", f"does a {t.name} appear in the picture?", f"is one of the shapes a {t.name}?")
        ),
        "yes",
        *[o for o in things if o.name == t.name],
    )
    absent = f"{pick(colors)} {pick(shapes)}" if rng.random() < 0.5 else f"{pick(list(PALETTE))} {pick(shapes)}"
    if absent not in names:
        add(
            "exist",
            pick(
                (
                    f"can a {absent} be seen?",
                    f"does a {absent} appear in the picture?",
                    f"is one of the shapes a {absent}?",
                )
            ),
            "no",
        )
    sides = {
        "left": (0, -1, ("on the left of", "to the left of")),
        "right": (0, 1, ("on the right of", "to the right of")),
        "above": (1, -1, ("above", "higher up than")),
        "below": (1, 1, ("below", "lower down than")),
    }

    def at(o: _Thing, axis: int) -> float:
        return (o.x / wide, o.y / high)[axis]

    if len(alone) > 1:
        one, other = rng.sample(alone, 2)
        axis, sign, words = sides[pick(list(sides))]
        gap = (at(one, axis) - at(other, axis)) * sign
        if abs(gap) > 0.08:
            add(
                "relation",
                pick(
                    (
                        f"would you say the {one.name} is {pick(words)} the {other.name}?",
                        f"can the {one.name} be found {pick(words)} the {other.name}?",
                        f"comparing the two, is the {one.name} {pick(words)} the {other.name}?",
                    )
                ),
                "yes" if gap > 0 else "no",
                one,
                other,
            )
        if max(one.area / other.area, other.area / one.area) > 1.5:
            big = rng.random() < 0.6
            word = pick(("larger", "bigger")) if big else "smaller"
            winner = one if (one.area > other.area) == big else other
            add(
                "larger",
                pick(
                    (
                        f"tell me which is {word}, the {one.name} or the {other.name}.",
                        f"the {one.name} or the {other.name}, which one is {word}?",
                    )
                ),
                winner.name,
                one,
                other,
            )
    if alone:
        o = pick(alone)
        dx, dy = at(o, 0) - 0.5, at(o, 1) - 0.5
        if min(abs(dx), abs(dy)) > 0.14:
            answer = f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"
            add(
                "where",
                pick(
                    (
                        f"where has the {o.name} been placed?",
                        f"which corner is the {o.name} in?",
                        f"tell me in which part of the picture the {o.name} is.",
                    )
                ),
                answer,
                o,
            )
        for _ in range(4):
            o = pick(alone)
            axis, sign, words = sides[pick(list(sides))]
            gaps = [((at(p, axis) - at(o, axis)) * sign, p) for p in things if p is not o]
            beyond = [p for gap, p in gaps if gap > 0.08]
            if len(beyond) == 1 and not any(0 < gap <= 0.08 for gap, _ in gaps):
                add(
                    "spatial",
                    pick(
                        (
                            f"which one is {pick(words)} the {o.name}?",
                            f"looking at the {o.name}, what shape is {pick(words)} it?",
                            f"what is found {pick(words)} the {o.name}?",
                        )
                    ),
                    beyond[0].name,
                    o,
                    beyond[0],
                )
                break
    if len(things) > 2:
        measures: tuple[tuple[str, Callable[[Any], float]], ...] = (
            ("highest", lambda q: q.y / high),
            ("lowest", lambda q: -q.y / high),
            ("leftmost", lambda q: q.x / wide),
            ("rightmost", lambda q: -q.x / wide),
        )
        for word, key in measures:
            ranked = sorted(things, key=key)
            if rng.random() < 0.3 and key(ranked[1]) - key(ranked[0]) > 0.07:
                add(
                    "extreme",
                    pick(
                        (
                            f"of all the shapes, which one is the {word}?",
                            f"what is the {word} shape called?",
                            f"which of the objects is the {word} one?",
                        )
                    ),
                    ranked[0].name,
                    *ranked[:2],
                )
        ranked = sorted(things, key=lambda q: -q.area)
        if ranked[0].area / ranked[1].area > 1.5:
            add(
                "extreme",
                pick(("of all the shapes, which one is the biggest?", "which of the objects is the largest one?")),
                ranked[0].name,
                *ranked[:2],
            )
    if len(set(colors)) > 1:
        one_color, other_color = rng.sample(sorted(set(colors)), 2)
        more = colors.count(one_color) > colors.count(other_color)
        about = [t for t in things if t.color in (one_color, other_color)]
        add(
            "more",
            pick(
                (
                    f"would you say there are more {one_color} shapes than {other_color} shapes?",
                    f"are more of the shapes {one_color} than {other_color}?",
                )
            ),
            "yes" if more else "no",
            *about,
        )
    rng.shuffle(asked)
    return asked[:7]


# --- characters ------------------------------------------------------------------------------------------------


def _characters(rng: random.Random) -> Picture:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("The independent evaluation", "train") from error
    canvas, base = _paper(rng)
    image = _photo(canvas)
    color = rng.choice([c for c, rgb in PALETTE.items() if np.abs(np.asarray(rgb) - base).sum() > 220])
    numeric = rng.random() < 0.6
    text = str(rng.randint(0, 999)) if numeric else rng.choice("ABCDEFGHJKLMNPRSTUVXYZ")
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    name = rng.choice(("STIXGeneral.ttf", "STIXGeneralBol.ttf", "cmss10.ttf", "DejaVuSansDisplay.ttf"))
    if name == "DejaVuSansDisplay.ttf":
        name = "DejaVuSansMono.ttf"
    font = ImageFont.truetype(str(folder / name), round(min(image.size) * rng.uniform(0.35, 0.55)))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    x = rng.uniform(4, max(5, image.width - (right - left) - 4))
    y = rng.uniform(4, max(5, image.height - (bottom - top) - 4))
    draw.text((x - left, y - top), text, font=font, fill=PALETTE[color])
    boxes = ((x, y, x + right - left, y + bottom - top),)
    kind, shown = ("number" if numeric else "letter"), text.lower()
    asked = [
        Question(
            "read",
            rng.choice((f"can you read this {kind}?", f"say which {kind} it is.", f"which {kind} was written here?")),
            shown,
            "",
            boxes,
        ),
        Question(
            "color",
            rng.choice((f"what color was the {kind} written in?", f"the {kind} has been printed in what color?")),
            color,
            "",
            boxes,
        ),
    ]
    if numeric:
        asked.append(
            Question(
                "number",
                rng.choice(("would you call this number even?", "can the number be called even?")),
                "yes" if int(text) % 2 == 0 else "no",
                "",
                boxes,
            )
        )
        asked.append(
            Question(
                "count",
                rng.choice(("tell me how many digits there are.", "how many digits is the number made of?")),
                str(len(text)),
                "",
                boxes,
            )
        )
    return Picture(image, tuple(asked))


# --- charts ----------------------------------------------------------------------------------------------------


def _chart(rng: random.Random) -> Picture:
    canvas, base = _paper(rng)
    high, wide, _ = canvas.shape
    colors = [c for c, rgb in PALETTE.items() if np.abs(np.asarray(rgb) - base).sum() > 170]
    colors = rng.sample(colors, rng.randint(3, 6))
    values = rng.sample(range(3, 17), len(colors))
    slot = wide * 0.86 / len(colors)
    boxes: dict[str, Box] = {}
    for k, (color, value) in enumerate(zip(colors, values, strict=True)):
        x0, x1 = wide * 0.09 + (k + 0.15) * slot, wide * 0.09 + (k + 0.85) * slot
        y1 = high * 0.9
        y0 = y1 - high * 0.8 * value / 17
        bar = _rectangle((x1 - x0) / 2, (y1 - y0) / 2, min(0.2 * (x1 - x0), 4.0))
        _paint(canvas, bar, (x0 + x1) / 2, (y0 + y1) / 2, 0.0, PALETTE[color])
        boxes[color] = (x0, y0, x1, y1)
    ink = (60, 60, 60) if base.sum() > 380 else (200, 200, 200)
    _paint(canvas, _rectangle(wide * 0.45, 0.8), wide / 2, high * 0.9 + 1, 0.0, ink)
    ranked = sorted(colors, key=lambda c: values[colors.index(c)])
    one, other = rng.sample(colors, 2)
    taller = values[colors.index(one)] > values[colors.index(other)]
    k = rng.randrange(len(colors) - 1)
    pick = rng.choice
    asked = [
        Question(
            "bar",
            pick(
                (
                    "of all the bars, which one is the tallest?",
                    "which color does the highest bar have?",
                    "tell me the color of the tallest bar.",
                )
            ),
            ranked[-1],
            "",
            (boxes[ranked[-1]],),
        ),
        Question(
            "bar",
            pick(("of all the bars, which one is the shortest?", "tell me the color of the smallest bar.")),
            ranked[0],
            "",
            (boxes[ranked[0]],),
        ),
        Question(
            "count",
            pick(("tell me how many bars there are.", "what is the total number of bars here?")),
            str(len(colors)),
            "",
            tuple(boxes.values()),
        ),
        Question(
            "bar_compare",
            pick(
                (
                    f"would you say the {one} bar is taller than the {other} bar?",
                    f"comparing the two, is the {one} bar taller than the {other} bar?",
                )
            ),
            "yes" if taller else "no",
            "",
            (boxes[one], boxes[other]),
        ),
        Question(
            "spatial",
            pick(
                (
                    f"which bar comes directly to the right of the {colors[k]} bar?",
                    f"looking at the {colors[k]} bar, which bar is right of it?",
                )
            ),
            colors[k + 1],
            "",
            (boxes[colors[k]], boxes[colors[k + 1]]),
        ),
    ]
    return Picture(_photo(canvas), tuple(asked))
