"""Attention over a shared prefix: every way of computing it against the formula in float64, and the rule of choice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import draw_shapes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latent_tool.models import prefix_attention, shared_prefix, static_pass
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.prefix import Stems
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
@pytest.mark.parametrize("count", [1, 13, 20])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.usefixtures("gpu_operators")
def test_padding_of_a_prefix_counts_for_nothing(dtype: torch.dtype, count: int, queries: int) -> None:
    """A buffer is longer than the prefix in it: what stands behind it is never seen, with and without a window."""
    query, key, value = (drawn(2, n, 32, seed=n, spread=2.0).to(dtype) for n in (queries, 20, 20))
    used = torch.tensor(count)
    hidden = torch.zeros(queries, 20, dtype=torch.bool)
    hidden[-1, : count // 2] = True
    ways = [attention_for(CPU, dtype, 32, 32), WRITTEN_OUT, *([variable_length] if dtype != torch.float32 else [])]
    for attention in ways:
        for window, softcap in ((None, None), (hidden, None), (None, 3.0)):
            found = attention(query, key, value, 0.2, softcap, window, used)
            seen = None if window is None else window[:, :count]
            expected = WRITTEN_OUT(query, key[:, :count], value[:, :count], 0.2, softcap, seen)
            assert (found[0].float() - expected[0]).abs().max() <= 4 * STEP[dtype]
            torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-5)


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
    """What torch does where a device has no such kernel."""
    raise NotImplementedError("Could not run 'aten::_scaled_dot_product' with arguments from the 'CPU' backend.")


def wrong(query: Tensor, key: Tensor, value: Tensor, scaling: float, hidden: Tensor | None = None, *_: Any) -> Any:
    """Log-sum-exps to the base of 2."""
    out, lse = WRITTEN_OUT(query, key, value, scaling, hidden=hidden)
    return out, lse / math.log(2)


def turned(query: Tensor, key: Tensor, value: Tensor, scaling: float, hidden: Tensor | None = None, *_: Any) -> Any:
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

    def unmasked(
        query: Tensor, key: Tensor, value: Tensor, scaling: float, hidden: Tensor | None = None, *_: Any
    ) -> Any:
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


# ---------------------------------------------------------------------- the ways of GPUs, run here


@pytest.fixture
def gpu_operators() -> Iterator[list[str]]:
    """The operators that only GPUs have, computed here by the formula, for torch's own functions around them.

    Yields the names of those that were asked.
    """
    asked: list[str] = []

    def flash(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        longest_query: int,
        longest_key: int,
        dropout: float,
        causal: bool,
        _debug: bool,
        *,
        scale: float,
        window_size_left: int = -1,
        window_size_right: int = -1,
        **_: Any,
    ) -> Any:
        asked.append("flash")
        assert query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0
        assert all(each.stride(-1) == 1 for each in (query, key, value))
        assert query_ends.tolist() == [0, longest_query] == [0, len(query)] and query_ends.dtype == torch.int32
        beginning, end = key_ends.tolist()
        assert beginning == 0 < end <= longest_key == len(key) and key_ends.dtype == torch.int32
        key, value = key[:end], value[:end]
        assert (dropout, causal, window_size_left, window_size_right) == (0.0, False, -1, -1)
        out, lse = exact(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), scale, None)
        state = torch.empty(2, dtype=torch.uint64)
        return torch.empty_like(query).copy_(out.transpose(0, 1)), lse.float(), state, state.clone(), query.new_empty(0)

    def widened(one: Tensor, other: Tensor, out_dtype: torch.dtype) -> Tensor:
        asked.append("bmm")
        assert one.dtype == other.dtype and out_dtype == torch.float32
        return (one.double() @ other.double()).float()

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", flash)
    library.impl("bmm.dtype", widened)
    try:
        yield asked
    finally:
        library._destroy()


variable_length = PrefixAttention(
    "variable-length kernel", "asked for", prefix_attention._variable_length, stops=True, widens=True
)


@pytest.mark.parametrize("dtype", TYPES[1:])
@pytest.mark.parametrize(("queries", "keys", "heads"), [(1, 40, 2), (2, 1, 2), (2, 300, 2), (56, 128, 4), (7, 33, 1)])
def test_the_variable_length_kernel_is_the_formula(
    dtype: torch.dtype, queries: int, keys: int, heads: int, gpu_operators: list[str]
) -> None:
    """As many queries as heads among them, where a log-sum-exp that is turned round would not be seen by its shape."""
    query, key = (drawn(heads, n, 64, seed=n, spread=3.0).to(dtype) for n in (queries, keys))
    value = drawn(heads, keys, 64, seed=5).to(dtype)
    assert_exact(variable_length, query, key, value, 0.125)
    assert gpu_operators == ["flash"]
    assert prefix_attention._agrees(variable_length, CPU, dtype, 64)
    assert prefix_attention._agrees(variable_length, CPU, dtype, 64, stop=True)


@pytest.mark.parametrize("dtype", TYPES[1:])
def test_what_that_kernel_cannot_is_written_out_without_a_copy_in_float32(
    dtype: torch.dtype, gpu_operators: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_attention, "_CHUNK", 3 * 200)
    query, key, value = (drawn(2, n, 64, seed=n).to(dtype) for n in (9, 100, 100))
    with Widest(key.numel()) as widest:
        assert_exact(variable_length, query, key, value, 0.125, torch.arange(100) < 9 * torch.arange(9)[:, None])
        variable_length(query, key, value, 0.125, softcap=20.0)
    assert set(gpu_operators) == {"bmm"}
    assert not widest.copies
    with Widest(key.numel()) as widest:
        WRITTEN_OUT(query, key, value, 0.125, softcap=20.0)
    assert widest.copies


class Widest(TorchDispatchMode):
    """Counts float32 copies of so many numbers or more; copies in float64 are the test's own."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.copies = numbers, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        copied = function is torch.ops.aten._to_copy.default and found.dtype == torch.float32
        self.copies += copied and args[0].dtype != torch.float64 and found.numel() >= self.numbers
        return found


