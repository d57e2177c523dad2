"""32 questions at once: how much faster than one by one, how fair, and how long the event loop stands still.

    python benchmarks/event_loop.py

Prints one line of JSON. First all are answered, one by one and then at the same time (in wall time, and in processor
time, which a busy machine does not disturb); ``spread`` is by how many places a question was answered earlier or later
than it was asked. Then a third of them are cancelled while a task wakes every millisecond: the longest time between two
wakings, less that millisecond, is the longest stall. The same is measured while the loop is idle, for comparison.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

from latent_tool import LatentReasoner

PICTURE = Path(__file__).parents[1] / "examples" / "images" / "shapes.png"
QUESTIONS = 32
TICK_S = 0.001


async def longest_stall(until: asyncio.Event) -> float:
    """Longest delay of a tick, in seconds."""
    longest = 0.0
    while not until.is_set():
        before = time.perf_counter()
        await asyncio.sleep(TICK_S)
        longest = max(longest, time.perf_counter() - before - TICK_S)
    return longest


async def idle_stall(seconds: float) -> float:
    """The longest stall of a loop that has nothing to do."""
    done = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, done.set)
    return await longest_stall(done)


async def cancel_later(task: asyncio.Task[Any], seconds: float) -> None:
    await asyncio.sleep(seconds)
    task.cancel()


async def throughput(reasoner: LatentReasoner, request: dict[str, Any]) -> dict[str, Any]:
    """One by one against all at the same time; and in which order the latter were answered."""
    requests = [{**request, "seed": i} for i in range(QUESTIONS)]
    wall, cpu = time.perf_counter(), time.process_time()
    alone = [await reasoner.ainvoke(each) for each in requests]
    one_by_one = (time.perf_counter() - wall, time.process_time() - cpu)
    order: list[int] = []

    async def ask(index: int) -> Any:
        answer = await reasoner.ainvoke(requests[index])
        order.append(index)
        return answer

    wall, cpu = time.perf_counter(), time.process_time()
    together = await asyncio.gather(*map(ask, range(QUESTIONS)))
    at_once = (time.perf_counter() - wall, time.process_time() - cpu)
    return {
        "one_by_one_s": round(one_by_one[0], 2),
        "at_once_s": round(at_once[0], 2),
        "speedup": round(one_by_one[0] / at_once[0], 2),
        "speedup_cpu": round(one_by_one[1] / at_once[1], 2),
        "answers_that_differ": sum(a.answer != b.answer for a, b in zip(alone, together, strict=True)),
        "spread": max(abs(place - index) for place, index in enumerate(order)),
    }


async def measure() -> dict[str, Any]:
    reasoner = LatentReasoner(budget={"iterations": 2, "max_patches": 4})
    request = {"image": PICTURE, "question": "what color is the circle?"}
    await reasoner.ainvoke(request)  # load the model before anything is measured
    await reasoner.ainvoke(request)
    fused = await throughput(reasoner, request)
    idle = await idle_stall(2.0)

    rng = random.Random(0)
    done = asyncio.Event()
    watching = asyncio.create_task(longest_stall(done))
    began = time.perf_counter()
    tasks = [asyncio.create_task(reasoner.ainvoke({**request, "seed": i})) for i in range(QUESTIONS)]
    doomed = rng.sample(range(QUESTIONS), QUESTIONS // 3)
    cancelling = [asyncio.create_task(cancel_later(tasks[i], rng.uniform(0.0, 3.0))) for i in doomed]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    seconds = time.perf_counter() - began
    await asyncio.gather(*cancelling)
    done.set()
    return {
        "questions": QUESTIONS,
        **fused,
        "cancelled": sum(isinstance(answer, asyncio.CancelledError) for answer in answers),
        "seconds": round(seconds, 2),
        "longest_stall_ms": round(1000 * await watching, 1),
        "longest_stall_idle_ms": round(1000 * idle, 1),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure())))
