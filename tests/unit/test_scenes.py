"""The generator of scenes: every answer is derived again from the objects by other code, colours from the pixels."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from latent_tool import scenes
from latent_tool.errors import SettingsError
from latent_tool.scenes import (
    COLORS,
    QUESTION_TYPES,
    SHAPES,
    UNSEEN_COMBINATIONS,
    Assets,
    Scene,
    SceneObject,
    generate,
    generator,
    wording,
)

THINGS = ("shape", "object", "thing", "figure", "item")
_NOUNS = {name: name for name in SHAPES} | {("crosses" if s == "cross" else s + "s"): s for s in SHAPES}
_NOUNS |= dict.fromkeys((*THINGS, *(t + "s" for t in THINGS), "one", "ones"), "")
_REFERENCE = re.compile(rf"\b(?:({'|'.join(COLORS)}) )?({'|'.join(sorted(_NOUNS, key=len, reverse=True))})\b")
_COLOR = re.compile(rf"\b({'|'.join(COLORS)})\b")


@pytest.fixture(scope="module")
def world() -> list[Scene]:
    train = [generate(seed, "train") for seed in range(350)]
    return train + [generate(seed, "held_out") for seed in range(150)] + [generate(seed, "hard") for seed in range(200)]


def references(text: str) -> list[tuple[str, str]]:
    """``(colour, shape)`` of everything a question names; either may be empty, not both."""
    found = [(color, _NOUNS[noun]) for color, noun in _REFERENCE.findall(text.lower())]
    return [pair for pair in found if pair != ("", "")]


def matching(scene: Scene, reference: tuple[str, str]) -> list[SceneObject]:
    color, shape = reference
    return [o for o in scene.objects if color in ("", o.color) and shape in ("", o.name)]


def direction(text: str) -> tuple[int, int]:
    """Axis and sign of the direction a question names."""
    text = text.lower()
    if re.search(r"\bleft\b", text):
        return 0, -1
    if re.search(r"\bright\b", text.replace("right?", "").replace("that right", "")):
        return 0, 1
    if re.search(r"\b(above|over|higher)\b", text):
        return 1, -1
    assert re.search(r"\b(below|under|beneath|lower)\b", text), text
    return 1, 1


def yes_no(value: bool) -> str:
    return "yes" if value else "no"


def one(things: Sequence[SceneObject]) -> SceneObject:
    assert len(things) == 1
    return things[0]


def derive(scene: Scene, kind: str, text: str, answer: str) -> str:
    """The answer, found by reading the question and looking at the objects."""
    low = text.lower()
    for phrase in (*wording.OPENINGS, *wording.ENDINGS):
        low = low.replace(phrase, "")
    if scene.kind == "text":
        return derive_text(scene, kind, low)
    if scene.kind == "bars":
        return derive_bars(scene, kind, low)
    named = references(low)
    if kind == "color":
        return one(matching(scene, named[-1])).color
    if kind == "shape":
        return one(matching(scene, (_COLOR.findall(low)[0], ""))).name
    if kind == "count":
        color, shape = _COLOR.findall(low), [name for name in SHAPES if scenes.plural(name) in low]
        if re.search(r"how many (are|of|[a-z]+ (have|were))", low) and (color or shape):  # how many of those are stars?
            return str(sum(o.color == color[0] if color else o.name in shape for o in scene.objects))
        return str(len(matching(scene, named[0]) if named else scene.objects))
    if kind == "exist":
        return yes_no(bool(matching(scene, named[0])) != (" not " in low))
    if kind == "where":
        thing = one(matching(scene, named[0]))
        x, y = thing.center[0] / scene.image.width, thing.center[1] / scene.image.height
        if answer == "center":
            return "center" if max(abs(x - 0.5), abs(y - 0.5)) < 0.1 else "elsewhere"
        across, down = ("left" if x < 0.5 else "right"), ("top" if y < 0.5 else "bottom")
        return f"{down} {across}" if " " in answer else across if answer in ("left", "right") else down
    if kind == "extreme":
        return derive_extreme(scene, low)
    if kind == "spatial":
        axis, sign = direction(low)
        anchor = one(matching(scene, named[-1]))
        return one(
            [o for o in scene.objects if o is not anchor and (o.center[axis] - anchor.center[axis]) * sign > 0]
        ).label
    if kind == "more" and low.startswith(("comparing", "counting")):
        first = matching(scene, named[2])
        second = matching(scene, next(reference for reference in named[:2] if reference != named[2]))
    else:
        first, second = (matching(scene, reference) for reference in named[:2])
    if kind == "more":
        return yes_no(len(first) < len(second) if "fewer" in low else len(first) > len(second))
    a, b = one(first), one(second)
    if kind == "relation":
        if " where " in low:  # is under the ring where the star is?
            a, b = b, a
        elif low.startswith(("compare", "look at")):  # both are named before the question
            a, b = (one(matching(scene, reference)) for reference in named[2:4])
        axis, sign = direction(low)
        return yes_no((a.center[axis] - b.center[axis]) * sign > 0)
    if kind == "larger":
        winner = a if (a.area > b.area) != ("smaller" in low) else b
        return yes_no(winner is a) if answer in ("yes", "no") else winner.label
    assert kind == "same"
    return yes_no(a.color == b.color if re.search(r"colou?r", low) else a.name == b.name)


def derive_extreme(scene: Scene, low: str) -> str:
    keys = {
        r"left": lambda o: o.center[0],
        r"right": lambda o: -o.center[0],
        r"top|highest|uppermost": lambda o: o.center[1],
        r"bottom|lowest|lowermost": lambda o: -o.center[1],
        r"largest|biggest": lambda o: -o.area,
        r"smallest|tiniest": lambda o: o.area,
    }
    key = next(key for pattern, key in keys.items() if re.search(pattern, low))
    winner = min(scene.objects, key=key)
    if re.search(r"colou?r", low):
        return winner.color
    return winner.name if re.search(r"what shape is the|what is the shape of|which shape does", low) else winner.label


def derive_text(scene: Scene, kind: str, low: str) -> str:
    shown = "".join(o.name for o in scene.objects).lower()
    numeric = shown.isdigit()
    if kind == "read":
        return shown
    if kind == "color":
        return scene.objects[0].color
    if kind == "count":
        return str(len(shown))
    if kind == "number":
        bound = re.search(r"than (\d+)", low)
        if bound is None:
            return yes_no((int(shown) % 2 == 0) == ("even" in low))
        return yes_no(int(shown) < int(bound[1]) if re.search(r"smaller|less", low) else int(shown) > int(bound[1]))
    asked = re.search(r"there an? (number|letter) (?:in|here)|(?:show|contain|see) an? (number|letter)", low)
    if asked:
        return yes_no(numeric == ("number" in asked.groups()))
    swapped = re.match(r"is (?!the |this )(\w+) the (?:number|letter)", low)
    return yes_no((swapped[1] if swapped else re.findall(r"\w+", low)[-1]) == shown)


def derive_bars(scene: Scene, kind: str, low: str) -> str:
    boxes = {o.color: o.box for o in scene.objects}
    lying = len({round(box[0], 3) for box in boxes.values()}) == 1
    size = {c: (b[2] - b[0]) if lying else (b[3] - b[1]) for c, b in boxes.items()}
    order = sorted(boxes, key=lambda c: boxes[c][1] if lying else boxes[c][0])
    named = _COLOR.findall(low)
    small = re.search(r"shorte|smalle|lowe", low) is not None
    if kind == "count":
        return str(len(boxes))
    if kind == "bar":
        return (min if small else max)(size, key=size.__getitem__)
    if kind == "exist":
        return yes_no(named[0] in boxes)
    if kind == "spatial":
        step = -1 if re.search(r"left|above|over", low) else 1
        return order[order.index(named[0]) + step]
    assert kind == "bar_compare"
    winner = (min if small else max)(named[:2], key=size.__getitem__)
    return winner if " or " in low else yes_no(winner == named[0])


def test_every_answer_can_be_derived_again(world: list[Scene]) -> None:
    seen: Counter[str] = Counter()
    for scene in world:
        for question in scene.questions:
            if question.type == "describe":
                continue
            derived = derive(scene, question.type, question.text, question.answer)
            assert derived == question.answer, (scene.seed, scene.split, question)
            seen[question.type] += 1
    assert set(seen) == set(QUESTION_TYPES) - {"describe"}
    assert min(seen.values()) >= 40


def test_descriptions_list_what_is_there(world: list[Scene]) -> None:
    described = [(s, q) for s in world for q in s.questions if q.type == "describe"]
    assert len(described) > 20
    for scene, question in described:
        labels = [] if question.answer == "nothing" else question.answer.split(", ")
        assert Counter(labels) == Counter(o.label for o in scene.objects)


def test_reasoning_is_short_and_leads_to_the_answer(world: list[Scene]) -> None:
    for scene in world:
        for question in scene.questions:
            words = question.reasoning.split()
            assert len(words) <= 20
            if question.type in ("color", "shape", "read"):
                assert words[-1] == question.answer
            if question.type == "count":
                assert words[-1] == question.answer
            if question.type in ("spatial", "extreme", "bar"):
                assert question.answer in question.reasoning


def test_colors_can_be_read_off_the_picture(world: list[Scene]) -> None:
    """The pixel at an object's centre is nearest to the colour it is said to have."""
    palette = np.array(list(COLORS.values()), float)
    right = []
    for scene in world:
        pixels = np.asarray(scene.image, float)
        for thing in scene.objects:
            if thing.name in SHAPES and thing.name != "ring":
                x, y = (int(v) for v in thing.center)
                patch = pixels[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].reshape(-1, 3).mean(0)
                nearest = list(COLORS)[int(np.abs(palette - patch).sum(1).argmin())]
                right.append(nearest == thing.color)
    assert len(right) > 500
    assert np.mean(right) > 0.95  # blur and noise cost a few


