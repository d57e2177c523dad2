"""Thousands of mixed requests at once: is any lost, swapped or wrong, and does anything grow?

    MALLOC_ARENA_MAX=2 python benchmarks/soak.py --requests 10000

Valid, invalid, cancelled and deadline-cut requests go to the embedded model from threads and from asyncio, through
every way of asking. Prints one line of JSON; exit code 1 if anything was lost, swapped, crashed or leaked, or the
resident memory grew by 3 % or more after warming up (on Linux).

Memory is measured after glibc has given back what is free; ``memory_growth_with_free`` also counts the free pages that
its allocator keeps. Without MALLOC_ARENA_MAX glibc opens an arena for every few threads, whose holes make some more per
cent while the number of objects stays the same.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from latent_tool import LatentReasoner, ReasoningResult
from latent_tool.errors import CancelledError, DeadlineError, InputError
from latent_tool.langchain.reasoner import OPTIONS_KEY
from latent_tool.schema import ReasoningStep
from latent_tool.settings import Budget, SearchSettings

QUESTIONS = ("what color is the circle?", "how many shapes are there?", "what is right of the circle?")
BUDGET = Budget(iterations=1, max_patches=3, max_new_tokens=8)
SETTINGS = SearchSettings(latents=2, samples=4, patches_per_latent=2)
INVALID: tuple[dict[str, Any], ...] = (
    {"question": "  "},
    {"image": "no-such-file.png"},
    {"image": b"no image"},
    {"budget": "huge"},
    {"seed": -1},
    {"question": "why? " * 30_000},
    {"question": "why? " * 3_000},
    {"colour": "red"},
)
SHARES = {"valid": 60, "invalid": 15, "cancelled": 15, "deadline": 10}
WAYS = ("ainvoke", "astream", "abatch", "invoke", "stream", "batch")
CLIENTS = {"asyncio": 24, "threads": 4}


@dataclass(frozen=True)
class Case:
    """One request: its number, what kind it is, how it is asked, which question it is, and when it is given up."""

    number: int
    kind: str
    way: str
    twin: int
    delay: float


@dataclass
class Tally:
    """What came of the requests."""

    verdicts: dict[int, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    problems: list[str] = field(default_factory=list)

    def note(self, case: Case, verdict: str) -> None:
        with self.lock:
            if case.number in self.verdicts:
                self.problems.append(f"{case}: a second verdict, {verdict}")
            self.verdicts[case.number] = verdict
            if verdict.startswith(("swapped", "crashed")):
                self.problems.append(f"{case}: {verdict}")


def pictures() -> list[Image.Image]:
    """Pictures that can be told apart by their size."""
    found = []
    for index in range(6):
        picture = Image.new("RGB", (160 + index, 120), (250, 250, 250))
        draw = ImageDraw.Draw(picture)
        draw.ellipse((15, 35, 65, 85), fill=((220, 25, 25), (25, 150, 40), (30, 60, 200))[index % 3])
        draw.rectangle((95, 35, 145, 85), fill=((30, 60, 200), (220, 25, 25))[index % 2])
        found.append(picture)
    return found


class Soak:
    """The same reasoner asked from everywhere; the answers of ``TWINS`` questions are known from asking one by one."""

    TWINS = 18

    def __init__(self) -> None:
        self.reasoner = LatentReasoner(budget=BUDGET, settings=SETTINGS)
        self.pictures = pictures()
        self.expected = [self.reasoner.invoke(self.request(twin)) for twin in range(self.TWINS)]

    def request(self, twin: int) -> dict[str, Any]:
        return {"image": self.pictures[twin % 6], "question": QUESTIONS[twin // 6], "seed": twin}

    def cases(self, first: int, count: int, seed: int) -> list[Case]:
        rng = random.Random(seed)
        kinds, weights = zip(*SHARES.items(), strict=True)
        return [
            Case(
                number,
                rng.choices(kinds, weights)[0],
                rng.choice(WAYS),
                rng.randrange(self.TWINS),
                rng.choice((0.0, 0.002, 0.01, 0.05)),
            )
            for number in range(first, first + count)
        ]

    def asked(self, case: Case, stop: threading.Event) -> tuple[dict[str, Any], dict[str, Any]]:
        """Request and config of a case."""
        request, options = self.request(case.twin), dict[str, Any]()
        if case.kind == "invalid":
            request |= INVALID[case.number % len(INVALID)]
        elif case.kind == "cancelled":
            request["budget"] = BUDGET.but(iterations=10_000)
            options["cancelled"] = stop
        elif case.kind == "deadline":
            request["budget"] = BUDGET.but(
                iterations=10_000,
                target_confidence=None,  # a sure answer would need no search
                max_views=0,
                deadline_s=(1e-9, 0.02, 0.05)[case.number % 3],
            )
        return request, {"configurable": {OPTIONS_KEY: options}}

    def judge(self, case: Case, found: Any) -> str:
        """What came back, in a word; ``swapped`` and ``crashed`` are the bad ones."""
        expected = self.expected[case.twin]
        if isinstance(found, ReasoningResult):
            if case.kind in ("invalid", "cancelled"):
                return "crashed: answered what cannot be"
            if (found.seed, found.image_sizes) != (expected.seed, expected.image_sizes):
                return "swapped"
            if case.kind == "deadline":
                return (
                    "cut" if found.stop_reason == "deadline" or found.finish_reason == "deadline" else "crashed: uncut"
                )
            near = abs((found.scores.reward or 0) - (expected.scores.reward or 0)) < 1e-4
            same = (found.answer, [p.cell for p in found.patches]) == (
                expected.answer,
                [p.cell for p in expected.patches],
            )
            return "equal" if same and near else "near-tie"
        wanted: dict[str, tuple[type[BaseException], ...]] = {
            "invalid": (InputError,),
            "cancelled": (CancelledError, asyncio.CancelledError),
            "deadline": (DeadlineError,),
        }
        if isinstance(found, wanted.get(case.kind, ())):
            return case.kind
        return f"crashed: {type(found).__name__}: {found}"[:300]

    # ------------------------------------------------------------------ one request

    def ask_from_thread(self, case: Case) -> Any:
        stop = threading.Event()
        request, config = self.asked(case, stop)
        timer = threading.Timer(case.delay, stop.set)
        timer.start()
        try:
            if case.way == "batch":
                return self.reasoner.batch([request], config, return_exceptions=True)[0]
            if case.way == "stream":
                return [each for each in self.reasoner.stream(request, config) if not isinstance(each, ReasoningStep)][
                    -1
                ]
            return self.reasoner.invoke(request, config)
        except Exception as error:
            return error
        finally:
            timer.cancel()
            timer.join()

    async def ask_from_loop(self, case: Case) -> Any:
        request, config = self.asked(case, threading.Event())
        task = asyncio.create_task(self._ask(case.way, request, config))
        if case.kind == "cancelled":
            await asyncio.sleep(case.delay)
            task.cancel()
        (found,) = await asyncio.gather(task, return_exceptions=True)
        return found

    async def _ask(self, way: str, request: dict[str, Any], config: Any) -> Any:
        if way == "abatch":
            return (await self.reasoner.abatch([request], config, return_exceptions=True))[0]
        if way == "astream":
            return [each async for each in self.reasoner.astream(request, config)][-1]
        return await self.reasoner.ainvoke(request, config)

    # ------------------------------------------------------------------ all of them

    def run(self, cases: list[Case], tally: Tally) -> None:
        """Ask everything, from threads and from a loop at the same time."""
        from_threads = iter([case for case in cases if not case.way.startswith("a")])
        from_loop = iter([case for case in cases if case.way.startswith("a")])
        lock = threading.Lock()

        def take(rest: Iterator[Case]) -> Case | None:
            with lock:
                return next(rest, None)

        def thread() -> None:
            while (case := take(from_threads)) is not None:
                tally.note(case, self.judge(case, self.ask_from_thread(case)))

        async def client() -> None:
            while (case := take(from_loop)) is not None:
                tally.note(case, self.judge(case, await self.ask_from_loop(case)))

        async def loop() -> None:
            await asyncio.gather(*(client() for _ in range(CLIENTS["asyncio"])))

        with ThreadPoolExecutor(CLIENTS["threads"]) as pool:
            waiting = [pool.submit(thread) for _ in range(CLIENTS["threads"])]
            asyncio.run(loop())
            for each in waiting:
                each.result()

    def settle(self) -> None:
        """Wait until nobody works any more."""
        from latent_tool.engine.scheduler import get_scheduler

        get_scheduler(self.reasoner.engine()).close()
        gc.collect()


def resident_bytes() -> int | None:
    """Resident memory of this process, where the system tells."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def give_back_free_memory() -> None:
    """Let glibc return the pages that nothing lives on; elsewhere nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def open_files() -> int | None:
    """Open files and sockets of this process, where the system tells."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


