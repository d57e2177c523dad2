"""Questions -> packed rows of tokens.

All questions about one picture share its prefix ``[system] <|user|> image [window ...]``; they are packed into ``rows``
rows of ``row_length`` tokens, and every question sees the prefix and itself. One question is laid out as

    question <|assistant|> [copies of cells] [<think> reasoning </think>] answer <|end|>

which is what the chat template, the injected patches and the thinking markers give at use.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from latent_tool.scenes import CHARACTERS, COLORS, SHAPES, Box, Question
from training.checkpoint import ASSISTANT, END, END_THINK, PAD, SYSTEM, SYSTEM_PROMPTS, THINK
from training.labels import IGNORE, cells_of, dense_labels
from training.looking import looking_sample
from training.settings import CELLS, IMAGE_SIZE, Recipe
from training.wording import reword
from training.world import Sample, sample

MAX_QUESTIONS = 12


@dataclass
class Batch:
    """Tensors of one step. ``B`` pictures, ``T = rows * row_length`` text positions, ``Q`` questions at most."""

    pixels: Tensor  # (B, 96, 96, 3) uint8
    views: Tensor  # (B, V, 96, 96, 3) uint8: windows that are shown after the picture, mostly none
    system: Tensor  # (S,) token ids that stand before the user turn of every picture, often none
    ids: Tensor  # (B, T) tokens
    cells: Tensor  # (B, T) the cell whose embedding replaces the token, or -1
    positions: Tensor  # (B, T) counted from the end of the prefix
    question: Tensor  # (B, T) which question a position belongs to, -1 for padding
    labels: Tensor  # (B, T) the next token, or IGNORE
    weights: Tensor  # (B, T) of the loss
    mixed: Tensor  # (B, T, 2) tokens mixed into the embedding
    mixture: Tensor  # (B, T, 3) shares of the token itself and of the two mixed ones
    own: Tensor  # (B, T) 1: the model's own expected embedding stands here, 2: a token it samples
    relevant: Tensor  # (B, Q, C) bool: the cells a question rests on; ``C = (1 + V) * CELLS``, picture by picture
    classes: Tensor  # (B, 3, CELLS) dense labels
    offsets: Tensor  # (B, CELLS, 2)

    @property
    def questions(self) -> int:
        """How many questions found a place."""
        return int(((self.question >= 0) & (self.positions == 0)).sum())


@dataclass
class _Segment:
    """One question as tokens; the lists run in parallel."""

    ids: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    mixtures: dict[int, tuple[float, list[tuple[int, float]]]] = field(default_factory=dict)

    def add(self, token: int, cell: int = -1, own: int = 0) -> None:
        self.ids.append(token)
        self.cells.append(cell)
        self.labels.append(IGNORE)
        self.weights.append(0.0)
        self.own.append(own)

    def expect(self, token: int, weight: float) -> None:
        """The last position added should predict ``token``."""
        self.labels[-1], self.weights[-1] = token, weight


class Packer:
    """Turns samples into batches. ``recipe`` sets shares and row sizes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 200_000:
                self._known.clear()
            self._known[text] = self.tokenizer(text, add_special_tokens=False).input_ids if text else []
        return self._known[text]

    @cached_property
    def _alternatives(self) -> dict[int, list[int]]:
        """For every token of a reasoning the tokens that could stand in its place."""
        places = ("left", "right", "top", "bottom", "center")
        groups = (COLORS, SHAPES, "0123456789", places, CHARACTERS[10:].lower())
        found: dict[int, list[int]] = {}
        for group in groups:
            tokens = [self.encode(word)[0] for word in group]
            found.update(dict.fromkeys(tokens, tokens))
        return found

    def segment(
        self,
        question: Question,
        rng: random.Random,
        own_tokens: bool = False,
        relevant: Sequence[int] = (),
        cells: int = CELLS,
    ) -> _Segment:
        """Lay out one question, with the noise of training; ``relevant`` of so many ``cells`` are those it rests on."""
        recipe, result = self.recipe, _Segment()
        text = reword(question.text, rng) if rng.random() < recipe.reword_share else question.text
        for token in self.encode(text):
            result.add(token)
        result.add(ASSISTANT)
        if rng.random() < recipe.copies_share:
            pool = relevant if relevant and rng.random() < 0.7 else range(cells)
            for _ in range(rng.randint(1, 8)):
                result.add(PAD, cell=rng.choice(pool))
        if question.reasoning and rng.random() < recipe.reasoning_share:
            self._reason(result, self.encode(question.reasoning), rng, own_tokens)
        answer = self.encode(question.answer.lower())
        scale = 0.35 if question.type == "describe" else 1.0
        for token in answer:
            result.expect(token, scale)
            result.add(token)
        result.expect(END, 0.4 * scale)
        return result

    def _reason(self, result: _Segment, steps: list[int], rng: random.Random, own_tokens: bool) -> None:
        """Reasoning between its markers: mostly whole, sometimes cut, thinned, softened, or the model's own."""
        given = list(steps)
        learn = len(steps) + 1  # how many tokens of ``[*steps, END_THINK]`` are to be predicted
        own = 0
        draw = rng.random()
        if own_tokens and rng.random() < 0.5:
            own, learn = rng.choice((1, 1, 2)), 0
        elif draw < 0.1:
            cut = rng.randint(0, len(steps) - 1)
            given, learn = steps[:cut], cut + 1
        elif draw < 0.2:
            given, learn = [token for token in steps if rng.random() > 0.25], 0
        result.add(THINK)
        targets = [*steps, END_THINK]
        soft = not own and rng.random() < 0.35
        for index, token in enumerate(given):
            if index < learn:
                result.expect(targets[index], 0.5)
            result.add(token, own=own)
            if soft and rng.random() < 0.6:
                result.mixtures[len(result.ids) - 1] = self._mixture(token, rng)
        if len(given) < learn:
            result.expect(targets[len(given)], 0.5)
        result.add(END_THINK)

    def _mixture(self, token: int, rng: random.Random) -> tuple[float, list[tuple[int, float]]]:
        """A soft token: mostly itself, partly one or two others of its kind."""
        share = rng.uniform(0.3, 1.0)
        pool = self._alternatives.get(token, [token])
        others = [(rng.choice(pool), rng.random() + 0.05) for _ in range(rng.randint(1, 2))]
        total = sum(weight for _, weight in others)
        return share, [(other, (1 - share) * weight / total) for other, weight in others]

    def batch(self, numbers: Sequence[int], own_tokens: bool = False, late: bool = False) -> Batch:
        """Samples ``numbers`` of the training stream as one batch."""
        rng = random.Random(f"system {numbers[0]}")
        system: list[int] = []
        if rng.random() < 0.12 and not self.recipe.tiny:
            system = [SYSTEM, *self.encode(rng.choice(SYSTEM_PROMPTS))]
        return self.pack([sample(n, self.recipe, late) for n in numbers], numbers, own_tokens, system)

    def looking_batch(self, numbers: Sequence[int], views: int, own_tokens: bool = False) -> Batch:
        """Samples ``numbers`` of the third stage as one batch, with so many windows beside every picture."""
        rng = random.Random(f"system {numbers[0]}")
        system = [SYSTEM, *self.encode(rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.12 else []
        return self.pack([looking_sample(n, self.recipe, views) for n in numbers], numbers, own_tokens, system)

    def pack(
        self, samples: Sequence[Sample], numbers: Sequence[int], own_tokens: bool = False, system: Sequence[int] = ()
    ) -> Batch:
        """Pack samples; ``numbers`` seed their noise."""
        recipe = self.recipe
        total, length = recipe.rows * recipe.row_length, recipe.row_length

        def full(value: int, dtype: type = np.int64, *more: int) -> NDArray[np.generic]:
            return np.full((len(samples), total, *more), value, dtype)

        ids, cells, positions, owner = full(PAD), full(-1), full(0), full(-1)
        labels, weights, own = full(IGNORE), full(0, np.float32), full(0)
        mixed, mixture = full(0, np.int64, 2), full(0, np.float32, 3)
        mixture[..., 0] = 1.0
        shown = 1 + len(samples[0].views)
        relevant = np.zeros((len(samples), MAX_QUESTIONS, shown * CELLS), bool)
        dense = [dense_labels(one.objects) for one in samples]
        for b, (one, number) in enumerate(zip(samples, numbers, strict=True)):
            rng = random.Random(13 * number + 5)
            rests_on = [_cells(question.boxes, one) for question in one.questions[:MAX_QUESTIONS]]
            segments = [
                (k, self.segment(one.questions[k], rng, own_tokens, touched, shown * CELLS))
                for k, touched in enumerate(rests_on)
            ]
            used = [0] * recipe.rows
            for k, segment in segments:
                size = len(segment.ids)
                row = next((r for r in range(recipe.rows) if used[r] + size <= length), None)
                if row is None:
                    continue
                here = slice(row * length + used[row], row * length + used[row] + size)
                used[row] += size
                ids[b, here], cells[b, here], labels[b, here] = segment.ids, segment.cells, segment.labels
                weights[b, here], own[b, here] = segment.weights, segment.own
                positions[b, here], owner[b, here] = np.arange(size), k
                for offset, (share, others) in segment.mixtures.items():
                    mixture[b, here.start + offset, 0] = share
                    for slot, (other, weight) in enumerate(others):
                        mixed[b, here.start + offset, slot] = other
                        mixture[b, here.start + offset, slot + 1] = weight
                relevant[b, k, rests_on[k]] = True
        pixels = np.stack([np.asarray(one.image) for one in samples])
        views = np.zeros((len(samples), shown - 1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        for b, one in enumerate(samples):
            for k, view in enumerate(one.views):
                views[b, k] = np.asarray(view.image)
        tensor = torch.from_numpy
        return Batch(
            pixels=tensor(pixels),
            views=tensor(views),
            system=torch.tensor(list(system), dtype=torch.int64),
            ids=tensor(ids),
            cells=tensor(cells),
            positions=tensor(positions),
            question=tensor(owner),
            labels=tensor(labels),
            weights=tensor(weights),
            mixed=tensor(mixed),
            mixture=tensor(mixture),
            own=tensor(own),
            relevant=tensor(relevant),
            classes=tensor(np.stack([classes for classes, _ in dense])),
            offsets=tensor(np.stack([offsets for _, offsets in dense])),
        )


def _cells(boxes: Sequence[Box], one: Sample) -> list[int]:
    """The cells of a picture and of its windows that boxes touch, numbered picture by picture."""
    found = cells_of(boxes)
    for index, view in enumerate(one.views, start=1):
        left, top, right, bottom = view.window
        across, down = IMAGE_SIZE / (right - left), IMAGE_SIZE / (bottom - top)
        inside = [
            ((b[0] - left) * across, (b[1] - top) * down, (b[2] - left) * across, (b[3] - top) * down)
            for b in boxes
            if b[0] < right and b[2] > left and b[1] < bottom and b[3] > top
        ]
        found += [index * CELLS + cell for cell in cells_of(inside)]
    return found
