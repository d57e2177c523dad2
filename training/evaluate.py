"""The measurements of the model card, on the saved checkpoint alone.

The checkpoint is loaded and run as any user would (``AutoProcessor``, ``AutoModelForImageTextToText``, ``generate``),
in float32. Nothing here is used in training.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from latent_tool.scenes import generate
from latent_tool.statistics import auroc, ece, mcnemar
from training.checkpoint import END, END_THINK, IMAGE
from training.items import (
    FRESH_SEEDS,
    STRANGE,
    Item,
    absent_items,
    asked,
    canvas_items,
    easy_vqa_items,
    foreign_items,
    independent_items,
    photograph_items,
    scene_items,
    strange_items,
)
from training.looking import CANNOT_TELL
from training.settings import CELLS
from training.world import easy_vqa, tiny_scene

CANVAS_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)


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
        items += asked(scene.image, scene.questions)
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