def soak(requests: int, warm_up: int, seed: int = 0) -> dict[str, Any]:
    """Warm up with some requests, ask the rest, and say what came of them and what grew."""
    work, tally = Soak(), Tally()
    work.run(work.cases(0, warm_up, seed), tally)
    work.settle()
    with_free = resident_bytes()
    give_back_free_memory()
    memory, files, threads, objects = resident_bytes(), open_files(), threading.active_count(), len(gc.get_objects())
    began = time.perf_counter()
    work.run(work.cases(warm_up, requests - warm_up, seed + 1), tally)
    work.settle()
    seconds = time.perf_counter() - began
    after_with_free, objects_after = resident_bytes(), len(gc.get_objects())
    give_back_free_memory()
    after, counts = resident_bytes(), Counter(verdict.partition(":")[0] for verdict in tally.verdicts.values())
    return {
        "requests": requests,
        "verdicts": dict(counts),
        "lost": requests - len(tally.verdicts),
        "swapped": counts["swapped"],
        "crashed": counts["crashed"],
        "memory_mb": None if after is None else round(after / 1e6, 1),
        "memory_growth": _growth(memory, after),
        "memory_growth_with_free": _growth(with_free, after_with_free),
        "objects_growth": _growth(objects, objects_after),
        "threads_left": threading.active_count() - threads,
        "files_left": 0 if files is None else (open_files() or 0) - files,
        "seconds": round(seconds, 1),
        "problems": tally.problems[:10],
    }


def _growth(before: int | None, after: int | None) -> float | None:
    return None if before is None or after is None else round(after / before - 1, 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = soak(options.requests, min(max(500, options.requests // 10), options.requests // 2), options.seed)
    print(json.dumps(found))
    bad = found["problems"] or found["lost"] or found["threads_left"] or found["files_left"] > 0
    return int(bool(bad) or (found["memory_growth"] or 0) >= 0.03)


if __name__ == "__main__":
    sys.exit(main())
