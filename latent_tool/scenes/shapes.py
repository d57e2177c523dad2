"""The synthetic world of the embedded model: pictures, questions, answers, true reasoning and relevant boxes.

``generate(seed, split)`` draws one picture (coloured shapes, printed characters or a bar chart, now and then
nothing at all) and asks questions about it. Everything is decided by ``(seed, split)`` alone, so a data set is
a range of seeds:

* ``"train"``     what the shipped model was trained on;
* ``"held_out"``  the same distribution, from a stream of random numbers that training never touches;
* ``"hard"``      more and smaller objects, longer numbers, crowded charts, and colour-shape combinations
  (``UNSEEN_COMBINATIONS``) that occur in no training picture and in no training question.

Boxes are ``(left, top, right, bottom)`` in pixels of ``Scene.image``. ``Question.boxes`` holds what the answer
rests on; it is empty when nothing in the picture does (``is there a star?`` - ``no``).

This module needs Pillow and numpy alone. It knows nothing of models, tokens, cells or training.
"""

from __future__ import annotations

import io
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from latent_tool.errors import SettingsError

__all__ = [
    "CHARACTERS",
    "COLORS",
    "QUESTION_TYPES",
    "SEEDS_PER_SPLIT",
    "SHAPES",
    "UNSEEN_COMBINATIONS",
    "Assets",
    "Box",
    "Question",
    "Scene",
    "SceneKind",
    "SceneObject",
    "Split",
    "bar_questions",
    "generate",
    "location",
    "plural",
    "tenths",
]

Split = Literal["train", "held_out", "hard"]
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
_STREAM: dict[str, int] = {"train": 0, "held_out": SEEDS_PER_SPLIT, "hard": 2 * SEEDS_PER_SPLIT}

_BACKGROUNDS: dict[str, Color] = {
    "white": (248, 248, 248),
    "black": (10, 10, 10),
    "gray": (175, 175, 175),
    "light blue": (195, 220, 245),
    "beige": (240, 228, 200),
    "dark blue": (20, 25, 70),
    "light green": (205, 240, 205),
}
_MARGIN = 0.075  # two positions nearer than this share of the canvas are not told apart
_SIZE_RATIO = 1.35  # two areas nearer than this are not told apart
# A picture is stretched to a square before the model sees it: beyond this aspect ratio a square cannot be told
# from a rectangle, so such canvases carry neither.
_MAX_ASPECT_WITH_SQUARES = 1.34


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
    """A picture with its questions. ``image`` is an RGB Pillow image of any size and aspect ratio."""

    image: Image.Image
    kind: SceneKind
    objects: tuple[SceneObject, ...]
    questions: tuple[Question, ...]
    seed: int
    split: Split


@dataclass(frozen=True)
class Assets:
    """What the caller lends the generator for variety; without it scenes have plain backgrounds and one font.

    Args:
        photographs: RGB images used as distractor backgrounds.
        fonts: paths of TrueType files used beside Pillow's own font.
    """

    photographs: tuple[Image.Image, ...] = ()
    fonts: tuple[str, ...] = ()


_NO_ASSETS = Assets()


def generate(
    seed: int,
    split: Split = "held_out",
    kind: SceneKind | None = None,
    max_questions: int = 9,
    assets: Assets = _NO_ASSETS,
    objects: int | None = None,
) -> Scene:
    """The scene of ``(seed, split)``; the same arguments give the same scene on every machine and at any time.

    Args:
        seed: which scene; ``0 <= seed < SEEDS_PER_SPLIT``.
        split: which stream of random numbers and which difficulty; streams never overlap.
        kind: fixes what is drawn; ``None`` lets the seed decide.
        max_questions: at most so many questions are asked.
        assets: photographs and fonts; other assets give another picture.
        objects: fixes how many shapes, digits or bars are drawn, as far as there is room; ``None`` lets the seed
            decide.

    Raises:
        SettingsError: an unknown split or kind, a seed outside its range, or ``objects`` outside 0 to 9.
    """
    if split not in get_args(Split):
        raise SettingsError(f"There is no split {split!r}.", f"Use one of {', '.join(get_args(Split))}.")
    if kind is not None and kind not in get_args(SceneKind):
        raise SettingsError(f"There is no scene kind {kind!r}.", f"Use one of {', '.join(get_args(SceneKind))}.")
    if not 0 <= seed < SEEDS_PER_SPLIT:
        raise SettingsError(f"Seed {seed} is out of range.", f"Use 0 <= seed < {SEEDS_PER_SPLIT}.")
    if objects is not None and not 0 <= objects <= 9:
        raise SettingsError(f"A scene cannot have {objects} objects.", "Use 0 to 9.")
    rng = random.Random(_STREAM[split] + seed)
    drawn = rng.random()
    if kind is None:
        kind = "text" if drawn < 0.17 else "bars" if drawn < 0.30 else "shapes"
    build = {"shapes": _shapes_scene, "text": _text_scene, "bars": _bars_scene}[kind]
    image, things, questions = build(_Context(rng, split, assets, objects))
    rng.shuffle(questions)
    polished = tuple(_polish(rng, question) for question in questions[:max_questions])
    return Scene(image, kind, tuple(things), polished, seed, split)


def plural(word: str) -> str:
    """``"cross"`` -> ``"crosses"``."""
    return word + ("es" if word.endswith("s") else "s")


def tenths(position: float, extent: float) -> str:
    """A position as the digit ``0`` to ``9`` of its tenth of the canvas."""
    return str(max(0, min(9, int(10 * position / extent))))


def location(center: tuple[float, float], size: tuple[int, int]) -> str:
    """``"top left"``, ``"left"``, ..., ``"center"``: the third of the canvas in which a centre lies."""
    x, y = center[0] / size[0], center[1] / size[1]
    vertical = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else ""
    horizontal = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    return f"{vertical} {horizontal}".strip() or "center"


# --- wording ---------------------------------------------------------------------------------------------------

_CHOICE = re.compile(r"\{([^{}]*)\}")
_SYNONYMS = {
    "COLOR": ("color", "color", "color", "colour"),
    "IMAGE": ("image", "image", "picture", "picture", "photo", "scene", "drawing"),
    "THING": ("shape", "shape", "object", "object", "thing", "figure", "item"),
}
_OPENINGS = ("please tell me, ", "look at the picture: ", "please answer: ", "question: ", "tell me: ", "hey, ")
_ENDINGS = (" answer with one word.", " please.", " answer briefly.", " use a single word.", " thanks!")


def _expand(rng: random.Random, template: str) -> str:
    """Resolve ``{a|b}`` alternatives, innermost first, and the synonyms ``COLOR``, ``IMAGE`` and ``THING``."""
    while found := _CHOICE.search(template):
        template = template[: found.start()] + rng.choice(found.group(1).split("|")) + template[found.end() :]
    for word, choices in _SYNONYMS.items():
        while word in template:
            template = template.replace(word, rng.choice(choices), 1)
    return template


def _polish(rng: random.Random, question: Question) -> Question:
    """Now and then an opening, an ending or no question mark; always a capital letter, as people write."""
    text = question.text
    if rng.random() < 0.06 and text.endswith("?"):
        text = text[:-1]
    elif rng.random() < 0.06:
        text = text + rng.choice(_ENDINGS)
    if rng.random() < 0.06:
        text = rng.choice(_OPENINGS) + text
    return Question(question.type, text[0].upper() + text[1:], question.answer, question.reasoning, question.boxes)


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


