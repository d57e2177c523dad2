"""What the model card asks: the questions, and the pictures of its measurements. Training sees none of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latent_tool.scenes import Box, Question, Split, generate
from training.independent import picture
from training.labels import cells_of
from training.looking import CANNOT_TELL, NEEDS_WHAT_IT_NAMES, names_something_absent
from training.settings import IMAGE_SIZE
from training.world import TEST_PHOTOGRAPHS, easy_vqa, easy_vqa_type, photographs

STRANGE = ("photographs", "noise", "blank sheets", "pages of text")
FRESH_SEEDS = 1_000_000  # seeds of held-out and hard scenes from here on are looked at by the evaluation alone


@dataclass(frozen=True)
class Item:
    """A question to be measured. Boxes and windows, which are shown after the picture, are in pixels of ``image``."""

    image: Image.Image
    type: str
    text: str
    answer: str
    boxes: tuple[Box, ...] = ()
    windows: tuple[Box, ...] = ()

    @property
    def pictures(self) -> list[Image.Image]:
        """The picture, then its windows."""
        return [self.image, *(self.image.crop((round(a), round(b), round(c), round(d))) for a, b, c, d in self.windows)]

    def cells(self) -> list[int]:
        """Image cells that the answer rests on, after the picture is stretched to the model's square."""
        across, down = IMAGE_SIZE / self.image.width, IMAGE_SIZE / self.image.height
        return cells_of([(b[0] * across, b[1] * down, b[2] * across, b[3] * down) for b in self.boxes])


def scene_items(split: Split, number: int, first_seed: int = FRESH_SEEDS, per_scene: int = 5) -> list[Item]:
    """Questions about fresh scenes, at most ``per_scene`` about each; free descriptions are left out."""
    items: list[Item] = []
    seed = first_seed
    while len(items) < number:
        scene = generate(seed, split)
        seed += 1
        items += asked(scene.image, scene.questions)[:per_scene]
    return items[:number]


def independent_items(number: int) -> list[Item]:
    """Questions of the second world."""
    items: list[Item] = []
    seed = 0
    while len(items) < number:
        one = picture(seed)
        seed += 1
        items += asked(one.image, one.questions)[:5]
    return items[:number]


def asked(image: Image.Image, questions: Sequence[Question]) -> list[Item]:
    return [Item(image, q.type, q.text, q.answer.lower(), q.boxes) for q in questions if q.type != "describe"]


def easy_vqa_items(number: int) -> list[Item]:
    """Questions of easy-VQA's test split, the same ones every time."""
    every = [(image, text, answer) for image, pairs in easy_vqa("test") for text, answer in pairs]
    chosen = random.Random(1).sample(every, min(number, len(every)))
    return [Item(image, easy_vqa_type(text, answer), text, answer) for image, text, answer in chosen]


def photograph_items(number: int) -> list[Item]:
    """Questions of held-out scenes about photographs that training did not use; there is no right answer."""
    texts = [item for item in scene_items("held_out", number, 2 * FRESH_SEEDS) if item.type not in ("read", "number")]
    pictures = photographs(TEST_PHOTOGRAPHS)
    return [Item(pictures[k % len(pictures)], item.type, item.text, "") for k, item in enumerate(texts)]


# Sentences that training never used, about things that no picture of this world shows.
FOREIGN = (
    "Who is the artist?",
    "What is the weather in this scene?",
    "Is the lady smiling?",
    "What does the billboard advertise?",
    "Which team won the match?",
    "Has the kettle boiled yet?",
    "What language is spoken here?",
    "How heavy is the suitcase?",
    "What breed is the puppy?",
    "Where was this photograph taken?",
    "Is the traffic light working?",
    "What is the total on the bill?",
    "Who wrote the letter on the desk?",
    "What are the tourists looking at?",
    "Which ingredient is missing?",
    "Is the guitar in tune?",
    "What year was the bridge built?",
    "How many passengers fit in the van?",
    "What is the doctor holding?",
    "Does the soup taste salty?",
    "What model of camera took this?",
    "Why are the students laughing?",
    "Is the elevator going up?",
    "What is the dosage on the bottle?",
)


