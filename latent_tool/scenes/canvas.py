"""A scene among other things on a larger canvas, so that its details fall below what a small model sees at once.

The scene keeps its own resolution: who looks again at its part of the canvas sees what was drawn.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from PIL import Image

from latent_tool.scenes.drawing import gradient, jitter
from latent_tool.scenes.world import Box, Color, Question, Scene, SceneKind, SceneObject

SCALES = (1.0, 10.0)  # the least and the greatest
# What may lie around a scene without answering its questions. Shapes beside a number would be counted with neither,
# but a bar chart prints numbers of its own, and a rectangle looks like a bar.
AROUND: dict[SceneKind, tuple[SceneKind, ...]] = {"shapes": ("text",), "text": ("shapes",), "bars": ("text",)}

_GROUNDS: tuple[Color, ...] = (
    (250, 250, 250),
    (225, 225, 225),
    (200, 200, 200),
    (90, 90, 90),
    (30, 30, 30),
    (235, 225, 200),
    (205, 220, 240),
)
_VAGUE = re.compile(r"\b(thing|object|item|figure|one)s?\b", re.IGNORECASE)
_OF_THE_WHOLE = ("where", "describe")  # their answers change with the canvas


def compose(scene: Scene, scale: float, rng: random.Random, draw: Callable[[SceneKind], Image.Image]) -> Scene:
    """Paste a scene onto a canvas of ``scale`` times its width and height, with up to four other things around it.

    Args:
        scene: what is asked about.
        scale: sides of the canvas in sides of the scene, 1 to 10; at 1 the canvas is the scene.
        rng: decides where everything lies.
        draw: draws another thing of the kind it is given.

    Returns:
        The scene in pixels of the canvas; ``window`` is where it lies. Questions about the whole picture, and those
        that the other things would answer too, are left out.
    """
    asked = [question for question in scene.questions if question.type not in _OF_THE_WHOLE]
    clear = [question for question in asked if not _others_may_answer(scene.kind, question)]
    questions = tuple(clear or asked)
    width, height = scene.image.size
    if scale == 1:
        return replace(scene, questions=questions, window=(0.0, 0.0, float(width), float(height)))
    aspect = math.exp(rng.uniform(-0.08, 0.08))
    size = max(width, round(width * scale * aspect)), max(height, round(height * scale / aspect))
    ground, other = (jitter(rng, rng.choice(_GROUNDS), 20) for _ in range(2))
    canvas = gradient(rng, size, ground, other) if rng.random() < 0.3 else Image.new("RGB", size, ground)
    left, top = rng.randint(0, size[0] - width), rng.randint(0, size[1] - height)
    canvas.paste(scene.image, (left, top))
    wanted = rng.randint(0, 1) if scale < 1.5 else rng.randint(1, 4)
    taken = [(left, top, left + width, top + height)]
    for _ in range(wanted if clear else 0):
        _place(canvas, rng, draw(rng.choice(AROUND[scene.kind])), (width, height), taken)

    def moved(box: Box) -> Box:
        return box[0] + left, box[1] + top, box[2] + left, box[3] + top

    return replace(
        scene,
        image=canvas,
        objects=tuple(_moved(thing, left, top) for thing in scene.objects),
        questions=tuple(replace(q, boxes=tuple(moved(box) for box in q.boxes)) for q in questions),
        window=moved((0.0, 0.0, float(width), float(height))),
    )


def _moved(thing: SceneObject, left: int, top: int) -> SceneObject:
    box = (thing.box[0] + left, thing.box[1] + top, thing.box[2] + left, thing.box[3] + top)
    return replace(thing, box=box, center=(thing.center[0] + left, thing.center[1] + top))


def _others_may_answer(kind: SceneKind, question: Question) -> bool:
    """Whether a number or a shape beside the scene could be meant as well."""
    if kind == "shapes":
        return _VAGUE.search(question.text) is not None
    return kind == "text" and question.type in ("exist", "count")


def _place(
    canvas: Image.Image,
    rng: random.Random,
    thing: Image.Image,
    scene: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
) -> None:
    """Paste a thing, smaller than the scene, where nothing lies yet; leave it out when no place is found."""
    for attempt in range(24):
        share = rng.uniform(0.35, 0.9) * (1 - attempt / 40) * min(scene[0] / thing.width, scene[1] / thing.height)
        wide, high = max(8, round(thing.width * share)), max(8, round(thing.height * share))
        if wide > canvas.width or high > canvas.height:
            continue
        left, top = rng.randint(0, canvas.width - wide), rng.randint(0, canvas.height - high)
        box = left, top, left + wide, top + high
        if all(_apart(box, other) for other in taken):
            canvas.paste(thing.resize((wide, high), Image.Resampling.BICUBIC), (left, top))
            taken.append(box)
            return


def _apart(one: Sequence[int], other: Sequence[int]) -> bool:
    return one[2] <= other[0] or one[0] >= other[2] or one[3] <= other[1] or one[1] >= other[3]