# --- drawing ---------------------------------------------------------------------------------------------------


@dataclass
class _Context:
    """The state of one scene while it is drawn."""

    rng: random.Random
    split: Split
    assets: Assets
    objects: int | None = None
    size: tuple[int, int] = (96, 96)
    background: tuple[Color, ...] = field(default_factory=tuple)

    @property
    def hard(self) -> bool:
        return self.split == "hard"

    @property
    def unit(self) -> float:
        """1/96 of the shorter side, in pixels: the measure of all sizes."""
        return min(self.size) / 96

    def allowed(self, color: str, shape: str) -> bool:
        return self.hard or (color, shape) not in UNSEEN_COMBINATIONS


def _jitter(rng: random.Random, color: Color, amount: int = 14) -> Color:
    red, green, blue = (max(0, min(255, value + rng.randint(-amount, amount))) for value in color)
    return red, green, blue


def _distance(one: Color, other: Color) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def _blend(one: Color, other: Color, share: float) -> Color:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _canvas(context: _Context, with_photographs: bool = True) -> Image.Image:
    """A background; sets ``context.size`` and the colours that objects must stand out from."""
    rng = context.rng
    short = rng.choice((64, 80, 96, 96, 112, 128, 160, 192))
    aspect = 1.0 if rng.random() < 0.45 else math.exp(rng.uniform(-0.29, 0.29))
    if rng.random() < 0.08:
        aspect = math.exp(rng.choice((-1, 1)) * rng.uniform(0.3, 0.75))
    context.size = (round(short * max(1.0, aspect)), round(short * max(1.0, 1 / aspect)))
    base = _jitter(rng, _BACKGROUNDS[rng.choices(list(_BACKGROUNDS), (6, 2, 2, 2, 2, 1, 1))[0]], 10)
    style = rng.random()
    photographs = context.assets.photographs
    if with_photographs and photographs and style < 0.08:
        return _photograph(context, rng.choice(photographs))
    if style < 0.2:
        other = _blend(base, rng.choice(((255, 255, 255), (0, 0, 0), (120, 140, 200), (200, 160, 120))), 0.22)
        context.background = (base, other)
        return _gradient(rng, context.size, base, other)
    image = Image.new("RGB", context.size, base)
    context.background = (base,)
    if style < 0.26:
        other = _blend(base, (128, 128, 128), 0.25)
        context.background = (base, other)
        draw, step = ImageDraw.Draw(image), rng.randint(5, 16)
        for offset in range(0, sum(context.size), step):
            draw.line((offset, 0, offset - context.size[1], context.size[1]), fill=other, width=1)
    return image


def _photograph(context: _Context, photograph: Image.Image) -> Image.Image:
    """A random crop of a photograph, washed out towards white or black so that objects stand out."""
    rng, (width, height) = context.rng, context.size
    share = rng.uniform(0.4, 1.0)
    crop_w, crop_h = max(2, int(photograph.width * share)), max(2, int(photograph.height * share))
    left, top = rng.randint(0, photograph.width - crop_w), rng.randint(0, photograph.height - crop_h)
    crop = photograph.crop((left, top, left + crop_w, top + crop_h)).resize((width, height), Image.Resampling.BILINEAR)
    goal: Color = rng.choice(((255, 255, 255), (0, 0, 0)))
    image = Image.blend(crop, Image.new("RGB", crop.size, goal), rng.uniform(0.35, 0.7))
    pixels = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float64).reshape(-1, 3)
    low, mean, high = (np.quantile(pixels, q, axis=0) for q in (0.1, 0.5, 0.9))
    context.background = tuple((int(c[0]), int(c[1]), int(c[2])) for c in (low, mean, high))
    return image


def _gradient(rng: random.Random, size: tuple[int, int], one: Color, other: Color) -> Image.Image:
    """A linear gradient between two colours, in one of four directions."""
    corners = [one, one, other, other]
    if rng.random() < 0.5:
        corners = [one, other, one, other]
    if rng.random() < 0.5:
        corners.reverse()
    small = Image.new("RGB", (2, 2))
    small.putdata(corners)
    return small.resize(size, Image.Resampling.BILINEAR)


def _finish(context: _Context, image: Image.Image) -> Image.Image:
    """Camera and file artefacts: sensor noise, blur, JPEG."""
    rng = context.rng
    if rng.random() < 0.06:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8) * context.unit))
    if rng.random() < 0.3:
        noise = np.random.default_rng(rng.getrandbits(63)).integers(-9, 10, (image.height, image.width, 3))
        image = Image.fromarray((np.asarray(image, dtype=np.int16) + noise).clip(0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(55, 95))
        image = Image.open(buffer).convert("RGB")
    return image


def _visible(context: _Context, contrast: int) -> list[str]:
    """Colour names that stand out from the background."""
    names = [n for n, c in COLORS.items() if all(_distance(c, b) > contrast for b in context.background)]
    return names or sorted(COLORS, key=lambda n: -min(_distance(COLORS[n], b) for b in context.background))[:4]


def _polygon(rng: random.Random, shape: str) -> list[tuple[float, float]]:
    """The outline of a shape within the square from -1 to 1."""
    if shape in ("circle", "ring"):
        return [(math.cos(math.tau * k / 40), math.sin(math.tau * k / 40)) for k in range(40)]
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "rectangle":
        long, short = 1.0, rng.uniform(0.36, 0.52)
        a, b = (long, short) if rng.random() < 0.5 else (short, long)
        return [(-a, -b), (a, -b), (a, b), (-a, b)]
    if shape == "triangle":
        tip = rng.choice((1, 1, 1, -1))
        return [(0, -tip), (-1, 0.8 * tip), (1, 0.8 * tip)]
    if shape == "diamond":
        wide = rng.uniform(0.68, 0.85)
        return [(0, -1), (wide, 0), (0, 1), (-wide, 0)]
    if shape == "cross":
        w = rng.uniform(0.26, 0.38)
        quarter = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w)]
        return [*quarter, (-w, -w)]
    inner = rng.uniform(0.4, 0.5)  # a star
    spikes = ((-math.pi / 2 + k * math.pi / 5, inner if k % 2 else 1.0) for k in range(10))
    return [(r * math.cos(a), r * math.sin(a)) for a, r in spikes]


