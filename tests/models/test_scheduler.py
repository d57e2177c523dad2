"""Questions that ride together: each as if it were asked alone, whoever joins, leaves, fails or is cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError as FutureCancelled
from concurrent.futures import Future
from typing import Any

import pytest
from pictures import draw_shapes

from latent_tool.engine.engine import Engine
from latent_tool.engine.in_step import InStep
from latent_tool.engine.job import Job, Outcome
from latent_tool.engine.scheduler import Scheduler, get_scheduler
from latent_tool.errors import CancelledError, DeadlineError, OverloadedError, QuestionError, SettingsError
from latent_tool.schema import ReasoningStep
from latent_tool.settings import Budget, SearchSettings

PICTURES = [draw_shapes("circle" if index % 2 else "triangle", (220, 25 * index, 25)) for index in range(4)]
QUESTIONS = ["what color is the circle?", "how many shapes are there?", "what is right of the red circle?"]
SMALL = SearchSettings(search_below=None, latents=2, samples=4, patches_per_latent=2)
ENDLESS = Budget(iterations=10_000)


def job(index: int = 0, **options: Any) -> Job:
    budget = Budget(iterations=1 + index % 3, max_patches=4)
    fields = {"question": QUESTIONS[index % 3], "settings": SMALL, "budget": budget, "seed": index, **options}
    return Job((PICTURES[index % 4],), **fields)


def same(one: Outcome, other: Outcome) -> None:
    assert one.search is not None and other.search is not None
    assert (one.answer.text, one.patches) == (other.answer.text, other.patches)
    assert one.search.best.reward == pytest.approx(other.search.best.reward, abs=1e-4)
    assert one.search.candidates == other.search.candidates


@pytest.fixture
def scheduler(engine: Engine) -> Iterator[Scheduler]:
    found = Scheduler(engine, max_active=3, max_queue=100)
    yield found
    found.close(cancel=True)


class Gate:
    """A callback that holds the worker thread at a question's first step until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, step: ReasoningStep) -> None:
        self.reached.set()
        assert self.open.wait(60)


def test_every_answer_is_that_of_the_question_asked_alone(engine: Engine, scheduler: Scheduler) -> None:
    jobs = [job(index) for index in range(10)]
    futures = [scheduler.submit(each) for each in jobs]
    for each, future in zip(jobs, futures, strict=True):
        same(future.result(60), engine.answer(each))
    scheduler.close()
    assert (scheduler.active, scheduler.waiting) == (0, 0)


