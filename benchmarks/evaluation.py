"""The table of methods and confidences on the embedded model, on questions that nothing was trained or tuned on.

    python benchmarks/evaluation.py --out out/evaluation --write docs/measured/evaluation.md

Held-out scenes, hard scenes (one question each, seeds from 5,000,000) and easy-VQA's test split. A run goes on where it
was stopped. ``--tuning`` looks at seeds from 3,000,000 and easy-VQA's train split instead, for choosing settings.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_tool import LatentReasoner
from latent_tool.calibration.calibration import Calibration
from latent_tool.evaluation import Run, evaluate, load_dataset, summarise
from latent_tool.evaluation.report import markdown_table, number, p_value, tables, with_interval
from latent_tool.files import write_whole
from latent_tool.statistics import accuracy_interval, ece, ece_noise_floor

FIRST, FIRST_TUNING = 5_000_000, 3_000_000
METHODS = ["greedy", "reasoning", "search", "random-latents", "self-consistency"]
# Asked after those, and not on easy-VQA, where nearly every answer of every method is right.
FURTHER = ["search-no-patches", "patches-no-search", "random-draw"]
ONLY_METHODS = "easy-VQA"
PROMISED = "held-out scenes"  # where the questions are drawn like those of the shipped calibration


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
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--further", nargs="*", default=FURTHER, help="methods asked last, and not on easy-VQA")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of questions")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tuning", action="store_true")
    given = parser.parse_args()
    runs: dict[str, Run] = {}
    for further in (False, True):
        for title, (spec, limit) in sets(given.scale, given.tuning).items():
            names = [*given.methods, *(given.further if further and title != ONLY_METHODS else [])]
            if not further or names != given.methods:
                runs[title] = answer(given, title, spec, limit, names)
    text = document(runs, given.processes)
    if given.write is None:
        print(text)
    else:
        write_whole(given.write, text.encode())


def answer(given: argparse.Namespace, title: str, spec: str, limit: int | None, names: list[str]) -> Run:
    """The run of one data set, begun or gone on with."""
    items = load_dataset(spec, limit=limit)
    began, said = time.monotonic(), 0.0

    def progress(done: int, total: int, name: str) -> None:
        nonlocal said
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"{title}: {done} of {total} answers, {said - began:.0f} s, {name}", flush=True)

    folder = given.out / re.sub(r"\W+", "-", title)
    reasoner = LatentReasoner(model=given.model)
    return evaluate(reasoner, items, names, folder, name=spec, processes=given.processes, progress=progress)


def document(runs: Mapping[str, Run], processes: int, calibration: Calibration | None = None) -> str:
    """The tables of all data sets, and first what was aimed at and what the shipped calibration is worth."""
    summaries = {title: summarise(run) for title, run in runs.items()}
    model = next(iter(summaries.values()))["model"]
    parts = [
        "# Evaluation of the embedded model",
        "Written by `make evaluation`. None of these questions was used in training, calibration or tuning: "
        + "; ".join(f"{title}: {summary['dataset']['name']}" for title, summary in summaries.items())
        + f". Checkpoint {str(model.get('content', model['name']))[:12]}, {processes} processes of one thread; seconds "
        "depend on what else the machine does, and the further methods were asked later than the others: for those, "
        "compare the decoder calls.",
        *(lacking(title, runs[title]) for title in runs if not runs[title].complete),
        "## What was aimed at",
        "The gated confidence is the pooled probability, of greedy answers the answer probability. *No score ranks "
        "better* compares AUROCs as they are; most of their intervals overlap.",
        markdown_table(["aim", "data", "found", "met"], aims(summaries)),
        "## The shipped calibration on these questions",
        *shipped(runs, calibration or Calibration.load("embedded")),
    ]
    for title, summary in summaries.items():
        parts.append(f"## {title[0].upper()}{title[1:]}")
        for name, header, rows, note in tables(summary):
            parts += [f"### {name}", markdown_table(header, rows), *([note] if note else [])]
    return "\n\n".join(parts) + "\n"


def lacking(title: str, run: Run) -> str:
    """Says that a run is not complete, and of which methods."""
    size = run.manifest.dataset.size
    short = [f"{name} {len(run.of(name))}" for name in run.methods if len(run.of(name)) < size]
    return f"**{title} is not complete**: of {size} questions have an answer: {', '.join(short)}."


def aims(summaries: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Aims against figures; those that the runs have nothing to say about are left out."""
    rows = []
    for title, wanted in (("held-out scenes", 0.90), ("hard scenes", 0.80)):
        methods = summaries[title]["methods"] if title in summaries else {}
        for name in ("greedy", "reasoning", "search"):
            scores = methods.get(name, {}).get("scores", {})
            gates = ["answer_probability"] if name == "greedy" else ["pooled_probability", "answer_probability"]
            for gated in gates:
                if gated in scores:
                    rows += aims_of(title, name, gated, scores, wanted, gated == gates[0])
        if {"reasoning", "self-consistency"} <= set(methods):
            cost, other = (methods[name]["cost"]["seconds"] for name in ("reasoning", "self-consistency"))
            if cost is not None and other is not None:
                aim = "seconds of reasoning answers: at most half of self-consistency"
                rows.append([aim, title, f"{cost:.3f} s, {other:.3f} s", met(cost <= other / 2)])
        for pair in summaries[title]["pairs"] if title in summaries else []:
            if pair["method"] == "search" and pair["against"] in ("greedy", "reasoning", "random-latents"):
                found = f"{with_interval(pair['gain'])}, p {p_value(pair['p'])}, {pair['n']} questions"
                better = pair["gain"]["low"] > 0 and pair["p"] < 0.05
                rows.append([f"the search answers better than {pair['against']}", title, found, met(better)])
    return rows


