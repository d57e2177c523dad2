"""Many continuations of few prefixes in one forward pass, without a copy of any prefix.

The rows of a ``SuffixBatch`` each continue a prefix. Everything but attention runs as one batch. In attention, the
queries of all rows of a prefix go against its one set of keys and values, the queries of every row against the row's
own suffix, and the two parts are merged by their log-sum-exps:

    out = w_p out_p + w_s out_s,   w_p = exp(lse_p - lse),   w_s = exp(lse_s - lse),   lse = ln(exp lse_p + exp lse_s)

which is exactly the softmax over both. Rows of different lengths are padded on the left and masked.

This fits decoders whose layers all are plain or sliding-window attention through transformers' attention interface
(``install``, ``layers_fit``); the model compares one pass with the plain path before it relies on it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from latent_tool.models.vlm import Prefix, VisionLanguageModel

__all__ = ["SuffixBatch", "Tap", "install", "installed", "layers_fit"]

_NAME = "latent_tool_shared_prefix"
_active = threading.local()

# Attention scores of the prefix part that are held at once, as float32 numbers.
_CHUNK = 4_000_000


class _SuffixLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of the suffix alone; counts the (longest) prefix as seen."""

    def __init__(self, prefix_length: int) -> None:
        super().__init__()
        self.prefix_length = prefix_length

    def get_seq_length(self) -> int:
        return self.prefix_length + int(super().get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


@dataclass(frozen=True)
class _Block:
    """Adjacent rows ``[start, stop)`` that continue the same prefix."""

    start: int
    stop: int
    prefix: Prefix


class Tap:
    """Reads the attention of some positions of every row to the row's image cells, mean over layers and heads.

    Args:
        places: per row, positions counted from the row's first embedding.
        pads: per row, how many positions of padding stand before it.
    """

    def __init__(self, places: Sequence[slice], pads: Sequence[int]) -> None:
        self._places = [slice(place.start + pad, place.stop + pad) for place, pad in zip(places, pads, strict=True)]
        self._sums: list[Tensor | None] = [None] * len(places)
        self._layers = [0] * len(places)

    def add(self, row: int, probabilities: Tensor) -> None:
        """One layer's probabilities ``(H, S, C)`` of one row."""
        mean = probabilities[:, self._places[row]].mean(0)
        before = self._sums[row]
        self._sums[row] = mean if before is None else before + mean
        self._layers[row] += 1

    def means(self) -> list[Tensor]:
        """Per row ``(positions, C)``, float32."""
        return [total / count for total, count in zip(self._sums, self._layers, strict=True) if total is not None]


class SuffixBatch:
    """Rows that continue prefixes, run together. Their first embeddings may differ in number, later ones may not.

    Args:
        vlm: the model.
        prefixes: the prefix of every row; rows of one prefix stand together.
    """

    def __init__(self, vlm: VisionLanguageModel, prefixes: Sequence[Prefix]) -> None:
        self.vlm = vlm
        self.prefixes = list(prefixes)
        longest = max(prefix.length for prefix in prefixes)
        self.cache = DynamicCache()
        self.cache.layers = [_SuffixLayer(longest) for _ in prefixes[0].cache.layers]
        self.pads = torch.zeros(len(prefixes), dtype=torch.long, device=vlm.device)
        self.starts = torch.tensor([prefix.next_position for prefix in prefixes], device=vlm.device)
        self.seen = 0
        self.tap: Tap | None = None
        self._arrange()

    def _arrange(self) -> None:
        """Find the blocks of adjacent rows with the same prefix."""
        self.blocks: list[_Block] = []
        start = 0
        for _, rows in groupby(self.prefixes, key=id):
            count = len(list(rows))
            self.blocks.append(_Block(start, start + count, self.prefixes[start]))
            start += count
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def extend(self, suffixes: Sequence[Tensor], keep: Sequence[Sequence[int]]) -> list[Tensor]:
        """Run the next embeddings ``(S, d)`` of every row; logits ``(len(keep), vocabulary)`` where they are wanted.

        ``keep`` counts from the row's own first embedding. Only the first call may have rows of different lengths.
        """
        length = max(len(suffix) for suffix in suffixes)
        pads = [length - len(suffix) for suffix in suffixes]
        if self.seen and any(pads):
            raise ValueError("only the first pass may have rows of different lengths")
        if not self.seen:
            self.pads = torch.tensor(pads, device=self.vlm.device)
        embeddings = torch.stack(
            [torch.nn.functional.pad(row, (0, 0, pad, 0)) for row, pad in zip(suffixes, pads, strict=True)]
        )
        steps = self.seen + torch.arange(length, device=self.vlm.device)
        positions = self.starts[:, None] + (steps[None] - self.pads[:, None]).clamp_min(0)
        shape = self.prefixes[0].positions
        if shape is not None:
            positions = positions.expand(*shape.shape[:-2], *positions.shape)
        most = max(len(row) for row in keep)
        places = [[place + pad for place in row] + [0] * (most - len(row)) for row, pad in zip(keep, pads, strict=True)]
        wanted = torch.tensor(places, dtype=torch.long, device=self.vlm.device)
        logits = self._forward(embeddings, positions, wanted)
        self.seen += length
        self._masks.clear()
        return [row[: len(wished)] for row, wished in zip(logits, keep, strict=True)]

    def _forward(self, embeddings: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        """Logits ``(R, K, vocabulary)`` at the wanted positions ``(R, K)``."""

        def choose(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = arguments[0]
            index = wanted[..., None].expand(-1, -1, hidden.shape[-1])
            return (hidden.gather(1, index), *arguments[1:])

        model = self.vlm.model
        with self.vlm.forward_pass():
            handle = model.get_output_embeddings().register_forward_pre_hook(choose)
            _active.batch = self
            try:
                output = model(
                    inputs_embeds=embeddings, past_key_values=self.cache, position_ids=positions, use_cache=True
                )
            finally:
                _active.batch = None
                handle.remove()
        logits: Tensor = output.logits
        if logits.shape[:2] != wanted.shape:
            raise RuntimeError("the model computes its logits somewhere else")
        return logits

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows only, in the order given."""
        index = torch.tensor(list(rows), device=self.vlm.device)
        self.prefixes = [self.prefixes[row] for row in rows]
        self.pads, self.starts = self.pads[index], self.starts[index]
        for layer in self.cache.layers:
            if layer.keys is not None:
                layer.keys, layer.values = layer.keys[index], layer.values[index]
        self._arrange()

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
        """Attention output ``(R, S, H, D)``; query ``(R, H, S, D)``, suffix keys and values ``(R, Hkv, T, D)``."""
        rows, heads, length, width = query.shape
        shared = key.shape[1]
        # Heads that share a key head are queries of it like any other.
        grouped = query.reshape(rows, shared, heads // shared * length, width)
        scores = _scores(grouped, key, scaling, softcap).view(rows, shared, -1, length, key.shape[2])
        scores = scores.masked_fill(~self._suffix_mask(length, key.shape[2], window)[:, None, None], float("-inf"))
        own = scores.view(rows, shared, -1, key.shape[2])
        own_lse = own.logsumexp(-1, keepdim=True)
        own_out = torch.matmul((own - own_lse).exp().to(value.dtype), value)

        out = torch.empty(rows, shared, grouped.shape[2], value.shape[-1], dtype=value.dtype, device=value.device)
        for block in self.blocks:
            stored = block.prefix.cache.layers[layer]
            part = slice(block.start, block.stop)
            folded = grouped[part].transpose(0, 1).reshape(shared, -1, width)
            hidden = self._out_of_window(block, stored.keys.shape[2], length, key.shape[2], window, folded.shape[1])
            there_out, there_lse = _over_prefix(folded, stored.keys[0], stored.values[0], scaling, softcap, hidden)
            count = block.stop - block.start
            there_out = there_out.view(shared, count, -1, value.shape[-1]).transpose(0, 1)
            there_lse = there_lse.view(shared, count, -1, 1).transpose(0, 1)
            lse = torch.logaddexp(there_lse, own_lse[part])
            merged = (there_lse - lse).exp() * there_out + (own_lse[part] - lse).exp() * own_out[part]
            out[part] = merged.to(out.dtype)
            if self.tap is not None:
                columns = block.prefix.columns
                scores = _scores(folded, stored.keys[0][:, columns], scaling, softcap)
                if hidden is not None:
                    scores = scores.masked_fill(hidden[:, columns], float("-inf"))
                probabilities = (scores - lse.transpose(0, 1).reshape(shared, -1, 1)).exp()
                probabilities = probabilities.view(shared, count, -1, length, len(columns))
                for offset, row in enumerate(range(block.start, block.stop)):
                    self.tap.add(row, probabilities[:, offset].flatten(0, 1))
        return out.view(rows, heads, length, -1).transpose(1, 2).contiguous()

    def _suffix_mask(self, length: int, total: int, window: int | None) -> Tensor:
        """What the last ``length`` of ``total`` suffix positions may look at, ``(R, length, total)``."""
        found = self._masks.get((total, window))
        if found is None:
            column = torch.arange(total, device=self.pads.device)
            row = column[total - length :, None]
            found = (column <= row) & (column >= self.pads[:, None, None])
            if window is not None:
                found &= row - column < window
            # Padding looks at itself, so that its softmax is finite; nothing looks at padding.
            found = found | (column == row)
            self._masks[(total, window)] = found
        return found

    def _out_of_window(
        self, block: _Block, prefix: int, length: int, total: int, window: int | None, queries: int
    ) -> Tensor | None:
        """Which prefix columns the folded queries of a block may not see, ``(queries, P)``; ``None``: they see all."""
        if window is None or window >= prefix + total:
            return None
        row = torch.arange(total - length, total, device=self.pads.device)
        place = prefix + row[None] - self.pads[block.start : block.stop, None]  # (rows, length)
        hidden = place[..., None] - torch.arange(prefix, device=self.pads.device) >= window
        return hidden[:, None].expand(-1, queries // place.numel(), -1, -1).reshape(queries, prefix)


def _over_prefix(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output ``(Hkv, M, D)`` and log-sum-exp ``(Hkv, M)`` of queries ``(Hkv, M, D)`` over keys ``(Hkv, P, D)``."""
    step = max(1, _CHUNK // (key.shape[0] * key.shape[1]))
    outs, lses = [], []
    for start in range(0, query.shape[1], step):
        scores = _scores(query[:, start : start + step], key, scaling, softcap)
        if hidden is not None:
            # A finite floor: a row whose window has left the prefix gets no weight, and no NaN.
            scores = scores.masked_fill(hidden[start : start + step], -1e30)
        lse = scores.logsumexp(-1)
        outs.append(torch.matmul((scores - lse[..., None]).exp().to(value.dtype), value))
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _scores(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Attention scores in float32."""
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scaling
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


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
    """SDPA, except in the passes of a ``SuffixBatch``."""
    batch: SuffixBatch | None = getattr(_active, "batch", None)
    if batch is None:
        if softcap is not None:
            kwargs["softcap"] = softcap
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return batch.attend(module.layer_idx, query, key, value, scale, softcap, sliding_window), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """SDPA's mask, except in the passes of a ``SuffixBatch``, which masks by itself."""
    return None if getattr(_active, "batch", None) is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


def install(model: PreTrainedModel) -> bool:
    """Let the decoder use this attention, which is SDPA outside a ``SuffixBatch``; ``False`` where it does not fit."""
    text = model.config.get_text_config()
    if text._attn_implementation != "sdpa" or model.get_output_embeddings() is None:
        return False
    key = next((name for name in model.config.sub_configs if getattr(model.config, name, None) is text), None)
    if key is None:
        return False
    model.set_attn_implementation({key: _NAME})
    return bool(text._attn_implementation == _NAME)


def installed(model: PreTrainedModel) -> bool:
    """Whether the decoder uses this attention now; somebody may have chosen another since."""
    return bool(model.config.get_text_config()._attn_implementation == _NAME)


def layers_fit(cache: DynamicCache) -> bool:
    """Whether every layer of a prefix's cache holds plain keys and values."""
    return all(type(layer) is DynamicLayer and layer.keys is not None and layer.keys.numel() for layer in cache.layers)
