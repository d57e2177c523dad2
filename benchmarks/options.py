"""Given options against free text: accuracy, ranking, calibration and cost, on the embedded model.

    python benchmarks/options.py --out out/options --write docs/measured/options.md

Held-out and hard scenes (one question each, seeds from 5,500,000, which nothing was trained or tuned on) and easy-VQA's
test split, each question asked freely and with options, by the same settings and budget. Answers are kept in ``--out``,
one line each: a run that was stopped, by hand or by ``--seconds``, goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics as plain_statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latent_tool.calibration.configuration import configuration, digest
from latent_tool.calibration.fit import fit
from latent_tool.engine.engine import Engine, get_engine
from latent_tool.engine.job import Job, Outcome
from latent_tool.errors import CalibrationError
from latent_tool.evaluation import Item, load_dataset
from latent_tool.files import write_whole
from latent_tool.models.loading import ModelSpec
from latent_tool.models.options import score_options, spell
from latent_tool.models.requests import ScoreOptions
from latent_tool.settings import Budget, SearchSettings
from latent_tool.statistics import accuracy_interval, auroc_interval, coverage_at_risk, ece, mcnemar

FIRST = 5_500_000
CHUNK = 40
ALL_OF = "easy-VQA"  # asked with all of its answers
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/options"))
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="where the page goes; by default to stdout")
    parser.add_argument("--questions", type=int, nargs=3, default=[2000, 1000, 1000], metavar="N")
    parser.add_argument("--rewards", type=int, default=200, help="hard questions on which rewards are compared")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long, and go on another time")
    given = parser.parse_args()
    engine, end = get_engine(ModelSpec()), time.monotonic() + given.seconds
    given.out.mkdir(parents=True, exist_ok=True)
    # Answers of another model, by other settings, to other questions or of another program are no answers.
    made_of = {"configuration": configuration(score="option_probability"), "program": Path(__file__).read_text()}
    key = digest({**made_of, "questions": given.questions})
    rows: dict[str, list[Row]] = {}
    dropped: dict[str, list[str]] = {}
    titles = ("held-out scenes", "hard scenes", ALL_OF)
    for title, number in zip(titles, given.questions, strict=True):
        items, dropped[title] = questions(title, number)
        rows[title] = kept(given.out / f"{title}.jsonl", key, items, lambda some: asked(engine, some), end)
    hard = questions("hard scenes", given.questions[1])[0][: given.rewards]
    rows["rewards"] = kept(given.out / "rewards.jsonl", key, hard, lambda some: searched(engine, some), end)
    path = given.out / "cost.json"
    if not path.exists() or json.loads(path.read_text()).get("key") != key:
        path.write_text(json.dumps({"key": key, **cost(engine)}))
    command = f"--questions {' '.join(map(str, given.questions))} --rewards {given.rewards}"
    text = document(rows, json.loads(path.read_text()), command, dropped)
    if given.write is None:
        print(text)
    else:
        write_whole(given.write, text.encode())


# ---------------------------------------------------------------------------------------------------- the questions


def questions(title: str, number: int) -> tuple[list[tuple[Item, tuple[str, ...]]], list[str]]:
    """Questions with what is given to choose from: the label and three of the same type, or all there are.

    Also the ids of those that are left out, since all questions of their type have one answer.
    """
    last = FIRST + number - 1
    specs = {"held-out scenes": f"scenes:held_out:{FIRST}-{last}", "hard scenes": f"scenes:hard:{FIRST}-{last}"}
    items = load_dataset(specs.get(title, "easy-vqa:test"))[:number]
    known: dict[str | None, dict[str, None]] = {}
    for item in items:
        known.setdefault(None if title == ALL_OF else item.type, {})[str(item.label)] = None
    found, dropped = [], []
    for item in items:
        label, draw = str(item.label), random.Random(item.id)
        if label in ("yes", "no"):
            options = ["yes", "no"]
        elif title == ALL_OF:
            options = sorted(known[None])
        else:
            others = [each for each in known[item.type] if each != label and each not in ("yes", "no")]
            options = [label, *draw.sample(others, min(3, len(others)))]
            draw.shuffle(options)
        if len(options) > 1:
            found.append((item, tuple(options)))
        else:
            dropped.append(item.id)
    return found, dropped


def kept(
    path: Path,
    key: str,
    items: Sequence[tuple[Item, tuple[str, ...]]],
    ask: Callable[[Sequence[tuple[Item, tuple[str, ...]]]], list[Row]],
    end: float,
) -> list[Row]:
    """The rows of a file that have this key, after those that were missing have been added, while there is time."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row.get("key") == key]
    there = {row["id"] for row in rows}
    missing = [each for each in items if each[0].id not in there]
    for begin in range(0, len(missing), CHUNK):
        if time.monotonic() > end:
            break
        added = ask(missing[begin : begin + CHUNK])
        with path.open("a") as file:
            file.writelines(json.dumps({"key": key, **row}) + "\n" for row in added)
        rows += added
        print(f"{path.stem}: {len(rows)} of {len(items)}", flush=True)
    return rows


