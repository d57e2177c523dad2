"""The table of methods and confidences on the embedded model, on questions that nothing was trained or tuned on.

    python benchmarks/evaluation.py --out out/evaluation --write docs/evaluation-results.md

Held-out scenes, hard scenes (one question each, seeds from 5,000,000) and easy-VQA's test split. A run goes on where it
was stopped. ``--tuning`` looks at seeds from 3,000,000 and easy-VQA's train split instead, for choosing settings.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from latent_tool import LatentReasoner
from latent_tool.evaluation import METHODS, evaluate, load_dataset
from latent_tool.evaluation.report import markdown_table, number, p_value, tables, with_interval
from latent_tool.files import write_whole

FIRST, FIRST_TUNING = 5_000_000, 3_000_000
# Methods of the main table; the samples without reasoning are the other way to give self-consistency its best.
NAMES = [*METHODS, "search:paper", "self-consistency:think=false"]


def sets(scale: float, tuning: bool) -> dict[str, tuple[str, int | None]]:
    """Title -> data set and how many of its questions (``None``: all)."""
    first = FIRST_TUNING if tuning else FIRST

    def seeds(number: int) -> str:
        return f"{first}-{first + max(20, round(number * scale)) - 1}"

    return {
        "held-out scenes": (f"scenes:held_out:{seeds(2000)}", None),
        "hard scenes": (f"scenes:hard:{seeds(1000)}", None),
        "easy-VQA": (f"easy-vqa:{'train' if tuning else 'test'}", max(20, round(1000 * scale))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--out", type=Path, default=Path("out/evaluation"))
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="where the tables go; by default to stdout")
    parser.add_argument("--methods", nargs="*", default=NAMES)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of questions")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tuning", action="store_true")
    given = parser.parse_args()
    summaries: dict[str, dict[str, Any]] = {}
    for title, (spec, limit) in sets(given.scale, given.tuning).items():
        items = load_dataset(spec, limit=limit)
        began, said = time.monotonic(), 0.0

        def progress(done: int, total: int, name: str, title: str = title, began: float = began) -> None:
            nonlocal said
            if time.monotonic() - said > 30:
                said = time.monotonic()
                print(f"{title}: {done} of {total} answers, {said - began:.0f} s, {name}", flush=True)

        folder = given.out / re.sub(r"\W+", "-", title)
        reasoner = LatentReasoner(model=given.model)
        run = evaluate(reasoner, items, given.methods, folder, name=spec, processes=given.processes, progress=progress)
        summaries[title] = json.loads((run.path / "summary.json").read_text())
    text = document(summaries, given.processes)
    if given.write is None:
        print(text)
    else:
        write_whole(given.write, text.encode())


def document(summaries: dict[str, dict[str, Any]], processes: int) -> str:
    """The tables of all data sets, and first what was aimed at."""
    model = next(iter(summaries.values()))["model"]
    parts = [
        "# Evaluation of the embedded model",
        "Written by `make evaluation`. None of these questions was used in training, calibration or tuning: "
        + "; ".join(f"{title}: {summary['dataset']['name']}" for title, summary in summaries.items())
        + f". Checkpoint {str(model.get('content', model['name']))[:12]}, {processes} processes of one thread; seconds "
        "depend on what else the machine does.",
        "## What was aimed at",
        markdown_table(["aim", "data", "found", "met"], list(aims(summaries))),
    ]
    for title, summary in summaries.items():
        parts.append(f"## {title[0].upper()}{title[1:]}")
        for name, header, rows, note in tables(summary):
            parts += [f"### {name}", markdown_table(header, rows), *([note] if note else [])]
    return "\n\n".join(parts) + "\n"


def aims(summaries: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Aims against figures, for the answer probability of greedy answers and of reasoning ones."""
    rows = []
    for title, wanted in (("held-out scenes", 0.90), ("hard scenes", 0.80)):
        methods = summaries[title]["methods"]
        for name in ("greedy", "reasoning", "search"):
            if name not in methods:
                continue
            scores = methods[name]["scores"]
            gated = scores["answer_probability"]
            area = gated["auroc"]["value"]
            rows.append(
                [
                    f"AUROC of the answer probability, {name}: at least {wanted:.2f}",
                    title,
                    with_interval(gated["auroc"]),
                    "-" if area is None else "yes" if area >= wanted else "no",
                ]
            )
            others = {key: value["auroc"]["value"] or 0.0 for key, value in scores.items()}
            best = max(others, key=lambda key: others[key])
            rows.append(
                [
                    f"no score ranks better, {name}",
                    title,
                    f"best: {best}, {number(others[best])}",
                    "yes" if best == "answer_probability" else "no",
                ]
            )
            excess = max(0.0, gated["ece"] - gated["ece_floor"])
            rows.append(
                [
                    f"ECE above its noise floor, {name}, not calibrated: at most 0.03",
                    title,
                    number(excess),
                    "yes" if excess <= 0.03 else "no",
                ]
            )
        if {"reasoning", "self-consistency"} <= set(methods):
            cost, other = (methods[name]["cost"]["seconds"] for name in ("reasoning", "self-consistency"))
            rows.append(
                [
                    "seconds of reasoning answers: at most half of self-consistency",
                    title,
                    f"{cost:.3f} s, {other:.3f} s",
                    "yes" if cost <= other / 2 else "no",
                ]
            )
        if "search" in methods:
            paired = methods["search"]["paired"]
            rows.append(
                [
                    "the search answers better than greedy",
                    title,
                    f"{with_interval(paired['gain'])}, p {p_value(paired['p'])}",
                    "yes" if paired["gain"]["low"] > 0 and paired["p"] < 0.05 else "no",
                ]
            )
    return rows


if __name__ == "__main__":
    main()
