"""Questions that come with packages: the embedded model's own scenes, and easy-VQA."""

from __future__ import annotations

import json
import re
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from latent_tool.errors import MissingExtraError, SettingsError
from latent_tool.evaluation.datasets.items import Item, open_images
from latent_tool.settings import ImagePolicy

if TYPE_CHECKING:
    from PIL.Image import Image

    from latent_tool.scenes import Scene

__all__ = ["easy_vqa", "scenes"]

SCENE_SEEDS = range(5_000_000, 5_000_100)
_RANGE = re.compile(r"(\d{1,18})-(\d{1,18})")


def scenes(rest: str) -> list[Item]:
    """Return one question about each scene; scenes without any but a description have none."""
    from latent_tool.scenes import SEEDS_PER_SPLIT, Split

    name, _, seeds = rest.partition(":")
    split = name or "held_out"
    if split not in get_args(Split):
        raise SettingsError(f"There is no split {split!r}.", f"Use one of {', '.join(get_args(Split))}.")
    chosen = SCENE_SEEDS
    if seeds:
        found = _RANGE.fullmatch(seeds)
        chosen = range(int(found[1]), int(found[2]) + 1) if found else range(0)
        if not chosen or chosen.stop > SEEDS_PER_SPLIT:
            raise SettingsError(
                f"{seeds!r} is no range of seeds.", f"Use first-last, both included, below {SEEDS_PER_SPLIT}."
            )
    items = []
    for seed in chosen:
        asked = [question for question in _scene(seed, split).questions if question.type != "describe"]
        if asked:
            first = asked[0]
            items.append(
                Item(
                    f"{split}-{seed}",
                    first.text,
                    first.answer,
                    partial(_scene_image, seed, split),
                    type=first.type,
                    boxes=first.boxes,
                    reasoning=first.reasoning,
                    content=f"scene:{split}:{seed}",
                    images=(f"scenes:{split}:{seed}-{seed}",),
                )
            )
    return items


@lru_cache(maxsize=64)
def _scene(seed: int, split: str) -> Scene:
    from latent_tool.scenes import generate

    return generate(seed, split)  # type: ignore[arg-type]  # checked by the caller


def _scene_image(seed: int, split: str) -> tuple[Image, ...]:
    return (_scene(seed, split).image,)


def easy_vqa(split: str) -> list[Item]:
    """Return the questions of the easy-VQA package."""
    if split not in ("test", "train"):
        raise SettingsError(f"easy-VQA has no split {split!r}.", "Use easy-vqa:test or easy-vqa:train.")
    try:
        import easy_vqa as package
    except ImportError as error:
        raise MissingExtraError("The easy-VQA data set", "evaluation") from error
    from latent_tool.scenes import COLORS

    folder = Path(package.__file__).parent / "data" / split
    items = []
    for number, (text, answer, index) in enumerate(json.loads((folder / "questions.json").read_text())):
        kind = "exist" if answer in ("yes", "no") else "color" if answer in COLORS else "shape"
        path = folder / "images" / f"{index}.png"
        items.append(
            Item(
                f"easy-vqa-{split}-{number}",
                text,
                answer,
                partial(open_images, (str(path),), ImagePolicy.local()),
                type=kind,
                content=f"easy-vqa:{split}:{index}",
                images=(f"easy-vqa/{split}/{index}.png",),
            )
        )
    return items
