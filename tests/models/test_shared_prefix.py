"""Shared prefixes and fused batches against the plain path: one question at a time, a cache for every candidate."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pictures import draw_shapes
from tiny_checkpoints import checkpoint, picture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessorList

from latent_tool.engine.engine import Engine
from latent_tool.engine.job import Job, Outcome
from latent_tool.errors import CancelledError, QuestionError
from latent_tool.method.policy import policy_gradient
from latent_tool.method.reward import Logits, entropy, read_reward
from latent_tool.models import generating, prefix_attention, shared_prefix
from latent_tool.models.attention import AttentionTap, tap_attention
from latent_tool.models.choosing import Chooser, choose, draw, seeded
from latent_tool.models.decoding import Decoded, GenerationRules
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.prefix import Prefix, Suffix
from latent_tool.models.prefix_attention import PrefixAttention
from latent_tool.models.prompts import Markers
from latent_tool.models.requests import Attend, Decode, Score
from latent_tool.models.rows import Beginning
from latent_tool.models.shared_prefix import SharedRows
from latent_tool.settings import Budget, GenerationSettings, NoiseSettings, SamplingSettings, SearchSettings

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
WRITTEN_OUT = PrefixAttention("written out", "asked for")
QUESTIONS = ["what color is the circle?", "how many shapes are there?", "what is right of the red circle in the image?"]


@pytest.fixture(scope="module")
def plain() -> Engine:
    """The embedded model without shared prefixes."""
    engine = Engine(load(ModelSpec()))
    engine.vlm._shares = False
    return engine


@pytest.fixture(scope="module")
def prefixes(engine: Engine) -> list[Prefix]:
    """Prefixes of different lengths, about different pictures."""
    pictures = [draw_shapes(), draw_shapes("triangle"), draw_shapes("circle", (25, 150, 40))]
    return [
        engine.vlm.prefill(engine.vlm.prepare([picture], question))
        for picture, question in zip(pictures, QUESTIONS, strict=True)
    ]


def states(prefix: Prefix, engine: Engine, seed: int) -> Score:
    """Five states with different numbers of cells and, by seed, of latents."""
    width = prefix.features.shape[1]
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(5, 2 + seed, width, generator=generator) * engine.vlm.embedding_rms()
    return Score(prefix, latents, [(), (3,), (5, 60, 5), (1, 2), (63,)])


def test_the_embedded_model_shares_prefixes(engine: Engine, prefixes: list[Prefix]) -> None:
    assert engine.vlm.shares_prefixes(prefixes[0])


def test_scores_of_several_questions_equal_the_plain_ones(
    engine: Engine, plain: Engine, prefixes: list[Prefix]
) -> None:
    requests = [states(prefix, engine, seed) for seed, prefix in enumerate(prefixes)]
    for found, request in zip(engine.vlm.score_many(requests), requests, strict=True):
        expected = plain.vlm.score(request.prefix, request.latents, request.patches)
        torch.testing.assert_close(found.latents, expected.latents, **CLOSE)
        torch.testing.assert_close(found.answer, expected.answer, **CLOSE)


def test_attention_of_several_questions_equals_the_plain_one(
    engine: Engine, plain: Engine, prefixes: list[Prefix]
) -> None:
    requests = [
        Attend(each.prefix, each.latents[2], each.patches[seed])
        for seed, each in enumerate(states(prefix, engine, index) for index, prefix in enumerate(prefixes))
    ]
    for found, request in zip(engine.vlm.attend_many(requests), requests, strict=True):
        expected = plain.vlm.attend(request.prefix, request.latents, request.patches)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_decodings_of_several_questions_equal_the_plain_ones(
    engine: Engine, plain: Engine, prefixes: list[Prefix]
) -> None:
    """With and without latents, of different lengths, one cut after a token, two of the same prefix."""
    requests = [
        Decode(prefix, latents, cells, limit)
        for prefix, seed in zip([*prefixes, prefixes[0]], range(4), strict=True)
        for latents, cells, limit in (
            (None, (), 20),
            (states(prefix, engine, seed).latents[0], (4, 9), 1 + 19 * (seed % 2)),
        )
    ]
    found = engine.vlm.decode_many(requests)
    for each, request in zip(found, requests, strict=True):
        assert not isinstance(each, Exception)
        expected = plain.vlm.decode(request.prefix, request.latents, request.patches, request.max_new_tokens)
        assert (each.tokens, each.finish_reason) == (expected.tokens, expected.finish_reason)
        torch.testing.assert_close(each.log_probabilities, expected.log_probabilities, **CLOSE)


def test_a_decoding_that_fails_harms_no_other(engine: Engine, prefixes: list[Prefix]) -> None:
    asked = 0

    def cancel() -> bool:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise CancelledError("The question was cancelled.")
        return False

    requests = [Decode(prefixes[0], None, (), 20), Decode(prefixes[1], None, (), 20, cancel)]
    first, second = engine.vlm.decode_many(requests)
    alone = engine.vlm.decode(prefixes[0], None, (), 20)
    assert isinstance(second, CancelledError)
    assert not isinstance(first, Exception)
    assert first.tokens == alone.tokens


def test_no_copy_of_the_prefix_is_made(engine: Engine, prefixes: list[Prefix]) -> None:
    """Keys and values of the prefix stay the very same tensors, and the batch holds only the suffixes' own."""
    request = states(prefixes[2], engine, 1)
    before = [layer.keys.data_ptr() for layer in prefixes[2].cache.layers]
    batch = SharedRows(engine.vlm, [prefixes[2]] * 5)
    batch.extend([Suffix(request.latents, (0,) * request.latents.shape[1])], [-1])
    assert [layer.keys.data_ptr() for layer in prefixes[2].cache.layers] == before
    assert all(layer.keys.shape[2] == request.latents.shape[1] for layer in batch.cache.layers)


