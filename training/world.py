"""What training is shown: generated scenes, the train split of easy-VQA, and photographs without an answer.

It knows nothing of tokens or cells. Everything is decided by the sample's number.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image

from latent_tool.errors import MissingExtraError
from latent_tool.scenes import (
    COLORS,
    SEEDS_PER_SPLIT,
    SHAPES,
    Assets,
    Box,
    Question,
    Scene,
    SceneKind,
    SceneObject,
    Split,
    bar_questions,
    generate,
)
from training.settings import IMAGE_SIZE, Recipe
from training.wording import foreign_question

# Samples of scikit-image that ship inside its wheel. The second list is kept for the evaluation.
TRAINING_PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "ihc.png",
    "motorcycle_left.png",
    "rocket.jpg",
)
TEST_PHOTOGRAPHS = (
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "gravel.png",
    "horse.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "page.png",
    "retina.jpg",
    "text.png",
)


@dataclass(frozen=True)
class View:
    """A window of a picture, stretched to the model's square; ``window`` is in pixels of the picture's square."""

    image: Image.Image
    window: Box


@dataclass(frozen=True)
class Sample:
    """One picture, already stretched to the model's square, with its questions.

    Boxes and objects are in pixels of the square. ``objects`` is ``None`` where they are not known. ``views`` are
    windows of the original that are shown after the picture.
    """

    image: Image.Image
    questions: tuple[Question, ...]
    objects: tuple[SceneObject, ...] | None = None
    views: tuple[View, ...] = ()


def stretch(image: Image.Image) -> Image.Image:
    """What the image processor does before it normalises."""
    return image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)


def sample(number: int, recipe: Recipe, late: bool = False) -> Sample:
    """Sample ``number`` of the training stream; ``late`` asks for more printed characters."""
    rng = random.Random(7_000_000_000 + number)
    draw = rng.random()
    if recipe.tiny:
        return from_scene(tiny_scene(number, "train"))
    if draw < recipe.easy_vqa_share:
        return _easy_vqa_sample(rng)
    if draw < recipe.easy_vqa_share + recipe.photograph_share:
        return _photograph_sample(number, rng)
    if draw < recipe.easy_vqa_share + recipe.photograph_share + recipe.matplotlib_share:
        return _chart_sample(rng)
    kind: SceneKind | None = "text" if late and rng.random() < recipe.late_text_share else None
    objects = None
    if rng.random() < recipe.crowded_share:
        kind = rng.choices(("shapes", "text", "bars"), (6, 2, 1))[0]
        objects = 4 if kind == "text" else rng.randint(6, 9)
    scene = generate(number, "train", kind, max_questions=14, assets=assets(), objects=objects)
    return _mixed(from_scene(scene), rng, recipe)


_EASY = ("color", "shape", "exist", "where")


def _mixed(one: Sample, rng: random.Random, recipe: Recipe) -> Sample:
    """Fewer of the questions that are soon learnt, and now and then some without an answer."""
    questions = [q for q in one.questions if q.type not in _EASY or rng.random() >= recipe.drop_easy]
    if rng.random() < recipe.unanswerable_share:
        shapes = {thing.name for thing in one.objects or ()}
        for _ in range(rng.randint(1, 2)):
            questions.insert(rng.randint(0, len(questions)), _unanswerable(rng, shapes))
    return replace(one, questions=tuple(questions))


def _unanswerable(rng: random.Random, shapes: set[str]) -> Question:
    """A question that the picture does not answer, with any answer: all one can learn is not to be sure."""
    absent = [shape for shape in SHAPES if shape not in shapes]
    if absent and rng.random() < 0.4:
        text = rng.choice(("what color is the {}?", "what is the color of the {}?", "which color does the {} have?"))
        return Question("unanswerable", text.format(rng.choice(absent)), rng.choice(list(COLORS)), "")
    answers: tuple[str, ...] = tuple(COLORS)
    text = foreign_question(rng)
    if text.startswith(("is ", "does ", "can ", "do ", "are ")):
        answers = ("yes", "no")
    elif text.startswith("how many"):
        answers = tuple("0123456789")
    elif text.startswith("where"):
        answers = ("top left", "top right", "bottom left", "bottom right", "center")
    elif rng.random() < 0.8:
        answers = (*COLORS, *SHAPES, *"0123456789", "yes", "no", "center", "bar")
    return Question("unanswerable", text, rng.choice(answers), "")


def tiny_scene(number: int, split: Split) -> Scene:
    """The world of the two-minute recipe: one or two shapes, and questions about colour, shape and existence."""
    for attempt in range(20):
        scene = generate((20 * number + attempt) % SEEDS_PER_SPLIT, split, kind="shapes", max_questions=12)
        if 1 <= len(scene.objects) <= 2:
            break
    return replace(scene, questions=tuple(q for q in scene.questions if q.type in ("color", "shape", "exist")))


def from_scene(scene: Scene) -> Sample:
    """A scene stretched to the model's square."""
    image = scene.image
    across, down = IMAGE_SIZE / image.width, IMAGE_SIZE / image.height

    def scaled(box: Box) -> Box:
        return (box[0] * across, box[1] * down, box[2] * across, box[3] * down)

    objects = tuple(
        SceneObject(o.name, o.color, scaled(o.box), (o.center[0] * across, o.center[1] * down), o.area * across * down)
        for o in scene.objects
    )
    questions = tuple(
        Question(q.type, q.text, q.answer, q.reasoning, tuple(scaled(box) for box in q.boxes)) for q in scene.questions
    )
    return Sample(stretch(image), questions, objects)


