"""Keys and values of rows behind a shared prefix: what stands after it, with room for later tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from latent_tool.models.prefix import Stem

__all__ = ["SuffixLayer", "beginning", "with_room"]

# Columns that are made room for when rows grow token by token: at least so many, and then twice as many as are needed.
_ROOM = 64


class SuffixLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of the suffix alone; counts the (longest) prefix as seen.

    What is kept lies in buffers with room for later tokens, of which ``keys`` and ``values`` are the part in use: a
    token is written into its column, and what stands there already is not copied. Room is made in powers of two, so
    that few shapes occur; rows that leave make place within the buffers.

    ``before``: keys and values ``(2, R, Hkv, V, D)`` the rows begin with; ``keep``: whether another pass follows.
    """

    def __init__(self, prefix_length: int, before: Tensor | None, keep: bool) -> None:
        super().__init__()
        self.prefix_length = prefix_length
        self.keep = keep
        self._buffers: tuple[Tensor, Tensor] | None = None  # (R0, Hkv, room, D), R0 rows at least
        if before is not None:
            self.keys, self.values = before[0], before[1]
            self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        more = key_states.shape[-2]
        if more > 1 or not self.is_initialized or not self.keep:
            if self.is_initialized:
                key_states = torch.cat([self.keys, key_states], dim=-2)
                value_states = torch.cat([self.values, value_states], dim=-2)
            if self.keep:
                self.keys, self.values, self._buffers = key_states, value_states, None
                self.is_initialized = True
            return key_states, value_states
        rows, used = len(key_states), self.keys.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < used + more:
            self._buffers = with_room(self.keys, used + more), with_room(self.values, used + more)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, used : used + more] = states
        self.keys, self.values = (buffer[:rows, :, : used + more] for buffer in self._buffers)
        return self.keys, self.values

    def fork(self) -> SuffixLayer:
        """Return a layer that begins with what this one holds, and writes nothing into its buffers."""
        forked = copy.copy(self)
        forked._buffers = None
        return forked

    def select(self, index: Tensor) -> None:
        """Keep some of the rows, in ascending order."""
        if self.keys is None:
            return
        at = index.to(self.keys.device)  # layers may be on different devices
        if self._buffers is None:
            self.keys, self.values = self.keys[at], self.values[at]
            return
        used = self.keys.shape[-2]
        with torch.inference_mode():
            for buffer, states in zip(self._buffers, (self.keys, self.values), strict=True):
                buffer[: len(at), :, :used] = states[at]
        self.keys, self.values = (buffer[: len(at), :, :used] for buffer in self._buffers)

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Go on from keys and values ``(R, Hkv, T, D)``."""
        self.keys, self.values, self._buffers = keys, values, None
        self.is_initialized = True

    def release(self) -> None:
        """Let keys and values go, which stand elsewhere now."""
        self.keys = self.values = None  # type: ignore[assignment]
        self._buffers = None
        self.is_initialized = False

    def get_seq_length(self) -> int:
        return self.prefix_length + int(super().get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def with_room(states: Tensor, needed: int) -> Tensor:
    """Return a buffer that begins with states ``(R, Hkv, T, D)`` and has room for ``needed`` columns or more."""
    room = max(_ROOM, 1 << (needed - 1).bit_length())
    buffer = states.new_empty(*states.shape[:2], room, states.shape[-1])
    buffer[:, :, : states.shape[2]] = states
    return buffer


def beginning(stems: Sequence[Stem | None]) -> Tensor | None:
    """Return what rows begin with, ``(layers, 2, R, Hkv, V, D)``, shorter stems padded on the left."""
    most = max(0 if stem is None else len(stem.cells) for stem in stems)
    if not most:
        return None
    some = next(stem.states for stem in stems if stem is not None)
    parts = []
    for _, group in groupby(stems, key=id):
        same = list(group)
        if same[0] is None:
            states = some.new_zeros(*some.shape[:3], most, some.shape[-1])
        else:
            states = torch.nn.functional.pad(same[0].states, (0, 0, most - len(same[0].cells), 0))
        parts.append(states[:, :, None].expand(-1, -1, len(same), -1, -1, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
