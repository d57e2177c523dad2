"""How many times as fast as the formula written out the kernels for attention over a shared prefix are.

    python benchmarks/prefix_attention.py [--write docs/measured/prefix-attention.md]

Queries are those of all rows of a step that share a key head: candidates times tokens times heads of a group. The sides
run in alternation, and figures are medians; on a CPU they are of one thread's processor time. The rule in
``latent_tool/models/prefix_attention.py`` rests on this page, and is not measured anew while questions are answered.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from latent_tool.files import write_whole
from latent_tool.models.prefix_attention import PrefixAttention, _cpu, _cpu_in_float32, attention_for

WRITTEN_OUT = "written out"
# Key heads and their width: of the embedded model, of a small one, and of one with 7 B parameters.
HEADS = ((6, 32), (2, 64), (4, 128))
PREFIXES = (128, 1024, 8192)
# A token of one row, one of four; a step of one, eight and 32 candidates of eight tokens with four heads to a key head.
QUERIES = (1, 4, 32, 256, 1024)
# Products of one side at most: with more, a step takes seconds on a CPU.
MOST = {"cpu": 300_000_000, "cuda": 40_000_000_000}


def kernels(device: torch.device, dtype: torch.dtype, width: int) -> dict[str, PrefixAttention]:
    """Return the ways of computing it that there are, the one that is chosen first."""
    chosen = attention_for(device, dtype, width, width)
    found = {f"**{chosen.way}**": chosen}
    if device.type == "cpu" and dtype != torch.float32:
        for name, kernel in (("fused kernel", _cpu), ("fused kernel in float32", _cpu_in_float32)):
            if name != chosen.way:
                found[name] = replace(chosen, kernel=kernel)
    return found


def milliseconds(
    sides: dict[str, Callable[[], object]], device: torch.device, repeats: int, at_once: int
) -> dict[str, float]:
    """Return the median time of every side; they alternate."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    taken: dict[str, list[float]] = {name: [] for name in sides}
    for work in sides.values():
        work()
    for _ in range(repeats):
        for name, work in sides.items():
            began = now()
            for _ in range(at_once):
                work()
            taken[name].append(1000 * (now() - began) / at_once)
    return {name: median(times) for name, times in taken.items()}


def rows(device: torch.device, dtype: torch.dtype, heads: int, width: int, repeats: int) -> Iterator[str]:
    """Measure every number of queries behind every prefix; a row of the table each."""
    ways = kernels(device, dtype, width)
    for prefix in PREFIXES:
        for count in QUERIES:
            products = heads * width * prefix * count
            if products > MOST[device.type]:
                continue
            generator = torch.Generator().manual_seed(0)
            query, key, value = (
                torch.randn(heads, length, width, generator=generator).to(device, dtype)
                for length in (count, prefix, prefix)
            )
            given = query, key, value, width**-0.5
            sides: dict[str, Callable[[], object]] = {name: partial(way, *given) for name, way in ways.items()}
            sides[WRITTEN_OUT] = partial(next(iter(ways.values())).written_out, *given)
            took = milliseconds(sides, device, repeats, max(1, min(20, 20_000_000 // products)))
            written = took.pop(WRITTEN_OUT)
            ratios = " | ".join(f"{written / each:.2f}" for each in took.values())
            yield f"| {prefix} | {count} | {written:.3g} | {ratios} |"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="where the page goes, too")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    machine = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"one thread of a CPU with {torch.backends.cpu.get_cpu_capability()}; other work was running"  # type: ignore[no-untyped-call]
    )
    lines = [
        "# Attention over a shared prefix\n",
        f"`python benchmarks/prefix_attention.py`: {machine}, torch {torch.__version__}, Python "
        f"{platform.python_version()}.\n",
        "Times as fast as the formula written out, which upcasts the whole prefix to float32 unless the device "
        "multiplies half precision into float32. The chosen way is in bold. *Queries*: per key head.\n",
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for heads, width in HEADS:
            names = kernels(device, dtype, width)
            lines += [
                f"## {str(dtype).removeprefix('torch.')}, {heads} key heads of width {width}\n",
                f"| prefix | queries | written out, ms | {' | '.join(names)} |",
                f"|---|---|---|{'---|' * len(names)}",
            ]
            for row in rows(device, dtype, heads, width, given.repeats):
                print(dtype, heads, width, row, flush=True)
                lines.append(row)
            lines.append("")
    print("\n".join(lines))
    if given.write is not None:
        write_whole(given.write, "\n".join(lines).encode())


if __name__ == "__main__":
    main()