def test_what_loading_leaves_on_the_decoder_is_sdpa_for_everybody_else() -> None:
    vlm = load(ModelSpec())
    tensors = vlm.prepare([draw_shapes()], QUESTIONS[0]).tensors
    assert vlm.model.config.get_text_config()._attn_implementation == "latent_tool_shared_prefix"
    with torch.inference_mode():
        installed = vlm.model(**tensors).logits
        vlm.model.set_attn_implementation({"text_config": "sdpa"})
        assert torch.equal(installed, vlm.model(**tensors).logits)


JOBS = [
    Job(
        (draw_shapes("circle" if index % 2 else "triangle", (220, 25 * index, 25)),),
        QUESTIONS[index % 2] if index != 3 else "what is left of the blue square in this image?",
        settings=SearchSettings(search_below=None, reward_position="both", patches_per_latent=2),
        budget=Budget(iterations=3, max_patches=4 + index),
        seed=index,
        attention=index == 1,
        grounding=NoiseSettings() if index == 2 else None,
        controls=index == 4,
    )
    for index in range(6)
]


def test_a_fused_batch_gives_what_each_question_gives_alone(engine: Engine, plain: Engine) -> None:
    """Same answers, patches and rewards to 1e-4; no near-tie may be decided differently on these questions."""
    fused = engine.answer_many(JOBS)
    for job, found in zip(JOBS, fused, strict=True):
        alone = plain.answer(job)
        assert isinstance(found, Outcome)
        assert found.search is not None
        assert alone.search is not None
        assert found.answer.text == alone.answer.text
        assert found.patches == alone.patches
        assert found.search.best.reward == pytest.approx(alone.search.best.reward, abs=1e-4)
        assert found.search.candidates == alone.search.candidates
        assert (found.attention is None) == (not job.attention)
        if found.attention is not None:
            assert found.attention == pytest.approx(alone.attention, abs=1e-5)
        assert (found.grounding is None) == (job.grounding is None)
        assert (found.controls is None) == (not job.controls)
        assert engine.rescore(found) == pytest.approx(found.search.best.reward, abs=1e-4)


