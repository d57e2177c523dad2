"""What the third stage is shown: scenes, canvases, windows as further pictures, and what cannot be told.

A window is a part of the original picture at its own resolution. It may hold what a question rests on, part of it, or
nothing of it; the answer is the true one in any case, so that the model learns to look where there is something to
see. Where nothing of it can be seen in any picture, where the thing asked about is not there, and where the picture or
the question is of another world, the answer is ``CANNOT_TELL``. It knows nothing of tokens.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from latent_tool.scenes import COLORS, SHAPES, Box, Question, Scene, SceneKind, SceneObject, compose, generate, plural
from latent_tool.scenes.asking import ShapeQuestions
from latent_tool.scenes.drawing import Context
from training.settings import IMAGE_SIZE, Recipe
from training.strangers import stranger
from training.wording import foreign_question
from training.world import Sample, View, assets, from_scene, sample, stretch

CANNOT_TELL = "cannot tell"
UNANSWERABLE = "unanswerable"  # the type of such questions
_NOT_SEEN = "not seen"  # the reasoning that leads there

# Fewer pixels than this on the model's square, in the best of its pictures, and one cannot tell.
_LEAST = {"color": 2.0, "text": 5.0, "bars": 1.8, "shapes": 3.2}


def looking_sample(number: int, recipe: Recipe, views: int) -> Sample:
    """Sample ``number`` of the third stage, with so many windows beside the picture."""
    rng = random.Random(9_000_000_000 + number)
    draw = rng.random()
    ordinary = recipe.looking_ordinary_share if not views else recipe.looking_ordinary_beside_share
    if draw < recipe.looking_stranger_share:
        return _strange(number, rng, views)
    if draw < recipe.looking_stranger_share + ordinary:
        return _ordinary(number, rng, recipe, views)
    return _canvas(number, rng, recipe, views)


def _strange(number: int, rng: random.Random, views: int) -> Sample:
    image = stranger(rng)
    asked = [q.text for q in generate(number, "train").questions if q.type != "describe"]
    texts = [foreign_question(rng) if rng.random() < 0.25 else text for text in asked[:7]]
    questions = tuple(Question(UNANSWERABLE, text, CANNOT_TELL, _NOT_SEEN) for text in texts)
    windows = [_window(rng, image.size) for _ in range(views)]
    return Sample(stretch(image), questions, views=tuple(_view(image, window) for window in windows))


def _ordinary(number: int, rng: random.Random, recipe: Recipe, views: int) -> Sample:
    if not views:
        plain = replace(recipe, photograph_share=0.0, unanswerable_share=0.0)
        one = sample(number, plain, late=True)
        return _with_more(one, rng, recipe, _kind_of(one.objects), number)
    kind: SceneKind | None = None
    objects = None
    if rng.random() < recipe.crowded_share:
        kind = rng.choices(("shapes", "text", "bars"), (6, 2, 1))[0]
        objects = 4 if kind == "text" else rng.randint(6, 9)
    scene = generate(number, "train", kind, max_questions=14, assets=assets(), objects=objects)
    windows = [_window(rng, scene.image.size, _something(scene, rng)) for _ in range(views)]
    one = replace(from_scene(scene), views=tuple(_view(scene.image, window) for window in windows))
    return _with_more(one, rng, recipe, scene.kind, number)


def _canvas(number: int, rng: random.Random, recipe: Recipe, views: int) -> Sample:
    low, high = (1.15, 4.5) if rng.random() < 0.88 else (4.5, 8.0)
    scale = math.exp(rng.uniform(math.log(low), math.log(high)))

    def draw(kind: SceneKind) -> Image.Image:
        return generate(rng.randrange(400_000_000, 500_000_000), "train", kind, 0, assets()).image

    scene = compose(generate(number, "train", max_questions=14, assets=assets()), scale, rng, draw)
    assert scene.window is not None
    windows: list[Box] = []
    for _ in range(views):
        draw_window = rng.random()
        if draw_window < 0.5:
            windows.append(_window(rng, scene.image.size, scene.window))
        elif draw_window < 0.75:
            windows.append(_part(rng, scene.image.size, scene.window))
        else:
            windows.append(_window(rng, scene.image.size))
    one = replace(from_scene(scene), views=tuple(_view(scene.image, window) for window in windows))
    one = _with_more(one, rng, recipe, scene.kind, number, on_canvas=True)
    whole = any(_is_about(window, scene.window) for window in windows)
    kept = []
    for question in one.questions:
        if question.type != UNANSWERABLE and not _legible(question, scene.kind, one):
            question = replace(question, type=UNANSWERABLE, answer=CANNOT_TELL, reasoning=_NOT_SEEN)
        elif not whole and question.type not in ("count", "more", "same", "read", "number", UNANSWERABLE):
            question = replace(question, reasoning="")  # it speaks of places in the scene, not on the canvas
        kept.append(question)
    return replace(one, questions=tuple(kept))


# --- windows ---------------------------------------------------------------------------------------------------


def _window(rng: random.Random, size: tuple[int, int], about: Box | None = None) -> Box:
    """A window of about the picture's own aspect, around ``about`` where it is given."""
    width, height = size
    if about is None:
        share = rng.uniform(0.2, 1.0)
        wide, high = (min(side, share * side * math.exp(rng.uniform(-0.1, 0.1))) for side in size)
        left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
    else:
        share = max((about[2] - about[0]) / width, (about[3] - about[1]) / height)
        share = min(1.0, max(0.15, share * math.exp(rng.choice((0.0, rng.uniform(0, 0.8))))))
        wide = min(width, max(about[2] - about[0], share * width))
        high = min(height, max(about[3] - about[1], share * height))
        left = rng.uniform(max(0.0, about[2] - wide), min(about[0], width - wide))
        top = rng.uniform(max(0.0, about[3] - high), min(about[1], height - high))
    return _whole_pixels(left, top, left + wide, top + high, size)


