"""Scenes of coloured shapes: how they are drawn and placed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw

from latent_tool.scenes.asking import ShapeQuestions
from latent_tool.scenes.drawing import Context, blank_canvas, blend, finish, gradient, jitter, visible
from latent_tool.scenes.world import COLORS, SHAPES, UNSEEN_COMBINATIONS, Color, Question, SceneObject

# A picture is stretched to a square before the model sees it: beyond this aspect ratio a square cannot be told
# from a rectangle, so such canvases carry neither.
_MAX_ASPECT_WITH_SQUARES = 1.34


def shapes_scene(context: Context) -> tuple[Image.Image, list[SceneObject], list[Question]]:
    rng = context.rng
    image = blank_canvas(context)
    width, height = context.size
    unit = context.unit
    if context.hard:
        number = rng.choices((6, 7, 8, 9), (2, 3, 3, 3))[0]
    else:
        number = rng.choices(range(10), (0.25, 1.4, 1.7, 1.6, 1.3, 1.0, 0.8, 0.6, 0.5, 0.5))[0]
    number = number if context.objects is None else context.objects
    colors = visible(context, 150)
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
    questions = ShapeQuestions(context, objects).ask()
    return finish(context, image), objects, questions


def _free_spot(
    context: Context, placed: Sequence[tuple[float, float, float]], smallest: float, largest: float
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
    context: Context, image: Image.Image, shape: str, color: str, center: tuple[float, float], half: float
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

    paint = jitter(rng, COLORS[color])
    style = rng.random()
    if shape == "ring":
        image.paste(paint, (left, top), mask(1.0, rng.uniform(0.55, 0.7)))
    elif style < 0.15 and half > 8 * context.unit:  # outlined
        edge: Color = rng.choice(((0, 0, 0), (40, 40, 40), (255, 255, 255), blend(paint, (0, 0, 0), 0.5)))
        image.paste(edge, (left, top), mask(1.0))
        image.paste(paint, (left, top), mask(rng.uniform(0.8, 0.9)))
    elif style < 0.27:  # shaded
        light, dark = blend(paint, (255, 255, 255), 0.14), blend(paint, (0, 0, 0), 0.16)
        image.paste(gradient(rng, (wide, high), light, dark), (left, top), mask(1.0))
    else:
        image.paste(paint, (left, top), mask(1.0))
    area = abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in _edges(points))) / 2
    return SceneObject(shape, color, box, center, area)


def _edges(points: Sequence[tuple[float, float]]) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    return zip(points, [*points[1:], points[0]], strict=True)
