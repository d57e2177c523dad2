"""``(seed, split)`` -> scene: which stream of random numbers, which kind of picture, which questions are kept."""

from __future__ import annotations

import random
from typing import get_args

from latent_tool.errors import SettingsError
from latent_tool.scenes.bars import bars_scene
from latent_tool.scenes.drawing import Context
from latent_tool.scenes.shapes import shapes_scene
from latent_tool.scenes.text import text_scene
from latent_tool.scenes.wording import polish
from latent_tool.scenes.world import SEEDS_PER_SPLIT, Assets, Scene, SceneKind, Split

_STREAM: dict[str, int] = {"train": 0, "held_out": SEEDS_PER_SPLIT, "hard": 2 * SEEDS_PER_SPLIT}
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
    build = {"shapes": shapes_scene, "text": text_scene, "bars": bars_scene}[kind]
    image, things, questions = build(Context(rng, split, assets, objects))
    rng.shuffle(questions)
    polished = tuple(polish(rng, question) for question in questions[:max_questions])
    return Scene(image, kind, tuple(things), polished, seed, split)