def answered(engine: Engine, jobs: Sequence[Job]) -> Iterator[Outcome]:
    for outcome in engine.answer_many(jobs):
        if isinstance(outcome, Exception):
            raise outcome
        yield outcome


def asked(engine: Engine, items: Sequence[tuple[Item, tuple[str, ...]]]) -> list[Row]:
    """Every question freely and with its options, by the default settings and budget and by the plain model."""
    rows: list[Row] = [{"id": item.id, "type": item.type, "label": item.label} for item, _ in items]
    images = [item.load() for item, _ in items]
    for name, settings in (("default", SearchSettings()), ("plain", SearchSettings(latents=0))):
        free = [
            Job(shown, item.question, settings=settings, budget=Budget())
            for shown, (item, _) in zip(images, items, strict=True)
        ]
        began = time.perf_counter()
        for row, outcome, (item, _) in zip(rows, answered(engine, free), items, strict=True):
            result = engine.result(outcome)
            right = item.match.right(result.answer, str(item.label))
            row[f"{name} free"] = {"right": right, "confidence": result.confidence or 0.0}
        middle = time.perf_counter()
        chosen = [
            Job(shown, item.question, options=options, settings=settings, budget=Budget())
            for shown, (item, options) in zip(images, items, strict=True)
        ]
        for row, outcome, (item, options) in zip(rows, answered(engine, chosen), items, strict=True):
            row[name] = {
                **chances(outcome, options.index(str(item.label))),
                "seconds": (time.perf_counter() - middle) / len(items),
                "seconds_free": (middle - began) / len(items),
            }
    for row, shown, (item, options) in zip(rows, images, items, strict=True):
        blank = tuple(Image.new("RGB", each.size, (128, 128, 128)) for each in shown)
        prefix = engine.vlm.prefill(engine.vlm.prepare(blank, item.question))
        spelled = spell(engine.vlm, [[option] for option in options])
        row["blank"] = (
            score_options(engine.vlm, ScoreOptions(prefix, None, ((),), spelled)).log_probabilities[0].tolist()
        )
    return rows


def chances(outcome: Outcome, label: int) -> Row:
    """The log-probabilities of the options, with latents and without, and which of them is the label."""
    assert outcome.chosen is not None
    found = outcome.chosen
    return {"label": label, "log_p": found.log_probabilities.tolist(), "plain": found.plain.tolist()}


def searched(engine: Engine, items: Sequence[tuple[Item, tuple[str, ...]]]) -> list[Row]:
    """Options after a whole search whose reward is read at the answer, or in the options."""
    rows: list[Row] = [{"id": item.id} for item, _ in items]
    for position in ("answer", "options"):
        settings = always(SearchSettings(reward_position=position))  # type: ignore[arg-type]
        jobs = [
            Job(item.load(), item.question, options=options, settings=settings, budget=Budget())
            for item, options in items
        ]
        for row, outcome, (item, options) in zip(rows, answered(engine, jobs), items, strict=True):
            row[position] = chances(outcome, options.index(str(item.label)))
    return rows


def always(settings: SearchSettings) -> SearchSettings:
    """Settings that search whatever the model says before."""
    return settings.but(search_below=None) if "search_below" in SearchSettings.model_fields else settings


# ---------------------------------------------------------------------------------------------------- what it costs


