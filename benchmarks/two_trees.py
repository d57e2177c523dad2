"""Compare the speed of two states of this project: the same questions, asked of both in alternation.

    git worktree add ../before COMMIT
    python benchmarks/two_trees.py ../before . [--model FOLDER] [--turns 20]

Each tree runs in a process of its own, with one thread, and is asked the same by the same model; settings that one tree
does not know are what that tree does anyway. Figures are processor time; a ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

FIRST_SEED = 3_200_000
PICTURES = 32


def works(model: str, side: int) -> dict[str, Callable[[int], list[str]]]:
    """Return what is asked, each by a name; the number says which pictures."""
    from latent_tool import Budget, LatentReasoner, SearchSettings
    from latent_tool.scenes import generate
    from latent_tool.settings import GenerationSettings

    scenes = [generate(FIRST_SEED + number, "held_out") for number in range(PICTURES)]
    pictures = [scene.image.resize((side, side)) if side else scene.image for scene in scenes]

    def known(owner: Any, **values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name in owner.model_fields}

    def reasoner(rounds: int, tokens: int = 16, least: int | None = None, **settings: Any) -> LatentReasoner:
        # Both trees make every round with the same rows: nothing ends early, no window, no refusal is remembered.
        settings = known(SearchSettings, view_depth=0, search_below=None) | settings
        limits = known(Budget, max_views=0, target_confidence=None)
        return LatentReasoner(
            model=model,
            device="cpu",
            dtype="float32",
            settings=SearchSettings.paper() if settings.pop("paper", False) else SearchSettings(**settings),
            budget=Budget(iterations=rounds, max_new_tokens=tokens, **limits),
            generation=GenerationSettings(min_new_tokens=least),
            **known(LatentReasoner, compile=False, check_domain=False),
        )

    def ask(reasoner: LatentReasoner, number: int, count: int = 1) -> list[str]:
        reasoner.engine().vlm.prefix_cache.clear()  # every question pays for its own picture
        places = [(number + place) % PICTURES for place in range(count)]
        requests = [{"images": [pictures[place]], "question": scenes[place].questions[0].text} for place in places]
        return [result.answer for result in reasoner.batch(requests)]

    plain, thinking = reasoner(0, latents=0), reasoner(0)
    searching, paper = reasoner(5, proposals="top"), reasoner(5, paper=True)
    long = reasoner(1, 64, 64, proposals="top")
    return {
        "a plain answer": lambda number: ask(plain, number),
        "reasoning": lambda number: ask(thinking, number),
        "a search of 5 rounds": lambda number: ask(searching, number),
        "`paper()`, 5 rounds": lambda number: ask(paper, number),
        "64 tokens decoded": lambda number: ask(long, number),
        "8 questions together": lambda number: ask(searching, number, 8),
    }


def serve(tree: str, model: str, side: int) -> None:
    """Answer lines of [name, number] by lines of [seconds, answers]."""
    sys.path.insert(0, tree)
    import torch

    import latent_tool

    assert Path(latent_tool.__file__).is_relative_to(tree), latent_tool.__file__
    torch.set_num_threads(1)
    out, sys.stdout = sys.stdout, sys.stderr
    named = works(model, side)
    print(json.dumps(list(named)), file=out, flush=True)
    for line in sys.stdin:
        name, number = json.loads(line)
        began = time.process_time()
        answers = named[name](number)
        print(json.dumps([time.process_time() - began, answers]), file=out, flush=True)


class Tree:
    """One state of the project in a process of its own."""

    def __init__(self, folder: Path, model: str, side: int) -> None:
        command = [sys.executable, __file__, "--serve", str(folder.resolve()), "--model", model, "--side", str(side)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        self.names: list[str] = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("A tree has ended; what it said stands above.")
        return json.loads(line)

    def ask(self, name: str, number: int) -> tuple[float, list[str]]:
        """Return seconds of processor and the answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, number]) + "\n")
        self._process.stdin.flush()
        seconds, answers = self._read()
        return seconds, answers

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def compare(before: Tree, now: Tree, turns: int) -> list[str]:
    """Return the rows of a Markdown table; the first turn does not count."""
    rows = ["| what | before, ms | now, ms | now / before | the same answers |", "|---|---|---|---|---|"]
    for name in before.names:
        pairs: list[tuple[float, float]] = []
        same = 0
        for turn in range(turns + 1):
            order = (before, now) if turn % 2 else (now, before)
            said = {tree: tree.ask(name, turn) for tree in order}
            if turn:
                pairs.append((said[before][0], said[now][0]))
                same += said[before][1] == said[now][1]
        first, second = (median(times) * 1000 for times in zip(*pairs, strict=True))
        ratio = median(now / before for before, now in pairs)
        rows.append(f"| {name} | {first:.1f} | {second:.1f} | {ratio:.3f} | {same} of {turns} |")
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("now", type=Path, nargs="?", default=Path())
    parser.add_argument("--model", help="a folder that both can load; without it the embedded model of BEFORE")
    parser.add_argument("--side", type=int, default=0, help="of the pictures, in pixels; 0: as they are")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve, asked.model, asked.side)
        return
    if asked.before is None:
        parser.error("name the two trees")
    model = asked.model or str((asked.before / "latent_tool/models/embedded").resolve())
    trees: list[Tree] = []
    try:
        trees += [Tree(asked.before, model, asked.side)]
        trees += [Tree(asked.now, model, asked.side)]
        print("\n".join(compare(trees[0], trees[1], asked.turns)))
    finally:
        for tree in trees:
            tree.close()


if __name__ == "__main__":
    main()