def test_boxes_are_inside_and_on_an_object(world: list[Scene]) -> None:
    for scene in world:
        boxes = {o.box for o in scene.objects}
        for left, top, right, bottom in boxes:
            assert -1.5 <= left < right <= scene.image.width + 1.5
            assert -1.5 <= top < bottom <= scene.image.height + 1.5
        if scene.kind != "text":
            assert all(box in boxes for q in scene.questions for box in q.boxes)
        else:
            whole = scene.questions[0].boxes[0]
            for thing in scene.objects:
                assert whole[0] - 3 <= thing.center[0] <= whole[2] + 3
                assert whole[1] - 3 <= thing.center[1] <= whole[3] + 3


def test_boxes_hold_ink(world: list[Scene]) -> None:
    """Inside the box of a shape there is more of its colour than around it."""
    better = []
    for scene in world[:200]:
        pixels = np.asarray(scene.image, float)
        for thing in scene.objects:
            if thing.name not in SHAPES:
                continue
            close = np.abs(pixels - np.array(COLORS[thing.color])).sum(-1) < 120
            left, top, right, bottom = (max(0, int(v)) for v in thing.box)
            inside = close[top : bottom + 1, left : right + 1]
            better.append(inside.mean() > 0.25)
    assert np.mean(better) > 0.95


