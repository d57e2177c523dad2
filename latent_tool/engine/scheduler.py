"""A scheduler that lets questions asked at the same time share one model's forward passes.

One worker thread per engine advances up to ``max_active`` questions in step (``InStep``). A question joins at the next
step, in the order of asking; one that is answered, fails or is cancelled leaves, and the others go on as if it had
never been there. The thread lives while there is work.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from latent_tool.engine.engine import Engine
from latent_tool.engine.in_step import InStep, Member
from latent_tool.engine.job import Job, Outcome
from latent_tool.engine.signals import AnyOf
from latent_tool.errors import CancelledError, DeadlineError, OverloadedError, SettingsError
from latent_tool.schema import ReasoningStep

__all__ = ["Scheduler", "get_scheduler"]

OnStep = Callable[[ReasoningStep], None]


# Questions that calls of one's own process may let wait: more than a server would, since nobody is turned away then.
_IN_PROCESS = 1024
# Questions in step: a small model's prefixes take little memory, and its passes cost little more for many rows.
_ACTIVE, _ACTIVE_SMALL = 8, 64


@dataclass(frozen=True)
class _Withdrawn:
    """The signal that nobody wants a future's result any more."""

    future: Future[Outcome]

    def is_set(self) -> bool:
        return self.future.cancelled()


@dataclass(frozen=True)
class _Asked:
    """A question that waits for its turn."""

    job: Job
    on_step: OnStep | None
    future: Future[Outcome]
    since: float


class Scheduler:
    """Answers questions from any thread, up to ``max_active`` of them in step.

    Args:
        engine: who answers.
        max_active: questions under way at a time; each holds its prefix in memory.
        max_queue: questions that wait beside those; one more raises ``OverloadedError``. Each holds its images.

    Both limits are attributes and may be changed at any time.
    """

    def __init__(self, engine: Engine, *, max_active: int = _ACTIVE, max_queue: int = 64) -> None:
        if max_active < 1 or max_queue < 0:
            raise SettingsError(
                "A scheduler needs max_active >= 1 and max_queue >= 0.", "Leave them out for the defaults."
            )
        self.engine = engine
        self.max_active = max_active
        self.max_queue = max_queue
        self._lock = threading.Lock()
        self._queue: deque[_Asked] = deque()
        self._active = 0
        self._worker: threading.Thread | None = None
        self._closed = False
        self._ended = threading.Event()  # everything is given up

    @property
    def waiting(self) -> int:
        """Questions that are not under way yet."""
        return len(self._queue)

    @property
    def active(self) -> int:
        """Questions under way."""
        return self._active

    def submit(self, job: Job, on_step: OnStep | None = None) -> Future[Outcome]:
        """Ask; the outcome, or what the engine raises, comes through the future.

        Cancelling the future (at any time before it is done) or setting ``job.cancelled`` takes the question out at the
        next step. ``on_step`` is called in the worker thread, must be quick, and fails its own question if it raises.
        The wait for a turn is added to ``queue_seconds``; a deadline counts while waiting, too.

        Raises ``OverloadedError`` when too many wait already.
        """
        future: Future[Outcome] = Future()
        job = replace(job, cancelled=AnyOf((_Withdrawn(future), job.cancelled, self._ended)))
        with self._lock:
            if self._closed:
                raise OverloadedError("The scheduler is closing and takes no more questions.", "Ask again later.")
            if self._active + len(self._queue) >= self.max_active + self.max_queue:
                raise OverloadedError(
                    f"{len(self._queue)} questions are waiting already.",
                    "Ask again later, ask fewer at a time, or let more wait (max_queue).",
                )
            self._queue.append(_Asked(job, on_step, future, self.engine.clock()))
            # A thread of the parent process is not alive in a forked child.
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(target=self._work, name="latent-tool-scheduler")
                self._worker.start()
        return future

    def close(self, *, cancel: bool = False) -> None:
        """Take no more questions, and return when those that were asked are answered, or with ``cancel`` given up."""
        with self._lock:
            self._closed = True
            worker = self._worker
        if cancel:
            self._ended.set()
        if worker is not None and worker is not threading.current_thread():
            worker.join()

    # ------------------------------------------------------------------ the worker thread

    def _work(self) -> None:
        batch = InStep(self.engine.vlm, lambda: bool(self._queue) and self._active < self.max_active)
        futures: dict[Member[Any], Future[Outcome]] = {}
        try:
            while self._admit(batch, futures):
                for member in batch.step():
                    _settle(futures.pop(member), member.result)
        except BaseException as error:  # a defect, since a question's own errors are results: nobody is left waiting
            with self._lock:
                left = [*futures.values(), *(each.future for each in self._queue)]
                self._queue.clear()
                self._active, self._worker = 0, None
            for future in left:
                _settle(future, error)

    def _admit(self, batch: InStep, futures: dict[Member[Any], Future[Outcome]]) -> bool:
        """Fill the free places in the order of asking; ``False`` when there is nothing left to do."""
        while True:
            with self._lock:
                over = [(each, error) for each in self._queue if (error := self._over(each)) is not None]
                for each, _ in over:
                    self._queue.remove(each)
                asked = self._queue.popleft() if self._queue and len(batch.members) < self.max_active else None
                self._active = len(batch.members) + (asked is not None)
                if not self._active and not over:
                    self._worker = None
                    return False
            for each, error in over:
                _settle(each.future, error)
            if asked is not None:
                try:
                    waited = asked.job.queue_seconds + self.engine.clock() - asked.since
                    job = replace(asked.job, queue_seconds=waited)
                    member = batch.join(job, self.engine.work(job), asked.on_step)
                except BaseException as error:  # it is neither in the queue nor among the members
                    _settle(asked.future, error)
                    raise
                futures[member] = asked.future
            elif batch.members:
                return True

    def _over(self, asked: _Asked) -> Exception | None:
        """Why a waiting question need not be begun any more."""
        if asked.job.cancelled is not None and asked.job.cancelled.is_set():
            return CancelledError("The question was cancelled.")
        if asked.job.deadline is not None and self.engine.clock() >= asked.job.deadline:
            return DeadlineError(
                "The deadline passed while the question waited for its turn.",
                "Allow more seconds (deadline_s), or ask fewer questions at a time.",
            )
        return None


def _settle(future: Future[Outcome], result: Outcome | BaseException | None) -> None:
    """Hand over a result, unless nobody wants it any more."""
    if future.set_running_or_notify_cancel():
        if isinstance(result, Outcome):
            future.set_result(result)
        else:
            future.set_exception(result)


_registry_lock = threading.Lock()


def get_scheduler(engine: Engine) -> Scheduler:
    """Return the engine's scheduler; a new one when the last was closed."""
    with _registry_lock:
        found = engine.attached.get("scheduler")
        if not isinstance(found, Scheduler) or found._closed:
            active = _ACTIVE_SMALL if engine.vlm.small else _ACTIVE
            found = engine.attached["scheduler"] = Scheduler(engine, max_active=active, max_queue=_IN_PROCESS)
        return found