@lru_cache(maxsize=1)
def assets() -> Assets:
    """Photographs and fonts that training lends to the generator."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("Training the embedded model", "train") from error
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono-Bold.ttf")
    return Assets(photographs(TRAINING_PHOTOGRAPHS), tuple(str(folder / name) for name in names))


@lru_cache(maxsize=4)
def photographs(names: tuple[str, ...]) -> tuple[Image.Image, ...]:
    """Samples of scikit-image by file name, as RGB images."""
    try:
        import skimage
    except ImportError as error:
        raise MissingExtraError("Training the embedded model", "train") from error
    folder = Path(skimage.__file__).parent / "data"
    return tuple(Image.open(folder / name).convert("RGB") for name in names)


def _photograph_sample(number: int, rng: random.Random) -> Sample:
    """A photograph with the questions and answers of some other scene: all one can learn is not to be sure."""
    chosen = rng.choice(assets().photographs)
    share = rng.uniform(0.3, 1.0)
    wide, high = int(chosen.width * share), int(chosen.height * share)
    left, top = rng.randint(0, chosen.width - wide), rng.randint(0, chosen.height - high)
    image = stretch(chosen.crop((left, top, left + wide, top + high)))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        bands = list(image.split())
        rng.shuffle(bands)
        image = Image.merge("RGB", bands)
    if rng.random() < 0.3:
        image = Image.blend(image, stretch(rng.choice(assets().photographs)), 0.4)
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    questions = [q for q in generate(number, "train").questions if q.type != "describe"]
    plain = tuple(Question(q.type, q.text, q.answer, "") for q in questions)
    return Sample(image, plain)


# --- charts by matplotlib --------------------------------------------------------------------------------------

_CHARTS = 120  # pictures; rendering is slow, so they are asked about more than once


def _chart_sample(rng: random.Random) -> Sample:
    image, bars, lengths, horizontal = _chart(rng.randrange(_CHARTS))
    questions = bar_questions(rng, bars, lengths, horizontal)
    rng.shuffle(questions)
    return Sample(image, tuple(questions), tuple(bars.values()))


@lru_cache(maxsize=_CHARTS)
def _chart(index: int) -> tuple[Image.Image, dict[str, SceneObject], tuple[float, ...], bool]:
    """A bar chart with axes, ticks and labels: stretched picture, bars by colour, their lengths, lying or not."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Training the embedded model", "train") from error
    rng = random.Random(8_000_000_000 + index)
    figure = Figure(figsize=(rng.uniform(2.2, 3.4), rng.uniform(1.8, 2.8)), dpi=rng.choice((60, 80, 100)))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = rng.sample([name for name in COLORS if name != "white"], rng.randint(2, 6))
    values = rng.sample(range(3, 20), len(names))
    horizontal = rng.random() < 0.3
    ticks = [rng.choice(("a", "b", "c", "d", "x", "y", "k1", "k2", "one", "two")) + str(k) for k in range(len(names))]
    paint = [tuple(value / 255 for value in COLORS[name]) for name in names]
    thick = rng.uniform(0.5, 0.85)
    if horizontal:
        drawn = axes.barh(ticks[::-1], values[::-1], color=paint[::-1], height=thick)[::-1]
        axes.set_xlim(0, 20)
    else:
        drawn = axes.bar(ticks, values, color=paint, width=thick)
        axes.set_ylim(0, 20)
    if rng.random() < 0.4:
        axes.set_title(rng.choice(("results", "sales by group", "values", "fruit", "score")))
    if rng.random() < 0.3:
        axes.grid(alpha=0.4)
    if rng.random() < 0.3:
        axes.set_ylabel(rng.choice(("count", "value", "units")))
    figure.tight_layout()
    canvas.draw()
    pixels = canvas.buffer_rgba()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), bytes(pixels), "raw", "RGBA", 0, 1).convert("RGB")
    across, down = IMAGE_SIZE / image.width, IMAGE_SIZE / image.height
    bars = {}
    for name, patch in zip(names, drawn, strict=True):
        extent = patch.get_window_extent()
        box = (
            extent.x0 * across,
            (image.height - extent.y1) * down,
            extent.x1 * across,
            (image.height - extent.y0) * down,
        )
        center = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        bars[name] = SceneObject("bar", name, box, center, (box[2] - box[0]) * (box[3] - box[1]))
    return stretch(image), bars, tuple(value / 20 for value in values), horizontal