def _draw_shape(
    context: _Context, image: Image.Image, shape: str, color: str, center: tuple[float, float], half: float
) -> SceneObject:
    """Draw one shape of half extent ``half`` (pixels) and return what was drawn."""
    rng = context.rng
    outline = _polygon(rng, shape)
    turn = math.radians(rng.uniform(-13, 13)) if rng.random() < 0.4 else 0.0
    cos, sin = math.cos(turn) * half, math.sin(turn) * half
    points = [(center[0] + x * cos - y * sin, center[1] + x * sin + y * cos) for x, y in outline]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    box = (min(xs), min(ys), max(xs), max(ys))
    left, top = math.floor(box[0]) - 1, math.floor(box[1]) - 1
    wide, high = math.ceil(box[2]) + 2 - left, math.ceil(box[3]) + 2 - top
    scale = 1 if rng.random() < 0.25 else 3  # aliased, or supersampled

    def mask(shrink: float, hole: float = 0.0) -> Image.Image:
        stencil = Image.new("L", (wide * scale, high * scale))
        draw = ImageDraw.Draw(stencil)
        for factor, value in ((shrink, 255), (hole, 0)):
            if factor:
                draw.polygon(
                    [
                        (
                            (center[0] + (x - center[0]) * factor - left) * scale,
                            (center[1] + (y - center[1]) * factor - top) * scale,
                        )
                        for x, y in points
                    ],
                    fill=value,
                )
        return stencil if scale == 1 else stencil.resize((wide, high), Image.Resampling.BOX)

    paint = _jitter(rng, COLORS[color])
    style = rng.random()
    if shape == "ring":
        image.paste(paint, (left, top), mask(1.0, rng.uniform(0.55, 0.7)))
    elif style < 0.15 and half > 8 * context.unit:  # outlined
        edge: Color = rng.choice(((0, 0, 0), (40, 40, 40), (255, 255, 255), _blend(paint, (0, 0, 0), 0.5)))
        image.paste(edge, (left, top), mask(1.0))
        image.paste(paint, (left, top), mask(rng.uniform(0.8, 0.9)))
    elif style < 0.27:  # shaded
        light, dark = _blend(paint, (255, 255, 255), 0.14), _blend(paint, (0, 0, 0), 0.16)
        image.paste(_gradient(rng, (wide, high), light, dark), (left, top), mask(1.0))
    else:
        image.paste(paint, (left, top), mask(1.0))
    area = abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in _edges(points))) / 2
    return SceneObject(shape, color, box, center, area)


def _edges(points: Sequence[tuple[float, float]]) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    return zip(points, [*points[1:], points[0]], strict=True)


