"""A tap that reads the attention of a few rows (the latents) to a few columns (the image cells), layer by layer.

It is an attention implementation of its own, used for the one forward pass that needs it: the output comes from SDPA
(or from the eager formula where logits are soft-capped, which SDPA cannot do), the tapped rows from an explicit
softmax.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["AttentionTap", "mean_over_layers", "pick_columns", "tap_attention"]

_NAME = "latent_tool_tap"
_active = threading.local()


@dataclass
class AttentionTap:
    """What to read, and per layer what was read: ``(batch, rows, columns)``, mean over heads, on the layer's device.

    ``switched``: the model let itself be tapped; otherwise nothing is read, and its own attention output must do.
    """

    rows: slice
    columns: Tensor
    layers: list[Tensor] = field(default_factory=list)
    switched: bool = True

    def add(self, probabilities: Tensor) -> None:
        """Note one layer's probabilities ``(batch, heads, rows, keys)``, float32."""
        self.layers.append(pick_columns(probabilities, self.columns).mean(1))

    def mean(self) -> Tensor:
        """Return the mean over layers and heads, ``(batch, rows, columns)``, in float32."""
        return mean_over_layers(self.layers)


def pick_columns(weights: Tensor, columns: Tensor) -> Tensor:
    """Return some columns of ``(..., keys)``; ``columns`` ``(C,)`` may be on another device."""
    return weights[..., columns.to(weights.device)]


def mean_over_layers(layers: Sequence[Tensor]) -> Tensor:
    """Return the mean of what was read in several layers, which may be on different devices; on that of the first."""
    return torch.stack([layer.to(layers[0].device) for layer in layers]).mean(0)


def _probabilities(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """Attention probabilities ``(batch, heads, queries, keys)`` in float32; queries are the last positions."""
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1) if groups > 1 else key
    scores = torch.matmul(query.float(), key.float().transpose(2, 3))
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        length, total = query.shape[2], key.shape[2]
        mask = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)[None, None]
    mask = mask[..., : key.shape[2]]
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def _tapped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    tap: AttentionTap | None = getattr(_active, "tap", None)
    rows = None if tap is None else tap.rows
    if softcap is not None:
        probabilities = _probabilities(module, query, key, attention_mask, scaling, softcap)
        groups = query.shape[1] // value.shape[1]
        output = torch.matmul(probabilities.to(value.dtype), value.repeat_interleave(groups, dim=1))
        output = output.transpose(1, 2).contiguous()
        if tap is not None:
            tap.add(probabilities[:, :, rows])
        return output, None
    if tap is not None:
        length, total = query.shape[2], key.shape[2]
        mask = attention_mask
        if mask is None:
            mask = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)[None, None]
        probabilities = _probabilities(module, query[:, :, rows], key, mask[:, :, rows], scaling, None)
        tap.add(probabilities)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output, None


AttentionInterface.register(_NAME, _tapped_attention)
# Without a mask function of the same name the causal mask would be lost without a word.
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def tap_attention(model: PreTrainedModel, rows: slice, columns: Tensor) -> Iterator[AttentionTap]:
    """Read the attention of the decoder in the forward passes inside the ``with``; everything is restored after it."""
    tap = AttentionTap(rows, columns)
    if not model.get_decoder()._can_set_attn_implementation():
        tap.switched = False
        yield tap
        return
    text = model.config.get_text_config()
    key = next((name for name in model.config.sub_configs if getattr(model.config, name, None) is text), None)
    before = text._attn_implementation
    model.set_attn_implementation(_NAME if key is None else {key: _NAME})
    _active.tap = tap
    try:
        yield tap
    finally:
        _active.tap = None
        model.set_attn_implementation(before if key is None else {key: before})
