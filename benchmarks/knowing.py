"""Does the embedded model know what it does not know? What is abstained from, by kind of picture, and by what.

    python benchmarks/knowing.py [--count 100] [--held-out 1000] [--cache FILE] [--write docs/measured/knowing.md]

Every question is asked with the shipped calibration at its own threshold. Three things abstain: the threshold, the
answer "cannot tell", and the domain check; each is counted alone, and all together. Photographs are scikit-image's
samples that training never saw, scikit-learn's two, and crops of both; scenes have seeds that nobody tuned or
calibrated on (5,400,000 on). ``--cache`` keeps answers, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from calibration import QUESTIONS
from PIL import Image, ImageDraw, ImageFont

from latent_tool import LatentReasoner
from latent_tool.calibration.calibration import Calibration, embedded_domain
from latent_tool.calibration.configuration import digest
from latent_tool.cannot_tell import says_cannot_tell
from latent_tool.engine.engine import use_threads
from latent_tool.evaluation.matching import Match
from latent_tool.models.looks import look, picture_numbers
from latent_tool.scenes import SceneKind, compose, generate
from latent_tool.scores import score_of
from latent_tool.settings import Budget, SearchSettings
from latent_tool.statistics import accuracy_interval

sys.path.insert(0, str(Path(__file__).parents[1]))  # training, for the photographs and the texts

FIRST_SEED = 5_400_000
YES_NO = (
    "is there a dog?",
    "is there a person in the picture?",
    "is it outdoors?",
    "is the sky blue?",
    "are there any trees?",
    "is this a photograph?",
    "is there a red square?",
    "are there more circles than squares?",
)
OF_PHOTOGRAPHS = (
    "what animal is this?",
    "what is the man doing?",
    "how many people are there?",
    "what color is the sky?",
    "what is in the background?",
)


@dataclass(frozen=True)
class Asked:
    """One question about one picture; ``label`` where the picture is one that the model knows."""

    image: Image.Image
    question: str
    label: str | None = None


def scenes(split: str, offset: int, change: Callable[[Image.Image, random.Random], Image.Image] | None = None):
    """One question about each scene, its picture changed or not."""

    def make(count: int) -> Iterator[Asked]:
        seed = FIRST_SEED + offset
        while count:
            scene = generate(seed, split)  # type: ignore[arg-type]
            asked = [each for each in scene.questions if each.type != "describe"]
            if asked:
                image = scene.image if change is None else change(scene.image, random.Random(seed))
                yield Asked(image, asked[0].text, asked[0].answer)
                count -= 1
            seed += 1

    return make


def canvases(scale: float):
    def make(count: int) -> Iterator[Asked]:
        seed = FIRST_SEED + 20_000
        while count:
            rng = random.Random(seed)
            scene = generate(seed, "held_out")
            scene = compose(scene, scale, rng, partial(_another, rng))
            if scene.questions:
                yield Asked(scene.image, scene.questions[0].text, scene.questions[0].answer)
                count -= 1
            seed += 1

    return make


def _another(rng: random.Random, kind: SceneKind) -> Image.Image:
    return generate(rng.randrange(5_450_000, 5_460_000), "held_out", kind).image


def easy_vqa(count: int) -> Iterator[Asked]:
    from latent_tool.evaluation.datasets import load_dataset

    for item in load_dataset("easy-vqa:test", limit=count, seed=5):
        yield Asked(item.load()[0], item.question, item.label)


def pictures_of(make: Callable[[random.Random], Image.Image], questions: tuple[str, ...] = QUESTIONS):
    """Strange pictures, each with one question after another."""

    def asked(count: int) -> Iterator[Asked]:
        for number in range(count):
            yield Asked(make(random.Random(FIRST_SEED + number)), questions[number % len(questions)])

    return asked


def photographs(questions: tuple[str, ...], crops: bool = False):
    def asked(count: int) -> Iterator[Asked]:
        whole = _photographs(thrice=crops)
        rng = random.Random(FIRST_SEED)
        for number in range(count):
            image = whole[number % len(whole)]
            if crops:
                share = rng.uniform(0.2, 0.8)
                wide, high = int(image.width * share), int(image.height * share)
                left, top = rng.randint(0, image.width - wide), rng.randint(0, image.height - high)
                image = image.crop((left, top, left + wide, top + high))
            yield Asked(image, questions[(number // len(whole)) % len(questions)])

    return asked


def _photographs(*, thrice: bool = False) -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    from training.world import TEST_PHOTOGRAPHS
    from training.world import photographs as samples

    names = [name for name in TEST_PHOTOGRAPHS if name not in ("page.png", "text.png")]  # pages of text
    others = [Image.fromarray(each) for each in load_sample_images().images]
    return [*others * (3 if thrice else 1), *samples(tuple(names))]


def scanned_pages(count: int) -> Iterator[Asked]:
    """scikit-image's two, and crops of them."""
    from training.world import photographs as samples

    rng = random.Random(1)
    for number in range(count):
        image = samples(("page.png", "text.png"))[number % 2]
        if number > 1:
            wide = rng.randint(image.width // 3, image.width)
            left = rng.randint(0, image.width - wide)
            image = image.crop((left, 0, left + wide, image.height))
        yield Asked(image, QUESTIONS[(number // 2) % len(QUESTIONS)])


def strangers(name: str, questions: tuple[str, ...] = QUESTIONS):
    from training import strangers as made

    return pictures_of(getattr(made, name), questions)


WORDS = (
    "the of and a to in is it that was for on are as with his they be at one have this from or had by not but what all"
)


def letter(rng: random.Random) -> Image.Image:
    """A whole page of printed sentences in one column or two."""
    image = Image.new("RGB", (480, 640), (255, 255, 255))
    draw, size = ImageDraw.Draw(image), rng.choice((10, 12, 14, 18))
    font, words = ImageFont.load_default(size), WORDS.split()
    columns = rng.choice((1, 1, 2))
    for column in range(columns):
        width = 420 // columns - 10
        for line in range(30, 610, int(size * 1.5)):
            text = " ".join(rng.choice(words) for _ in range(40))
            while draw.textlength(text, font=font) > width:
                text = text.rsplit(" ", 1)[0]
            draw.text((30 + column * 215, line), text, font=font, fill=(20, 20, 20))
    return image


def even_noise(rng: random.Random) -> Image.Image:
    source = np.random.default_rng(rng.getrandbits(60))
    shape = (rng.randint(64, 200), rng.randint(64, 200), 3)
    values = source.integers(0, 256, shape) if rng.random() < 0.5 else source.normal(128, 40, shape).clip(0, 255)
    return Image.fromarray(values.astype(np.uint8))


def one_colour(rng: random.Random) -> Image.Image:
    color = rng.choice(((255, 255, 255), (0, 0, 0), (128, 128, 128), tuple(rng.randrange(256) for _ in range(3))))
    return Image.new("RGB", (rng.randint(32, 400), rng.randint(32, 400)), color)


def slope(rng: random.Random) -> Image.Image:
    """A smooth run from one colour to another."""
    size = rng.randint(64, 300)
    angle, ends = rng.uniform(0, 2 * math.pi), np.array([[rng.randrange(256) for _ in range(3)] for _ in range(2)])
    y, x = np.mgrid[0:size, 0:size] / size
    share = ((x * math.cos(angle) + y * math.sin(angle)) % 1)[..., None]
    return Image.fromarray((ends[0] * share + ends[1] * (1 - share)).astype(np.uint8))


def screenshot(rng: random.Random) -> Image.Image:
    """Windows with bars, buttons, lines of text and boxes."""
    image = Image.new("RGB", (640, 400), (236, 238, 242))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    draw.rectangle((0, 0, 640, 28), fill=(50, 60, 80))
    for place, name in enumerate(("File", "Edit", "View", "Help")):
        draw.text((12 + 60 * place, 8), name, font=font, fill=(240, 240, 240))
    for _ in range(rng.randint(2, 4)):
        left, top = rng.randint(0, 400), rng.randint(30, 250)
        wide, high = rng.randint(120, 240), rng.randint(80, 150)
        draw.rectangle((left, top, left + wide, top + high), fill=(255, 255, 255), outline=(150, 150, 150))
        draw.rectangle((left, top, left + wide, top + 18), fill=(80, 120, 200))
        for line in range(rng.randint(2, 5)):
            text = " ".join(rng.choice(WORDS.split()) for _ in range(rng.randint(2, 6)))
            draw.text((left + 6, top + 24 + 16 * line), text, font=font, fill=(30, 30, 30))
        draw.rounded_rectangle(
            (left + wide - 60, top + high - 24, left + wide - 8, top + high - 6), 4, fill=(90, 170, 90)
        )
    return image


def line_drawing(rng: random.Random) -> Image.Image:
    """Black strokes on white: curves that nobody named."""
    image = Image.new("RGB", (200, 200), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 6)):
        x, y, turn = rng.uniform(30, 170), rng.uniform(30, 170), rng.uniform(0, 6.3)
        points = [(x, y)]
        for _ in range(30):
            turn += rng.gauss(0, 0.4)
            x, y = x + 6 * math.cos(turn), y + 6 * math.sin(turn)
            points.append((x, y))
        draw.line(points, fill=(0, 0, 0), width=rng.randint(1, 4))
    return image


def icon(rng: random.Random) -> Image.Image:
    """A few simple figures in two or three colours, laid over each other: near to what the model knows."""
    image = Image.new("RGB", (96, 96), rng.choice(((255, 255, 255), (40, 44, 52), (230, 240, 255))))
    draw = ImageDraw.Draw(image)
    colors = [tuple(rng.randrange(256) for _ in range(3)) for _ in range(3)]
    for color in colors:
        box = sorted(rng.sample(range(8, 90), 2)) + sorted(rng.sample(range(8, 90), 2))
        box = [box[0], box[2], box[1], box[3]]
        kind = rng.randrange(4)
        if kind == 0:
            draw.arc(box, rng.uniform(0, 180), rng.uniform(180, 360), fill=color, width=8)
        elif kind == 1:
            draw.rounded_rectangle(box, 6, fill=color)
        elif kind == 2:
            draw.chord(box, rng.uniform(0, 180), rng.uniform(180, 360), fill=color)
        else:
            draw.line((*box[:2], *box[2:]), fill=color, width=9)
    return image


def matplotlib_chart(rng: random.Random) -> Image.Image:
    """A pie, a scatter plot, lines, a heat map or a histogram by matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 2.5), dpi=80)
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    source = np.random.default_rng(rng.getrandbits(60))
    kind = rng.randrange(5)
    if kind == 0:
        axes.pie(source.random(rng.randint(3, 6)) + 0.2)
    elif kind == 1:
        axes.scatter(*source.normal(size=(2, 60)))
    elif kind == 2:
        axes.plot(source.normal(size=(40, 3)).cumsum(0))
    elif kind == 3:
        axes.imshow(source.random((8, 8)))
    else:
        axes.hist(source.normal(size=300), bins=20)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def graph(rng: random.Random) -> Image.Image:
    """Discs joined by lines."""
    image = Image.new("RGB", (240, 240), (255, 255, 255))
    draw, color = ImageDraw.Draw(image), tuple(rng.randrange(256) for _ in range(3))
    places = [(rng.randint(20, 220), rng.randint(20, 220)) for _ in range(rng.randint(5, 12))]
    for _ in range(2 * len(places)):
        draw.line((*rng.choice(places), *rng.choice(places)), fill=(100, 100, 100))
    for x, y in places:
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=color, outline=(0, 0, 0))
    return image


def ruled_table(rng: random.Random) -> Image.Image:
    """Rows and columns of words and numbers, ruled."""
    image = Image.new("RGB", (300, 220), (255, 255, 255))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    rows, columns = rng.randint(4, 9), rng.randint(3, 6)
    for row in range(rows):
        for column in range(columns):
            left, top = 8 + column * 284 / columns, 8 + row * 200 / rows
            box = (left, top, left + 284 / columns, top + 200 / rows)
            draw.rectangle(box, outline=(90, 90, 90), fill=None if row else (220, 230, 245))
            text = str(rng.randint(1, 999)) if row and column else rng.choice(WORDS.split())
            draw.text((left + 4, top + 3), text, font=font, fill=(20, 20, 20))
    return image


def symbol(rng: random.Random) -> Image.Image:
    """One large sign of a font: weather, chess, planets, warnings."""
    from matplotlib import get_data_path

    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 90)
    image = Image.new("RGB", (120, 120), rng.choice(((255, 255, 255), (0, 0, 0), (255, 255, 224))))
    ink = tuple(rng.randrange(256) for _ in range(3))
    ImageDraw.Draw(image).text((60, 60), chr(rng.randint(0x2600, 0x26FF)), font=font, anchor="mm", fill=ink)
    return image


def fractal(rng: random.Random) -> Image.Image:
    """A Julia set."""
    from matplotlib import colormaps

    rise, run = np.mgrid[-1.5:1.5:128j, -1.5:1.5:128j]
    point, steps = run + 1j * rise, np.zeros((128, 128))
    constant = complex(rng.uniform(-0.9, 0.4), rng.uniform(-0.8, 0.8))
    for _ in range(40):
        inside = np.abs(point) < 4
        point[inside] = point[inside] ** 2 + constant
        steps[inside] += 1
    colors = colormaps[rng.choice(("viridis", "magma", "gray", "twilight", "hot"))](steps / 40)
    return Image.fromarray((colors[..., :3] * 255).astype(np.uint8))


def spheres(rng: random.Random) -> Image.Image:
    """Balls under a lamp, as a ray tracer draws them."""
    y, x = np.mgrid[0:160, 0:160] / 160
    canvas = np.array([rng.uniform(0.2, 0.9) for _ in range(3)]) * (0.6 + 0.4 * y[..., None])
    for _ in range(rng.randint(1, 5)):
        radius, color = rng.uniform(0.08, 0.25), np.array([rng.random() for _ in range(3)])
        across, down = (x - rng.uniform(0.2, 0.8)) / radius, (y - rng.uniform(0.2, 0.8)) / radius
        inside = across**2 + down**2 < 1
        towards = np.sqrt(np.clip(1 - across**2 - down**2, 0, 1))
        light = np.clip(0.6 * towards - 0.5 * across - 0.6 * down, 0, 1)[inside][:, None]
        canvas[inside] = color * (0.2 + 0.8 * light) + 0.5 * light**20
    return Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8))


def rotated(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.rotate(rng.choice((20, 45, 70, 135)), expand=True, fillcolor=image.getpixel((0, 0)))


def _resized(factor: float) -> Callable[[Image.Image, random.Random], Image.Image]:
    return lambda image, _: image.resize((max(4, int(image.width * factor)), max(4, int(image.height * factor))))


def _grey(image: Image.Image, _: random.Random) -> Image.Image:
    return image.convert("L").convert("RGB")


KINDS: dict[str, Callable[[int], Iterator[Asked]]] = {
    "held-out scenes": scenes("held_out", 0),
    "hard scenes": scenes("hard", 10_000),
    "easy-VQA": easy_vqa,
    "photographs, any question": photographs(QUESTIONS + OF_PHOTOGRAPHS),
    "photographs, yes or no": photographs(YES_NO),
    "crops of photographs, any question": photographs(QUESTIONS + OF_PHOTOGRAPHS + YES_NO, crops=True),
    "noise": pictures_of(even_noise),
    "clouds": strangers("clouds"),
    "pages of text": pictures_of(letter),
    "scanned pages": scanned_pages,
    "words, bills, headings": strangers("page"),
    "one colour": pictures_of(one_colour),
    "slopes of colour": pictures_of(slope),
    "screenshots": pictures_of(screenshot),
    "line drawings": pictures_of(line_drawing),
    "charts of other kinds": pictures_of(matplotlib_chart),
    "icons": pictures_of(icon),
    "graphs of discs and lines": pictures_of(graph),
    "tables": pictures_of(ruled_table),
    "symbols": pictures_of(symbol),
    "fractals": pictures_of(fractal),
    "spheres": pictures_of(spheres),
    "scenes on a canvas, 2 x": canvases(2.0),
    "scenes on a canvas, 3 x": canvases(3.0),
    "scenes, rotated": scenes("held_out", 30_000, rotated),
    "scenes, a quarter of the size": scenes("held_out", 31_000, _resized(0.25)),
    "scenes, eight times the size": scenes("held_out", 32_000, _resized(8)),
    "scenes, grey": scenes("held_out", 33_000, _grey),
}


def rows_of(kind: str, count: int, reasoner: LatentReasoner, calibration: Calibration) -> Iterator[dict[str, object]]:
    """What was said of every question of a kind, and what abstained."""
    asked = list(KINDS[kind](count))
    for begin in range(0, len(asked), 16):
        part = asked[begin : begin + 16]
        for one, found in zip(
            part, reasoner.batch([{"image": a.image, "question": a.question} for a in part]), strict=True
        ):
            assert found.domain is not None
            yield {
                "below": not calibration.accepts(score_of(found, calibration.score)),
                "silent": says_cannot_tell(found.answer),
                "refused": found.domain.refused,
                "accepted": bool(found.accepted),
                "right": None if one.label is None else Match().right(found.answer, one.label),
            }


def line_of(kind: str, rows: list[dict[str, object]]) -> str:
    """One row of the table."""
    share = {name: np.mean([bool(row[name]) for row in rows]) for name in ("below", "silent", "refused", "accepted")}
    together = accuracy_interval(sum(not row["accepted"] for row in rows), len(rows))
    without = np.mean([bool(row["below"] or row["silent"]) for row in rows])
    taken = [row for row in rows if row["accepted"] and row["right"] is not None]
    wrong = f"{np.mean([not row['right'] for row in taken]):.3f} of {len(taken)}" if taken else "-"
    cells = [kind, str(len(rows)), *(f"{share[name]:.2f}" for name in ("below", "silent", "refused")), f"{without:.2f}"]
    cells += [f"{together.value:.2f} ({together.low:.2f} to {together.high:.2f})", wrong]
    return f"| {' | '.join(cells)} |"


def cost(scenes: int = 60) -> tuple[float, float]:
    """Milliseconds of a plain answer, and of what the check takes of it: medians of processor time, in alternation."""
    use_threads(1)
    reasoner = LatentReasoner(settings=SearchSettings(latents=0), budget=Budget(iterations=0), check_domain=False)
    engine, check = reasoner.engine(), embedded_domain()
    assert check is not None
    plain, checking = [], []
    for seed in range(FIRST_SEED + 40_000, FIRST_SEED + 40_000 + scenes):
        image = generate(seed, "held_out").image
        began = time.process_time()
        reasoner.invoke({"image": image, "question": QUESTIONS[seed % len(QUESTIONS)]})
        answered = time.process_time()
        inputs = engine.vlm.prepare([image], "?")
        features = look(engine.vlm, inputs)  # what the answer has anyway
        looked = time.process_time()
        check.verdict(picture_numbers(features, inputs.cells, [image]))
        checking.append(1000 * (time.process_time() - looked))
        plain.append(1000 * (answered - began))
    return float(np.median(plain)), float(np.median(checking))


# How strange the strange pictures are.
STRANGERS = (
    "Clouds, and words, bills and headings are drawn by the generators that drew such ones for the model's training,",
    "with other seeds: they show what was learned of those, not what becomes of pictures that nobody thought of.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="questions of every kind but held-out scenes")
    parser.add_argument("--held-out", type=int, default=1000, help="questions about held-out scenes")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--cache", type=Path, help="file that keeps the answers")
    parser.add_argument("--write", type=Path, help="file to write the tables to")
    given = parser.parse_args()
    calibration = Calibration.load("embedded")
    check, threshold = calibration.domain, calibration.require_threshold()
    assert check is not None
    reasoner = LatentReasoner(calibration=calibration, min_confidence="calibrated")
    # Answers of another model, by other settings, another calibration or another state of this program are no answers.
    made_of = {"configuration": reasoner.configuration(), "calibration": calibration.model_dump(mode="json")}
    key = digest({**made_of, "program": Path(__file__).read_text()})
    kept: dict[str, list[dict[str, object]]] = {}
    if given.cache is not None and given.cache.exists():
        found = json.loads(given.cache.read_text())
        kept = found["kinds"] if found.get("key") == key else {}
    for kind in given.kinds:
        count = given.held_out if kind == "held-out scenes" else given.count
        if len(kept.get(kind, ())) != count:
            kept[kind] = list(rows_of(kind, count, reasoner, calibration))
            if given.cache is not None:
                given.cache.write_text(json.dumps({"key": key, "kinds": kept}))
        print(line_of(kind, kept[kind]), flush=True)
    whole, part = cost()
    scenes_lost = kept.get("held-out scenes", [])
    taken = [bool(row["refused"] and not row["below"] and not row["silent"]) for row in scenes_lost]
    lost = accuracy_interval(sum(taken), len(taken)) if taken else None
    page = "\n".join(
        [
            "# What it abstains from, measured",
            "",
            f"Written by `python benchmarks/knowing.py --count {given.count} --held-out {given.held_out} --write",
            "docs/measured/knowing.md`: the embedded model with its own calibration at its own threshold "
            f"({threshold.target_error:.0%} errors, {threshold.confidence_level:.0%} sure), its domain check at",
            f"{check.level:.0%} false alarms ({check.reference} reference scenes, {check.held} held "
            "back). *threshold*,",
            "*cannot tell* and *check*: the share of questions that each abstains from by itself; *without the check*:",
            "the first two together; *abstained*: all three, with its 95 % interval. *wrong*: the share of errors "
            "among the accepted, where the picture has an answer.",
            "",
            "| pictures | questions | threshold | cannot tell | check | without the check | abstained | wrong |",
            "|---|---|---|---|---|---|---|---|",
            *(line_of(kind, kept[kind]) for kind in KINDS if kind in kept),
            "",
            "Of the held-out scenes the check takes "
            + ("none" if lost is None else f"{lost.value:.3f} ({lost.low:.3f} to {lost.high:.3f})")
            + " that would have been accepted without it.",
            f"It costs {part:.2f} ms where a plain answer, which makes it too, costs {whole:.1f} ms of processor time.",
            "",
            *STRANGERS,
            "",
        ]
    )
    if given.write:
        given.write.write_text(page)


if __name__ == "__main__":
    main()