@lru_cache(maxsize=256)
def _font(path: str | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


# --- coloured shapes -------------------------------------------------------------------------------------------


def _shapes_scene(context: _Context) -> tuple[Image.Image, list[SceneObject], list[Question]]:
    rng = context.rng
    image = _canvas(context)
    width, height = context.size
    unit = context.unit
    if context.hard:
        number = rng.choices((6, 7, 8, 9), (2, 3, 3, 3))[0]
    else:
        number = rng.choices(range(10), (0.25, 1.4, 1.7, 1.6, 1.3, 1.0, 0.8, 0.6, 0.5, 0.5))[0]
    number = number if context.objects is None else context.objects
    colors = _visible(context, 150)
    shapes: Sequence[str] = SHAPES
    if max(width, height) / min(width, height) > _MAX_ASPECT_WITH_SQUARES:
        shapes = [s for s in SHAPES if s not in ("square", "rectangle")]
    if rng.random() < 0.5:  # small pools make things repeat, so that there is something to count
        colors = rng.sample(colors, min(len(colors), rng.randint(2, 3)))
    if rng.random() < 0.5:
        shapes = rng.sample(shapes, rng.randint(1, 3))
    pairs = [(c, s) for c in colors for s in shapes if context.allowed(c, s)]
    unseen = [pair for pair in pairs if pair in UNSEEN_COMBINATIONS]
    largest = 24 if number <= 2 else 18 if number <= 4 else 14.5 if number <= 6 else 12.5
    smallest = 5.5
    if context.hard:
        smallest, largest = 5.0, 9.5
    objects: list[SceneObject] = []
    placed: list[tuple[float, float, float]] = []
    for index in range(number if pairs else 0):
        spot = _free_spot(context, placed, smallest * unit, largest * unit)
        if spot is None:
            continue
        color, shape = rng.choice(unseen if unseen and index == 0 else pairs)
        placed.append(spot)
        objects.append(_draw_shape(context, image, shape, color, spot[:2], spot[2]))
    questions = _ShapeQuestions(context, objects).ask()
    return _finish(context, image), objects, questions


def _free_spot(
    context: _Context, placed: Sequence[tuple[float, float, float]], smallest: float, largest: float
) -> tuple[float, float, float] | None:
    """A centre and half extent (pixels) that overlaps nothing, or ``None`` after 60 tries."""
    rng, (width, height) = context.rng, context.size
    gap = 1.5 * context.unit
    for attempt in range(60):
        half = rng.uniform(smallest, largest if attempt < 30 else (smallest + largest) / 2)
        x, y = rng.uniform(half + 1, width - half - 1), rng.uniform(half + 1, height - half - 1)
        if all(max(abs(x - px), abs(y - py)) > half + p + gap for px, py, p in placed):
            return x, y, half
    return None


_DIRECTIONS: dict[str, tuple[int, int, str]] = {
    "left": (0, -1, "{to the left of|left of|on the left of|on the left side of}"),
    "right": (0, 1, "{to the right of|right of|on the right of|on the right side of}"),
    "above": (1, -1, "{above|over|higher than}"),
    "below": (1, 1, "{below|under|beneath|lower than}"),
}
_EXTREMES: dict[str, tuple[str, int, str]] = {
    "leftmost": ("x", 1, "{leftmost|farthest left|furthest left|furthest to the left}"),
    "rightmost": ("x", -1, "{rightmost|farthest right|furthest right|furthest to the right}"),
    "topmost": ("y", 1, "{topmost|highest|uppermost|nearest to the top}"),
    "bottommost": ("y", -1, "{bottommost|lowest|lowermost|nearest to the bottom}"),
    "largest": ("area", -1, "{largest|biggest}"),
    "smallest": ("area", 1, "{smallest|tiniest}"),
}


class _ShapeQuestions:
    """Asks about coloured shapes. Every method returns a question, or ``None`` when the scene offers none."""

    def __init__(self, context: _Context, objects: Sequence[SceneObject]) -> None:
        self.context = context
        self.rng = context.rng
        self.objects = list(objects)
        self.by_color: dict[str, list[SceneObject]] = {}
        self.by_shape: dict[str, list[SceneObject]] = {}
        self.by_label: dict[str, list[SceneObject]] = {}
        for thing in objects:
            self.by_color.setdefault(thing.color, []).append(thing)
            self.by_shape.setdefault(thing.name, []).append(thing)
            self.by_label.setdefault(thing.label, []).append(thing)
        self.unique = [thing for thing in objects if len(self.by_label[thing.label]) == 1]

    def ask(self, number: int = 12) -> list[Question]:
        """Up to ``number`` different questions, rarer types no less often than common ones."""
        makers: dict[Callable[[], Question | None], float] = {
            self.color: 1.0,
            self.shape: 1.0,
            self.count: 1.7,
            self.exist: 1.4,
            self.spatial: 1.7,
            self.relation: 1.6,
            self.where: 1.3,
            self.larger: 1.5,
            self.extreme: 1.5,
            self.more: 1.0,
            self.same: 1.4,
            self.describe: 0.35,
        }
        questions: list[Question] = []
        seen: set[str] = set()
        for _ in range(3 * number):
            if len(questions) == number:
                break
            question = self.rng.choices(list(makers), list(makers.values()))[0]()
            if question is not None and question.text not in seen:
                seen.add(question.text)
                questions.append(question)
        return questions

    # helpers

    def _say(self, *templates: str) -> str:
        return _expand(self.rng, self.rng.choice(templates))

    def _refer(self, thing: SceneObject) -> str:
        """A name that fits this object alone."""
        names = [thing.label]
        if len(self.by_shape[thing.name]) == 1:
            names.append(thing.name)
        if len(self.by_color[thing.color]) == 1:
            names.append(f"{thing.color} THING")
        return self.rng.choice(names)

    def _at(self, thing: SceneObject, axis: int) -> float:
        """Centre as a share of the canvas along an axis (0 is x, 1 is y)."""
        return thing.center[axis] / self.context.size[axis]

    def _tenth(self, thing: SceneObject, axis: int) -> str:
        return tenths(thing.center[axis], self.context.size[axis])

    def _size_digit(self, thing: SceneObject) -> str:
        """Area on a logarithmic scale from 0 to 9, as a share of the canvas."""
        share = thing.area / (self.context.size[0] * self.context.size[1])
        return str(max(0, min(9, int(math.log(share * 96 * 96 / 45) / 0.37))))

    def _location(self, thing: SceneObject) -> str:
        return location(thing.center, self.context.size)

    def _top_down(self, things: Sequence[SceneObject]) -> list[SceneObject]:
        return sorted(things, key=lambda thing: thing.center[1])

    # one method per question type

    def color(self) -> Question | None:
        things = [thing for thing in self.objects if len(self.by_shape[thing.name]) == 1]
        if not things:
            return None
        thing = self.rng.choice(things)
        text = self._say(
            f"what COLOR is the {thing.name}?",
            f"what is the COLOR of the {thing.name}?",
            f"which COLOR {{does the {thing.name} have|is the {thing.name}}}?",
            f"what COLOR does the {thing.name} have?",
            f"COLOR of the {thing.name}?",
            f"the {thing.name} {{is|has}} what COLOR?",
            f"{{tell me|name|give|identify}} the COLOR of the {thing.name}.",
            f"{{can|could}} you tell me {{what COLOR the {thing.name} is|the COLOR of the {thing.name}}}?",
            f"{{in what|in which}} COLOR is the {thing.name} {{drawn|painted|shown}}?",
            f"there is {_article(thing.name)} in the IMAGE. what COLOR is it?",
            f"what COLOR is the {thing.name} in {{the|this}} IMAGE?",
        )
        reasoning = f"{thing.name} {self._location(thing)} {thing.color}"
        return Question("color", text, thing.color, reasoning, (thing.box,))

    def shape(self) -> Question | None:
        things = [thing for thing in self.objects if len(self.by_color[thing.color]) == 1]
        if not things:
            return None
        thing = self.rng.choice(things)
        color = thing.color
        text = self._say(
            f"what shape is the {color} THING?",
            f"what is the {color} THING?",
            f"which shape is {color}?",
            f"what {color} shape is {{there|shown|in the IMAGE}}?",
            f"the {color} THING {{has|is}} {{what|which}} shape?",
            f"what is the shape of the {color} THING?",
            f"{{tell me|name|give|identify}} the {{shape of the {color} THING|{color} shape}}.",
            f"what shape does the {color} THING have?",
            f"{{what kind of|which|what type of}} {{shape|figure}} is the {color} {{one|THING}}?",
            f"what is {color} in {{the|this}} IMAGE?",
            f"which THING is {color}?",
            f"one of the THINGs is {color}: {{which shape is it|what is it}}?",
            f"{{which|what}} THING {{was drawn|is drawn|is painted}} in {color}?",
        )
        reasoning = f"{color} {self._location(thing)} {thing.name}"
        return Question("shape", text, thing.name, reasoning, (thing.box,))

    def count(self) -> Question | None:
        rng, draw = self.rng, self.rng.random()
        things: list[SceneObject]
        noun: str
        among: tuple[str, ...] = ()
        if draw < 0.25 or not self.objects:
            noun, things = "THINGs", self.objects

            def note(thing: SceneObject) -> str:
                return thing.name

        elif draw < 0.5:
            color = rng.choice(list(self.by_color) if rng.random() < 0.85 else list(COLORS))
            noun, things = f"{color} THINGs", self.by_color.get(color, [])
            among = (
                f"{{of|among|out of}} {{the|all the|all}} THINGs, how many are {color}?",
                f"how many THINGs {{have the COLOR {color}|were drawn in {color}}}?",
                f"how many {color} ones {{are there|do you see}}?",
            )

            def note(thing: SceneObject) -> str:
                return thing.name

        elif draw < 0.8:
            shape = rng.choice(list(self.by_shape) if rng.random() < 0.85 else list(SHAPES))
            noun, things = plural(shape), self.by_shape.get(shape, [])
            among = (
                f"{{of|among|out of}} {{the|all the|all}} THINGs, how many are {plural(shape)}?",
                f"how many {{of these|of those}} THINGs are {plural(shape)}?",
            )

            def note(thing: SceneObject) -> str:
                return thing.color

        else:
            one = rng.choice(self.objects)
            noun, things = f"{one.color} {plural(one.name)}", self.by_label[one.label]

            def note(thing: SceneObject) -> str:
                x = self._at(thing, 0)
                return "left" if x < 1 / 3 else "right" if x > 2 / 3 else "center"

        text = self._say(
            f"how many {noun} are {{there|in the IMAGE|visible|shown|in this IMAGE}}?",
            f"how many {noun} {{do you see|can you see|does the IMAGE {{contain|have|show}}}}?",
            f"{{count|count all|please count}} the {noun}.",
            f"what is the {{number|total number|count}} of {noun}{{| in the IMAGE}}?",
            f"how many {noun}?",
            f"{{give|tell me|find}} the number of {noun}.",
            f"how many {noun} are there {{altogether|in total}}?",
            f"number of {noun}?",
            f"how many {noun} {{were drawn|are drawn|appear|exist|can be counted}}{{| in the IMAGE| here}}?",
            f"{{say|find out|work out}} how many {noun} {{there are|you see|the IMAGE has}}.",
            f"{{looking over|going through}} {{the|this}} IMAGE, how many {noun} do you find?",
            *among,
        )
        listing = " ".join(f"{note(t)} {k}" for k, t in enumerate(self._top_down(things), start=1))
        boxes = tuple(thing.box for thing in things)
        return Question("count", text, str(len(things)), listing or "no 0", boxes)

    def exist(self) -> Question | None:
        rng = self.rng
        present = bool(self.objects) and rng.random() < 0.5
        boxes: tuple[Box, ...] = ()
        if present:
            thing = rng.choice(self.objects)
            phrase = rng.choice((thing.label, thing.name, f"{thing.color} THING"))
            matching = [t for t in self.objects if phrase in (t.label, t.name, f"{t.color} THING")]
            boxes = tuple(t.box for t in matching)
            reasoning = f"{thing.label} {self._location(thing)}"
        else:
            absent = self._absent()
            if absent is None:
                return None
            phrase, reasoning = absent
        named = _expand(rng, phrase)
        if rng.random() < 0.1:
            text = self._say(
                f"is there not {_article(named)}{{| in the IMAGE}}?", f"does the IMAGE not contain {_article(named)}?"
            )
            return Question("exist", text, "no" if present else "yes", reasoning, boxes)
        text = self._say(
            f"is there {_article(named)}{{| in the IMAGE| in this IMAGE| here| anywhere}}?",
            f"{{do|can}} you see {_article(named)}?",
            f"does {{the|this}} IMAGE {{contain|show|have|include}} {_article(named)}?",
            f"is {_article(named)} {{present|visible|shown|in the IMAGE}}?",
            f"is there any {named}{{| in the IMAGE}}?",
            f"{{can|could}} you {{find|spot}} {_article(named)}{{| in the IMAGE| anywhere}}?",
            f"is {_article(named)} {{drawn|to be seen|among the THINGs|one of the THINGs}}{{| here}}?",
            f"is any {{THING|of the THINGs}} {_article(named)}?",
            f"{_article(named)}: {{is it there|does the IMAGE have one|do you see one}}?",
            f"are there any {named.rsplit(' ', 1)[0] + ' ' if ' ' in named else ''}{plural(named.rsplit(' ', 1)[-1])}?",
        )
        return Question("exist", text, "yes" if present else "no", reasoning, boxes)

    def _absent(self) -> tuple[str, str] | None:
        """A description that fits nothing in the scene, and the reasoning that finds this out."""
        rng = self.rng
        for _ in range(20):
            draw = rng.random()
            color = rng.choice(list(self.by_color) if self.by_color and not 0.5 <= draw < 0.75 else list(COLORS))
            shape = rng.choice(list(self.by_shape) if self.by_shape and draw < 0.75 else list(SHAPES))
            if f"{color} {shape}" in self.by_label or not self.context.allowed(color, shape):
                continue
            phrase = f"{color} {shape}"
            if rng.random() < 0.35:
                if shape not in self.by_shape:
                    phrase = shape
                elif color not in self.by_color:
                    phrase = f"{color} THING"
            if shape in self.by_shape:
                found = " ".join(thing.color for thing in self.by_shape[shape][:3])
                return phrase, f"no {found} {shape}"
            if color in self.by_color:
                return phrase, "no " + " ".join(thing.name for thing in self.by_color[color][:3])
            return phrase, f"no {shape}"
        return None

    def spatial(self) -> Question | None:
        if len(self.objects) < 2 or not self.unique:
            return None
        for _ in range(12):
            anchor = self.rng.choice(self.unique)
            axis, sign, words = _DIRECTIONS[self.rng.choice(list(_DIRECTIONS))]
            gaps = {id(t): (self._at(t, axis) - self._at(anchor, axis)) * sign for t in self.objects if t is not anchor}
            beyond = [t for t in self.objects if gaps.get(id(t), -1.0) > _MARGIN]
            if len(beyond) != 1 or any(0 < gap <= _MARGIN for gap in gaps.values()):
                continue
            found, name = beyond[0], self._refer(anchor)
            text = self._say(
                f"what is {words} the {name}?",
                f"which THING is {words} the {name}?",
                f"what {{lies|stands|can be seen}} {words} the {name}?",
                f"{{name|tell me|find}} the THING {words} the {name}.",
                f"which THING is located {words} the {name}?",
                f"what THING is {words} the {name}{{| in the IMAGE}}?",
                f"{{find|take|start from}} the {name}. {{what|which THING}} is {words} it?",
                f"{words} the {name}, {{what|which THING}} {{is there|do you see|can be seen}}?",
                f"{{of|among}} the THINGs, which {{one |}}is {words} the {name}?",
            )
            steps = f"{anchor.label} {self._tenth(anchor, axis)} {found.label} {self._tenth(found, axis)}"
            return Question("spatial", text, found.label, steps, (anchor.box, found.box))
        return None

    def relation(self) -> Question | None:
        if len(self.unique) < 2:
            return None
        for _ in range(10):
            one, other = self.rng.sample(self.unique, 2)
            axis, sign, words = _DIRECTIONS[self.rng.choice(list(_DIRECTIONS))]
            gap = (self._at(one, axis) - self._at(other, axis)) * sign
            if abs(gap) <= _MARGIN:
                continue
            first, second = self._refer(one), self._refer(other)
            text = self._say(
                f"is the {first} {words} the {second}?",
                f"is the {first} {{located|placed|positioned}} {words} the {second}?",
                f"does the {first} {{lie|stand|appear}} {words} the {second}?",
                f"is it true that the {first} is {words} the {second}?",
                f"the {first} is {words} the {second}, {{yes or no|right|is that right|true or not}}?",
                f"{{do|can}} you see the {first} {words} the {second}?",
                f"{{compare|look at}} the {first} and the {second}: is the {first} {words} the {second}?",
                f"is {words} the {second} where the {first} is?",
            )
            steps = f"{one.label} {self._tenth(one, axis)} {other.label} {self._tenth(other, axis)}"
            return Question("relation", text, "yes" if gap > 0 else "no", steps, (one.box, other.box))
        return None

    def where(self) -> Question | None:
        if not self.unique:
            return None
        thing = self.rng.choice(self.unique)
        name = self._refer(thing)
        dx, dy = self._at(thing, 0) - 0.5, self._at(thing, 1) - 0.5
        steps = f"{thing.label} {self._tenth(thing, 1)} {self._tenth(thing, 0)}"
        if self.rng.random() < 0.3:
            axis = self.rng.randrange(2)
            gap = (dx, dy)[axis]
            if abs(gap) < 0.1:
                return None
            low, high = (("left", "right"), ("top", "bottom"))[axis]
            first, second = (low, high) if self.rng.random() < 0.5 else (high, low)
            pair = f"{first} or {{|the }}{second}"
            text = self._say(
                f"is the {name} {{on|at|in}} the {pair}?",
                f"is the {name} in the {pair} {{half|part}}{{| of the IMAGE}}?",
                f"{{which side is the {name} on|on which side is the {name}}}, {pair}?",
            )
            return Question("where", text, low if gap < 0 else high, steps, (thing.box,))
        if max(abs(dx), abs(dy)) < 0.09:
            answer = "center"
        elif min(abs(dx), abs(dy)) > 0.125:
            answer = f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"
        else:
            return None
        text = self._say(
            f"where is the {name}{{| in the IMAGE| located| placed}}?",
            f"in {{which|what}} {{part|area|region|corner}} of the IMAGE is the {name}?",
            f"what is the {{position|location|place}} of the {name}?",
            f"where {{can you see|do you see|can i find}} the {name}?",
            f"{{tell me|say|describe}} where the {name} is.",
            f"{{which|what}} {{part|area|corner}} of the IMAGE {{contains|has}} the {name}?",
        )
        return Question("where", text, answer, steps, (thing.box,))

    def larger(self) -> Question | None:
        if len(self.unique) < 2:
            return None
        for _ in range(10):
            one, other = self.rng.sample(self.unique, 2)
            if not _clearly_larger(one, other) and not _clearly_larger(other, one):
                continue
            bigger = self.rng.random() < 0.6
            word = "{larger|bigger}" if bigger else "smaller"
            winner = one if (one.area > other.area) == bigger else other
            steps = f"{one.label} {self._size_digit(one)} {other.label} {self._size_digit(other)}"
            boxes = (one.box, other.box)
            if self.rng.random() < 0.35:
                text = self._say(
                    f"is the {self._refer(one)} {word} than the {self._refer(other)}?",
                    f"is the {self._refer(one)} the {word} one compared {{to|with}} the {self._refer(other)}?",
                )
                return Question("larger", text, "yes" if winner is one else "no", steps, boxes)
            first, second = one.label, other.label
            text = self._say(
                f"which {{is|one is|THING is}} {word}{{,|:}} the {first} or the {second}?",
                f"what is {word}{{,|:}} the {first} or the {second}?",
                f"is the {first} or the {second} {word}?",
                f"which is the {word} {{one|THING}}, the {first} or the {second}?",
                f"{{of|between}} the {first} and the {second}, which is {word}?",
            )
            return Question("larger", text, winner.label, steps, boxes)
        return None

    def extreme(self) -> Question | None:
        if len(self.objects) < 2:
            return None
        for _ in range(6):
            measure, sign, words = _EXTREMES[self.rng.choice(list(_EXTREMES))]
            if measure == "area":
                ranked = sorted(self.objects, key=lambda t: sign * t.area)
                clear = _clearly_larger(*ranked[:2]) or _clearly_larger(*ranked[1::-1])
                notes = [self._size_digit(t) for t in ranked[:2]]
            else:
                axis = "xy".index(measure)
                ranked = sorted(self.objects, key=lambda t: sign * t.center[axis])
                clear = abs(self._at(ranked[0], axis) - self._at(ranked[1], axis)) > 0.06
                notes = [self._tenth(t, axis) for t in ranked[:2]]
            if not clear:
                continue
            winner, second = ranked[:2]
            steps = f"{second.label} {notes[1]} {winner.label} {notes[0]}"
            boxes = (winner.box, second.box)
            draw = self.rng.random()
            before = "nearest" not in words or self.rng.random() < 0.5
            word = _expand(self.rng, words)
            if " " in word or not before:
                text = self._say(
                    f"which THING is {word}?",
                    f"what THING is {word}?",
                    f"what is {word}?",
                    f"{{among|of|out of}} {{the|all the|all}} THINGs, {{which|what}} is {word}?",
                )
                return Question("extreme", text, winner.label, steps, boxes)
            if draw < 0.5:
                text = self._say(
                    f"what is the {word} THING?",
                    f"which THING is {{|the }}{word}?",
                    f"{{name|tell me|find|identify}} the {word} THING.",
                    f"what is the {word} THING in {{the|this}} IMAGE?",
                    f"{{among|out of}} {{the|all the|all}} THINGs, {{which|what}} is {{|the }}{word}{{| one}}?",
                    f"{{say|show me|point out}} {{which THING is|what is}} the {word}{{| one}}.",
                    f"the {word} THING is {{what|which one|called what}}?",
                )
                return Question("extreme", text, winner.label, steps, boxes)
            if draw < 0.75:
                text = self._say(
                    f"what COLOR is the {word} THING?",
                    f"what is the COLOR of the {word} THING?",
                    f"which COLOR does the {word} THING have?",
                )
                return Question("extreme", text, winner.color, steps, boxes)
            text = self._say(
                f"what shape is the {word} THING?",
                f"what is the shape of the {word} THING?",
                f"which shape does the {word} THING have?",
            )
            return Question("extreme", text, winner.name, steps, boxes)
        return None

    def more(self) -> Question | None:
        rng = self.rng
        by_name = rng.random() < 0.5
        groups = self.by_shape if by_name else self.by_color
        pool = [*groups, rng.choice(SHAPES if by_name else list(COLORS))]

        def nouns(name: str) -> str:
            return plural(name) if by_name else f"{name} THINGs"

        if len(pool) < 2:
            return None
        one, other = rng.sample(pool, 2)
        first, second = groups.get(one, []), groups.get(other, [])
        if one == other or (len(first) == len(second) and rng.random() < 0.6):
            return None
        boxes = tuple(thing.box for thing in first + second)
        steps = f"{one} {len(first)} {other} {len(second)}"
        if rng.random() < 0.3:
            text = self._say(
                f"are there fewer {nouns(one)} than {nouns(other)}?",
                f"does the IMAGE {{have|show|contain}} fewer {nouns(one)} than {nouns(other)}?",
            )
            return Question("more", text, "yes" if len(first) < len(second) else "no", steps, boxes)
        text = self._say(
            f"are there more {nouns(one)} than {nouns(other)}{{| in the IMAGE}}?",
            f"{{do|can}} you {{see|find|count}} more {nouns(one)} than {nouns(other)}?",
            f"{{comparing|counting}} {nouns(one)} and {nouns(other)}, are there more {nouns(one)}?",
            f"does the IMAGE {{have|show|contain}} more {nouns(one)} than {nouns(other)}?",
            f"is the number of {nouns(one)} {{larger|greater|higher}} than the number of {nouns(other)}?",
        )
        return Question("more", text, "yes" if len(first) > len(second) else "no", steps, boxes)

    def same(self) -> Question | None:
        by_name = self.rng.random() < 0.7
        groups = self.by_shape if by_name else self.by_color
        single = [thing for thing in self.unique if len(groups[thing.name if by_name else thing.color]) == 1]
        if len(single) < 2:
            return None
        wanted = self.rng.random() < 0.5
        for _ in range(6):
            one, other = self.rng.sample(single, 2)
            equal = one.color == other.color if by_name else one.name == other.name
            if equal == wanted:
                break
        if by_name:
            first, second, quality = one.name, other.name, "COLOR"
            steps = f"{one.name} {one.color} {other.name} {other.color}"
        else:
            first, second, quality = f"{one.color} THING", f"{other.color} THING", "shape"
            steps = f"{one.color} {one.name} {other.color} {other.name}"
        text = self._say(
            f"are the {first} and the {second} the same {quality}?",
            f"do the {first} and the {second} have the same {quality}?",
            f"{{is|has}} the {first} the same {quality} as the {second}?",
            f"do the {first} and the {second} {{share|match in}} {quality}?",
        )
        return Question("same", text, "yes" if equal else "no", steps, (one.box, other.box))

    def describe(self) -> Question | None:
        things = self._top_down(self.objects)
        if len(things) > 5:
            return None
        text = self._say(
            "describe the IMAGE.",
            "list the THINGs{| from top to bottom}.",
            "what is in the IMAGE?",
            "what {do|can} you see?",
            "what does the IMAGE show?",
        )
        answer = ", ".join(thing.label for thing in things) or "nothing"
        return Question("describe", text, answer, "", tuple(thing.box for thing in things))


def _clearly_larger(one: SceneObject, other: SceneObject) -> bool:
    """Larger in area and in extent, so that no reading of ``larger`` says otherwise."""

    def extent(thing: SceneObject) -> float:
        left, top, right, bottom = thing.box
        return (right - left) * (bottom - top)

    return one.area / other.area > _SIZE_RATIO and extent(one) > 1.1 * extent(other)


# --- printed characters ----------------------------------------------------------------------------------------


def _text_scene(context: _Context) -> tuple[Image.Image, list[SceneObject], list[Question]]:
    rng = context.rng
    image = _canvas(context, with_photographs=False)
    (width, height), unit = context.size, context.unit
    color = rng.choice(_visible(context, 200))
    numeric = rng.random() < 0.65
    if not numeric:
        text = rng.choice(LETTERS)
    elif context.objects:
        text = str(rng.randint(10 ** (context.objects - 1), 10**context.objects - 1))
    elif context.hard:
        text = str(rng.randint(100, 9999))
    else:
        text = str(rng.choice((rng.randint(0, 9), rng.randint(10, 99), rng.randint(10, 99), rng.randint(100, 999))))
    points = rng.uniform(17, 27) if context.hard else rng.uniform(22, {1: 66, 2: 52, 3: 42}.get(len(text), 30))
    path = rng.choice((None, None, *context.assets.fonts)) if context.assets.fonts else None
    font = _font(path, max(9, round(points * unit)))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    wide, high = right - left, bottom - top
    x = rng.uniform(2, max(2.1, width - wide - 2))
    y = rng.uniform(2, max(2.1, height - high - 2))
    draw.text((x - left, y - top), text, font=font, fill=_jitter(rng, COLORS[color]))
    objects = []
    for index, character in enumerate(text):
        start = x - left + draw.textlength(text[:index], font=font)
        end = x - left + draw.textlength(text[: index + 1], font=font)
        box = (max(0.0, start), y, min(float(width), end), min(float(height), y + high))
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        objects.append(SceneObject(character, color, box, middle, (box[2] - box[0]) * (box[3] - box[1])))
    whole = (x, y, min(float(width), x + wide), min(float(height), y + high))
    return _finish(context, image), objects, _text_questions(context, text, color, numeric, whole)


def _text_questions(context: _Context, text: str, color: str, numeric: bool, box: Box) -> list[Question]:
    rng = context.rng
    kind, shown = ("number" if numeric else "letter"), text.lower()
    seen = f"{color} {kind} {len(text)} {shown}"
    place = location(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), context.size)
    boxes = (box,)

    def say(*templates: str) -> str:
        return _expand(rng, rng.choice(templates))

    read_text = say(
        f"{{what|which}} {kind} is {{shown|this|in the IMAGE|visible|printed|written}}?",
        f"read the {kind}.",
        f"what is the {kind}{{| in the IMAGE}}?",
        f"{{what|which}} {kind} {{do|can}} you see?",
        f"{{tell me|name|give}} the {kind}{{| in the IMAGE}}.",
        f"{{what|which}} {kind} does the IMAGE show?",
    )
    say_text = say(
        "what does {the|this} text say?",
        "read the text{| in the IMAGE}.",
        "what is {written|printed}{| in the IMAGE| here}?",
        "what text is {shown|visible|in the IMAGE}?",
        "what does it say?",
    )
    color_text = say(
        f"what COLOR is the {{{kind}|text}}?",
        f"what is the COLOR of the {{{kind}|text}}?",
        f"which COLOR does the {{{kind}|text}} have?",
        f"{{in what|in which}} COLOR is the {{{kind}|text}} {{printed|written}}?",
        f"{{tell me|name}} the COLOR of the {{{kind}|text}}.",
    )
    claim = shown
    if rng.random() < 0.5:
        claim = str(rng.randint(0, 10 ** len(text) - 1)) if numeric else rng.choice(LETTERS).lower()
    claim_text = say(
        f"is {{the|this}} {kind} {claim}?",
        f"is this the {kind} {claim}?",
        f"does the IMAGE show the {kind} {claim}?",
        f"is {claim} the {kind}{{| in the IMAGE}}?",
    )
    which = rng.choice(("number", "letter"))
    which_text = say(
        f"is there a {which} {{in the IMAGE|here}}?",
        f"does {{the|this}} IMAGE {{show|contain}} a {which}?",
        f"{{do|can}} you see a {which}?",
    )
    questions = [
        Question("read", read_text, shown, seen, boxes),
        Question("read", say_text, shown, seen, boxes),
        Question("color", color_text, color, f"{kind} {place} {color}", boxes),
        Question("exist", claim_text, "yes" if claim == shown else "no", seen, boxes),
        Question("exist", which_text, "yes" if which == kind else "no", f"{color} {kind} {place}", boxes),
    ]
    if not numeric:
        return questions
    value, bound = int(text), rng.choice((5, 10, 20, 50, 100, 500))
    if value != bound:
        above = rng.random() < 0.7
        word = "{larger|bigger|greater|more}" if above else "{smaller|less}"
        compare_text = say(
            f"is the number {word} than {bound}?",
            f"is {{this|it}} {word} than {bound}?",
            f"is {{the|this}} {{printed|written|shown}} number {word} than {bound}?",
            f"{{do|can}} you see a number {word} than {bound}?",
        )
        questions.append(Question("number", compare_text, "yes" if (value > bound) == above else "no", seen, boxes))
    parity = rng.choice(("even", "odd"))
    holds = (value % 2 == 0) == (parity == "even")
    parity_text = say(
        f"is the number {parity}?",
        f"is this {_article(parity)} number?",
        f"is {{it|the printed number|the number shown}} {parity}?",
        f"{{is|does}} the IMAGE {{showing|show}} an {parity} number?",
    )
    questions.append(Question("number", parity_text, "yes" if holds else "no", seen, boxes))
    digits_text = say(
        "how many digits does the number have?",
        "how many digits {are there|do you see|are in the IMAGE|are shown}?",
        "{count|count all} the digits.",
        "what is the number of digits?",
    )
    steps = " ".join(f"{digit} {k}" for k, digit in enumerate(text, start=1))
    questions.append(Question("count", digits_text, str(len(text)), steps, boxes))
    return questions