@pytest.mark.slow
def test_questions_are_run_together_and_join_at_the_next_step(
    engine: Engine, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one searches without end, another is asked and answered."""
    sizes: list[int] = []
    step = InStep.step

    def counted(self: InStep) -> Any:
        sizes.append(len(self.members))
        return step(self)

    monkeypatch.setattr(InStep, "step", counted)
    endless = scheduler.submit(job(budget=ENDLESS))
    for index in range(1, 6):
        same(scheduler.submit(job(index)).result(60), engine.answer(job(index)))
    assert not endless.done()
    assert endless.cancel()
    assert max(sizes) == 2


def test_questions_are_begun_in_the_order_of_asking(scheduler: Scheduler) -> None:
    gate, begun = Gate(), []
    first = scheduler.submit(job(), gate)
    gate.reached.wait(60)
    futures = [scheduler.submit(job(index), lambda step, i=index: begun.append(i)) for index in range(9)]
    assert scheduler.waiting == 9
    gate.open.set()
    for future in [first, *futures]:
        future.result(60)
    assert list(dict.fromkeys(begun)) == list(range(9))


def test_steps_are_told(scheduler: Scheduler) -> None:
    steps: list[ReasoningStep] = []
    outcome = scheduler.submit(job(1), steps.append).result(60)
    assert [step.phase for step in steps] == ["prefill", *["search"] * (len(steps) - 2), "decode"]
    assert outcome.search is not None
    assert len(steps) - 2 == len(outcome.search.rounds)


def test_the_wait_is_counted(engine: Engine, scheduler: Scheduler) -> None:
    gate = Gate()
    scheduler.max_active = 1
    scheduler.submit(job(), gate)
    gate.reached.wait(60)
    before = time.monotonic()
    later = scheduler.submit(job(queue_seconds=100.0))
    time.sleep(0.05)
    gate.open.set()
    waited = later.result(60).usage.seconds["queue"]
    assert 100.05 <= waited <= 100 + time.monotonic() - before


# ---------------------------------------------------------------------- who leaves


def test_cancelled_questions_leave_and_the_others_do_not_notice(engine: Engine, scheduler: Scheduler) -> None:
    stop = threading.Event()
    searching: list[threading.Event] = [threading.Event(), threading.Event()]
    by_future = scheduler.submit(job(0, budget=ENDLESS), lambda step: step.trace and searching[0].set())
    by_event = scheduler.submit(job(1, budget=ENDLESS, cancelled=stop), lambda step: step.trace and searching[1].set())
    other = scheduler.submit(job(2))
    for event in searching:
        assert event.wait(60)
    assert by_future.cancel()
    stop.set()
    with pytest.raises(CancelledError):
        by_event.result(60)
    with pytest.raises(FutureCancelled):
        by_future.result(60)
    same(other.result(60), engine.answer(job(2)))
    scheduler.close()
    assert scheduler.active == 0


def test_questions_are_cancelled_while_they_wait(scheduler: Scheduler) -> None:
    gate = Gate()
    scheduler.max_active = 1
    scheduler.submit(job(), gate)
    gate.reached.wait(60)
    waiting = [scheduler.submit(job(index)) for index in range(3)]
    assert waiting[1].cancel()
    gate.open.set()
    assert waiting[0].result(60) and waiting[2].result(60)


def test_bad_questions_fail_alone(engine: Engine, scheduler: Scheduler) -> None:
    good = [scheduler.submit(job(index)) for index in range(3)]
    empty, expired = scheduler.submit(job(question="")), scheduler.submit(job(deadline=engine.clock() - 1))
    deaf = scheduler.submit(job(), lambda step: 1 / 0)
    with pytest.raises(QuestionError):
        empty.result(60)
    with pytest.raises(DeadlineError):
        expired.result(60)
    with pytest.raises(ZeroDivisionError):
        deaf.result(60)
    for index, future in enumerate(good):
        same(future.result(60), engine.answer(job(index)))


def test_a_deadline_counts_while_waiting(engine: Engine) -> None:
    now = [0.0]
    timed = Scheduler(Engine(engine.vlm, clock=lambda: now[0]), max_active=1)
    gate = Gate()
    first = timed.submit(job(deadline=200.0), gate)
    gate.reached.wait(60)
    late = timed.submit(job(deadline=10.0))
    now[0] = 20.0
    gate.open.set()
    with pytest.raises(DeadlineError, match="waited"):
        late.result(60)
    assert first.result(60).answer.text


# ---------------------------------------------------------------------- limits and the end


def test_too_many_questions_are_turned_away(engine: Engine) -> None:
    small, gate = Scheduler(engine, max_active=1, max_queue=2), Gate()
    futures = [small.submit(job(), gate)]
    gate.reached.wait(60)
    futures += [small.submit(job(index)) for index in range(2)]
    with pytest.raises(OverloadedError) as caught:
        small.submit(job())
    assert caught.value.retryable and caught.value.hint
    gate.open.set()
    assert all(future.result(60) for future in futures)
    assert small.submit(job()).result(60)


@pytest.mark.parametrize("limits", [{"max_active": 0}, {"max_queue": -1}])
def test_wrong_limits(engine: Engine, limits: dict[str, int]) -> None:
    with pytest.raises(SettingsError):
        Scheduler(engine, **limits)


def test_closing_waits_for_what_was_asked(engine: Engine) -> None:
    closing = Scheduler(engine, max_active=2)
    futures = [closing.submit(job(index)) for index in range(5)]
    closing.close()
    assert all(future.done() and future.result() for future in futures)
    with pytest.raises(OverloadedError, match="closing"):
        closing.submit(job())


def test_closing_may_give_up_what_was_asked(engine: Engine) -> None:
    closing = Scheduler(engine, max_active=2)
    futures = [closing.submit(job(budget=ENDLESS)) for _ in range(5)]
    closing.close(cancel=True)
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(0)


def test_no_thread_is_left_without_work(engine: Engine) -> None:
    before = set(threading.enumerate())
    idle = Scheduler(engine)
    for _ in range(3):
        idle.submit(job()).result(60)
        for thread in set(threading.enumerate()) - before:
            thread.join(60)
    assert set(threading.enumerate()) <= before


def test_one_scheduler_per_engine(engine: Engine) -> None:
    first = get_scheduler(engine)
    assert get_scheduler(engine) is first
    assert get_scheduler(Engine(engine.vlm)) is not first
    first.close()
    second = get_scheduler(engine)
    assert second is not first
    assert second.submit(job()).result(60).answer.text


def test_a_defect_strands_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: InStep) -> Any:
        raise RuntimeError("defect")

    scheduler = Scheduler(engine, max_active=1)
    with monkeypatch.context() as patched:
        patched.setattr(InStep, "step", broken)
        futures: list[Future[Outcome]] = [scheduler.submit(job()) for _ in range(3)]
        for future in futures:
            with pytest.raises(RuntimeError, match="defect"):
                future.result(60)
    assert scheduler.submit(job()).result(60).answer.text


class Panic(BaseException):
    """As the panics of tokenizers written in Rust, which are no ``Exception``."""


def broken_tokenizer(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> str:
    """Let the engine fail on the one question that is returned."""
    prepare, question = engine.vlm.prepare, "does this panic?"

    def broken(images: Any, asked: str, **options: Any) -> Any:
        if asked == question:
            raise error
        return prepare(images, asked, **options)

    monkeypatch.setattr(engine.vlm, "prepare", broken)
    return question


def test_a_panic_fails_its_own_question(engine: Engine, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    question = broken_tokenizer(engine, monkeypatch, Panic("of the tokenizer"))
    futures = [scheduler.submit(job(index)) for index in range(2)]
    wrong = scheduler.submit(job(question=question))
    futures += [scheduler.submit(job(index)) for index in range(2, 5)]
    with pytest.raises(RuntimeError, match="Panic: of the tokenizer") as caught:
        wrong.result(60)
    assert isinstance(caught.value.__cause__, Panic)
    for index, future in enumerate(futures):
        same(future.result(60), engine.answer(job(index)))
    with pytest.raises(RuntimeError, match="Panic"):
        engine.answer(job(question=question))
    first, second = engine.answer_many([job(question=question), job(1)])
    assert isinstance(first, RuntimeError) and isinstance(second, Outcome)


@pytest.mark.parametrize("at", ["joining", "the clock"])
def test_a_defect_while_a_question_joins_strands_nobody(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    fails = Engine(engine.vlm)
    scheduler = Scheduler(fails, max_active=2)
    if at == "joining":
        question = broken_tokenizer(engine, monkeypatch, SystemExit("defect"))
    else:
        question = QUESTIONS[0]

        def clock() -> float:
            if threading.current_thread().name == "latent-tool-scheduler":
                raise SystemExit("defect")
            return time.monotonic()

        monkeypatch.setattr(fails, "clock", clock)
    futures = [scheduler.submit(job(index, question=question)) for index in range(4)]
    for future in futures:
        with pytest.raises(SystemExit, match="defect"):
            future.result(60)
    monkeypatch.undo()
    assert scheduler.submit(job()).result(60).answer.text
