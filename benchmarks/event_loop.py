"""How long an asyncio server's event loop stands still while 32 questions are answered and a third are cancelled.

    python benchmarks/event_loop.py

Prints one line of JSON. A task wakes every millisecond; the longest time between two wakings, less that millisecond,
is the longest stall. The same is measured while the loop is idle, for comparison.
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


async def measure() -> dict[str, Any]:
    reasoner = LatentReasoner(budget={"iterations": 2, "max_patches": 4})
    request = {"image": PICTURE, "question": "what color is the circle?"}
    await reasoner.ainvoke(request)  # load the model before anything is measured
    await reasoner.ainvoke(request)
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
        "cancelled": sum(isinstance(answer, asyncio.CancelledError) for answer in answers),
        "seconds": round(seconds, 2),
        "longest_stall_ms": round(1000 * await watching, 1),
        "longest_stall_idle_ms": round(1000 * idle, 1),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure())))
