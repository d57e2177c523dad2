"""Does looking again help? Small scenes on larger canvases, answered in several ways, at stated cost.

    python benchmarks/looking.py --questions 1000

A canvas of scale ``s`` has its scene at 1/s of each side, so that its details fall below the model's cells. Every way
answers the same questions; ``random windows`` looks at as many windows of the same sizes by the same rule, only
elsewhere, and ``oracle window`` is shown the scene itself. The first ``--timed`` questions of a scale are asked one at
a time, for seconds relative to those of the plain answer, asked just before; the others in batches. Answers are kept in
``--journal`` as they come: called again, the program goes on where it was.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from latent_tool.calibration.configuration import configuration, digest
from latent_tool.engine.engine import Engine, get_engine
from latent_tool.engine.job import Job, joint
from latent_tool.engine.question import Question
from latent_tool.evaluation.journal import Journal, locked
from latent_tool.files import write_whole
from latent_tool.models.loading import ModelSpec
from latent_tool.models.windows import Window
from latent_tool.scenes import Scene, generate
from latent_tool.settings import Budget, SamplingSettings, SearchSettings, SearchVariant
from latent_tool.statistics import accuracy_interval, auroc, ece, mcnemar

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
FIRST_SEED = 5_300_000
Answer = tuple[str, float, dict[str, int]]


Way = Callable[[Engine, Sequence[tuple[Job, Scene]]], list[Answer]]


def _engine_way(settings: SearchSettings, budget: Budget) -> Way:
    def ask(engine: Engine, asked: Sequence[tuple[Job, Scene]]) -> list[Answer]:
        jobs = [Job(job.images, job.question, settings=settings, budget=budget) for job, _ in asked]
        answers: list[Answer] = []
        for outcome in engine.answer_many(jobs):
            assert not isinstance(outcome, Exception), outcome
            result = engine.result(outcome)
            assert result.usage is not None
            cost = {
                "calls": result.usage.decoder_calls,
                "vision": result.usage.vision_passes,
                "views": result.usage.views,
                "accepted": sum(view.accepted for view in result.views),
            }
            answers.append((result.answer, result.confidence or 0.0, cost))
        return answers

    return ask


def _oracle(engine: Engine, asked: Sequence[tuple[Job, Scene]]) -> list[Answer]:
    """The plain model with the scene itself as a window."""
    vlm = engine.vlm
    answers: list[Answer] = []
    for job, scene in asked:
        assert scene.window is not None
        left, top, right, bottom = scene.window
        window = Window(0, (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
        question = Question(vlm, job, time.monotonic)
        prefix = vlm.prefill(question.inputs([window]))
        decoded = vlm.decode(prefix, None, (), 16)
        answer = question.extract(prefix, decoded)
        cost = {"calls": 1 + len(decoded.tokens), "vision": prefix.encoded}
        answers.append((answer.text, joint(decoded.log_probabilities, answer) or 0.0, cost))
    return answers


def _self_consistency(engine: Engine, asked: Sequence[tuple[Job, Scene]]) -> list[Answer]:
    answers: list[Answer] = []
    for drawn in engine.sample_many([job for job, _ in asked], SamplingSettings()):
        assert not isinstance(drawn, Exception), drawn
        votes = collections.Counter(each.text.strip().lower() for each in drawn.answers)
        answer, count = votes.most_common(1)[0]
        answers.append((answer, count / len(drawn.answers), {"calls": drawn.usage.decoder_calls, "vision": 1}))
    return answers


_DEFAULT = SearchSettings()
WAYS: dict[str, Way] = {
    "greedy": _engine_way(SearchSettings(latents=0), Budget()),
    "reasoning": _engine_way(_DEFAULT, Budget(iterations=0)),
    "without views": _engine_way(_DEFAULT, Budget(max_views=0)),
    "search with copies, always": _engine_way(_DEFAULT, Budget(max_views=0, target_confidence=None)),
    "random windows": _engine_way(SearchSettings(variant=SearchVariant(view_source="random")), Budget()),
    "views, one level": _engine_way(SearchSettings(view_depth=1), Budget()),
    "views, two levels (default)": _engine_way(_DEFAULT, Budget()),
    "oracle window": _oracle,
    "self-consistency, 10": _self_consistency,
}
ATTENDED, RANDOM = "views, two levels (default)", "random windows"


def questions(scale: float, count: int, first: int) -> Iterator[tuple[int, Scene, int]]:
    """One question of each of so many canvases: seed, scene and which question."""
    given, seed = 0, first
    while given < count:
        scene = generate(seed, "canvas", scale=scale)
        if scene.questions:
            given += 1
            yield seed, scene, random.Random(seed).randrange(len(scene.questions))
        seed += 1


def _timed(engine: Engine, way: str, asked: Sequence[tuple[Job, Scene]]) -> tuple[list[Answer], float]:
    """Answer in one way, which begins with nothing, and say how many seconds it took."""
    engine.vlm.prefix_cache.clear()
    began = time.perf_counter()
    answers = WAYS[way](engine, asked)
    return answers, time.perf_counter() - began


def measure(engine: Engine, journal: Journal, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Answer what the journal does not hold yet; all scales in turn, so that any end is a fair one."""
    what = {"model": "embedded" if asked.model is None else asked.model, "dtype": "float32"}
    # Answers of another model, or by other settings, are no answers.
    key = digest(configuration(score="reward", **what))
    kept: list[dict[str, Any]] = [json.loads(line) for line in journal.lines]
    records = [record for record in kept if record.get("key") == key]
    known = {(record["scale"], record["seed"], record["way"]) for record in records}
    streams = {scale: questions(scale, asked.questions, asked.seed) for scale in asked.scales}
    done = 0
    while done < asked.questions:
        alone = done < asked.timed
        size = 1 if alone else min(asked.batch, asked.questions - done)
        for scale, stream in streams.items():
            items = list(itertools.islice(stream, size))
            new, plain = [], None
            for way in asked.ways:
                open_items = [item for item in items if (scale, item[0], way) not in known]
                if not open_items:
                    continue
                jobs = [(Job((scene.image,), scene.questions[index].text), scene) for _, scene, index in open_items]
                if alone and plain is None and way != "greedy":
                    plain = _timed(engine, "greedy", jobs)[1]
                answers, seconds = _timed(engine, way, jobs)
                plain = seconds if way == "greedy" else plain
                clock = {"seconds": seconds, "plain_seconds": plain} if alone else {}
                for (seed, scene, index), (answer, confidence, cost) in zip(open_items, answers, strict=True):
                    question = scene.questions[index]
                    right = " ".join(answer.lower().split()) == question.answer.strip().lower()
                    new.append(
                        {"key": key, "scale": scale, "seed": seed, "way": way, "type": question.type, "right": right}
                        | {"confidence": confidence, **clock, **cost}
                    )
            if new:
                journal.append(new)
                records += new
        done += size
    return records


