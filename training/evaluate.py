"""The measurements of the model card, on the saved checkpoint alone.

The checkpoint is loaded and run as any user would (``AutoProcessor``, ``AutoModelForImageTextToText``, ``generate``),
in float32. Nothing here is used in training.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from latent_tool.scenes import Box, Question, Split, generate
from latent_tool.statistics import auroc, ece, mcnemar
from training.checkpoint import END, END_THINK, IMAGE
from training.independent import picture
from training.labels import cells_of
from training.looking import CANNOT_TELL, NEEDS_WHAT_IT_NAMES, names_something_absent
from training.settings import CELLS, IMAGE_SIZE
from training.world import TEST_PHOTOGRAPHS, easy_vqa, easy_vqa_type, photographs, tiny_scene

CANVAS_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
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


@dataclass(frozen=True)
class Reply:
    """What the model said, and the joint probability of the answer's tokens with the end token."""

    answer: str
    reasoning: str
    probability: float

    @property
    def abstains(self) -> bool:
        """Whether it says that it cannot tell."""
        return self.answer == CANNOT_TELL

    @property
    def confidence(self) -> float:
        """In the answer; none where it says that it cannot tell."""
        return 0.0 if self.abstains else self.probability


# --- data sets -------------------------------------------------------------------------------------------------


def scene_items(split: Split, number: int, first_seed: int = FRESH_SEEDS, per_scene: int = 5) -> list[Item]:
    """Questions about fresh scenes, at most ``per_scene`` about each; free descriptions are left out."""
    items: list[Item] = []
    seed = first_seed
    while len(items) < number:
        scene = generate(seed, split)
        seed += 1
        items += _asked(scene.image, scene.questions)[:per_scene]
    return items[:number]


def independent_items(number: int) -> list[Item]:
    """Questions of the second world."""
    items: list[Item] = []
    seed = 0
    while len(items) < number:
        one = picture(seed)
        seed += 1
        items += _asked(one.image, one.questions)[:5]
    return items[:number]


def _asked(image: Image.Image, questions: Sequence[Question]) -> list[Item]:
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
        items += [replace(item, windows=windows) for item in _asked(scene.image, scene.questions)[:2]]
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


# --- the model -------------------------------------------------------------------------------------------------


