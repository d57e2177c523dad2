"""What a model is given and what it keeps of it: processed inputs, the prefix in the cache, and cells known after it.

Values only: nothing here runs a model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from latent_tool.models.cells import Box
from latent_tool.models.prompts import Markers

__all__ = ["Cell", "Computed", "Inputs", "Prefix", "Stem", "Stems", "Suffix", "common_length"]


@dataclass(frozen=True)
class Stem:
    """Keys and values of injected cells right after a prefix, ``(layers, 2, Hkv, V, D)``."""

    cells: tuple[int, ...]
    states: Tensor


@dataclass(frozen=True)
class Computed:
    """A row of a pass that began after a stem, and the cells that it added: column ``[first, first + added)``."""

    layers: Sequence[tuple[Tensor, Tensor]]
    row: int
    first: int
    cells: tuple[int, ...]
    before: Stem | None

    def stem(self) -> Stem:
        columns = slice(self.first, self.first + len(self.cells) - (len(self.before.cells) if self.before else 0))
        states = torch.stack([torch.stack(each)[:, self.row, :, columns] for each in self.layers])
        return Stem(self.cells, states if self.before is None else torch.cat([self.before.states, states], dim=3))


class Stems:
    """The stems of one prefix: the few that were used last, and those of the last pass that computed new ones."""

    KEPT = 4

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stems: tuple[Stem, ...] = ()
        self._computed: tuple[Computed, ...] = ()

    def find(self, cells: tuple[int, ...]) -> Stem | None:
        """Return what is known of the cells: a stem of the longest possible run of them from the first one on."""
        if not cells:
            return None
        with self._lock:
            every: tuple[Stem | Computed, ...] = (*self._stems, *self._computed)
            best, length = None, 0
            for each in every:
                common = common_length((each.cells, cells))
                if common > length:
                    best, length = each, common
            if best is None:
                return None
            stem = best if isinstance(best, Stem) else best.stem()
            self._stems = (stem, *(each for each in self._stems if each is not stem))[: self.KEPT]
        if length == len(stem.cells):
            return stem
        return Stem(stem.cells[:length], stem.states[:, :, :, :length])

    def add(self, computed: Sequence[Computed]) -> None:
        """Remember what a pass computed, in place of the pass before."""
        with self._lock:
            self._computed = tuple(computed)


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the beginning that all sequences have in common."""
    shortest = min(map(len, sequences))
    return next((at for at, row in enumerate(zip(*sequences, strict=False)) if len(set(row)) > 1), shortest)


@dataclass(frozen=True)
class Cell:
    """One image cell of the prompt: which image it belongs to, and its box in pixels of the upright image.

    ``window``: which of the windows beside the images it was seen in, from 0; ``None``: in the image itself.
    """

    image: int
    box: Box | None
    window: int | None = None


@dataclass(frozen=True)
class Inputs:
    """Processed inputs of one question, before the model has seen them.

    ``cells``: of the prompt, then of the windows that are injected. ``pictures``: pictures in the prompt, windows
    among them. ``injected``: prompts of windows whose cells are injected after the prompt, before all others.
    """

    tensors: Mapping[str, Any]
    tail: tuple[int, ...]
    markers: Markers
    cells: tuple[Cell, ...]
    warnings: tuple[str, ...]
    pictures: int = 1
    injected: tuple[Inputs, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the prefix."""
        return int(self.tensors["input_ids"].shape[1]) + sum(len(each.cells) for each in self.injected)

    @property
    def shows_windows(self) -> bool:
        """Whether windows of pictures are among what it shows."""
        return any(cell.window is not None for cell in self.cells)

    def changed(self, change: Callable[[str, Any], Any]) -> Inputs:
        """Return the inputs with every tensor as ``change`` makes it of its name and value."""
        tensors = {name: change(name, value) for name, value in self.tensors.items()}
        return replace(self, tensors=tensors, injected=tuple(each.changed(change) for each in self.injected))


@dataclass(frozen=True)
class Prefix:
    """The prefix in the cache.

    ``features``: ``(C, d)``, merged image features at the image cells. ``last_logits``: ``(vocabulary,)`` after the
    prefix. ``positions``: position ids the decoder was given, ``(..., P)``, or ``None`` if it counts by itself;
    ``next_position``: the one that follows. ``columns``: ``(C,)``, where the image cells stand in the prefix.
    ``stems``: what is known of cells injected after it. ``attention``: ``(C,)`` of the last position to the image
    cells, mean over heads and layers, if it was asked for. ``encoded``: pictures that went through the vision tower.
    """

    inputs: Inputs
    cache: DynamicCache
    features: Tensor
    last_logits: Tensor
    positions: Tensor | None
    columns: Tensor
    next_position: int
    stems: Stems = field(default_factory=Stems, compare=False, repr=False)
    attention: Tensor | None = None
    encoded: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prefix."""
        return self.inputs.length


@dataclass(frozen=True)
class Suffix:
    """What follows the prefix: embeddings ``(N, S, d)``, the token id of every position (a filler where V and T stand,
    which have none), and where the latents stand."""

    embeddings: Tensor
    tokens: tuple[int, ...]
    latents: slice = field(default_factory=lambda: slice(0, 0))

    @property
    def length(self) -> int:
        return len(self.tokens)

    def split(self) -> list[Suffix]:
        """Return what follows the prefix in every row."""
        return [replace(self, embeddings=each[None]) for each in self.embeddings]

    def part(self, begin: int, end: int) -> Suffix:
        """Return the positions ``[begin, end)``; where latents stand is not told of a part."""
        return Suffix(self.embeddings[:, begin:end], self.tokens[begin:end])
