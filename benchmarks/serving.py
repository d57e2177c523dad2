"""What a served question costs: a real ``latent-tool serve``, asked by more and more clients at once.

    python benchmarks/serving.py --questions 48

Prints a table. Processor seconds are those of the server's process, which other work on the machine hardly changes;
questions a second and latencies are what the clients see on this machine at this moment.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from latent_tool import Budget, RemoteReasoner
from latent_tool.scenes import Scene, generate

BUDGETS = {
    "initial latents": Budget(iterations=0),
    "quick": Budget.level("quick"),
    "standard": Budget.level("standard"),
}
CLIENTS = (1, 8, 32)


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(reasoner: RemoteReasoner, scenes: list[Scene], clients: int, pid: int) -> tuple[float, float, float, float]:
    """Questions a second, the median and the 95th percentile of the latency, and processor seconds a question."""

    def ask(scene: Scene) -> float:
        began = time.monotonic()
        reasoner.invoke({"image": scene.image, "question": scene.questions[0].text})
        return time.monotonic() - began

    ask(scenes[0])
    began, used = time.monotonic(), processor_seconds(pid)
    with ThreadPoolExecutor(clients) as threads:
        latencies = sorted(threads.map(ask, scenes))
    seconds = time.monotonic() - began
    late = latencies[min(len(latencies) - 1, round(len(latencies) * 0.95))]
    return (
        len(scenes) / seconds,
        statistics.median(latencies),
        late,
        (processor_seconds(pid) - used) / len(scenes),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=48, help="for each row")
    parser.add_argument("--model", default="embedded", help="checkpoint directory or hub id")
    parser.add_argument("--threads", type=int, default=1, help="of the server's torch")
    arguments = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-m", "latent_tool.cli", "serve", "--port", "0", "--model", arguments.model],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "LATENT_TOOL_TOKEN": ""},
    )
    assert server.stderr is not None
    try:
        url = server.stderr.readline().strip().removeprefix("Listening at ")
        print(f"{arguments.questions} questions a row, {arguments.threads} thread(s), torch {torch.__version__}")
        print(f"load of the machine when it began: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors\n")
        print("| budget | clients | questions a second | median, s | 95 %, s | processor s a question |")
        print("|---|---|---|---|---|---|")
        rows = [(name, clients) for name in BUDGETS for clients in CLIENTS]
        for number, (name, clients) in enumerate(rows):
            first = 2_000_000 + number * arguments.questions  # every row has pictures of its own: none is remembered
            scenes = [generate(first + i) for i in range(arguments.questions)]
            reasoner = RemoteReasoner(url, budget=BUDGETS[name], timeout_s=600)
            row = measure(reasoner, scenes, clients, server.pid)
            print(f"| {name} | {clients} | {row[0]:.1f} | {row[1]:.3f} | {row[2]:.3f} | {row[3]:.3f} |", flush=True)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
