"""What was computed of images that were asked about before: a second question about an image begins after it.

An entry holds a prompt up to the end of its last image, as it stands in the decoder's cache. Entries are never changed
once they are in; a question continues from a fork. The least recently used ones go first when the bytes are used up.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from latent_tool.models.cache import fork_cache

__all__ = ["PER_TOKEN", "AttentionMemory", "ImagePrefix", "PrefixCache", "cut_cache", "cut_tensors", "image_key"]

# Inputs that have one entry per token of the prompt.
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class ImagePrefix:
    """A prompt up to the end of its last image; the fields are those of a ``Prefix``."""

    cache: DynamicCache
    features: Tensor
    positions: Tensor | None
    columns: Tensor
    next_position: int

    @property
    def bytes(self) -> int:
        """Memory its tensors take."""
        tensors = [self.features, self.columns, *([] if self.positions is None else [self.positions])]
        tensors += [part for layer in self.cache.layers for part in (layer.keys, layer.values)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class PrefixCache:
    """Image prefixes by key, least recently used first to go; may be used from any thread.

    Those that show windows of a picture are chosen anew for every question, and hardly ever asked for again: they make
    way for whole pictures, never the other way round.

    Args:
        limit: bytes that the entries may take together; 0: nothing is kept.
        most: whole pictures at most, whatever they take: those of a small model would fill the bytes with hundreds of
            images that nobody asks about again.
        most_windows: entries with windows at most, beside those.
    """

    def __init__(self, limit: int, most: int = 64, most_windows: int = 8) -> None:
        self.limit = limit
        self.most = most
        self.most_windows = most_windows
        self.bytes = self.hits = self.misses = 0
        self._pictures: OrderedDict[str, ImagePrefix] = OrderedDict()
        self._windows: OrderedDict[str, ImagePrefix] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pictures) + len(self._windows)

    def find(self, key: str) -> ImagePrefix | None:
        """Return the entry of a key, which becomes the most recently used one."""
        with self._lock:
            for entries in (self._pictures, self._windows):
                if key in entries:
                    self.hits += 1
                    entries.move_to_end(key)
                    return entries[key]
            self.misses += 1
            return None

    def put(self, key: str, entry: ImagePrefix, *, window: bool = False) -> None:
        """Keep an entry and drop the least recently used ones, until all fit and are not too many.

        One that never fits is not kept. ``window``: it shows windows of a picture; whole pictures do not make way.
        """
        with self._lock:
            if key in self._pictures or key in self._windows or entry.bytes > self.limit:
                return
            (self._windows if window else self._pictures)[key] = entry
            self.bytes += entry.bytes
            while len(self._windows) > self.most_windows or (self.bytes > self.limit and self._windows):
                self._drop_first(self._windows)
            while len(self._pictures) > self.most or self.bytes > self.limit:
                self._drop_first(self._pictures)

    def _drop_first(self, entries: OrderedDict[str, ImagePrefix]) -> None:
        _, dropped = entries.popitem(last=False)
        self.bytes -= dropped.bytes

    def clear(self) -> None:
        """Forget all entries."""
        with self._lock:
            self._pictures.clear()
            self._windows.clear()
            self.bytes = 0


class AttentionMemory:
    """What pictures are attended to whatever is asked: attention ``(C,)`` by key, of the pictures that came last."""

    KEPT = 256

    def __init__(self) -> None:
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: str) -> Tensor | None:
        """Return the attention of a key, if it is known."""
        with self._lock:
            return self._known.get(key)

    def put(self, key: str, attention: Tensor) -> None:
        """Keep an attention, and drop the oldest ones."""
        with self._lock:
            self._known[key] = attention
            while len(self._known) > self.KEPT:
                self._known.popitem(last=False)


def cut_tensors(tensors: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Return a prompt's inputs without what stands after its first ``length`` tokens."""
    return {name: value[:, :length] if name in PER_TOKEN else value for name, value in tensors.items()}


def cut_cache(cache: DynamicCache, length: int, row: int = 0) -> DynamicCache:
    """Return a copy of the first ``length`` positions of one row of a cache of plain layers."""
    cut = fork_cache(cache)
    for layer in cut.layers:
        layer.keys = layer.keys[row : row + 1, :, :length].clone()
        layer.values = layer.values[row : row + 1, :, :length].clone()
    return cut


def image_key(tensors: Mapping[str, Any]) -> str:
    """Return a digest of all that an image prefix depends on: token ids, pixels and whatever else the processor
    gave.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
