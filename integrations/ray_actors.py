"""An evaluation on a Ray cluster: actors with one engine each answer its batches.

    evaluate(LatentReasoner(), items, ["greedy", "search"], "out", workers=actors(8, num_gpus=1))

The folder is written by ``latent_tool.evaluation``, where this was called, as if the questions had been answered there:
a run that was stopped goes on, on a cluster or without one. An actor gets its next batch when it is through with the
last one. A batch whose actor is lost goes to another, though not without end, as it would in Ray Data's pool of actors:
it may be the batch that ends them. This module knows nothing of methods, scores and files.
"""

from __future__ import annotations

import platform
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from importlib.metadata import version
from typing import Any

from latent_tool.errors import (
    DatasetError,
    LatentToolError,
    MissingExtraError,
    ServiceError,
    ServiceUnavailableError,
    SettingsError,
)
from latent_tool.evaluation.workers import BatchRows, Task, Worker, Workers
from latent_tool.integrations.ray_connection import connect, last_line

try:
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError, RayError
except ImportError as error:
    raise MissingExtraError("Ray", "ray") from error

__all__ = ["actors"]

# How many actors may be lost over one batch, or one after another while they load the model.
LOST_AT_MOST = 3
_GO_ON = "The same call goes on with the run."


def actors(count: int = 1, *, num_cpus: float = 1.0, num_gpus: float = 0.0) -> Workers:
    """Actors on a Ray cluster, for the ``workers`` of ``latent_tool.evaluation.evaluate``.

    The cluster is the one this program is connected to; otherwise that of ``RAY_ADDRESS``, or this machine alone. Its
    nodes need the same version of this package, the model and, at the same paths, the images.

    Args:
        count: actors at most. Where the cluster has room for fewer, those do the work, and others join when there is.
        num_cpus: processors of an actor, and so its threads.
        num_gpus: GPUs of an actor; a fraction lets several share one.

    Raises ``SettingsError`` for numbers out of their range. At work: ``SettingsError`` when this machine, being the
    cluster, has no room for an actor, or a node has another version; ``DatasetError`` when a node has not got an image;
    what loading the model raises; ``ServiceUnavailableError`` when actors are lost again and again, and
    ``ServiceError`` for other errors of the cluster.
    """
    if count < 1 or num_cpus < 0 or num_gpus < 0:
        raise SettingsError("There is no actor, or it takes less than nothing.", "Use one actor or more.")

    def answer(open_worker: Callable[[], Worker], tasks: Sequence[Task]) -> Generator[BatchRows, None, None]:
        try:
            connect({"CPU": num_cpus, "GPU": num_gpus})
            pool = _Pool(count, num_cpus, num_gpus, open_worker)
            try:
                yield from _in_order(pool, tasks)
            finally:
                pool.end()
        except RayError as error:
            raise ServiceError(f"Ray failed: {last_line(error)}", _GO_ON) from error

    return answer


class _Actor:
    """One process with one engine. Errors of this package are returned: raised, they would lose their type."""

    def load(self, open_worker: Callable[[], Worker], wanted: str) -> LatentToolError | None:
        if version("latent-tool") != wanted:
            return SettingsError(
                f"The node {platform.node()} has latent-tool {version('latent-tool')}, and not {wanted}.",
                "Install the same version everywhere.",
            )
        try:
            self.worker = open_worker()
        except LatentToolError as error:
            return error
        return None

    def answer(self, task: Task) -> BatchRows | LatentToolError:
        try:
            found = list(self.worker.answer(task))
            _require_images(found)
        except LatentToolError as error:
            return error
        return found


def _require_images(found: BatchRows) -> None:
    """Where the run was started the images were there: one that is missing is no fact about its question."""
    for _, rows in found:
        for row in rows:
            if row.error is not None and row.error.type == "ImageNotFoundError":
                raise DatasetError(
                    f"The node {platform.node()} has not got the image of {row.id!r}: {row.error.message}",
                    "Put the data set into a folder that every node has at the same path.",
                )


class _Pool:
    """Actors that come and go, and what each is doing: loading the model (``None``) or the batch of a number."""

    def __init__(self, count: int, num_cpus: float, num_gpus: float, open_worker: Callable[[], Worker]) -> None:
        self.count = count
        self.make = ray.remote(_Actor).options(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=0,
            # Threads that spin make a small model many times slower on a busy machine.
            runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
        )
        self.open_worker = ray.put(open_worker)
        self.doing: dict[Any, tuple[Any, int | None]] = {}

    def grow(self, batches: int) -> None:
        """Have as many actors as there are batches, within the count; one without room loads when there is some."""
        while len(self.doing) < min(self.count, batches):
            actor = self.make.remote()
            self.doing[actor.load.remote(self.open_worker, version("latent-tool"))] = (actor, None)

    def give(self, actor: Any, place: int, task: Task) -> None:
        self.doing[actor.answer.remote(task)] = (actor, place)

    def next(self) -> tuple[Any, int | None, Any]:
        """Return an actor that is through with something, what it was, and what came of it; ``_LOST`` if the actor
        died.
        """
        (ready,), _ = ray.wait(list(self.doing), num_returns=1)
        actor, place = self.doing.pop(ready)
        try:
            return actor, place, ray.get(ready)
        except (RayActorError, OutOfMemoryError):
            ray.kill(actor)
            return actor, place, _LOST

    def end(self) -> None:
        for actor, _ in self.doing.values():
            ray.kill(actor)
        self.doing.clear()


_LOST = object()


def _in_order(pool: _Pool, tasks: Sequence[Task]) -> Generator[BatchRows, None, None]:
    """What was found for each task, in their order; what is early waits."""
    waiting = deque(range(len(tasks)))
    early: dict[int, BatchRows] = {}
    lost: Counter[int | None] = Counter()
    given = 0  # the first that was not given back yet
    while given < len(tasks):
        pool.grow(len(tasks) - given - len(early))
        actor, place, found = pool.next()
        if found is _LOST:
            lost[place] += 1
            if lost[place] > LOST_AT_MOST:
                doing = (
                    "loading the model" if place is None else f"questions {tasks[place][0] + 1} to {tasks[place][1]}"
                )
                raise ServiceUnavailableError(
                    f"{lost[place]} actors were lost while {doing} was their work.",
                    f"Look at their memory in the logs of Ray. {_GO_ON}",
                )
            if place is not None:
                waiting.appendleft(place)
            continue
        if isinstance(found, LatentToolError):
            raise found
        if place is None:
            lost[None] = 0
        else:
            early[place] = found
        if waiting:
            pool.give(actor, waiting[0], tasks[waiting.popleft()])
        else:
            ray.kill(actor)  # others may have its place
        while given in early:
            yield early.pop(given)
            given += 1
