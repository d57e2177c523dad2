"""Prints what becomes of every hostile image of the tests: case, bytes, expected, observed, seconds, peak memory.

    python benchmarks/hostile_images.py > table.md

Each case is decoded in a process of its own, so that the peak is its own. The summary goes to the standard error.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def attempt(data: bytes, answer: Connection) -> None:
    """What becomes of ``data``, processor seconds, and MB of memory beyond what was used before."""
    from latent_tool.errors import ImageError
    from latent_tool.images import load_image
    from latent_tool.settings import ImagePolicy

    before = resource.getrusage(resource.RUSAGE_SELF)
    try:
        width, height = load_image(data, ImagePolicy.untrusted()).image.size
        seen = f"image {width}x{height}"
    except ImageError as error:
        seen = type(error).__name__
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    answer.send((seen, seconds, (after.ru_maxrss - before.ru_maxrss) / 1024))


def main() -> int:
    from hostile_images import cases, originals

    from latent_tool.images import load_image
    from latent_tool.settings import ImagePolicy

    load_image(originals()["png-rgb"], ImagePolicy.untrusted())  # what is imported now need not be in every process
    fork = multiprocessing.get_context("fork")
    print("| case | bytes | expected | observed | CPU seconds | MB more |\n|---|---|---|---|---|---|")
    slowest, largest, wrong, table = 0.0, 0.0, 0, cases()
    for name, (data, must_fail) in table.items():
        here, there = fork.Pipe()
        process = fork.Process(target=attempt, args=(data, there))
        process.start()
        there.close()
        try:
            seen, seconds, more = here.recv() if here.poll(120) else ("hang", 0.0, 0.0)
        except EOFError:
            seen, seconds, more = "crash", 0.0, 0.0
        process.kill()
        process.join()
        wrong += seen in ("crash", "hang") or (must_fail and not seen.endswith("Error"))
        slowest, largest = max(slowest, seconds), max(largest, more)
        expected = "error" if must_fail else "image or error"
        print(f"| {name} | {len(data)} | {expected} | {seen} | {seconds:.2f} | {more:.0f} |")
    summary = f"{len(table)} cases, {wrong} wrong; slowest {slowest:.2f} s, largest {largest:.0f} MB more than before"
    print(summary, file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