def test_same_seed_same_scene() -> None:
    for split in ("train", "held_out", "hard"):
        one_scene, again = generate(5, split), generate(5, split)
        assert one_scene.image.tobytes() == again.image.tobytes()
        assert one_scene.questions == again.questions
        assert generate(6, split).image.tobytes() != one_scene.image.tobytes()


def test_scenes_stay_what_they_were() -> None:
    """Every number anyone ever quoted rests on these pictures and questions: a change of one bit is seen here."""
    photographs = tuple(
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (60, 80, 3), dtype=np.uint8)) for k in range(3)
    )
    digest = hashlib.sha256()
    for split in ("train", "held_out", "hard"):
        for seed in range(80):
            kind = ("shapes", "text", "bars")[seed % 3]
            for one_scene in (
                generate(seed, split),
                generate(seed, split, assets=Assets(photographs)),
                generate(seed, split, kind=kind, objects=seed % 10),
            ):
                said = (one_scene.image.size, one_scene.kind, one_scene.objects, one_scene.questions)
                digest.update(one_scene.image.tobytes() + repr(said).encode())
    assert digest.hexdigest() == "c8d5247df37f12588b71d436ad61a9c75cc295d6f00b996bbbb9f165ebc592d4"


def test_splits_do_not_share_scenes() -> None:
    pictures = {
        (split, seed): generate(seed, split).image.tobytes() for split in ("train", "held_out") for seed in range(60)
    }
    assert len(set(pictures.values())) == len(pictures)
    streams = sorted(generator._STREAM.values())
    assert all(high - low >= scenes.SEEDS_PER_SPLIT for low, high in pairwise(streams))


def test_unseen_combinations_are_kept_for_the_hard_split(world: list[Scene]) -> None:
    unseen = {f"{color} {shape}" for color, shape in UNSEEN_COMBINATIONS}
    phrases = [re.compile(rf"\b{color} ({shape}|{scenes.plural(shape)})\b") for color, shape in UNSEEN_COMBINATIONS]
    shown = Counter(scene.split for scene in world for o in scene.objects if o.label in unseen)
    assert shown["train"] == shown["held_out"] == 0
    assert shown["hard"] > 50
    for scene in world:
        if scene.split != "hard":
            assert not any(p.search(q.text.lower()) for p in phrases for q in scene.questions)


def test_hard_scenes_are_harder() -> None:
    easy = [generate(seed, "train", "shapes") for seed in range(80)]
    hard = [generate(seed, "hard", "shapes") for seed in range(80)]
    assert np.mean([len(s.objects) for s in hard]) > 6.5 > np.mean([len(s.objects) for s in easy])
    assert max(len(s.objects) for s in easy) == 9
    assert min(len(s.objects) for s in easy) == 0

    def size(many: list[Scene]) -> float:
        return float(np.median([o.area / (s.image.width * s.image.height) for s in many for o in s.objects]))

    assert size(hard) < 0.6 * size(easy)


