"""Does looking again help? Small scenes on larger canvases, answered in several ways, at stated cost.

    python benchmarks/looking.py --questions 100

A canvas of scale ``s`` has its scene at 1/s of each side, so that its details fall below the model's cells. Every way
answers the same questions, one at a time; ``random windows`` looks at as many windows of the same sizes by the same
rule, only elsewhere, and ``oracle window`` is shown the scene itself. Answers are kept in ``--journal`` as they come:
called again, the program goes on where it was. Seconds are relative to those of the plain answer, asked just before.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
import time
from collections.abc import Callable, Sequence
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
from latent_tool.settings import Budget, SamplingSettings, SearchSettings
from latent_tool.statistics import accuracy_interval, auroc, ece, mcnemar

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
FIRST_SEED = 5_300_000
Answer = tuple[str, float, dict[str, int]]


def _engine_way(settings: SearchSettings, budget: Budget) -> Callable[[Engine, Job, Scene], Answer]:
    def ask(engine: Engine, job: Job, scene: Scene) -> Answer:
        outcome = engine.answer(Job(job.images, job.question, settings=settings, budget=budget))
        result = engine.result(outcome)
        assert result.usage is not None
        cost = {
            "calls": result.usage.decoder_calls,
            "vision": result.usage.vision_passes,
            "views": result.usage.views,
            "accepted": sum(view.accepted for view in result.views),
        }
        return result.answer, result.confidence or 0.0, cost

    return ask


def _oracle(engine: Engine, job: Job, scene: Scene) -> Answer:
    """The plain model with the scene itself as a window."""
    vlm = engine.vlm
    assert scene.window is not None
    left, top, right, bottom = scene.window
    window = Window(0, (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
    question = Question(vlm, job, time.monotonic)
    prefix = vlm.prefill(question.inputs([window]))
    decoded = vlm.decode(prefix, None, (), 16)
    answer = question.extract(prefix, decoded)
    calls = 1 + len(decoded.tokens)
    return answer.text, joint(decoded.log_probabilities, answer) or 0.0, {"calls": calls, "vision": prefix.encoded}


def _self_consistency(engine: Engine, job: Job, scene: Scene) -> Answer:
    (drawn,) = engine.sample_many([job], SamplingSettings())
    assert not isinstance(drawn, Exception), drawn
    votes = collections.Counter(each.text.strip().lower() for each in drawn.answers)
    answer, count = votes.most_common(1)[0]
    return answer, count / len(drawn.answers), {"calls": drawn.usage.decoder_calls, "vision": 1}


_DEFAULT = SearchSettings()
WAYS: dict[str, Callable[[Engine, Job, Scene], Answer]] = {
    "greedy": _engine_way(SearchSettings(latents=0), Budget()),
    "reasoning": _engine_way(_DEFAULT, Budget(iterations=0)),
    "without views": _engine_way(_DEFAULT, Budget(max_views=0)),
    "search with copies, always": _engine_way(_DEFAULT, Budget(max_views=0, target_confidence=None)),
    "random windows": _engine_way(SearchSettings(view_source="random"), Budget()),
    "views, one level": _engine_way(SearchSettings(view_depth=1), Budget()),
    "views, two levels (default)": _engine_way(_DEFAULT, Budget()),
    "oracle window": _oracle,
    "self-consistency, 10": _self_consistency,
}
ATTENDED, RANDOM = "views, two levels (default)", "random windows"


def questions(scale: float, count: int, first: int) -> list[tuple[int, Scene, int]]:
    """One question of each of so many canvases: seed, scene and which question."""
    found: list[tuple[int, Scene, int]] = []
    seed = first
    while len(found) < count:
        scene = generate(seed, "canvas", scale=scale)
        if scene.questions:
            found.append((seed, scene, random.Random(seed).randrange(len(scene.questions))))
        seed += 1
    return found


def _timed(engine: Engine, way: str, job: Job, scene: Scene) -> tuple[Answer, float]:
    """Answer in one way, which begins with nothing, and say how many seconds it took."""
    engine.vlm.prefix_cache.clear()
    began = time.perf_counter()
    answer = WAYS[way](engine, job, scene)
    return answer, time.perf_counter() - began


def measure(engine: Engine, journal: Journal, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Answer what the journal does not hold yet; all scales in turn, so that any end is a fair one."""
    what = {"model": "embedded" if asked.model is None else asked.model, "dtype": "float32"}
    # Answers of another model, or by other settings, are no answers.
    key = digest(configuration(score="reward", **what))
    kept: list[dict[str, Any]] = [json.loads(line) for line in journal.lines]
    records = [record for record in kept if record.get("key") == key]
    known = {(record["scale"], record["seed"], record["way"]) for record in records}
    per_scale = [(scale, questions(scale, asked.questions, asked.seed)) for scale in asked.scales]
    for number in range(asked.questions):
        for scale, items in per_scale:
            seed, scene, index = items[number]
            question = scene.questions[index]
            new, plain = [], None
            for way in asked.ways:
                if (scale, seed, way) in known:
                    continue
                job = Job((scene.image,), question.text)
                if plain is None and way != "greedy":
                    plain = _timed(engine, "greedy", job, scene)[1]
                (answer, confidence, cost), seconds = _timed(engine, way, job, scene)
                plain = seconds if way == "greedy" else plain
                right = " ".join(answer.lower().split()) == question.answer.strip().lower()
                new.append(
                    {"key": key, "scale": scale, "seed": seed, "way": way, "type": question.type, "right": right}
                    | {"confidence": confidence, "seconds": seconds, "plain_seconds": plain, **cost}
                )
            if new:
                journal.append(new)
                records += new
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
            plain = sum(record.get("plain_seconds", one["seconds"]) for record, one in zip(row, greedy, strict=True))
            lines.append(
                f"| {way} | {share:.3f} | {low:.2f} to {high:.2f} | {against.fixed} / {against.broken} "
                f"| {against.p:.2g} | {area:.3f} | {ece(surely, right, 10):.3f} | {calls:.1f} | {vision:.1f} "
                f"| {sum(record['seconds'] for record in row) / plain:.1f} |"
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