def cost(engine: Engine) -> dict[str, Any]:
    """Seconds of the plain model for a free answer, and as shares of that, for 2 to 255 options; medians in turn."""
    items, _ = questions("held-out scenes", 30)
    words = ["red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "gray"]
    words += ["circle", "square", "triangle", "star"]
    many = [f"{one} {other}" for one in words for other in words] + words + [str(number) for number in range(30)]
    times: dict[str, list[float]] = {}
    for item, _ in items:
        shown = item.load()
        for name, options in {
            "free": None,
            "2": ("yes", "no"),
            "4": tuple(words[:4]),
            "16": tuple(many[:16]),
            "255": tuple(many[:255]),
        }.items():
            engine.vlm.prefix_cache.clear()
            job = Job(shown, item.question, options=options, settings=SearchSettings(latents=0))
            began = time.perf_counter()
            engine.answer(job)
            times.setdefault(name, []).append(time.perf_counter() - began)
    free = plain_statistics.median(times["free"])
    ratios = {
        name: plain_statistics.median(one / other for one, other in zip(found, times["free"], strict=True))
        for name, found in times.items()
    }
    return {"free": free, "ratios": ratios, "threads": torch.get_num_threads()}


# ---------------------------------------------------------------------------------------------------- the page


def softmax(values: Sequence[float]) -> list[float]:
    most = max(values)
    weights = [math.exp(value - most) for value in values]
    return [weight / sum(weights) for weight in weights]


def decided(found: Row, log_p: Sequence[float]) -> tuple[bool, float]:
    """Whether the likeliest option is the label, and its probability among all."""
    chances = softmax(log_p)
    best = max(range(len(chances)), key=chances.__getitem__)
    return best == found["label"], chances[best]


def pooled(found: Row) -> list[float]:
    return [(one + other) / 2 for one, other in zip(found["log_p"], found["plain"], strict=True)]


WAYS: dict[str, Callable[[Row], tuple[bool, float]]] = {
    "free text, default": lambda row: (row["default free"]["right"], row["default free"]["confidence"]),
    "**options, default (pooled)**": lambda row: decided(row["default"], pooled(row["default"])),
    "options, default, not pooled": lambda row: decided(row["default"], row["default"]["log_p"]),
    "free text, plain model": lambda row: (row["plain free"]["right"], row["plain free"]["confidence"]),
    "options, plain model": lambda row: decided(row["plain"], row["plain"]["log_p"]),
    "options, default, divided by those on a blank picture": lambda row: decided(
        row["default"], [one - other for one, other in zip(pooled(row["default"]), row["blank"], strict=True)]
    ),
}
HEAD = "| way | accuracy | AUROC | ECE before | after | coverage at 5 % error |\n|---|---|---|---|---|---|"


def line(name: str, values: Sequence[tuple[bool, float]]) -> str:
    right, sure = [each[0] for each in values], [min(1.0, each[1]) for each in values]
    share = accuracy_interval(sum(right), len(right))
    area = "-"
    if 0 < sum(right) < len(right):
        found = auroc_interval(sure, right)
        area = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    try:
        made = fit(sure, right, score="option_probability", fingerprint="0" * 64)
        after = f"{made.quality.ece_after:.3f} (floor {made.quality.ece_noise_floor:.3f})"
    except CalibrationError:
        after = "too few wrong"
    covered = coverage_at_risk(sure, right, 0.05)
    return (
        f"| {name} | {share.value:.3f} [{share.low:.3f}, {share.high:.3f}] | {area} | {ece(sure, right):.3f} | {after} "
        f"| {covered:.2f} |"
    )


def table(rows: Sequence[Row]) -> str:
    return "\n".join([HEAD, *(line(name, [way(row) for row in rows]) for name, way in WAYS.items())])


def difference(rows: Sequence[Row]) -> str:
    free, chosen = ([WAYS[name](row)[0] for row in rows] for name in list(WAYS)[:2])
    found = mcnemar(free, chosen)
    return (
        f"Against free text, options put {found.fixed} answers right and {found.broken} wrong (McNemar's p = "
        f"{found.p:.2g})."
    )


def document(rows: dict[str, list[Row]], costs: dict[str, Any], command: str, dropped: dict[str, list[str]]) -> str:
    parts = [
        "# Options against free text",
        "Embedded model, default settings and the standard budget, unless a way says otherwise. Four options are the "
        "label and three distractors: labels of other questions of the same type (yes and no for yes/no questions; "
        "fewer where a type has fewer). *Pooled*: the geometric mean of each option's probability after thinking and "
        "by the plain model, which is what `option_probability` is. ECE after calibration is cross-validated.",
        f"```console\n$ python benchmarks/options.py --out out/options {command} --write docs/measured/options.md\n```",
    ]
    for title, found in rows.items():
        if title == "rewards" or not found:
            continue
        given = "all its answers as options" if title == ALL_OF else "the label and three of the same type"
        parts += [f"## {title}: {len(found)} questions, {given}", table(found), difference(found)]
        if dropped[title]:
            parts.append(f"{len(dropped[title])} more were left out: all questions of their type have one answer.")
        binary = [row for row in found if row["label"] in ("yes", "no")]
        if title != ALL_OF and len(binary) >= 30:
            parts += [f"### Of these, {len(binary)} yes/no questions", table(binary)]
    if rows["rewards"]:
        found = rows["rewards"]
        lines = [
            line(f"reward at the {name}, {kind}", [decided(row[name], read(row[name])) for row in found])
            for name in ("answer", "options")
            for kind, read in (("pooled", pooled), ("not pooled", lambda found: found["log_p"]))
        ]
        title = f"## Where the reward is read: {len(found)} hard questions, always searched"
        parts += [title, "\n".join([HEAD, *lines])]
    shares = "\n".join(f"| {name} | {ratio:.2f} |" for name, ratio in costs["ratios"].items() if name != "free")
    parts += [
        "## Cost",
        f"The plain model, one question at a time, nothing cached, {costs['threads']} thread; a free answer takes "
        f"{1000 * costs['free']:.0f} ms (median of 30 questions). Shares are medians of ratios on the same question.",
        f"| options | time / a free answer's |\n|---|---|\n{shares}",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
