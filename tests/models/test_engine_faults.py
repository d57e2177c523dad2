"""Faults at every step: whatever goes wrong in a forward pass, the engine can be used again and nothing has changed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from pictures import draw_shapes

from latent_tool.engine.engine import Engine
from latent_tool.engine.job import Job, Outcome
from latent_tool.errors import CancelledError, DeadlineError, NotEnoughMemoryError, NumericalError
from latent_tool.method.asking import Request
from latent_tool.models import attention, shared_prefix
from latent_tool.models.decoding import Decoded
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.memory import out_of_memory
from latent_tool.models.options import spell
from latent_tool.models.prefix import Prefix
from latent_tool.models.prefix_cache import PrefixCache
from latent_tool.models.requests import DecodeEach, Prefill, PrefillEach, Sample, Score, ScoreOptions
from latent_tool.models.serving import together
from latent_tool.models.shared_prefix import SharedRows
from latent_tool.settings import Budget, NoiseSettings, SamplingSettings, SearchSettings

TINY = SearchSettings(search_below=None, latents=2, samples=4, patches_per_latent=2, reward_position="both")
BUDGET = Budget(iterations=1, max_patches=3, max_new_tokens=3)
JOBS = [
    Job(
        (draw_shapes("circle" if index else "triangle"),),
        ("what color is the circle?", "how many shapes?")[index],
        settings=TINY,
        budget=BUDGET,
        seed=index,
        grounding=NoiseSettings() if index else None,
    )
    for index in range(2)
]


@pytest.fixture(scope="module", params=["shared prefixes", "plain"])
def victim(request: pytest.FixtureRequest) -> Engine:
    """An engine of its own; without shared prefixes the attention is read through a switched implementation."""
    engine = Engine(load(ModelSpec()))
    if request.param == "plain":
        engine.vlm._shares = False
    engine.answer(JOBS[0])
    return engine


class Hooks:
    """Counts the decoder's forward passes, and does something in the middle of the chosen one."""

    def __init__(self, engine: Engine, at: int, action: Callable[[], None]) -> None:
        self.engine, self.at, self.action, self.calls = engine, at, action, 0

    def _layer(self, *_: Any) -> None:
        if self.calls == self.at:
            self.action()

    def _model(self, *_: Any) -> None:
        self.calls += 1

    def __enter__(self) -> Hooks:
        self.engine.vlm.prefix_cache.clear()  # so that the image is computed every time
        decoder = self.engine.vlm.model.get_decoder()
        # The last layer: the layers before it have written their keys and values when it fails.
        self.handles = [
            decoder.register_forward_pre_hook(self._model),
            decoder.layers[-1].register_forward_pre_hook(self._layer),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def passes(engine: Engine, ask: Callable[[], object]) -> int:
    with Hooks(engine, -1, lambda: None) as hooks:
        ask()
    return hooks.calls


def world(engine: Engine) -> Any:
    """Everything that a question must leave as it was."""
    model = engine.vlm.model
    free: list[bool] = []

    def try_lock() -> None:  # from another thread: this one could take its own lock again
        free.append(engine.vlm._lock.acquire(timeout=5))
        if free[0]:
            engine.vlm._lock.release()

    thread = threading.Thread(target=try_lock)
    thread.start()
    thread.join()
    return (
        free,
        model.config.get_text_config()._attn_implementation,
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_rng_state().tolist(),
        engine.vlm._shares,
        getattr(shared_prefix._active, "batch", None),
        getattr(attention._active, "tap", None),
        set(threading.enumerate()) - {thread},
    )


def essence(found: Outcome | Exception) -> Any:
    assert isinstance(found, Outcome), found
    assert found.search is not None
    dependency = [] if found.grounding is None else [round(each.dependency, 3) for each in found.grounding.tokens]
    return found.decoded.tokens, found.patches, round(found.search.best.reward, 4), dependency


def fail(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


FAULTS: dict[str, tuple[Callable[[], BaseException], tuple[type[BaseException], ...]]] = {
    "defect": (lambda: RuntimeError("defect"), (RuntimeError,)),
    "no memory": (lambda: torch.OutOfMemoryError("CUDA out of memory"), (NotEnoughMemoryError,)),
    "no memory on the CPU": (
        lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        (NotEnoughMemoryError,),
    ),
    "interrupted": (KeyboardInterrupt, (KeyboardInterrupt,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["defect", "no memory", "interrupted"])
def test_a_fault_at_any_forward_pass_of_a_question(victim: Engine, kind: str) -> None:
    """Both lacks of memory are one fault as soon as they are known, see below."""
    make, errors = FAULTS[kind]
    clean, before = essence(victim.answer(JOBS[1])), world(victim)
    total = passes(victim, lambda: victim.answer(JOBS[1]))
    assert total > 10
    survived = 0
    for at in range(1, total + 1):
        with Hooks(victim, at, fail(make())):
            try:
                assert essence(victim.answer(JOBS[1])) == clean
                survived += 1
            except errors:
                pass
        assert world(victim) == before
    # Batches of states are halved; a single state, a prefill or a decoding alone cannot be.
    assert (survived > 0) == kind.startswith("no memory")
    assert essence(victim.answer(JOBS[1])) == clean


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["defect", "no memory"])
def test_a_fault_at_any_forward_pass_of_several_questions(victim: Engine, kind: str) -> None:
    """At most one of them fails, with an error of its own; the others' answers do not change."""
    make, errors = FAULTS[kind]
    clean, before = [essence(each) for each in victim.answer_many(JOBS)], world(victim)
    total = passes(victim, lambda: victim.answer_many(JOBS))
    for at in range(1, total + 1):
        with Hooks(victim, at, fail(make())):
            found = victim.answer_many(JOBS)
        wrong = [each for each in found if isinstance(each, Exception)]
        assert len(wrong) <= 1 and all(isinstance(each, errors) for each in wrong)
        for each, expected in zip(found, clean, strict=True):
            assert isinstance(each, Exception) or essence(each) == expected
        assert world(victim) == before
    assert [essence(each) for each in victim.answer_many(JOBS)] == clean


def test_a_panic_in_a_forward_pass_is_the_error_of_one_question(engine: Engine) -> None:
    """What is raised past ``except Exception``, as Rust's panics are."""
    engine.answer(JOBS[0])  # transformers puts hooks of its own on a model in its first pass
    before = world(engine)
    # In the pass of both, after which each is tried alone, and again in that of the first.
    with Hooks(engine, 2, fail(BaseException("panic"))), Hooks(engine, 3, fail(BaseException("panic"))):
        found = engine.answer_many(JOBS)
    (wrong,) = [each for each in found if not isinstance(each, Outcome)]
    assert isinstance(wrong, RuntimeError) and "panic" in str(wrong)
    with Hooks(engine, 4, fail(BaseException("panic"))), pytest.raises(RuntimeError, match="panic"):
        engine.answer(JOBS[0])
    assert world(engine) == before


@pytest.mark.slow
def test_cancelling_at_any_forward_pass(victim: Engine) -> None:
    clean, before = [essence(each) for each in victim.answer_many(JOBS)], world(victim)
    total = passes(victim, lambda: victim.answer_many(JOBS))
    cancelled = 0
    for at in range(1, total + 1):
        stop = threading.Event()
        with Hooks(victim, at, stop.set):
            first, second = victim.answer_many([JOBS[0], replace(JOBS[1], cancelled=stop)])
        assert essence(first) == clean[0]
        if isinstance(second, Exception):
            assert isinstance(second, CancelledError)
            cancelled += 1
        else:
            assert essence(second) == clean[1]
        assert world(victim) == before
    assert cancelled > total / 2


@pytest.mark.slow
def test_a_deadline_at_any_forward_pass(victim: Engine) -> None:
    """An error before anything was scored; later the best so far, with at most one pass more for every phase."""
    before = world(victim)
    job = replace(JOBS[0], deadline=1.0, budget=BUDGET.but(max_new_tokens=30), settings=TINY)
    now = [0.0]
    timed = Engine(victim.vlm, clock=lambda: now[0])
    total = passes(victim, lambda: timed.answer(job))
    errors = 0
    for at in range(1, total + 1):
        now[0] = 0.0
        with Hooks(victim, at, lambda: now.__setitem__(0, 2.0)) as hooks:
            try:
                found = timed.answer(job)
                assert found.answer.text or found.decoded.tokens
                assert found.decoded.finish_reason == "deadline" or hooks.calls == total
            except DeadlineError:
                errors += 1
        assert hooks.calls <= at + 2
        assert world(victim) == before
    assert 0 < errors < total


@pytest.mark.parametrize("cancel", [False, True])
def test_a_prefill_is_given_up_between_layers(victim: Engine, cancel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline passes (or the question is cancelled) in the vision tower: the decoder is never reached."""
    monkeypatch.setattr(victim.vlm, "prefix_cache", PrefixCache(0))  # a known image does not see the tower again
    before, now, stop = world(victim), [0.0], threading.Event()
    timed = Engine(victim.vlm, clock=lambda: now[0])
    tower = victim.vlm.model.model.vision_tower

    def strike(*_: Any) -> None:
        if cancel:
            stop.set()
        else:
            now[0] = 2.0

    handle = tower.register_forward_pre_hook(strike)
    try:
        with (
            Hooks(victim, -1, lambda: None) as hooks,
            pytest.raises(CancelledError if cancel else DeadlineError),
        ):
            timed.answer(replace(JOBS[0], deadline=1.0, cancelled=stop))
    finally:
        handle.remove()
    assert hooks.calls == 0
    assert world(victim) == before


@contextmanager
def not_a_number(engine: Engine, at: int) -> Iterator[list[int]]:
    """The chosen output of the model's head is not finite: of several rows the last one."""
    calls = [0]

    def spoil(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        calls[0] += 1
        if calls[0] != at:
            return None
        spoiled = output.clone()
        spoiled[-1] = float("nan")
        return spoiled

    handle = engine.vlm.model.lm_head.register_forward_hook(spoil)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.slow
def test_values_that_are_not_finite_at_any_forward_pass(victim: Engine) -> None:
    """A candidate is discarded and counted; without one there is a typed error, and never a NaN in a result."""
    clean, before = essence(victim.answer(JOBS[1])), world(victim)
    with not_a_number(victim, -1) as calls:
        victim.answer(JOBS[1])
    discarded = 0
    for at in range(1, calls[0] + 1):
        with not_a_number(victim, at):
            try:
                found = victim.answer(JOBS[1])
            except NumericalError as error:
                assert error.hint
            else:
                discarded += found.usage.discarded
                scores = victim.result(found).scores
                assert "nan" not in repr(victim.result(found)) and scores.reward is not None
                # `min(1.0, nan)` is 1.0: a value that is not finite must not come out as certainty.
                assert all(p is not None and 0 < p < 1 for p in (scores.answer_probability, scores.plain_probability))
        assert world(victim) == before
    assert discarded > 0
    assert essence(victim.answer(JOBS[1])) == clean


# ---------------------------------------------------------------------- memory that stays short


@pytest.mark.parametrize(
    ("kind", "rows"), [("no memory", 1), ("no memory", 2), ("no memory", 5), ("no memory on the CPU", 2)]
)
def test_batches_are_made_small_enough(engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: str, rows: int) -> None:
    extend, sizes = SharedRows.extend, set()

    def small(self: SharedRows, suffixes: Any, keep: Any) -> Any:
        if len(suffixes) > rows:
            raise FAULTS[kind][0]()
        sizes.add(len(suffixes))
        return extend(self, suffixes, keep)

    clean = [essence(each) for each in engine.answer_many(JOBS)]
    monkeypatch.setattr(SharedRows, "extend", small)
    assert [essence(each) for each in engine.answer_many(JOBS)] == clean
    assert [essence(engine.answer(job)) for job in JOBS] == clean
    assert max(sizes) == rows or rows == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no memory", "no memory on the CPU"])
def test_one_request_of_many_rows_is_made_small_enough(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of whatever kind: the reply is the same, row by row and option by option."""
    vlm = engine.vlm
    inputs = [vlm.prepare([draw_shapes("circle", (220, 25 * at, 25))], "what color is the circle?") for at in range(5)]
    prefixes = [vlm.prefill(each) for each in inputs]
    latents = torch.randn(4, 2, prefixes[0].features.shape[1], generator=torch.Generator().manual_seed(0))
    cells = [(), (1,), (0, 2), (3,)]
    options = tuple(each for word in ("red", "blue", "green", "yellow", "two") for each in spell(vlm, [[word]]))
    requests: list[Request[Any]] = [
        Score(prefixes[0], latents, cells, attended=4),
        Score(prefixes[0], latents, cells, attended=3),
        Score(prefixes[0], latents, cells, answer_only=True),
        ScoreOptions(prefixes[0], latents, cells, options, tokens=True),
        ScoreOptions(prefixes[0], None, [(1,)], options, tokens=True),
        DecodeEach(prefixes, 5),
        Sample(prefixes[0], 5, SamplingSettings(samples=7), seed=3),
        PrefillEach([Prefill(each, cached=False) for each in inputs]),
    ]
    expected = [together(vlm, [request])[0] for request in requests]
    extend, run, refused = SharedRows._extend, type(vlm)._run_prompts, []

    def small(self: SharedRows, suffixes: Any, keep: Any) -> Any:
        if len(self.prefixes) > 2:
            refused.append(len(self.prefixes))
            raise FAULTS[kind][0]()
        return extend(self, suffixes, keep)

    def one(self: Any, rows: Any) -> Any:
        if len(rows) > 1:
            refused.append(len(rows))
            raise FAULTS[kind][0]()
        return run(self, rows)

    monkeypatch.setattr(SharedRows, "_extend", small)
    monkeypatch.setattr(type(vlm), "_run_prompts", one)
    for request, wanted in zip(requests, expected, strict=True):
        refused.clear()
        (found,) = together(vlm, [request])
        assert refused, type(request)
        assert flat(found) == pytest.approx(flat(wanted), abs=1e-4, nan_ok=True), type(request)


def flat(reply: object) -> list[float]:
    """All numbers of a reply, one after another."""
    if isinstance(reply, torch.Tensor):
        return [float(value) for value in reply.reshape(-1)]
    if isinstance(reply, int | float):
        return [float(reply)]
    if isinstance(reply, Prefix):
        return flat([reply.last_logits, reply.features])
    if isinstance(reply, Decoded):
        return flat([reply.tokens, reply.log_probabilities, reply.entropies])
    assert reply is None or isinstance(reply, list | tuple), reply
    return [value for each in reply or () for value in (math.nan, *flat(each))]


def test_what_does_not_fit_alone_is_a_typed_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: SharedRows, *_: object) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(SharedRows, "extend", none)
    prefix = engine.vlm.prefill(engine.vlm.prepare([draw_shapes()], "what?"))
    width = prefix.features.shape[1]
    (error,) = together(engine.vlm, [Score(prefix, torch.zeros(4, 2, width), [()] * 4)])
    assert isinstance(error, NotEnoughMemoryError)
    assert "smaller" in error.hint
    assert error.__cause__ is None and error.__context__ is None  # no traceback that holds on to tensors
    for found in engine.answer_many(JOBS):
        assert isinstance(found, NotEnoughMemoryError)


def test_images_that_do_not_fit_into_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.vlm, "prepare", lambda *_, **__: fail(MemoryError())())
    with pytest.raises(NotEnoughMemoryError):
        engine.answer(JOBS[0])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_how_a_lack_of_memory_is_known(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) == expected


def test_the_real_allocator_says_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