def test_the_number_of_objects_can_be_fixed() -> None:
    for seed in range(12):
        assert len(generate(seed, "train", "shapes", objects=3).objects) <= 3
        assert len(generate(seed, "train", "bars", objects=6).objects) == 6
        drawn = generate(seed, "train", "text", objects=4).objects
        assert len(drawn) == 4 or drawn[0].name.isalpha()
    assert max(len(generate(seed, "train", "shapes", objects=9).objects) for seed in range(12)) == 9
    with pytest.raises(SettingsError, match="10 objects"):
        generate(0, objects=10)


def test_wordings_and_canvases_vary(world: list[Scene]) -> None:
    texts = {q.text for s in world for q in s.questions if q.type == "color"}
    assert len(texts) > 100
    aspects = {round(s.image.width / s.image.height, 2) for s in world}
    assert min(aspects) < 0.7
    assert max(aspects) > 1.4


def canvases(scale: float, number: int = 60) -> list[Scene]:
    return [generate(seed, "canvas", scale=scale) for seed in range(number)]


def test_a_canvas_shows_the_scene_at_its_own_resolution() -> None:
    for seed in range(20):
        plain, large = (generate(seed, "canvas", scale=scale) for scale in (1, 3))
        assert plain.window == (0, 0, *plain.image.size)
        assert large.window is not None
        shown = large.image.crop(tuple(int(side) for side in large.window))
        assert shown.tobytes() == plain.image.tobytes()
        for one_side, other in zip(large.image.size, plain.image.size, strict=True):
            assert one_side / other == pytest.approx(3, rel=0.1)


def test_questions_about_a_canvas_are_those_about_its_scene() -> None:
    for few, many in zip(canvases(1), canvases(4), strict=True):
        assert [(q.type, q.text, q.answer) for q in few.questions] == [
            (q.type, q.text, q.answer) for q in many.questions
        ]
        assert few.questions
        left, top = (many.window or ())[:2]
        for before, after in zip(few.questions, many.questions, strict=True):
            assert after.boxes == tuple((a + left, b + top, c + left, d + top) for a, b, c, d in before.boxes)
            assert after.type not in ("where", "describe")


def test_answers_on_a_canvas_can_be_derived_again() -> None:
    for scene in canvases(2.5, 120):
        for question in scene.questions:
            assert derive(scene, question.type, question.text, question.answer) == question.answer, (
                scene.seed,
                question,
            )


def test_other_things_lie_around_the_scene_and_never_on_it() -> None:
    around = []
    for scene in canvases(3):
        pixels = np.asarray(scene.image, float)
        left, top, right, bottom = (int(side) for side in scene.window or ())
        pixels[top:bottom, left:right] = np.nan
        edges = np.abs(np.diff(pixels, axis=1)).sum(-1) > 60  # a gradient has none
        around.append(int(np.nansum(edges)) > 20)
    assert np.mean(around) > 0.9


def test_what_lies_around_does_not_answer_the_question() -> None:
    for scene in canvases(2, 200):
        if scene.kind == "shapes":  # a number may stand beside them, and is a thing as well
            vague = [q for q in scene.questions if re.search(r"\b(thing|object|item|figure)s?\b", q.text.lower())]
            assert not vague or len(vague) == len(scene.questions)  # nothing lies around then
        if scene.kind == "text":
            assert not {q.type for q in scene.questions} & {"exist", "count"}


def test_canvases_are_the_same_every_time_and_a_stream_of_their_own() -> None:
    assert canvases(2, 3)[2].image.tobytes() == canvases(2, 3)[2].image.tobytes()
    assert generate(2, "canvas").image.tobytes() == canvases(2, 3)[2].image.tobytes()
    assert generate(2, "canvas", scale=1).image.tobytes() != generate(2, "held_out").image.tobytes()
    unseen = {f"{color} {shape}" for color, shape in UNSEEN_COMBINATIONS}
    assert not any(o.label in unseen for scene in canvases(2) for o in scene.objects)


def test_a_wrong_scale_is_a_typed_error() -> None:
    for scale in (0.5, 11, -1, float("nan")):
        with pytest.raises(SettingsError, match="scale"):
            generate(0, "canvas", scale=scale)
    with pytest.raises(SettingsError, match="has no scale"):
        generate(0, "held_out", scale=2)


def test_wrong_arguments_are_typed_errors() -> None:
    with pytest.raises(SettingsError, match="split"):
        generate(0, "test")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="kind"):
        generate(0, "train", "photo")  # type: ignore[arg-type]
    for seed in (-1, scenes.SEEDS_PER_SPLIT):
        with pytest.raises(SettingsError, match="out of range"):
            generate(seed)


def test_number_of_questions_is_bounded() -> None:
    assert all(len(generate(seed, max_questions=3).questions) <= 3 for seed in range(30))
    assert generate(0, max_questions=0).questions == ()