# --- bar charts ------------------------------------------------------------------------------------------------


def _bars_scene(context: _Context) -> tuple[Image.Image, list[SceneObject], list[Question]]:
    rng = context.rng
    dark = rng.random() < 0.15
    _canvas(context, with_photographs=False)
    paper = _jitter(rng, (20, 20, 30) if dark else (246, 246, 246), 8)
    context.background = (paper,)
    image = Image.new("RGB", context.size, paper)
    (width, height), unit = context.size, context.unit
    draw = ImageDraw.Draw(image)
    number = rng.randint(6, 7) if context.hard else rng.randint(2, 5)
    number = min(context.objects, 7) if context.objects and context.objects > 1 else number
    colors = rng.sample(_visible(context, 150), number)
    step = 0.04 if context.hard else 0.065
    lengths = [k * step for k in rng.sample(range(math.ceil(0.14 / step), math.floor(1.0 / step) + 1), number)]
    lengths = [min(1.0, length + rng.uniform(0, step / 3)) for length in lengths]
    horizontal = rng.random() < 0.3
    pen: Color = (215, 215, 215) if dark else (50, 50, 50)
    left, top = width * rng.uniform(0.05, 0.17), height * rng.uniform(0.04, 0.16)
    right, bottom = width * rng.uniform(0.92, 0.98), height * rng.uniform(0.84, 0.95)
    _axes(context, draw, (left, top, right, bottom), horizontal, pen)
    slot = ((bottom - top) if horizontal else (right - left)) / number
    gap = rng.uniform(0.06, 0.2)
    outline = pen if rng.random() < 0.2 else None
    bars: dict[str, SceneObject] = {}
    for index, (color, length) in enumerate(zip(colors, lengths, strict=True)):
        start, end = (index + gap) * slot, (index + 1 - gap) * slot
        if horizontal:
            box = (left, top + start, left + length * (right - left), top + end)
        else:
            box = (left + start, bottom - length * (bottom - top), left + end, bottom)
        draw.rectangle(box, fill=_jitter(rng, COLORS[color]), outline=outline)
        center = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        bars[color] = SceneObject("bar", color, box, center, (box[2] - box[0]) * (box[3] - box[1]))
    if rng.random() < 0.25 and unit >= 1:
        size = max(8, round(7 * unit))
        title = "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 7))).title()
        draw.text((left, 0), title, font=_font(None, size), fill=pen)
    return _finish(context, image), list(bars.values()), bar_questions(rng, bars, lengths, horizontal)