def report(records: Sequence[dict[str, Any]], asked: argparse.Namespace) -> str:
    """Write the tables as Markdown."""
    command = f"python benchmarks/looking.py --questions {asked.questions}"
    lines = [
        "# Looking again",
        "",
        f"Written by `{command}`; canvases from seed {asked.seed:,}, the embedded model.",
        "",
    ]
    lines += [*(__doc__ or "").strip().splitlines()[4:], ""]
    for scale in asked.scales:
        rows = {
            way: {record["seed"]: record for record in records if (record["scale"], record["way"]) == (scale, way)}
            for way in asked.ways
        }
        seeds = sorted(set.intersection(*(set(row) for row in rows.values())))
        if not seeds:
            continue
        greedy = [rows["greedy"][seed] for seed in seeds]
        lines += [
            f"## s = {scale:g}, {len(seeds)} questions",
            "",
            "| way | accuracy | 95 % | fixed / broken against greedy | p | AUROC | ECE | decoder calls | vision passes "
            "| seconds / greedy |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for way in asked.ways:
            row = [rows[way][seed] for seed in seeds]
            right = [record["right"] for record in row]
            low, high = accuracy_interval(sum(right), len(right))[1:]
            against = mcnemar([record["right"] for record in greedy], right)
            surely = [record["confidence"] for record in row]
            area = auroc(surely, right) if 0 < sum(right) < len(right) else math.nan
            calls, vision = (sum(record.get(name, 0) for record in row) / len(row) for name in ("calls", "vision"))
            share = sum(right) / len(right)
            timed = [record for record in row if "seconds" in record]
            plain = sum(record.get("plain_seconds", rows["greedy"][record["seed"]]["seconds"]) for record in timed)
            ratio = f"{sum(record['seconds'] for record in timed) / plain:.1f}" if plain else "-"
            lines.append(
                f"| {way} | {share:.3f} | {low:.2f} to {high:.2f} | {against.fixed} / {against.broken} "
                f"| {against.p:.2g} | {area:.3f} | {ece(surely, right, 10):.3f} | {calls:.1f} | {vision:.1f} "
                f"| {ratio} |"
            )
        lines.append("")
        if ATTENDED in rows and RANDOM in rows:
            one, other = ([rows[way][seed]["right"] for seed in seeds] for way in (RANDOM, ATTENDED))
            test = mcnemar(one, other)
            lines += [f"Attended against random windows: {test.fixed} / {test.broken}, p = {test.p:.2g}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100, help="per scale")
    parser.add_argument("--timed", type=int, default=110, help="of them, asked one at a time for their seconds")
    parser.add_argument("--batch", type=int, default=16, help="questions asked together after those")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="of the first canvas")
    parser.add_argument("--model", help="a checkpoint; without it the embedded model")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--journal", type=Path, default=Path("looking.jsonl"))
    parser.add_argument("--out", type=Path, help="a page to write; otherwise it is printed")
    asked = parser.parse_args()
    if "greedy" not in asked.ways:
        asked.ways = ["greedy", *asked.ways]
    with locked(asked.journal.resolve().parent):
        spec = ModelSpec() if asked.model is None else ModelSpec(asked.model, dtype="float32")
        records = measure(get_engine(spec), Journal(asked.journal), asked)
    page = report(records, asked)
    if asked.out is None:
        print(page)
    else:
        write_whole(asked.out, (page.rstrip() + "\n").encode())


if __name__ == "__main__":
    main()