class Answerer:
    """A checkpoint that answers batches of questions."""

    def __init__(self, folder: Path, batch: int = 96) -> None:
        started = time.perf_counter()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.load_seconds = time.perf_counter() - started
        self.batch = batch

    def prompt(self, item: Item, opened: str = "") -> str:
        """The chat template, with the assistant turn opened by ``opened``."""
        content = [{"type": "image"}] * (1 + len(item.windows)) + [{"type": "text", "text": item.text}]
        messages = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True)) + opened

    def inputs(self, items: Sequence[Item], opened: Sequence[str], blank: bool = False) -> dict[str, Tensor]:
        """Left-padded inputs; ``blank`` shows gray pictures."""
        pictures = [picture for item in items for picture in item.pictures]
        if blank:
            pictures = [Image.new("RGB", picture.size, (128, 128, 128)) for picture in pictures]
        texts = [self.prompt(item, start) for item, start in zip(items, opened, strict=True)]
        return dict(self.processor(text=texts, images=pictures, padding=True, return_tensors="pt"))

    @torch.inference_mode()
    def replies(self, items: Sequence[Item], opened: str | Sequence[str] = "", blank: bool = False) -> list[Reply]:
        """Greedy answers.

        Args:
            items: the questions.
            opened: text that opens the assistant turn: ``""`` for a direct answer, ``"<think>"`` for reasoning
                first, or one complete reasoning for each item.
            blank: show a gray picture instead.
        """
        starts = [opened] * len(items) if isinstance(opened, str) else list(opened)
        found: list[Reply] = []
        for low in range(0, len(items), self.batch):
            part = slice(low, low + self.batch)
            inputs = self.inputs(items[part], starts[part], blank)
            longest = 40 if any(start == "<think>" for start in starts[part]) else 12
            made = self.model.generate(
                **inputs,
                max_new_tokens=longest,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            tokens = made.sequences[:, inputs["input_ids"].shape[1] :]
            chances = torch.stack([step.log_softmax(-1) for step in made.logits], dim=1)
            chosen = chances.gather(-1, tokens[..., None])[..., 0]
            found += [self._reply(t.tolist(), c.tolist()) for t, c in zip(tokens, chosen, strict=True)]
        return found

    def _reply(self, tokens: list[int], log_chances: list[float]) -> Reply:
        start = tokens.index(END_THINK) + 1 if END_THINK in tokens else 0
        end = tokens.index(END, start) if END in tokens[start:] else len(tokens) - 1
        decode = self.processor.tokenizer.decode
        answer = decode([t for t in tokens[start : end + 1] if t != END]).strip()
        reasoning = decode(tokens[: start - 1]).strip() if start else ""
        return Reply(answer, reasoning, math.exp(sum(log_chances[start : end + 1])))

    @torch.inference_mode()
    def looks(self, items: Sequence[Item], reasonings: Sequence[str]) -> list[float]:
        """AUROC of the attention of the reasoning's positions for telling relevant cells from others.

        The attention is averaged over layers, heads and positions (opening marker and reasoning). ``nan`` where no
        cell, or every cell, is relevant.
        """
        values: list[float] = []
        for low in range(0, len(items), self.batch):
            part = items[low : low + self.batch]
            opened = [f"<think>{text}" for text in reasonings[low : low + self.batch]]
            inputs = self.inputs(part, opened)
            attentions = self.model(**inputs, output_attentions=True).attentions
            mean = torch.stack([layer.mean(1) for layer in attentions]).mean(0)  # (B, N, N)
            for row, item in enumerate(part):
                size = len(self.processor.tokenizer(opened[row], add_special_tokens=False).input_ids)
                shown = inputs["input_ids"][row] == IMAGE
                look = mean[row, -size:][:, shown].mean(0)
                relevant = np.zeros(CELLS, bool)
                relevant[item.cells()] = True
                values.append(auroc(look.tolist(), relevant.tolist()))
        return values


class Crew:
    """Several processes of one thread each that answer for one checkpoint; the same answers, sooner."""

    def __init__(self, folder: Path, processes: int = 2, batch: int = 64) -> None:
        self.batch = batch
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(processes, context, initializer=_open, initargs=(folder, batch))

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def replies(self, items: Sequence[Item], opened: str | Sequence[str] = "", blank: bool = False) -> list[Reply]:
        """As ``Answerer.replies``."""
        starts = [opened] * len(items) if isinstance(opened, str) else list(opened)
        parts = [slice(low, low + self.batch) for low in range(0, len(items), self.batch)]
        asked = [self.pool.submit(_replies, items[part], starts[part], blank) for part in parts]
        return [reply for part in asked for reply in part.result()]

    def looks(self, items: Sequence[Item], reasonings: Sequence[str]) -> list[float]:
        """As ``Answerer.looks``."""
        parts = [slice(low, low + self.batch) for low in range(0, len(items), self.batch)]
        asked = [self.pool.submit(_looks, items[part], reasonings[part]) for part in parts]
        return [value for part in asked for value in part.result()]


_opened: list[Answerer] = []


def _open(folder: Path, batch: int) -> None:
    torch.set_num_threads(1)
    _opened.append(Answerer(folder, batch))


def _replies(items: Sequence[Item], opened: Sequence[str], blank: bool) -> list[Reply]:
    return _opened[0].replies(items, opened, blank)


def _looks(items: Sequence[Item], reasonings: Sequence[str]) -> list[float]:
    return _opened[0].looks(items, reasonings)


# --- without the picture ---------------------------------------------------------------------------------------


def question_only(scenes: int = 4000, with_easy_vqa: bool = True) -> Callable[[Item], str]:
    """The best guess without the picture: the most common training answer to the same text, opening or type."""
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in range(scenes):
        for q in generate(seed, "train").questions:
            for key in _keys(q.type, q.text):
                by_text[key][q.answer.lower()] += 1
    for _, pairs in easy_vqa("train") if with_easy_vqa else ():
        for text, answer in pairs:
            by_text[f"easy {text.lower()}"][answer] += 1
    best = {key: answers.most_common(1)[0][0] for key, answers in by_text.items()}

    def guess(item: Item) -> str:
        keys = (f"easy {item.text.lower()}", *_keys(item.type, item.text))
        return next((best[key] for key in keys if key in best), "no")

    return guess


def _keys(kind: str, text: str) -> Iterator[str]:
    words = text.lower().split()
    yield " ".join(words)
    yield f"{kind} {' '.join(words[:2])}"
    yield f"{kind} {words[0]}"
    yield kind


# --- everything ------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, flush=True)


def measure(folder: Path, scale: float = 1.0, log: Callable[[str], None] = _say) -> dict[str, Any]:
    """All rows of the model card.

    Args:
        folder: the checkpoint.
        scale: share of the full number of questions.
        log: told what is going on.
    """

    def size(number: int) -> int:
        return max(40, round(number * scale))

    answerer = Answerer(folder)
    loads = [answerer.load_seconds] + [Answerer(folder).load_seconds for _ in range(2)]
    guess = question_only(max(200, round(4000 * min(1.0, scale))))
    result: dict[str, Any] = {
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md"),
        "parameters": sum(p.numel() for p in answerer.model.parameters()),
        "load_seconds": sorted(loads)[1],
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }
    sets = {
        "easy_vqa_test": easy_vqa_items(size(1000)),
        "held_out": scene_items("held_out", size(1500)),
        "independent": independent_items(size(700)),
        "hard": scene_items("hard", size(900)),
    }
    with Crew(folder) as crew:
        return result | _measured(crew, sets, guess, size, log)


def _measured(
    crew: Crew,
    sets: dict[str, list[Item]],
    guess: Callable[[Item], str],
    size: Callable[[int], int],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Everything that needs answers."""
    result: dict[str, Any] = {"sets": {}}
    replies: dict[str, tuple[list[Reply], list[Reply]]] = {}
    for name, items in sets.items():
        direct, reasoned = crew.replies(items), crew.replies(items, "<think>")
        replies[name] = direct, reasoned
        result["sets"][name] = _summary(items, direct, reasoned, guess)
        log(f"{name}: {_short(result['sets'][name])}")
    held = sets["held_out"]
    result["sets"]["held_out"]["blank_image"] = _share(held[: size(300)], crew.replies(held[: size(300)], blank=True))
    pooled = ["held_out", "hard", "independent"]
    before = [r.answer == i.answer for n in pooled for i, r in zip(sets[n], replies[n][0], strict=True)]
    after = [r.answer == i.answer for n in pooled for i, r in zip(sets[n], replies[n][1], strict=True)]
    result["reasoning_first"] = _compared(before, after) | {"sets": pooled}
    result["leverage"] = _leverage(crew, held[: size(800)], replies["held_out"][1])
    log(f"leverage: {result['leverage']}")
    looked = held[: size(800)]
    looks = crew.looks(looked, [r.reasoning for r in replies["held_out"][1][: len(looked)]])
    by_type = defaultdict(list)
    for item, value in zip(looked, looks, strict=True):
        if not math.isnan(value):
            by_type[item.type].append(value)
    every = [value for values in by_type.values() for value in values]
    result["attention_auroc"] = {"all": float(np.mean(every)), "questions": len(every)}
    result["attention_auroc"]["types"] = {kind: float(np.mean(by_type[kind])) for kind in sorted(by_type)}
    log(f"attention: {result['attention_auroc']}")
    photos = photograph_items(size(330))
    shown = [r.confidence for r in crew.replies(photos)]
    known = [r.confidence for r in replies["held_out"][0]]
    result["photographs"] = _out_of_world(shown, known) | {"median_confidence_scenes": float(np.median(known))}
    log(f"photographs: {result['photographs']}")
    foreign = foreign_items(size(240))
    result["foreign"] = _out_of_world([r.confidence for r in crew.replies(foreign)], known)
    log(f"questions about other things: {result['foreign']}")
    unknown = {kind: strange_items(kind, size(300)) for kind in STRANGE}
    unknown |= {"other topics": foreign, "absent things": absent_items(size(300))}
    result["cannot_tell"] = {}
    for name, items in unknown.items():
        result["cannot_tell"][name] = _abstained(crew.replies(items), crew.replies(items, "<think>"))
        log(f"cannot tell, {name}: {result['cannot_tell'][name]}")
    result["false_cannot_tell"] = {name: _abstained(*replies[name]) for name in sets}
    log(f"cannot tell, wrongly: {result['false_cannot_tell']}")
    result["canvases"] = {}
    for scale in CANVAS_SCALES:
        result["canvases"][f"{scale:g}"] = row = canvas_row(crew, size(400), scale)
        log(f"canvas {scale:g}: {row}")
    return result


def canvas_row(crew: Crew | Answerer, number: int, scale: float, first_seed: int = FRESH_SEEDS) -> dict[str, Any]:
    """Direct answers on canvases of one scale: alone, with the window of the scene, with a useless window."""
    row: dict[str, Any] = {"questions": number}
    for name, shown in (("alone", ""), ("with_window", "scene"), ("with_other_window", "elsewhere")):
        items = canvas_items(number, scale, first_seed, shown)
        replies = crew.replies(items)
        right = [r.answer == i.answer for i, r in zip(items, replies, strict=True)]
        chances = [r.confidence for r in replies]
        row[name] = {
            "accuracy": float(np.mean(right)),
            "cannot_tell": float(np.mean([r.abstains for r in replies])),
            "auroc": _auroc(chances, right),
            "calibration_error": ece(chances, right, bins=10),
            "mean_confidence": float(np.mean(chances)),
        }
    return row


def _abstained(direct: Sequence[Reply], reasoned: Sequence[Reply]) -> dict[str, Any]:
    rates = {"direct": direct, "reasoned": reasoned}
    return {"questions": len(direct)} | {way: float(np.mean([r.abstains for r in rows])) for way, rows in rates.items()}


def _auroc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """``auroc`` as the measurements hold it: None, not ``nan``, where all or none are positive. JSON has no ``nan``."""
    area = auroc(scores, positive)
    return None if math.isnan(area) else area


def _out_of_world(shown: list[float], known: list[float]) -> dict[str, Any]:
    """How far confidences outside the model's world lie below those of held-out scenes."""
    return {
        "questions": len(shown),
        "median_confidence": float(np.median(shown)),
        "auroc": _auroc(known + shown, [True] * len(known) + [False] * len(shown)),
    }


def _share(items: Sequence[Item], replies: Sequence[Reply]) -> float:
    return float(np.mean([r.answer == i.answer for i, r in zip(items, replies, strict=True)]))


def _compared(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    fixed, broken, p = mcnemar(before, after)
    gain = float(np.mean(after) - np.mean(before))
    return {"questions": len(before), "gain": gain, "fixed": fixed, "broken": broken, "p": p}


def _summary(
    items: Sequence[Item], direct: Sequence[Reply], reasoned: Sequence[Reply], guess: Callable[[Item], str]
) -> dict[str, Any]:
    kinds = sorted({item.type for item in items})
    guessed = [guess(item) == item.answer for item in items]
    row: dict[str, Any] = {"questions": len(items), "question_only": float(np.mean(guessed)), "types": {}}
    for kind in kinds:
        chosen = [k for k, item in enumerate(items) if item.type == kind]
        row["types"][kind] = {"questions": len(chosen), "question_only": float(np.mean([guessed[k] for k in chosen]))}
    for mode, replies in (("direct", direct), ("reasoned", reasoned)):
        right = [r.answer == i.answer for i, r in zip(items, replies, strict=True)]
        chances = [r.confidence for r in replies]
        row[mode] = {
            "accuracy": float(np.mean(right)),
            "auroc": _auroc(chances, right),
            "calibration_error": ece(chances, right, bins=10),
            "mean_confidence": float(np.mean(chances)),
        }
        for kind in kinds:
            chosen = [k for k, item in enumerate(items) if item.type == kind]
            row["types"][kind][mode] = {
                "accuracy": float(np.mean([right[k] for k in chosen])),
                "auroc": _auroc([chances[k] for k in chosen], [right[k] for k in chosen]),
            }
    row["reasoning_first"] = _compared(
        [r.answer == i.answer for i, r in zip(items, direct, strict=True)],
        [r.answer == i.answer for i, r in zip(items, reasoned, strict=True)],
    )
    return row


def _short(row: dict[str, Any]) -> str:
    parts = []
    for mode in ("direct", "reasoned"):
        quality = "-" if row[mode]["auroc"] is None else f"{row[mode]['auroc']:.3f}"
        parts.append(f"{mode} {row[mode]['accuracy']:.3f} (AUROC {quality})")
    types = {k: f"{v['direct']['accuracy']:.2f}/{v['reasoned']['accuracy']:.2f}" for k, v in row["types"].items()}
    return f"n {row['questions']} {', '.join(parts)}, question only {row['question_only']:.3f} {types}"


def _leverage(crew: Crew, items: Sequence[Item], replies: Sequence[Reply]) -> dict[str, Any]:
    """Accuracy with the model's own reasoning, and with that of the next question of the same type."""
    replies = replies[: len(items)]
    swapped = list(range(len(items)))
    groups: dict[str, list[int]] = defaultdict(list)
    for k, item in enumerate(items):
        groups[item.type].append(k)
    for group in groups.values():
        # ten on, because neighbours may be about the same picture
        for place, k in enumerate(group):
            swapped[k] = group[(place + 10) % len(group)]
    own = [f"<think>{reply.reasoning}</think>" for reply in replies]
    kept = crew.replies(items, own)
    given = crew.replies(items, [own[k] for k in swapped])
    before = [r.answer == i.answer for i, r in zip(items, kept, strict=True)]
    after = [r.answer == i.answer for i, r in zip(items, given, strict=True)]
    return _compared(before, after) | {"own": float(np.mean(before)), "swapped": float(np.mean(after))}


def measure_quick(folder: Path) -> dict[str, Any]:
    """The little that the two-minute recipe claims: colour, shape and existence in fresh scenes of shapes."""
    items: list[Item] = []
    seed = FRESH_SEEDS
    while len(items) < 200:
        scene = tiny_scene(seed, "held_out")
        items += _asked(scene.image, scene.questions)
        seed += 1
    answerer = Answerer(folder)
    direct, reasoned = answerer.replies(items), answerer.replies(items, "<think>")
    row = _summary(items, direct, reasoned, question_only(400, with_easy_vqa=False))
    return {
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md"),
        "parameters": sum(p.numel() for p in answerer.model.parameters()),
        "load_seconds": answerer.load_seconds,
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "sets": {"held_out": row},
    }