def foreign_items(number: int) -> list[Item]:
    """Held-out pictures with questions about other things; there is no right answer."""
    items: list[Item] = []
    for seed in range(3 * FRESH_SEEDS, 3 * FRESH_SEEDS + number):
        items.append(Item(generate(seed, "held_out").image, "foreign", FOREIGN[seed % len(FOREIGN)], ""))
    return items


def canvas_items(number: int, scale: float, first_seed: int = FRESH_SEEDS, shown: str = "") -> list[Item]:
    """Questions about scenes on canvases, at most two about each.

    Args:
        number: how many.
        scale: sides of the canvas in sides of the scene.
        first_seed: of the canvases.
        shown: what is shown after the canvas: nothing, the window where the scene lies (``"scene"``), or one of the
            same size elsewhere (``"elsewhere"``).
    """
    items: list[Item] = []
    seed = first_seed
    while len(items) < number:
        scene = generate(seed, "canvas", scale=scale)
        assert scene.window is not None
        windows = {"": (), "scene": (scene.window,), "elsewhere": (_elsewhere(scene.window, scene.image.size),)}[shown]
        items += [replace(item, windows=windows) for item in asked(scene.image, scene.questions)[:2]]
        seed += 1
    return items[:number]


def _elsewhere(window: Box, size: tuple[int, int]) -> Box:
    """A window of the same size in the corner that is farthest away."""
    wide, high = window[2] - window[0], window[3] - window[1]
    left = 0.0 if window[0] + window[2] > size[0] else size[0] - wide
    top = 0.0 if window[1] + window[3] > size[1] else size[1] - high
    return left, top, left + wide, top + high


def absent_items(number: int) -> list[Item]:
    """Held-out scenes of shapes with questions of other ones, about things that are not there."""
    items: list[Item] = []
    seed = 4 * FRESH_SEEDS - 200_000
    while len(items) < number:
        here, other = (generate(k, "held_out", "shapes") for k in (seed, seed + 100_000))
        items += [
            Item(here.image, "absent", q.text, CANNOT_TELL)
            for q in other.questions
            if q.type in NEEDS_WHAT_IT_NAMES and names_something_absent(q.text, here.objects)
        ][:2]
        seed += 1
    return items[:number]


def strange_items(kind: str, number: int) -> list[Item]:
    """Questions of held-out scenes about pictures of nothing this world knows; one cannot tell.

    Args:
        kind: ``"photographs"`` that training did not use, ``"noise"``, ``"blank sheets"`` of colours that no scene has
            as its background, or ``"pages of text"``.
        number: how many questions.
    """
    make = {"photographs": _photograph, "noise": _noise, "blank sheets": _sheet, "pages of text": _page}[kind]
    texts = scene_items("held_out", number, 2 * FRESH_SEEDS)
    return [Item(make(k), item.type, item.text, CANNOT_TELL) for k, item in enumerate(texts)]


def _photograph(number: int) -> Image.Image:
    pictures = photographs(TEST_PHOTOGRAPHS)
    chosen, rng = pictures[number % len(pictures)], random.Random(number)
    if rng.random() < 0.5:
        return chosen
    wide, high = (int(side * rng.uniform(0.3, 0.9)) for side in chosen.size)
    left, top = rng.randint(0, chosen.width - wide), rng.randint(0, chosen.height - high)
    return chosen.crop((left, top, left + wide, top + high))


def _noise(number: int) -> Image.Image:
    source = np.random.default_rng(number)
    values = source.integers(0, 256, (96, 120, 3)) if number % 2 else source.normal(128, 50, (96, 96, 1)).repeat(3, 2)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _sheet(number: int) -> Image.Image:
    colors = ((128, 128, 128), (200, 40, 40), (60, 140, 70), (250, 210, 40), (110, 70, 150), (90, 90, 90))
    return Image.new("RGB", ((120, 96), (96, 96), (80, 110))[number % 3], colors[number % len(colors)])


def _page(number: int) -> Image.Image:
    rng = random.Random(number)
    image = Image.new("RGB", (rng.randint(140, 300), rng.randint(140, 300)), (252, 252, 250))
    draw, size = ImageDraw.Draw(image), rng.randint(8, 16)
    for y in range(6, image.height - size, round(1.5 * size)):
        draw.text(
            (8, y), rng.choice(FOREIGN)[rng.randint(0, 9) :], font=ImageFont.load_default(size), fill=(20, 20, 20)
        )
    return image