def _axes(context: _Context, draw: ImageDraw.ImageDraw, plot: Box, horizontal: bool, pen: Color) -> None:
    """Axis lines, and now and then a grid, ticks and their numbers."""
    rng = context.rng
    left, top, right, bottom = plot
    lines, numbers = rng.random() < 0.3, rng.random() < 0.4
    faint = _blend(context.background[0], pen, 0.18)
    ticks = rng.randint(3, 6)
    font = _font(None, max(6, round(6 * context.unit)))
    for k in range(1, ticks):
        share = k / (ticks - 1)
        if horizontal:
            x = left + share * (right - left)
            if lines:
                draw.line((x, top, x, bottom), fill=faint)
            if numbers:
                draw.text((x - 3, bottom), str(k * 10), font=font, fill=pen)
        else:
            y = bottom - share * (bottom - top)
            if lines:
                draw.line((left, y, right, y), fill=faint)
            if numbers:
                draw.text((0, y - 3), str(k * 10), font=font, fill=pen)
    if rng.random() < 0.85:
        draw.line((left, bottom, right, bottom) if not horizontal else (left, top, left, bottom), fill=pen)
    if rng.random() < 0.4:
        draw.line((left, bottom, right, bottom) if horizontal else (left, top, left, bottom), fill=pen)
    if rng.random() < 0.15:
        draw.rectangle(plot, outline=pen)