# --- easy-VQA --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def easy_vqa(split: str) -> tuple[tuple[Image.Image, tuple[tuple[str, str], ...]], ...]:
    """Pictures of easy-VQA with their ``(question, answer)`` pairs.

    Args:
        split: ``"train"`` or ``"test"``; only the evaluation asks for the second.
    """
    try:
        import easy_vqa as package
    except ImportError as error:
        raise MissingExtraError("Training the embedded model", "train") from error
    folder = Path(package.__file__).parent / "data" / split
    asked: dict[int, list[tuple[str, str]]] = {}
    for text, answer, index in json.loads((folder / "questions.json").read_text()):
        asked.setdefault(index, []).append((text, answer))
    return tuple(
        (Image.open(folder / "images" / f"{index}.png").convert("RGB"), tuple(asked[index])) for index in sorted(asked)
    )


def easy_vqa_type(text: str, answer: str) -> str:
    """``"shape"``, ``"color"`` or ``"exist"``."""
    return "shape" if answer in SHAPES else "color" if answer in COLORS else "exist"


def _easy_vqa_sample(rng: random.Random) -> Sample:
    image, pairs = rng.choice(easy_vqa("train"))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    color = next((a for _, a in pairs if a in COLORS), "")
    shape = next((a for _, a in pairs if a in SHAPES), "")
    steps = f"{color} {shape}" if color and shape else ""
    chosen = rng.sample(pairs, min(9, len(pairs)))
    questions = tuple(Question(easy_vqa_type(text, answer), text, answer, steps) for text, answer in chosen)
    return Sample(stretch(image), questions)
