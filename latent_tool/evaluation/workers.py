"""Share the batches of a run among processes: this one, others of this machine, or whatever the caller brings.

This module knows batches, engines and processes. How a batch is answered is told in ``answers``; files are not known.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, NamedTuple

from latent_tool.errors import ServiceUnavailableError
from latent_tool.evaluation.answers import Plan, answer_batch
from latent_tool.evaluation.datasets import Item
from latent_tool.evaluation.runs import Row
from latent_tool.langchain.reasoner import LatentReasoner

if TYPE_CHECKING:
    from latent_tool.engine.engine import Engine

__all__ = ["BatchRows", "Task", "Worker", "Workers", "here", "in_processes"]


class Task(NamedTuple):
    """A batch to answer.

    Args:
        start, stop: place of its first item, and of the one after its last.
        there: the answers that exist already, by item and method, with their candidates.
    """

    start: int
    stop: int
    there: dict[tuple[str, str], int]


# The rows that were missing in a batch, method by method.
BatchRows = list[tuple[str, list[Row]]]


class Worker:
    """Answers batches of one run with one engine."""

    def __init__(self, model: LatentReasoner | Engine, plan: Plan, items: Sequence[Item]) -> None:
        self.engine = model.engine() if isinstance(model, LatentReasoner) else model
        self.plan = plan
        self.items = items

    def answer(self, task: Task) -> Iterator[tuple[str, list[Row]]]:
        """Return the rows of a batch that are missing, method by method. Errors of questions are rows."""
        return answer_batch(self.engine, self.plan, self.items[task.start : task.stop], task.there)


# Who answers the batches: is given a function that makes a ``Worker`` in the process that calls it (both can be
# pickled) and the tasks; gives the rows of each, in their order, as they become known. Closing it ends the work.
Workers = Callable[[Callable[[], Worker], Sequence[Task]], Generator[BatchRows, None, None]]


def here(open_worker: Callable[[], Worker], tasks: Sequence[Task]) -> Generator[BatchRows, None, None]:
    """Answer in this process: every method is told as soon as it is through."""
    worker = open_worker()
    for task in tasks:
        for rows in worker.answer(task):
            yield [rows]


def in_processes(
    count: int, open_worker: Callable[[], Worker], tasks: Sequence[Task]
) -> Generator[BatchRows, None, None]:
    """Answer in other processes of this machine, each with one thread.

    Raises what opening a worker raises, and ``ServiceUnavailableError`` when a process is lost.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(count, len(tasks)), context, initializer=_begin, initargs=(open_worker,))
    try:
        yield from pool.map(_serve, tasks)
    except BrokenProcessPool:
        raise ServiceUnavailableError(
            "A process that answered questions has ended, perhaps for want of memory.",
            "The same call goes on with the run; take fewer processes, or a smaller batch.",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# How the worker of this process is opened. Its first task does so, for an error then reaches the caller with its type.
_open_worker: list[Callable[[], Worker]] = []
_opened: list[Worker] = []


def _begin(open_worker: Callable[[], Worker]) -> None:
    _open_worker.append(open_worker)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from latent_tool.engine.engine import use_threads

    use_threads(1)


def _end_with_parent() -> None:
    """A killed run leaves no process behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _serve(task: Task) -> BatchRows:
    if not _opened:
        _opened.append(_open_worker[0]())
    return list(_opened[0].answer(task))
