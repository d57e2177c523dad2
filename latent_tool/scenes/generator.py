"""``(seed, split)`` -> scene: which stream of random numbers, which kind of picture, which questions are kept."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

from PIL import Image

from latent_tool.errors import SettingsError
from latent_tool.scenes.bars import bars_scene
from latent_tool.scenes.canvas import SCALES, compose
from latent_tool.scenes.drawing import Context
from latent_tool.scenes.shapes import shapes_scene
from latent_tool.scenes.text import text_scene
from latent_tool.scenes.wording import polish
from latent_tool.scenes.world import SEEDS_PER_SPLIT, Assets, Question, Scene, SceneKind, SceneObject, Split

_STREAM: dict[str, int] = {
    "train": 0,
    "held_out": SEEDS_PER_SPLIT,
    "hard": 2 * SEEDS_PER_SPLIT,
    "canvas": 3 * SEEDS_PER_SPLIT,
}
_SCALE = 2.0  # of a canvas when none is named
_NO_ASSETS = Assets()
_Build = Callable[[Context], tuple[Image.Image, list[SceneObject], list[Question]]]
_BUILD: dict[SceneKind, _Build] = {"shapes": shapes_scene, "text": text_scene, "bars": bars_scene}


def generate(
    seed: int,
    split: Split = "held_out",
    kind: SceneKind | None = None,
    max_questions: int = 9,
    assets: Assets = _NO_ASSETS,
    objects: int | None = None,
    scale: float | None = None,
) -> Scene:
    """Return the scene of ``(seed, split)``; the same arguments give the same scene on every machine and at any time.

    Args:
        seed: which scene; ``0 <= seed < SEEDS_PER_SPLIT``.
        split: which stream of random numbers and which difficulty; streams never overlap.
        kind: fixes what is drawn; ``None`` lets the seed decide.
        max_questions: at most so many questions are asked.
        assets: photographs and fonts; other assets give another picture.
        objects: fixes how many shapes, digits or bars are drawn, as far as there is room; ``None`` lets the seed
            decide.
        scale: of a canvas alone: its sides in sides of the scene, 1 to 10 (``None``: 2). The scene of a seed and
            its questions are the same at every scale; what lies around it, and where, is not.

    Raises:
        SettingsError: an unknown split or kind, a seed outside its range, ``objects`` outside 0 to 9, or a scale that
            is outside 1 to 10 or not of a canvas.
    """
    if split not in get_args(Split):
        raise SettingsError(f"There is no split {split!r}.", f"Use one of {', '.join(get_args(Split))}.")
    if kind is not None and kind not in get_args(SceneKind):
        raise SettingsError(f"There is no scene kind {kind!r}.", f"Use one of {', '.join(get_args(SceneKind))}.")
    if not 0 <= seed < SEEDS_PER_SPLIT:
        raise SettingsError(f"Seed {seed} is out of range.", f"Use 0 <= seed < {SEEDS_PER_SPLIT}.")
    if objects is not None and not 0 <= objects <= 9:
        raise SettingsError(f"A scene cannot have {objects} objects.", "Use 0 to 9.")
    if scale is not None and split != "canvas":
        raise SettingsError(f"The split {split!r} has no scale.", "Leave it out, or use the split 'canvas'.")
    if scale is not None and not SCALES[0] <= scale <= SCALES[1]:
        raise SettingsError(f"A canvas cannot have the scale {scale}.", f"Use {SCALES[0]:g} to {SCALES[1]:g}.")
    rng = random.Random(_STREAM[split] + seed)
    drawn = rng.random()
    if kind is None:
        kind = "text" if drawn < 0.17 else "bars" if drawn < 0.30 else "shapes"
    image, things, questions = _BUILD[kind](Context(rng, split, assets, objects))
    rng.shuffle(questions)
    kept = questions if split == "canvas" else questions[:max_questions]
    scene = Scene(image, kind, tuple(things), tuple(polish(rng, question) for question in kept), seed, split)
    return scene if split != "canvas" else _on_canvas(scene, _SCALE if scale is None else scale, max_questions, assets)


def _on_canvas(scene: Scene, scale: float, max_questions: int, assets: Assets) -> Scene:
    placing = random.Random(f"canvas {scene.seed} {float(scale)}")

    def draw(kind: SceneKind) -> Image.Image:
        return _BUILD[kind](Context(placing, "canvas", assets))[0]

    canvas = compose(scene, scale, placing, draw)
    return replace(canvas, questions=canvas.questions[:max_questions])