def bar_questions(
    rng: random.Random, bars: dict[str, SceneObject], lengths: Sequence[float], horizontal: bool
) -> list[Question]:
    """Questions about a chart, whoever drew it.

    Args:
        rng: chooses what is asked.
        bars: colour -> bar, in the order of the chart (left to right, or top to bottom when horizontal).
        lengths: of the bars, as shares of the axis, in the same order.
        horizontal: whether the bars lie.
    """
    names = list(bars)
    tall = dict(zip(names, lengths, strict=True))
    ranked = sorted(names, key=tall.__getitem__)
    height = {name: str(min(9, int(10 * value))) for name, value in tall.items()}
    overview = " ".join(f"{name} {height[name]}" for name in names)
    everything = tuple(bar.box for bar in bars.values())
    questions: list[Question] = []

    def say(*templates: str) -> str:
        return _expand(rng, rng.choice(templates))

    def superlative(word: str, name: str) -> None:
        text = say(
            f"which bar is {{|the }}{word}?",
            f"what COLOR is the {word} bar?",
            f"what is the {{COLOR of the |}}{word} bar?",
            f"{{name|tell me|find|identify}} the {word} bar.",
            f"which COLOR has the {word} bar?",
            f"which bar in the chart is {{|the }}{word}?",
        )
        questions.append(Question("bar", text, name, overview, (bars[name].box,)))

    superlative("{longest|largest|biggest}" if horizontal else "{tallest|highest|largest|biggest|longest}", ranked[-1])
    superlative("{shortest|smallest}" if horizontal else "{shortest|smallest|lowest}", ranked[0])
    value = rng.random() < 0.5
    text = say(
        f"which bar has the {'{largest|highest|greatest|biggest}' if value else '{smallest|lowest}'} value?",
        f"what COLOR is the bar with the {'{largest|highest}' if value else '{smallest|lowest}'} value?",
    )
    winner = ranked[-1] if value else ranked[0]
    questions.append(Question("bar", text, winner, overview, (bars[winner].box,)))
    text = say(
        "how many bars {are there|are shown|do you see|are in the chart|does the chart have|can you see}?",
        "{count|count all} the bars.",
        "what is the number of bars{| in the chart}?",
        "how many bars are in the IMAGE?",
    )
    listing = " ".join(f"{name} {k}" for k, name in enumerate(names, start=1))
    questions.append(Question("count", text, str(len(names)), listing, everything))
    for _ in range(2):
        one, other = rng.sample(names, 2)
        more = rng.random() < 0.5
        if horizontal:
            word = "{longer|larger|bigger}" if more else "{shorter|smaller}"
        else:
            word = "{taller|higher|larger|bigger|longer}" if more else "{shorter|smaller|lower}"
        text = say(
            f"is the {one} bar {word} than the {other} bar?",
            f"is the {one} bar {word} than the {other} one?",
            f"is it true that the {one} bar is {word} than the {other} bar?",
        )
        answer = "yes" if (tall[one] > tall[other]) == more else "no"
        steps = f"{one} {height[one]} {other} {height[other]}"
        questions.append(Question("bar_compare", text, answer, steps, (bars[one].box, bars[other].box)))
    one, other = rng.sample(names, 2)
    more = rng.random() < 0.5
    word = (
        ("{longer|larger}" if more else "{shorter|smaller}")
        if horizontal
        else ("{taller|higher|larger}" if more else "{shorter|smaller|lower}")
    )
    text = say(
        f"which bar is {word}, {{|the }}{one} or {{|the }}{other}?",
        f"which is {word}, the {one} bar or the {other} bar?",
        f"is the {one} bar or the {other} bar {word}?",
    )
    winner = one if (tall[one] > tall[other]) == more else other
    steps = f"{one} {height[one]} {other} {height[other]}"
    questions.append(Question("bar_compare", text, winner, steps, (bars[one].box, bars[other].box)))
    present = rng.random() < 0.5
    name = rng.choice(names if present else [color for color in COLORS if color not in names])
    text = say(
        f"is there {_article(name)} bar{{| in the chart| in the IMAGE}}?",
        f"does the {{chart|IMAGE}} {{have|show|contain}} {_article(name)} bar?",
        f"{{do|can}} you see {_article(name)} bar?",
    )
    found = (bars[name].box,) if present else ()
    questions.append(Question("exist", text, "yes" if present else "no", " ".join(names), found))
    index = rng.randrange(len(names) - 1)
    near, far = index, index + 1
    words = "{below|under}" if horizontal else "{right of|to the right of|on the right of}"
    if rng.random() < 0.5:
        near, far = far, near
        words = "{above|over}" if horizontal else "{left of|to the left of|on the left of}"
    text = say(
        f"which bar is {{|directly |just }}{words} the {names[near]} bar?",
        f"what COLOR is the bar {words} the {names[near]} bar?",
        f"which bar stands next to the {names[near]} bar, {words} it?",
    )
    steps = f"{names[near]} {near + 1} {names[far]} {far + 1}"
    questions.append(Question("spatial", text, names[far], steps, (bars[names[near]].box, bars[names[far]].box)))
    if rng.random() < 0.4:
        text = say(
            "describe the {IMAGE|chart}.", "list the bars.", "what is in the IMAGE?", "what does the chart show?"
        )
        questions.append(Question("describe", text, ", ".join(f"{name} bar" for name in names), "", everything))
    return questions