def aims_of(
    title: str, method: str, gated: str, scores: Mapping[str, Any], wanted: float, is_gate: bool
) -> list[list[str]]:
    """The rows about one confidence of one method."""
    facts, said = scores[gated], gated.replace("_", " ")
    what = f"{method}, {said}" if is_gate else f"{method}, {said} (not the gate)"
    area = facts["auroc"]["value"]
    excess = max(0.0, facts["ece"] - facts["ece_floor"])
    others = {name: each["auroc"]["value"] for name, each in scores.items() if each["auroc"]["value"] is not None}
    best = max(others, key=lambda name: others[name], default="-")
    verdict = "-" if area is None else met(area >= wanted)
    return [
        [f"{what}: AUROC at least {wanted:.2f}", title, with_interval(facts["auroc"]), verdict],
        [
            f"{what}: no score ranks better",
            title,
            f"best: {best}, {number(others.get(best))}",
            met(area == others.get(best)),
        ],
        [f"{what}, not calibrated: ECE above its noise floor at most 0.03", title, number(excess), met(excess <= 0.03)],
    ]


def met(flag: bool) -> str:
    return "yes" if flag else "no"


def shipped(runs: Mapping[str, Run], calibration: Calibration) -> list[str]:
    """What the calibration's threshold and probabilities do on answers of the method that it belongs to."""
    threshold, rows = calibration.threshold, []
    for title, run in runs.items():
        own = [name for name in run.methods if run.fingerprint(name, calibration.score) == calibration.fingerprint]
        for name in own:
            rows.append([title, name, *accepted(run, name, calibration, title == PROMISED)])
    if not rows:
        return ["It belongs to another configuration than these runs: nothing to measure."]
    promise = "It has no threshold."
    if threshold is not None:
        promise = (
            f"Its promise: at most {threshold.target_error:.1%} of the accepted answers are wrong, "
            f"{threshold.confidence_level:.0%} sure, for questions drawn like those it was made from "
            f"({calibration.provenance.get('dataset', 'unknown')}); it expects to accept {threshold.coverage:.3f}. On "
            "other questions it promises nothing."
        )
    header = ["data", "method", "n", "accepted", "wrong among them", "promise kept", "ECE", "floor", "above floor"]
    note = (
        f"Score: {calibration.score}. Answers that failed or have no score are not accepted. *Wrong among them* with "
        "its exact 95 % interval; the promise is kept when the share itself is not above it. *ECE* is that of the "
        "calibrated probabilities."
    )
    return [promise, markdown_table(header, rows), note]


def accepted(run: Run, method: str, calibration: Calibration, promised: bool) -> list[str]:
    """The cells about one method of one run."""
    labelled = [row for row in run.of(method) if row.usable]
    right = [row.correct is True for row in labelled]
    scores = [row.scores.get(calibration.score) for row in labelled]
    cells = [str(len(labelled))]
    if calibration.threshold is None or not labelled:
        cells += ["-", "-", "-"]
    else:
        taken = [flag for flag, score in zip(right, scores, strict=True) if calibration.accepts(score)]
        cells.append(f"{len(taken)} ({len(taken) / len(labelled):.3f})")
        if taken:
            wrong = taken.count(False)
            share = accuracy_interval(wrong, len(taken), method="exact")._asdict()
            kept = met(share["value"] <= calibration.threshold.target_error) if promised else "none is made"
            cells += [f"{wrong}: {with_interval(share)}", kept]
        else:
            cells += ["-", "-"]
    known = [
        (chance, flag)
        for score, flag in zip(scores, right, strict=True)
        if (chance := calibration.probability(score)) is not None
    ]
    if not known:
        return [*cells, "-", "-", "-"]
    chances = [chance for chance, _ in known]
    found, (floor, _) = ece(chances, [flag for _, flag in known]), ece_noise_floor(chances)
    return [*cells, number(found), number(floor), number(max(0.0, found - floor))]


if __name__ == "__main__":
    main()