def test_bad_cancelled_and_short_questions_leave_the_rest_of_a_batch_alone(engine: Engine) -> None:
    cancelled = threading.Event()
    cancelled.set()
    odd = [
        Job(JOBS[0].images, ""),
        Job(JOBS[0].images, QUESTIONS[0], cancelled=cancelled),
        Job(JOBS[0].images, QUESTIONS[0], budget=Budget(iterations=0, max_new_tokens=1)),
    ]
    results = engine.answer_many([JOBS[0], *odd, JOBS[1]])
    assert isinstance(results[1], QuestionError)
    assert isinstance(results[2], CancelledError)
    assert isinstance(results[3], Outcome)
    for result, job in zip((results[0], results[4]), JOBS[:2], strict=True):
        assert isinstance(result, Outcome)
        assert result.answer.text == engine.answer(job).answer.text


def test_a_batch_that_does_not_fit_is_served_one_by_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out whenever rows of two questions are run together."""
    extend = SharedRows.extend
    refused = 0

    def small(self: SharedRows, *arguments: object) -> object:
        nonlocal refused
        if len(self.blocks) > 1:
            refused += 1
            raise torch.OutOfMemoryError("no memory left")
        return extend(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SharedRows, "extend", small)
    results = engine.answer_many(JOBS[:2])
    assert refused
    for result, job in zip(results, JOBS[:2], strict=True):
        assert isinstance(result, Outcome)
        assert result.answer.text == engine.answer(job).answer.text


def test_a_model_on_which_sharing_is_not_exact_falls_back(
    prefixes: list[Prefix], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inexact = load(ModelSpec())
    attend = SharedRows.attend
    monkeypatch.setattr(SharedRows, "attend", lambda self, *arguments: attend(self, *arguments) * 1.5)
    prefix = inexact.prefill(inexact.prepare([draw_shapes()], QUESTIONS[0]))
    request = states(prefix, engine, 0)
    found = inexact.score(prefix, request.latents, request.patches)
    assert not inexact.shares_prefixes(prefix)
    monkeypatch.undo()
    expected = engine.vlm.score(prefixes[0], request.latents, request.patches)
    torch.testing.assert_close(found.answer, expected.answer, **CLOSE)


class _NoLookAtNumbers(TorchDispatchMode):
    """Refuses what would make a GPU's host wait for its numbers."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
        assert not any(name.startswith(f"aten.{each}.") for each in waits), name
        return function(*args, **(kwargs or {}))


def test_the_host_never_waits_inside_a_step(
    engine: Engine, prefixes: list[Prefix], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number is read while states of several questions are scored, with and without known cells."""
    requests = [states(prefix, engine, seed) for seed, prefix in enumerate(prefixes)]
    requests[1] = replace(requests[1], attended=len(requests[1].patches), answer_only=True)
    engine.vlm.score_many(requests)

    def refuse(*_arguments: object) -> None:
        raise AssertionError("numbers were read")

    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse, raising=False)
    with _NoLookAtNumbers():
        engine.vlm.score_many(requests)
        engine.vlm.score_many(requests[1:2])


# ---------------------------------------------------------------------- half precision, and the path of other devices


def drawn(*shape: int, spread: float, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def exact_attention(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64."""
    scores = query.double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ value.double(), scores.logsumexp(-1)


HALVES = [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)]


