"""Many continuations of few prefixes in one forward pass, without a copy of any prefix.

``SharedRows`` each continue a prefix. Everything but attention runs as one batch. In attention, the
queries of all rows of a prefix go against its one set of keys and values, which gives an output and a log-sum-exp; the
queries of every row then go against the row's own suffix, where the prefix is one more column, with its log-sum-exp as
score and its output as value. That is exactly the softmax over both. Rows of different lengths are padded and masked.

The keys and values of the injected cells, which come right after the prefix, depend on nothing that follows them. What
one pass computed of them is kept with the prefix (``Stems``), and later passes begin after them.

This fits decoders whose layers all are plain or sliding-window attention through transformers' attention interface
(``install``, ``layers_fit``); the model compares one pass with the plain path before it relies on it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from latent_tool.models.attention import mean_over_layers, pick_columns
from latent_tool.models.decoder import Decoder
from latent_tool.models.prefix import Computed, Prefix, Stem, Suffix
from latent_tool.models.prefix_attention import PrefixAttention, attention_for, beyond
from latent_tool.models.rows import Rows
from latent_tool.models.suffix_cache import SuffixLayer, beginning, with_room

__all__ = [
    "Block",
    "SharedRows",
    "attending",
    "hides_exactly",
    "install",
    "installed",
    "layers_fit",
    "over_prefix",
]

_NAME = "latent_tool_shared_prefix"
_active = threading.local()


@dataclass(frozen=True)
class Block:
    """Adjacent rows ``[start, stop)`` that continue the same prefix."""

    start: int
    stop: int
    prefix: Prefix


class SharedRows(Rows):
    """Rows that run as one batch.

    Args:
        decoder: the model's decoder.
        prefixes: the prefix of every row; rows of one prefix stand together.
        stems: per row, what of its suffix is known; the embeddings that are run begin after it.
        keep: whether the keys and values of the suffixes are needed after the first pass.
    """

    shared = True

    def __init__(
        self,
        decoder: Decoder,
        prefixes: Sequence[Prefix],
        stems: Sequence[Stem | None] | None = None,
        keep: bool = True,
    ) -> None:
        self.decoder = decoder
        self.prefixes = list(prefixes)
        self.stems = [None] * len(prefixes) if stems is None else list(stems)
        longest = max(prefix.length for prefix in prefixes)
        before = beginning(self.stems)
        self.cache = DynamicCache()
        self.cache.layers = [
            SuffixLayer(longest, None if before is None else before[index], keep)
            for index in range(len(prefixes[0].cache.layers))
        ]
        # By layer: they may be on different devices. Chosen here, because a choice may try a kernel.
        self._over_prefix = [over_prefix(layer) for layer in prefixes[0].cache.layers]
        # Per row, how many tokens after the prefix it has, and per column which one stands there; -1: padding. The
        # same numbers are on the device, where every pass reads them.
        device = decoder.device
        self.lengths = [0 if stem is None else len(stem.cells) for stem in self.stems]
        most = max(self.lengths)
        self._ends = torch.tensor(self.lengths, device=device)
        self._starts = torch.tensor([prefix.next_position for prefix in prefixes], device=device)
        places = torch.arange(most, device=device) - (most - self._ends[:, None])
        self._place_buffer = self._places = places.clamp_min(-1)
        self._padded = [length < most for length in self.lengths]
        self._first = [(most, length) for length in self.lengths]  # column and place of the first token that is run
        self._begun = False
        self.taps = {}
        self._tapped: dict[int, list[Tensor]] = {}
        self._arrange()

    def _arrange(self) -> None:
        """Find the blocks of adjacent rows with the same prefix."""
        self.blocks: list[Block] = []
        start = 0
        for _, rows in groupby(self.prefixes, key=id):
            count = len(list(rows))
            self.blocks.append(Block(start, start + count, self.prefixes[start]))
            start += count
        self._masks: dict[tuple[int | None, int, int, torch.device], Tensor] = {}

    @staticmethod
    def known(prefix: Prefix, cells: Sequence[int]) -> Stem | None:
        return prefix.stems.find(tuple(cells))

    def write(self, tokens: Sequence[Sequence[int]], keep: Sequence[int]) -> Tensor:
        flat = [token for row in tokens for token in row]
        embeddings = self.decoder.embed(flat).view(len(tokens), -1, self.decoder.width).to(self.decoder.dtype)
        return self._extend([embeddings], keep)

    def extend(self, suffixes: Sequence[Suffix], keep: Sequence[int]) -> Tensor:
        return self._extend([suffix.embeddings for suffix in suffixes], keep)

    def _extend(self, suffixes: Sequence[Tensor], keep: Sequence[int]) -> Tensor:
        """Run embeddings ``(n, S, d)`` of ``n`` adjacent rows each; shorter ones are padded on the left."""
        length = max(part.shape[1] for part in suffixes)
        pads = [length - part.shape[1] for part in suffixes for _ in range(len(part))]
        places = self._next_places(length, pads)  # (R, length)
        parts = [
            part if part.shape[1] == length else torch.nn.functional.pad(part, (0, 0, length - part.shape[1], 0))
            for part in suffixes
        ]
        embeddings = parts[0] if len(parts) == 1 else torch.cat(parts)
        # Nothing is masked when one token follows rows without padding.
        self._plain = length == 1 and not any(self._padded)
        self._masks.clear()
        positions = self._starts[:, None] + places.clamp_min(0)
        shape = self.prefixes[0].positions
        if shape is not None:
            positions = positions.expand(*shape.shape[:-2], *positions.shape)
        wanted = self.decoder.places([length + place for place in keep])
        with self.decoder.forward_pass(), attending(self):
            output = self.decoder.model(
                inputs_embeds=embeddings,
                **{self.decoder.cache_name: self.cache},
                position_ids=positions,
                use_cache=True,
                logits_to_keep=wanted,
            )
        logits: Tensor = output.logits
        if logits.shape[:2] != (len(embeddings), len(keep)):
            raise RuntimeError("the model computes its logits somewhere else")
        return logits

    def _next_places(self, length: int, pads: Sequence[int]) -> Tensor:
        """Note which tokens after the prefix stand in the next columns, ``(R, length)``, and return that."""
        used, device = self._places.shape[1], self._ends.device
        ahead = torch.arange(length, device=device)
        if any(pads):
            gaps = torch.tensor(pads, device=device)
            places = (self._ends[:, None] + ahead - gaps[:, None]).masked_fill_(ahead < gaps[:, None], -1)
            self._ends = self._ends + length - gaps
            self._padded = [padded or pad > 0 for padded, pad in zip(self._padded, pads, strict=True)]
        else:
            places = self._ends[:, None] + ahead
            self._ends = self._ends + length
        if not self._begun:
            self._begun = True
            self._first = [(column + pad, place) for (column, place), pad in zip(self._first, pads, strict=True)]
        self.lengths = [before + length - pad for before, pad in zip(self.lengths, pads, strict=True)]
        if self._place_buffer.shape[1] < used + length:
            self._place_buffer = with_room(self._places[:, None, :, None], used + length)[:, 0, :, 0]
        self._place_buffer[:, used : used + length] = places
        self._places = self._place_buffer[:, : used + length]
        return places

    def fork(self, rows: Sequence[int]) -> SharedRows:
        forked = copy.copy(self)
        forked.cache = copy.copy(self.cache)
        forked.cache.layers = [layer.fork() for layer in self.cache.layers]
        forked.taps, forked._tapped = {}, {}
        forked.select(rows)
        return forked

    def select(self, rows: Sequence[int]) -> None:
        index = torch.tensor(list(rows), device=self.decoder.device)
        self.prefixes = [self.prefixes[row] for row in rows]
        self.stems = [self.stems[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        self._padded = [self._padded[row] for row in rows]
        self._first = [self._first[row] for row in rows]
        used = self._places.shape[1]
        self._starts, self._ends = self._starts[index], self._ends[index]
        self._place_buffer = self._place_buffer[index]
        self._places = self._place_buffer[:, :used]
        for layer in self.cache.layers:
            layer.select(index)
        self._arrange()

    def column(self, row: int, place: int) -> int:
        """Return the suffix column of a row's token ``place`` after the prefix, of those that the first pass
        has run.
        """
        column, first = self._first[row]
        return column + place - first

    def attention(self, row: int) -> Tensor:
        return mean_over_layers(self._tapped[row])

    def remember(self, cells: Sequence[tuple[int, ...]]) -> None:
        layers = [(layer.keys, layer.values) for layer in self.cache.layers]
        if any(keys is None for keys, _ in layers) or len({(keys.shape, keys.device) for keys, _ in layers}) > 1:
            return
        for block in self.blocks:
            added: dict[tuple[int, ...], Computed] = {}
            for row in range(block.start, block.stop):
                stem = self.stems[row]
                known = 0 if stem is None else len(stem.cells)
                if len(cells[row]) > known:
                    added[cells[row]] = Computed(layers, row, self.column(row, known), cells[row], stem)
            if added:
                block.prefix.stems.add(list(added.values()))

    # ------------------------------------------------------------------ attention

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """Return the attention output ``(R, S, H, D)``; query ``(R, H, S, D)``, suffix keys and values ``(R, Hkv, T,
        D)``.
        """
        rows, heads, length, width = query.shape
        shared, total = key.shape[1], key.shape[2]
        # Heads that share a key head are queries of it like any other.
        grouped = query.reshape(rows, shared, heads // shared * length, width)
        over_prefix = self._over_prefix[layer]
        outs, lses, hidden = [], [], []
        for block in self.blocks:
            stored = block.prefix.cache.layers[layer]
            part = grouped[block.start : block.stop]
            folded = part.transpose(0, 1).reshape(shared, -1, width)
            columns, count = stored.keys.shape[2], self._columns_in_use(block)
            masked = self._out_of_window(block, columns, length, window, folded.shape[1], query.device)
            seen = slice(0, None)
            if masked is not None and window is not None and count is None:
                # Queries stand behind the prefix, so that none sees what lies a window before its end.
                seen = slice(min(max(0, columns - window + 1), columns - 1), None)
            out, lse = over_prefix(
                folded,
                stored.keys[0][:, seen],
                stored.values[0][:, seen],
                scaling,
                softcap,
                None if masked is None else masked[:, seen],
                count,
            )
            outs.append(out.view(shared, len(part), -1, out.shape[-1]).transpose(0, 1))
            lses.append(lse.view(shared, len(part), -1, 1).transpose(0, 1))
            hidden.append(masked)
        there = outs[0] if len(outs) == 1 else torch.cat(outs)
        there_lse = lses[0] if len(lses) == 1 else torch.cat(lses)

        mask = self._suffix_mask(length, window, shared, grouped.shape[2], query.device)
        own = over_prefix.scores(grouped, key, scaling, softcap, mask)
        scores = torch.cat([own, there_lse], dim=-1)
        weights = scores.softmax(-1)
        merged = torch.matmul(weights[..., :total], value.float())
        merged = torch.addcmul(merged, weights[..., total:], there.float()).to(value.dtype)
        for row, place in self.taps.items():
            block, masked = next(
                (block, masked) for block, masked in zip(self.blocks, hidden, strict=True) if row < block.stop
            )
            stored = block.prefix.cache.layers[layer]
            read = grouped[row].view(shared, -1, length, width)[:, :, place]
            lse = scores[row].logsumexp(-1).view(shared, -1, length)[:, :, place]
            if masked is not None:
                masked = masked.view(block.stop - block.start, -1, length, masked.shape[-1])[
                    row - block.start, :, place
                ]
                masked = masked.flatten(0, 1)
            count = self._columns_in_use(block)
            if count is not None:
                masked = beyond(count, stored.keys.shape[2], masked)
            there = over_prefix.scores(read.flatten(1, 2), stored.keys[0], scaling, softcap, hidden=masked)
            probabilities = (there - lse.flatten(1)[..., None]).exp()
            self._tap(row, probabilities.view(heads, -1, probabilities.shape[-1]))
        return merged.view(rows, heads, length, -1).transpose(1, 2).contiguous()

    def _tap(self, row: int, probabilities: Tensor) -> None:
        """Note one layer's attention ``(H, positions, P)`` of one row to its whole prefix: that to the image cells."""
        self._tapped.setdefault(row, []).append(pick_columns(probabilities.mean(0), self.prefixes[row].columns))

    def _suffix_mask(
        self, length: int, window: int | None, shared: int, queries: int, device: torch.device
    ) -> Tensor | None:
        """What is added to suffix scores, ``(R Hkv, queries, T)``: 0, or minus infinity for what must not be seen."""
        if self._plain and window is None:
            return None
        key = (window, shared, queries, device)
        found = self._masks.get(key)
        if found is None:
            places = self._places.to(device)
            column, row = places[:, None, :], places[:, -length:, None]
            # Padding sees the prefix alone; nothing sees padding.
            seen = (column <= row) & (column >= 0)
            if window is not None:
                seen &= row - column < window
            bias = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))
            bias = bias[:, None, None].expand(-1, shared, queries // length, -1, -1)
            found = self._masks[key] = bias.reshape(-1, queries, seen.shape[-1])
        return found

    def _columns_in_use(self, block: Block) -> Tensor | None:
        """How many columns of a block's prefix are no padding, ``()`` on their device; ``None``: all of them."""
        return None

    def _out_of_window(
        self, block: Block, prefix: int, length: int, window: int | None, queries: int, device: torch.device
    ) -> Tensor | None:
        """Which prefix columns the folded queries of a block may not see, ``(queries, P)``; ``None``: they see all."""
        if window is None or window >= prefix + max(self.lengths[block.start : block.stop]):
            return None
        place = prefix + self._places[block.start : block.stop, -length:].to(device).clamp_min(0)  # (rows, length)
        hidden = place[..., None] - torch.arange(prefix, device=place.device) >= window
        return hidden[:, None].expand(-1, queries // place.numel(), -1, -1).reshape(queries, prefix)


@contextmanager
def attending(rows: SharedRows) -> Iterator[None]:
    """Let the decoder's attention in this thread be that of rows."""
    _active.batch = rows
    try:
        yield
    finally:
        _active.batch = None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA, except in the passes of a ``SharedRows``."""
    batch: SharedRows | None = getattr(_active, "batch", None)
    if batch is None:
        if softcap is not None:
            kwargs["softcap"] = softcap
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return batch.attend(module.layer_idx, query, key, value, scale, softcap, sliding_window), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """SDPA's mask, except in the passes of a ``SharedRows``, which masks by itself."""
    return None if getattr(_active, "batch", None) is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


def install(model: PreTrainedModel) -> bool:
    """Let the decoder use this attention, which is SDPA outside a ``SharedRows``; ``False`` where it does not fit."""
    text = model.config.get_text_config()
    if text._attn_implementation != "sdpa" or model.get_output_embeddings() is None:
        return False
    key = next((name for name in model.config.sub_configs if getattr(model.config, name, None) is text), None)
    if key is None:
        return False
    model.set_attn_implementation({key: _NAME})
    return bool(text._attn_implementation == _NAME)


def installed(model: PreTrainedModel) -> bool:
    """Tell whether the decoder uses this attention now; somebody may have chosen another since."""
    return bool(model.config.get_text_config()._attn_implementation == _NAME)


def hides_exactly(cache: DynamicCache) -> bool:
    """Tell whether queries do not see what a sliding window has left, which a prompt shorter than the window does not
    show.

    The first keys of a prefix's first layer are the queries: one sees the second half, the other one nothing.
    """
    key, value = cache.layers[0].keys[0], cache.layers[0].values[0]
    half, scaling = key.shape[1] // 2, key.shape[-1] ** -0.5
    hidden = torch.ones(2, key.shape[1], dtype=torch.bool, device=key.device)
    hidden[0, half:] = False
    attention = over_prefix(cache.layers[0])
    out, lse = attention(key[:, :2], key, value, scaling, hidden=hidden)
    expected, expected_lse = attention(key[:, :1], key[:, half:], value[:, half:], scaling)
    close = 1e-3 if value.dtype == torch.float32 else 5e-2
    return bool(
        torch.allclose(out[:, :1].float(), expected.float(), atol=close, rtol=close)
        and torch.allclose(lse[:, :1], expected_lse, atol=close, rtol=close)
        and (lse[:, 1] < -1e4).all()
        and out.isfinite().all()
    )


def over_prefix(layer: Any) -> PrefixAttention:
    """Return how attention over what a layer of a prefix's cache holds is computed."""
    keys, values = layer.keys, layer.values
    return attention_for(keys.device, keys.dtype, keys.shape[-1], values.shape[-1])


def layers_fit(cache: DynamicCache) -> bool:
    """Tell whether every layer of a prefix's cache holds plain keys and values."""
    return all(type(layer) is DynamicLayer and layer.keys is not None and layer.keys.numel() for layer in cache.layers)