def _part(rng: random.Random, size: tuple[int, int], about: Box) -> Box:
    """A window whose middle lies in ``about``, and that may cut it."""
    width, height = size
    share = rng.uniform(0.12, 0.6)
    wide, high = share * width, share * height
    left = min(max(0.0, rng.uniform(about[0], about[2]) - wide / 2), width - wide)
    top = min(max(0.0, rng.uniform(about[1], about[3]) - high / 2), height - high)
    return _whole_pixels(left, top, left + wide, top + high, size)


def _whole_pixels(left: float, top: float, right: float, bottom: float, size: tuple[int, int]) -> Box:
    x, y = min(max(0, int(left)), size[0] - 4), min(max(0, int(top)), size[1] - 4)
    return (
        float(x),
        float(y),
        float(min(size[0], max(x + 4, round(right)))),
        float(min(size[1], max(y + 4, round(bottom)))),
    )


def _view(image: Image.Image, window: Box) -> View:
    across, down = IMAGE_SIZE / image.width, IMAGE_SIZE / image.height
    crop = image.crop((int(window[0]), int(window[1]), int(window[2]), int(window[3])))
    return View(stretch(crop), (window[0] * across, window[1] * down, window[2] * across, window[3] * down))


def _something(scene: Scene, rng: random.Random) -> Box | None:
    boxes = [thing.box for thing in scene.objects]
    if not boxes or rng.random() < 0.5:
        return None
    left, top, right, bottom = rng.choice(boxes)
    width, height = scene.image.size
    return max(0.0, left - 2), max(0.0, top - 2), min(float(width), right + 2), min(float(height), bottom + 2)


def _is_about(window: Box, scene: Box) -> bool:
    sides = scene[2] - scene[0], scene[3] - scene[1]
    return all(abs(a - b) < 0.08 * sides[k % 2] for k, (a, b) in enumerate(zip(window, scene, strict=True)))


# --- what can be told ------------------------------------------------------------------------------------------