@pytest.mark.parametrize(("dtype", "step"), HALVES)
@pytest.mark.parametrize("spread", [1.0, 4.0, 25.0])
@pytest.mark.parametrize("windowed", [False, True])
def test_the_part_over_the_prefix_is_exact_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, step: float, spread: float, windowed: bool
) -> None:
    """Without a fused kernel, peaked attention too: what is lost is the rounding of inputs, not of scores."""
    monkeypatch.setattr(prefix_attention, "_CHUNK", 500)  # several chunks
    query, key = (drawn(2, n, 64, spread=spread, seed=n).to(dtype) for n in (9, 50))
    value = drawn(2, 50, 64, spread=1.0, seed=3).to(dtype)
    hidden = torch.arange(50) < 5 * torch.arange(9)[:, None] if windowed else None
    out, lse = WRITTEN_OUT(query, key, value, 64**-0.5, hidden=hidden)
    expected, expected_lse = exact_attention(query, key, value, hidden)
    assert (out - expected).abs().max() < step
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "step"), HALVES)
@pytest.mark.parametrize("spread", [1.0, 4.0, 25.0])
@pytest.mark.parametrize("fused", [False, True])
def test_prefix_and_suffix_are_one_softmax_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, step: float, spread: float, fused: bool
) -> None:
    if not fused:
        monkeypatch.setattr(shared_prefix, "attention_for", lambda *_: WRITTEN_OUT)
    rows, heads, shared, length, width, before = 3, 4, 2, 2, 32, 40
    query = drawn(rows, heads, length, width, spread=spread, seed=1).to(dtype)
    keys = drawn(1, shared, before, width, spread=spread, seed=2).to(dtype)
    values = drawn(1, shared, before, width, spread=1.0, seed=3).to(dtype)
    key = drawn(rows, shared, length, width, spread=spread, seed=4).to(dtype)
    value = drawn(rows, shared, length, width, spread=1.0, seed=5).to(dtype)
    batch = lonely_batch(rows, length, keys, values)
    merged = batch.attend(0, query, key, value, width**-0.5, None, None)  # (R, S, H, D)
    for row in range(rows):
        every_key = torch.cat([keys[0], key[row]], 1).repeat_interleave(heads // shared, 0)
        every_value = torch.cat([values[0], value[row]], 1).repeat_interleave(heads // shared, 0)
        later = torch.arange(before + length) > before + torch.arange(length)[:, None]
        expected, _ = exact_attention(query[row], every_key, every_value, later)
        # Two roundings: of the prefix's part in the fused kernel, and of the output, of numbers up to 4.
        assert (merged[row].transpose(0, 1).double() - expected).abs().max() < 6 * step


@pytest.mark.parametrize(("window", "read"), [(1, 1), (2, 1), (7, 6), (40, 39), (41, 40), (42, 40)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_no_window_reaches_is_not_read(
    window: int, read: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of a long prefix that lie before every window are left out; the numbers are those of the whole softmax."""
    widths: list[int] = []

    class Noting(PrefixAttention):
        def __call__(self, query: Tensor, key: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
            widths.append(key.shape[1])
            return super().__call__(query, key, *given, **named)

    kind = shared_prefix.attention_for(torch.device("cpu"), torch.float32, 16, 16)
    noting = Noting(kind.way, kind.reason, kind.kernel, kind.hides)
    monkeypatch.setattr(shared_prefix, "attention_for", lambda *_: noting)
    rows, length, before = 3, 2, 40
    query, own_keys, own_values = (drawn(rows, 2, length, 16, spread=2.0, seed=seed) for seed in (1, 2, 3))
    keys, values = (drawn(1, 2, before, 16, spread=2.0, seed=seed) for seed in (4, 5))
    batch = lonely_batch(rows, length, keys, values)
    batch.taps[1] = slice(-2, None)
    merged = batch.attend(0, query, own_keys, own_values, 0.25, softcap, window)
    assert widths == [read]
    place = before + torch.arange(length)[:, None]
    column = torch.arange(before + length)
    hidden = (column > place) | (place - column >= window)
    for row in range(rows):
        scores = query[row].double() @ torch.cat([keys[0], own_keys[row]], 1).double().transpose(-1, -2) * 0.25
        scores = scores if softcap is None else (scores / softcap).tanh() * softcap
        probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        expected = probabilities @ torch.cat([values[0], own_values[row]], 1).double()
        assert (merged[row].transpose(0, 1) - expected).abs().max() < 1e-5
        if row == 1:
            assert (batch.attention(1) - probabilities.mean(0)[:, :3]).abs().max() < 1e-6


def lonely_batch(rows: int, length: int, keys: Tensor, values: Tensor, cells: int = 3) -> SharedRows:
    """A batch of rows that have run nothing but their next tokens, after one prefix of one layer."""
    layer = SimpleNamespace(keys=keys, values=values)
    columns = torch.arange(cells)
    prefix = SimpleNamespace(
        cache=SimpleNamespace(layers=[layer]), length=keys.shape[2], next_position=keys.shape[2], columns=columns
    )
    batch = SharedRows(SimpleNamespace(device=torch.device("cpu")), [prefix] * rows)  # type: ignore[arg-type, list-item]
    batch.lengths = [length] * rows
    batch._places, batch._plain = torch.arange(length).expand(rows, -1), False
    return batch


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.numbers = max(self.numbers, found.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_over_a_long_prefix_are_held_in_chunks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(prefix_attention, "_CHUNK", 20_000)
    query, key, value = (drawn(2, n, 8, spread=1.0, seed=n).to(dtype) for n in (200, 1000, 1000))
    with _Largest() as largest:
        WRITTEN_OUT(query, key, value, 0.3)
    assert largest.numbers <= 20_000 < 2 * 200 * 1000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sliding_windows_are_hidden_in_half_precision(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    vlm = load(ModelSpec(model=str(checkpoint("gemma3")), dtype=name))
    prefix = vlm.prefill(vlm.prepare([picture()], "what is red?"))
    assert prefix.length > vlm.model.config.get_text_config().sliding_window
    assert vlm.shares_prefixes(prefix)


def test_a_kernel_that_cannot_hide_is_found_out_before_a_prompt_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window longer than the prompt hides nothing of it, so the first question must try on purpose."""

    def unmasked(query: Tensor, key: Tensor, value: Tensor, scaling: float, hidden: Tensor | None, *_: Any) -> Any:
        if hidden is not None:
            raise RuntimeError("this kernel takes no mask")
        return WRITTEN_OUT(query, key, value, scaling)

    vlm = load(ModelSpec())
    prefix = vlm.prefill(vlm.prepare([draw_shapes()], QUESTIONS[0]))
    claimed = PrefixAttention("fused", "it says that it hides", unmasked, hides=True)
    monkeypatch.setattr(shared_prefix, "attention_for", lambda *_: claimed)
    monkeypatch.setattr(vlm.model.config.get_text_config(), "sliding_window", 4096, raising=False)
    assert not vlm.shares_prefixes(prefix)


# ---------------------------------------------------------------------- layers on several devices


class _Devices(TorchDispatchMode):
    """Torch's meta device plays one that is not the CPU: tensors of both are never mixed, and it has no float64."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            source = args[0]
            assert source.dtype == kwargs.get("dtype", source.dtype) or source.device.type == "cpu"
            return torch.zeros(source.shape, dtype=kwargs.get("dtype", source.dtype))
        found = function(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs, found)) if isinstance(each, Tensor) and each.dim()]
        if "copy" not in str(function):
            assert len({each.device for each in given}) <= 1, function
        assert all(each.dtype != torch.float64 for each in given if each.device.type != "cpu"), function
        return found


def test_no_float64_on_a_device() -> None:
    """Apple's and Intel's devices do not know it."""
    with _Devices():
        logits = Logits(torch.empty(3, 2, 20, device="meta"), torch.empty(3, 20, device="meta"))
        reading = read_reward(logits, SearchSettings(reward_position="both"))
        assert (reading.reward.dtype, reading.reward.device.type) == (torch.float64, "cpu")
        gradient = policy_gradient(torch.empty(4, 2, 8, device="meta"), torch.zeros(4).double(), 0.1)
        assert gradient.device.type == "meta"


def test_attention_of_layers_on_several_devices_is_read_and_brought_together() -> None:
    with _Devices():
        tap = AttentionTap(slice(0, 2), torch.arange(3))
        for device in ("cpu", "meta"):
            tap.add(torch.zeros(1, 4, 2, 9, device=device))
        assert (tap.mean().shape, tap.mean().device.type) == ((1, 2, 3), "cpu")


def test_an_index_of_positions_fits_the_last_layer_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load(ModelSpec())
    monkeypatch.setattr(type(vlm), "device", torch.device("meta"))
    for devices, expected in (({"": 0}, "meta"), ({"model": 0, "lm_head": 1}, "cpu"), (None, "meta")):
        monkeypatch.setattr(vlm.model, "hf_device_map", devices, raising=False)
        assert vlm.places([-1]).device.type == expected


@pytest.mark.parametrize("window", [None, 4])
def test_a_batch_attends_on_the_device_of_each_layer(window: int | None) -> None:
    """The model's inputs, and so the places of the rows, are on another device than the layer."""
    with _Devices():
        keys, values = (torch.empty(1, 2, 7, 8, device="meta") for _ in range(2))
        batch = lonely_batch(3, 2, keys, values)
        batch.taps[1] = slice(-2, None)
        query = torch.empty(3, 4, 2, 8, device="meta")
        key, value = (torch.empty(3, 2, 2, 8, device="meta") for _ in range(2))
        merged = batch.attend(0, query, key, value, 0.3, None, window)
        assert (merged.shape, merged.device.type) == ((3, 2, 4, 8), "meta")
        assert batch.attention(1).shape == (2, 3)
        batch.cache.layers[0].keys, batch.cache.layers[0].values = key, value
        batch.select([0, 2])
        assert batch.cache.layers[0].keys.shape[0] == 2


# ---------------------------------------------------------------------- one transfer per token


class _Waits(TorchDispatchMode):
    """Counts single numbers that the host reads."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(function).startswith("aten._local_scalar_dense.")
        return function(*args, **(kwargs or {}))


def test_no_number_is_read_per_row_and_token(engine: Engine, prefixes: list[Prefix]) -> None:
    """The tokens of all rows come in one transfer; only the beginning and the end of an answer read more."""
    counts = []
    for tokens in (2, 2, 6):  # the first may be the one that reads the rules, which are then known
        rules = GenerationSettings(min_new_tokens=0)
        with _Waits() as waits:
            found = engine.vlm.decode_many([Decode(each, None, (), tokens, generation=rules) for each in prefixes])
        counts.append(waits.count)
    assert max(len(each.tokens) for each in found if isinstance(each, Decoded)) > 2
    assert counts[1] == counts[2]


def test_what_is_kept_of_a_token_are_numbers(engine: Engine, prefixes: list[Prefix]) -> None:
    """Not a view that holds the log-probabilities of the whole vocabulary, times the rows, for every token."""
    beginning = Beginning(prefixes[0], None, engine.vlm.written(()))
    row: Any = generating.decode_from(engine.vlm, beginning, 4, lambda: False)
    next(row.decoding)
    for _ in range(3):
        row.decoding.send(choose([row.chooser], torch.randn(1, len(engine.vlm.tokenizer)))[0])
    kept = row.decoding.gi_frame.f_locals
    assert all(type(each) is float for each in (*kept["log_probabilities"], *kept["entropies"]))
    assert not any(isinstance(each, Tensor) and each.numel() > 3 for each in kept.values())


def test_what_is_said_of_many_rows_is_what_is_said_of_each() -> None:
    logits = torch.randn(7, 997, generator=torch.Generator().manual_seed(0)) * 5
    rules = GenerationRules(LogitsProcessorList(), frozenset())
    together = choose([Chooser(rules, [1], 9) for _ in logits], logits)
    for row, said in zip(logits, together, strict=True):
        (alone,) = choose([Chooser(rules, [1], 9)], row[None])
        assert said.token == alone.token == int(row.argmax())
        assert said.log_probability == alone.log_probability == float(row.log_softmax(-1)[said.token])
        assert said.entropy == pytest.approx(float(entropy(row)), abs=1e-6)


# ---------------------------------------------------------------------- drawn tokens


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_as_often_as_they_are_probable(top_p: float, temperature: float) -> None:
    """Against the definition, at 20,001 uniform numbers that are spread evenly, both ends among them."""
    logits = drawn(12, spread=2.0, seed=4)
    logits[5] = float("-inf")
    chances = (logits / temperature).softmax(-1)
    ordered = sorted(range(12), key=lambda token: -float(chances[token]))
    kept, held = [], 0.0
    for token in ordered:
        if held < top_p:
            kept.append(token)
        held += float(chances[token])
    expected = torch.zeros(12)
    expected[kept] = chances[kept] / chances[kept].sum()
    uniform = torch.linspace(0, 1 - 2**-24, 20_001)
    tokens = draw(logits.expand(len(uniform), -1), SamplingSettings(temperature=temperature, top_p=top_p), uniform)
    counts = torch.bincount(tokens, minlength=12) / len(uniform)
    assert (counts - expected).abs().max() < 2e-4
    assert (counts[expected == 0] == 0).all()


def test_rows_that_draw_stand_beside_rows_that_do_not() -> None:
    """What a row draws depends on its own seed alone."""
    logits = drawn(5, 200, spread=1.0, seed=1)
    rules = GenerationRules(LogitsProcessorList(), frozenset())
    how = [
        None,
        SamplingSettings(temperature=2.0),
        SamplingSettings(top_p=0.5),
        None,
        SamplingSettings(temperature=2.0),
    ]

    def choosers() -> list[Chooser]:
        return [Chooser(rules, [1], 9, sampling, seeded(7, row)) for row, sampling in enumerate(how)]

    together = [choose(rows, logits) for rows in [choosers()] for _ in range(3)]
    for row, each in enumerate(choosers()):
        assert [said[row].token for said in together] == [
            choose([each], logits[row : row + 1])[0].token for _ in range(3)
        ]


def test_thinking_in_words_does_not_count_towards_the_floor() -> None:
    """The answer's tokens alone do, whether the model writes the opening marker or its template did."""
    opened, template = Markers((1, 2), (3,)), Markers((), (3,))
    low, sure = math.log(0.1), math.log(0.9)
    for markers, begins in ((opened, [1, 2]), (template, [])):
        floor = generating._Floor(0.5, markers, True)
        assert all(floor.passed(token, low) for token in (*begins, 7, 8, 3))
        assert [floor.passed(9, sure) for _ in range(7)] == [True] * 6 + [False]  # 0.9 ** 7 < 0.5
    for markers, reasons in ((Markers(), True), (opened, True), (template, False)):
        floor = generating._Floor(0.5, markers, reasons)
        assert not floor.passed(7, low)


# ---------------------------------------------------------------------- which rows


def test_whether_prefixes_are_shared_is_not_asked_while_somebody_reads_attention(
    engine: Engine, prefixes: list[Prefix]
) -> None:
    """Another attention is set for that long; a question that comes then waits, and shares its prefix all the same."""
    said: list[bool] = []
    asking = threading.Thread(target=lambda: said.append(engine.vlm.shares_prefixes(prefixes[0])))
    with engine.vlm.forward_pass(), tap_attention(engine.vlm.model, slice(-1, None), prefixes[0].columns):
        assert not shared_prefix.installed(engine.vlm.model)
        asking.start()
        asking.join(0.2)
        assert not said
    asking.join(30)
    assert said == [True]
