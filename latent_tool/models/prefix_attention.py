"""Attention of many queries over one set of keys and values that all of them see: an output and a log-sum-exp.

The queries are those of all rows behind a shared prefix, ``(Hkv, M, D)``: heads that share a key head are queries of it
like any other. With the log-sum-exp, the prefix is one more column of the softmax over what stands after it.

``PrefixAttention.written_out`` is the formula, which is right for every model; fused kernels compute the same in the
model's own precision and hold no scores. Which is used depends on the device, the type and the width of a head alone,
by a fixed rule, so that a question gives the same numbers again; a kernel is tried on a few numbers before it is relied
on. This module knows tensors, and neither rows nor caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from latent_tool.models.memory import out_of_memory

__all__ = ["PrefixAttention", "attention_for", "beyond"]

# Query, key, value, scaling, what is hidden, and how many columns count: output and log-sum-exp.
Kernel = Callable[[Tensor, Tensor, Tensor, float, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]

_HALVES = (torch.bfloat16, torch.float16)

# Attention scores that are held at once, as float32 numbers, where they are written out.
_CHUNK = 4_000_000

# A finite floor: a row whose window has left the prefix gets no weight from there, and no NaN.
_FLOOR = -1e30


@dataclass(frozen=True)
class PrefixAttention:
    """How attention over a shared prefix is computed on a device, in a type.

    Attributes:
        way: what it is called, for people.
        reason: why it is used there, for people.
        kernel: the fused kernel; ``None``: written out.
        hides: the kernel can hide columns from single queries.
        stops: the kernel can stop at a column whose number stands in a tensor.
        widens: products of half-precision tensors come in float32 without a float32 copy of the tensors.
    """

    way: str
    reason: str
    kernel: Kernel | None = None
    hides: bool = False
    stops: bool = False
    widens: bool = False

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None = None,
        hidden: Tensor | None = None,
        count: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the output ``(Hkv, M, D)`` and the log-sum-exp ``(Hkv, M)``, float32, of queries ``(Hkv, M, D)``.

        Args:
            query: queries.
            key, value: ``(Hkv, P, D)``.
            scaling: factor of the scores.
            softcap: what scores are capped at, softly; no kernel here does that.
            hidden: ``(M, P)``, what a query must not see. If that is all, its log-sum-exp is as good as minus infinity.
            count: ``()``, an integer: columns from there on are padding, which no query sees.
        """
        if count is not None and (hidden is not None or not self.stops):
            hidden, count = beyond(count, key.shape[1], hidden).expand(query.shape[1], -1), None
        if self.kernel is None or softcap is not None or (hidden is not None and not self.hides):
            if count is not None:
                hidden = beyond(count, key.shape[1]).expand(query.shape[1], -1)
            return self.written_out(query, key, value, scaling, softcap, hidden)
        return self.kernel(query, key, value, scaling, hidden, count)

    def written_out(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None = None,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the same from scores that are held a chunk of queries at a time."""
        step = max(1, _CHUNK // (key.shape[0] * key.shape[1]))
        if not self.widens:
            key, value = key.float(), value.float()
        outs, lses = [], []
        for start in range(0, query.shape[1], step):
            part = None if hidden is None else hidden[start : start + step]
            scores = self.scores(query[:, start : start + step], key, scaling, softcap, hidden=part)
            lse = scores.logsumexp(-1)
            probabilities = scores.sub_(lse[..., None]).exp_()
            outs.append(self._product(probabilities.to(value.dtype), value))
            lses.append(lse)
        return torch.cat(outs, 1), torch.cat(lses, 1)

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        scaling: float,
        softcap: float | None,
        mask: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Return attention scores in float32; ``mask`` ``(batch, M, T)`` is added, ``hidden`` ones get the floor.

        Products of peaked queries and keys do not fit into half precision before they are scaled.
        """
        if mask is not None and softcap is None:
            query, key = query.float(), key.float()
            scores = torch.baddbmm(mask, query.flatten(0, 1), key.flatten(0, 1).transpose(-1, -2), alpha=scaling)
            return scores.view(*query.shape[:-1], -1)
        scores = self._product(query, key.transpose(-1, -2)).mul_(scaling)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if mask is not None:
            scores += mask.view(scores.shape)
        return scores if hidden is None else scores.masked_fill_(hidden, _FLOOR)

    def _product(self, one: Tensor, other: Tensor) -> Tensor:
        """The matrix product in float32, of tensors that may be in half precision."""
        if self.widens and one.dim() == 3 and one.dtype == other.dtype and one.dtype in _HALVES:
            return torch.bmm(one, other, out_dtype=torch.float32)
        return torch.matmul(one.float(), other.float())


def beyond(count: Tensor, columns: int, hidden: Tensor | None = None) -> Tensor:
    """Return which columns ``(1 or M, P)`` are hidden if those from a count ``()`` on are, too."""
    padding = (torch.arange(columns, device=count.device) >= count)[None]
    return padding if hidden is None else hidden | padding


@lru_cache(maxsize=64)
def attention_for(device: torch.device, dtype: torch.dtype, key_width: int, value_width: int) -> PrefixAttention:
    """Choose how attention over shared prefixes is computed for keys and values on a device, in a type.

    It may try a kernel, so it is asked before a pass, and not within a graph.
    """
    written = PrefixAttention("written out", "")
    if device.type == "cuda" and dtype in _HALVES and _agrees(replace(written, widens=True), device, dtype, key_width):
        written = replace(written, widens=True)
    if key_width != value_width:
        return replace(written, reason="keys and values have different widths")
    if device.type == "cpu":
        in_float32 = dtype == torch.float16  # the kernel of float16 takes two to five times as long
        kernel = _cpu_in_float32 if in_float32 else _cpu
        fused = replace(written, way="fused kernel in float32" if in_float32 else "fused kernel", kernel=kernel)
        if not _agrees(fused, device, dtype, key_width):
            return replace(written, reason="this torch has no kernel for CPUs that gives log-sum-exps")
        hiding = replace(fused, hides=True)
        return replace(
            hiding if _agrees(hiding, device, dtype, key_width, hide=True) else fused,
            reason="faster than the kernel of float16 on CPUs"
            if in_float32
            else "faster than written out on CPUs, for few and many rows and short and long prefixes",
        )
    if device.type == "cuda" and dtype in _HALVES:
        fused = replace(written, way="variable-length kernel", kernel=_variable_length)
        if _agrees(fused, device, dtype, key_width):
            fused = replace(fused, reason="it reads the prefix once and holds no scores")
            stopping = replace(fused, stops=True)
            return stopping if _agrees(stopping, device, dtype, key_width, stop=True) else fused
        return replace(written, reason="this torch or GPU has no variable-length attention for heads of this width")
    return replace(written, reason=f"torch has no kernel that gives log-sum-exps in {_name(dtype)} on {device.type}")


def _agrees(
    attention: PrefixAttention,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    hide: bool = False,
    stop: bool = False,
) -> bool:
    """Tell whether a kernel runs here and gives what is written out in float32, on a few numbers."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, count, width, generator=generator) for count in (5, 33, 33)]
    scaling = width**-0.5
    try:
        query, key, value = (each.to(device, dtype) for each in drawn)
        count = torch.full((), 20, device=device) if stop else None
        hidden = None
        if hide:
            hidden = torch.arange(33, device=device) < 7 * torch.arange(5, device=device)[:, None]
        found = attention(query, key, value, scaling, hidden=hidden, count=count)
        expected = PrefixAttention("written out", "")(
            query.float(), key.float(), value.float(), scaling, hidden=hidden, count=count
        )
        # Half precision: outputs of up to 3 are rounded.
        close = 1e-4 if dtype == torch.float32 else 3e-2
        return all(
            one.shape == other.shape and bool(((one.float() - other).abs() <= close).all())
            for one, other in zip(found, expected, strict=True)
        )
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError, AssertionError) as error:
        if out_of_memory(error):
            raise
        return False


def _cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    hidden: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel that torch's attention uses on CPUs; its public function keeps the log-sum-exps to itself."""
    queries = query.shape[1]
    if queries == 1 and query.dtype != torch.float32:  # a single query takes twice as long as two
        query = query.expand(-1, 2, -1)
    mask = None
    if hidden is not None:
        floor = max(_FLOOR, torch.finfo(query.dtype).min)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=hidden.device).masked_fill_(hidden, floor)
        mask = mask.expand(query.shape[1], -1)[None, None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], key[None], value[None], 0.0, False, attn_mask=mask, scale=scaling
    )
    return out[0, :, :queries], lse[0, :, :queries].float()


def _cpu_in_float32(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    hidden: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _cpu(query.float(), key.float(), value.float(), scaling, hidden)


def _variable_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    hidden: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run torch's variable-length attention over one sequence, whose queries are those of all rows."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    # Where the sequence begins and ends; made on the device, because a copy from the host would wait for it.
    queries, keys = query.shape[1], key.shape[1]
    query_ends, key_ends = (
        torch.arange(0, length + 1, length, dtype=torch.int32, device=query.device) for length in (queries, keys)
    )
    if count is not None:
        key_ends = torch.minimum(key_ends, count.to(torch.int32))
    out, lse = varlen_attn(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        query_ends,
        key_ends,
        queries,
        keys,
        return_aux=AuxRequest(lse=True),
        scale=scaling,
    )
    return out.transpose(0, 1), lse


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