def _legible(question: Question, kind: SceneKind, one: Sample) -> bool:
    """Whether everything the answer rests on has enough pixels in the picture or in one of its windows."""
    boxes = question.boxes or tuple(thing.box for thing in one.objects or ())
    least = _LEAST["color"] if question.type == "color" else _LEAST[kind]
    windows: list[Box] = [(0.0, 0.0, float(IMAGE_SIZE), float(IMAGE_SIZE)), *(view.window for view in one.views)]

    def pixels(box: Box, window: Box) -> float:
        left, top, right, bottom = box
        if left < window[0] - 0.3 or top < window[1] - 0.3 or right > window[2] + 0.3 or bottom > window[3] + 0.3:
            return 0.0
        across, down = IMAGE_SIZE / (window[2] - window[0]), IMAGE_SIZE / (window[3] - window[1])
        high = (bottom - top) * down
        return high if kind == "text" else min((right - left) * across, high)

    return all(max(pixels(box, window) for window in windows) >= least for box in boxes)


_NOUNS = {plural(name): name for name in (*SHAPES, "bar")} | {name: name for name in (*SHAPES, "bar")}
_NOUNS |= {name + end: "" for name in ("shape", "object", "thing", "figure", "item", "one") for end in ("", "s")}
_REFERENCE = re.compile(rf"\b(?:({'|'.join(COLORS)}) )?({'|'.join(sorted(_NOUNS, key=len, reverse=True))})\b")
NEEDS_WHAT_IT_NAMES = ("color", "shape", "where", "relation", "larger", "spatial", "same", "bar_compare")


def names_something_absent(text: str, objects: Sequence[SceneObject]) -> str:
    """The first thing a question names that is not there, or ``""``."""
    for color, noun in _REFERENCE.findall(text.lower()):
        name = _NOUNS[noun]
        if (color or name) and not any(color in ("", o.color) and name in ("", o.name) for o in objects):
            return f"{color} {name}".strip()
    return ""


def _with_more(
    one: Sample, rng: random.Random, recipe: Recipe, kind: SceneKind | None, number: int, on_canvas: bool = False
) -> Sample:
    """Further questions: of the types that are learnt slowest, and some that have no answer here."""
    questions = list(one.questions)
    if kind == "shapes" and one.objects:
        square = Context(rng, "train", assets(), size=(IMAGE_SIZE, IMAGE_SIZE))
        ask = ShapeQuestions(square, one.objects)
        makers = [ask.same, ask.same, rng.choice((ask.count, ask.more))]
        for make in makers if not on_canvas else makers[:1]:
            question = make()
            if question is not None and rng.random() < recipe.looking_slow_share:
                questions.insert(rng.randint(0, len(questions)), question)
    if rng.random() < recipe.looking_unanswerable_share:
        for _ in range(rng.randint(1, 2)):
            question = _unanswerable(one.objects, rng, kind, number, on_canvas)
            if question is not None:
                questions.insert(rng.randint(0, min(4, len(questions))), question)
    return replace(one, questions=tuple(questions))


def _unanswerable(
    objects: Sequence[SceneObject] | None, rng: random.Random, kind: SceneKind | None, number: int, on_canvas: bool
) -> Question | None:
    """A question about something absent or of another world; ``None`` when the one drawn has an answer after all."""
    if rng.random() < 0.4 or objects is None or kind is None or (on_canvas and kind != "shapes"):
        return Question(UNANSWERABLE, foreign_question(rng), CANNOT_TELL, _NOT_SEEN)
    other = generate(number + 100_000_000, "train", rng.choices(("shapes", "text", "bars"), (6, 1, 2))[0])
    for question in other.questions:
        if other.kind == "text":
            if kind != "text" and not on_canvas and question.type in ("read", "number", "color"):
                return replace(question, type=UNANSWERABLE, answer=CANNOT_TELL, reasoning=_NOT_SEEN, boxes=())
            continue
        if other.kind == "bars" and kind != "bars" and question.type in ("bar", "bar_compare", "spatial"):
            return replace(question, type=UNANSWERABLE, answer=CANNOT_TELL, reasoning="no bar", boxes=())
        absent = names_something_absent(question.text, objects)
        if question.type in NEEDS_WHAT_IT_NAMES and absent:
            return replace(question, type=UNANSWERABLE, answer=CANNOT_TELL, reasoning=f"no {absent}", boxes=())
    return None


def _kind_of(objects: Sequence[SceneObject] | None) -> SceneKind | None:
    if objects is None:
        return None
    names = {thing.name for thing in objects}
    return "bars" if "bar" in names else "shapes" if names <= set(SHAPES) else "text"