@pytest.mark.parametrize("dtype", TYPES[1:])
def test_the_variable_length_kernel_is_one_graph(dtype: torch.dtype, gpu_operators: list[str]) -> None:
    query, key, value = (drawn(2, n, 64, seed=n).to(dtype) for n in (9, 100, 100))
    graphs = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(variable_length.__call__, fullgraph=True, backend=count)
    try:
        found = compiled(query, key, value, 0.125)
    finally:
        torch._dynamo.reset()
    assert (graphs, gpu_operators) == (1, ["flash"])
    for one, other in zip(found, variable_length(query, key, value, 0.125), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("dtype", TYPES)
def test_a_gpu_gets_the_variable_length_kernel_in_half_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 7)  # there is none: whatever is tried fails
    assert attention_for(device, dtype, 64, 64).kernel is None
    attention_for.cache_clear()
    monkeypatch.setattr(prefix_attention, "_agrees", lambda *_, **__: True)
    attention = attention_for(device, dtype, 64, 64)
    half = dtype != torch.float32
    assert attention.way == ("variable-length kernel" if half else "written out")
    assert (attention.widens, attention.hides) == (half, False)


@pytest.mark.usefixtures("gpu_operators")
def test_a_model_in_half_precision_behind_the_variable_length_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, attention and a decoding are those of the formula, to the rounding of bfloat16."""
    vlm = load(ModelSpec(dtype="bfloat16"))
    prefix = vlm.prefill(vlm.prepare([draw_shapes()], "what color is the circle?"))
    latents = drawn(5, 3, prefix.features.shape[1], seed=3) * vlm.embedding_rms()
    found = []
    for attention in (variable_length, WRITTEN_OUT):
        monkeypatch.setattr(shared_prefix, "attention_for", lambda *_, attention=attention: attention)
        vlm._shares = None
        assert vlm.shares_prefixes(prefix)
        behind = replace(prefix, stems=Stems())
        scored = vlm.score(behind, latents, [(), (3,), (5, 60, 5), (1, 2), (63,)])
        found.append((scored.answer.float(), vlm.attend(behind, latents[1], (3,)), vlm.decode(behind, None, (), 8)))
    (logits, read, decoded), (expected, expected_read, expected_decoded) = found
    assert (logits - expected).abs().max() < 5e-2 * expected.abs().max()
    torch.testing.assert_close(read, expected_read, atol=1e-2, rtol=0)
    assert decoded.tokens == expected_decoded.tokens


def test_compiled_passes_run_behind_the_variable_length_kernel(
    gpu_operators: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their prefixes stand in longer buffers, which that kernel reads as far as they are in use."""
    vlm = load(ModelSpec(dtype="bfloat16"))
    prefix = vlm.prefill(vlm.prepare([draw_shapes()], "what color is the circle?"))
    latents = drawn(3, 3, prefix.features.shape[1], seed=3) * vlm.embedding_rms()
    monkeypatch.setattr(shared_prefix, "attention_for", lambda *_: variable_length)
    assert vlm.shares_prefixes(prefix)
    expected = vlm.score(replace(prefix, stems=Stems()), latents, [()] * 3).answer.float()
    vlm.static = passes = static_pass.StaticPasses(vlm, backend="eager")
    try:
        gpu_operators.clear()
        found = vlm.score(replace(prefix, stems=Stems()), latents, [()] * 3).answer.float()
    finally:
        torch._dynamo.reset()
    (fixed,) = passes.passes
    assert passes.failure is None and fixed.prefix > prefix.length
    assert set(gpu_operators) == {"flash"}
    assert (found - expected).abs().max() < 5e-2 * expected.abs().max()
