"""Attention over a shared prefix: every way of computing it against the formula in float64, and the rule of choice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latent_tool.models import prefix_attention
from latent_tool.models.prefix_attention import PrefixAttention, attention_for

CPU = torch.device("cpu")
WRITTEN_OUT = PrefixAttention("written out", "asked for")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
# How far numbers of about 1 may be off: float32 adds in another order, the others round the output.
STEP = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def drawn(*shape: int, seed: int, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def exact(query: Tensor, key: Tensor, value: Tensor, scaling: float, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64."""
    scores = query.double() @ key.double().transpose(-1, -2) * scaling
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ value.double(), scores.logsumexp(-1)


def assert_exact(
    attention: PrefixAttention, query: Tensor, key: Tensor, value: Tensor, scaling: float, hidden: Tensor | None = None
) -> None:
    out, lse = attention(query, key, value, scaling, hidden=hidden)
    expected, expected_lse = exact(query, key, value, scaling, hidden)
    assert lse.dtype == torch.float32
    size = max(1.0, float(expected.abs().max()))
    assert (out.double() - expected).abs().max() <= STEP[query.dtype] * size
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 70),
    keys=st.integers(1, 300),
    heads=st.integers(1, 4),
    width=st.sampled_from([8, 16, 32, 48, 64, 80, 128]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 1000),
    window=st.none() | st.integers(0, 300),
)
def test_what_is_chosen_on_cpus_is_the_formula(
    dtype: torch.dtype,
    queries: int,
    keys: int,
    heads: int,
    width: int,
    spread: float,
    seed: int,
    window: int | None,
) -> None:
    """Any number of rows and lengths, peaked and flat; windows hide some columns of some queries, never all."""
    attention = attention_for(CPU, dtype, width, width)
    assert attention.kernel is not None and attention.hides
    query, key = (drawn(heads, n, width, seed=seed + n, spread=spread).to(dtype) for n in (queries, keys))
    value = drawn(heads, keys, width, seed=seed).to(dtype)
    hidden = None
    if window is not None:
        first = (torch.arange(queries) * 3 + window).clamp_max(keys - 1)
        hidden = torch.arange(keys) < first[:, None]
    for one in (attention, WRITTEN_OUT):
        assert_exact(one, query, key, value, width**-0.5, hidden)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_query_that_sees_nothing_counts_for_nothing(dtype: torch.dtype) -> None:
    query, key, value = (drawn(2, n, 32, seed=n).to(dtype) for n in (3, 20, 20))
    hidden = torch.zeros(3, 20, dtype=torch.bool)
    hidden[1] = True
    for attention in (attention_for(CPU, dtype, 32, 32), WRITTEN_OUT):
        out, lse = attention(query, key, value, 0.2, hidden=hidden)
        assert out.isfinite().all() and lse[:, 1].max() < -1e4
        assert_exact(attention, query[:, ::2], key, value, 0.2)


@pytest.mark.parametrize("dtype", TYPES)
def test_soft_caps_are_written_out(dtype: torch.dtype) -> None:
    """No kernel caps scores, so none is asked."""
    query, key, value = (drawn(2, n, 32, seed=n, spread=3.0).to(dtype) for n in (3, 20, 20))

    def never(*_: Any) -> Any:
        raise AssertionError("a kernel was asked")

    attention = PrefixAttention("fused", "", never, hides=True)
    out, lse = attention(query, key, value, 0.2, softcap=2.0)
    capped = (query.double() @ key.double().transpose(-1, -2) * 0.2).div(2.0).tanh() * 2.0
    torch.testing.assert_close(lse.double(), capped.logsumexp(-1), atol=1e-4, rtol=1e-5)
    assert (out.double() - capped.softmax(-1) @ value.double()).abs().max() < 4 * STEP[dtype]


def test_widths_that_differ_are_written_out() -> None:
    attention = attention_for(CPU, torch.float32, 16, 24)
    assert attention.kernel is None and "widths" in attention.reason
    query, key, value = drawn(2, 5, 16, seed=1), drawn(2, 9, 16, seed=2), drawn(2, 9, 24, seed=3)
    assert_exact(attention, query, key, value, 0.25)


def test_the_same_choice_is_made_every_time() -> None:
    """It is a rule and no measurement: a question gives the same numbers again."""
    for dtype, way in zip(TYPES, ("fused kernel", "fused kernel", "fused kernel in float32"), strict=True):
        first = attention_for(CPU, dtype, 64, 64)
        attention_for.cache_clear()
        again = attention_for(CPU, dtype, 64, 64)
        assert (first, first.way) == (again, way)
        query, key, value = (drawn(2, n, 64, seed=n).to(dtype) for n in (7, 90, 90))
        found = [attention(query, key, value, 0.125) for attention in (first, again)]
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_device_without_a_kernel_is_written_out() -> None:
    attention = attention_for(torch.device("meta"), torch.bfloat16, 64, 64)
    assert attention.kernel is None and "bfloat16 on meta" in attention.reason


# ---------------------------------------------------------------------- kernels that are tried first


@pytest.fixture
def anew() -> Iterator[None]:
    """Choices are made anew, and forgotten again."""
    attention_for.cache_clear()
    yield
    attention_for.cache_clear()


def refusing(*_: Any) -> Any:
    raise NotImplementedError("not on this machine")


def wrong(query: Tensor, key: Tensor, value: Tensor, scaling: float, hidden: Tensor | None = None) -> Any:
    """Log-sum-exps to the base of 2."""
    out, lse = WRITTEN_OUT(query, key, value, scaling, hidden=hidden)
    return out, lse / math.log(2)


def turned(query: Tensor, key: Tensor, value: Tensor, scaling: float, hidden: Tensor | None = None) -> Any:
    out, lse = WRITTEN_OUT(query, key, value, scaling, hidden=hidden)
    return out, lse.transpose(0, 1)


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("kernel", [refusing, wrong, turned])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_kernel_that_fails_or_is_off_is_not_used(
    kernel: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_attention, "_cpu", kernel)
    attention = attention_for(CPU, dtype, 32, 32)
    assert attention.kernel is None and attention.reason
    query, key, value = (drawn(2, n, 32, seed=n).to(dtype) for n in (3, 20, 20))
    assert_exact(attention, query, key, value, 0.2)


@pytest.mark.usefixtures("anew")
def test_a_kernel_that_cannot_hide_is_used_where_nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = prefix_attention._cpu

    def unmasked(query: Tensor, key: Tensor, value: Tensor, scaling: float, hidden: Tensor | None = None) -> Any:
        if hidden is not None:
            raise RuntimeError("this kernel takes no mask")
        return kernel(query, key, value, scaling)

    monkeypatch.setattr(prefix_attention, "_cpu", unmasked)
    attention = attention_for(CPU, torch.float32, 32, 32)
    assert attention.kernel is unmasked and not attention.hides
    query, key, value = (drawn(2, n, 32, seed=n) for n in (3, 20, 20))
    assert_exact(attention, query, key, value, 0.2)
    assert_exact(attention, query, key, value, 0.2, torch.arange(20) < torch.tensor([[3], [7], [19]]))


@pytest.mark.usefixtures("anew")
def test_memory_that_runs_out_is_no_verdict_on_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(prefix_attention, "_cpu", full)
        with pytest.raises(torch.OutOfMemoryError):
            attention_for(CPU, torch.float32, 32, 32)
    assert attention_for(CPU, torch.float32, 32, 32).kernel is not None
