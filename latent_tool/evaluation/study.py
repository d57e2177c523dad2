"""The observations that the method's authors report, looked for in any data set and model.

Every question is answered by the search, and several reasoning sequences are drawn for it from the plain model. Each
observation is a statement with a test: a bootstrap over *questions* (the sequences of a question belong together) gives
a 95 % interval and a two-sided p value, which Holm's method adjusts for the statements that were tested. Where it is
below 5 %, the statement *holds* or *does not hold*, by the side on which the value lies; otherwise, and with too few
questions or too few wrong answers, one *cannot tell*.

``collect`` asks the model and gives plain rows; ``analyse`` makes the findings of them; ``write_study`` writes both
reports from the findings alone. This module knows no tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from latent_tool.errors import MissingExtraError, SettingsError
from latent_tool.evaluation.matching import normalise
from latent_tool.evaluation.metrics import holm
from latent_tool.files import write_whole
from latent_tool.settings import NoiseSettings, SamplingSettings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from latent_tool.engine.engine import Outcome, Sampled
    from latent_tool.evaluation.datasets import Box, Item
    from latent_tool.langchain.reasoner import LatentReasoner
    from latent_tool.schema import Grounding, ReasoningResult

__all__ = ["Drawn", "Question", "analyse", "collect", "markdown_study", "study", "study_page", "word_f1", "write_study"]

T = TypeVar("T")
Progress = Callable[[int, int], None]


class Estimate(NamedTuple):
    """A value with its 95 % interval, and the two-sided p value of its being the null."""

    value: float
    low: float
    high: float
    p: float


HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot tell"
DRAWS = 1000
FEWEST = 30  # questions below which nothing is tested
FEWEST_WRONG = 20  # wrong answers, and right ones, below which the two are not compared
LEVEL = 0.05
QUANTILES = 5
ANSWERS = "answers.jsonl"


class Part(BaseModel):
    """Base of what is collected: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Drawn(Part):
    """One drawn reasoning sequence with its answer."""

    correct: bool
    confidence: float | None
    reasoning: str
    quality: float | None
    reasoning_dependency: tuple[float, ...]
    answer_dependency: tuple[float, ...]

    @property
    def dependency(self) -> float:
        """Mean S over all tokens of the sequence."""
        values = (*self.reasoning_dependency, *self.answer_dependency)
        return math.fsum(values) / len(values)


class Question(Part):
    """One question: the search's answer, and the sequences that were drawn for it."""

    id: str
    correct: bool
    confidence: float | None
    rewards: tuple[float, ...]
    grounding: float | None
    sequences: tuple[Drawn, ...]


# ---------------------------------------------------------------------- asking


def collect(
    reasoner: LatentReasoner,
    items: Sequence[Item],
    *,
    samples: int = 6,
    temperature: float = 1.0,
    system: str | None = None,
    noise: NoiseSettings | None = None,
    batch: int = 8,
    progress: Progress | None = None,
    there: Mapping[str, Question | str] | None = None,
    keep: Callable[[Mapping[str, Question | str]], None] | None = None,
) -> tuple[list[Question], list[str]]:
    """Ask everything about every labelled item; also what could not be asked, one line each.

    Args:
        samples, temperature: how many sequences are drawn for a question, and how freely.
        system: system text before every question.
        noise: how the image is noised for the visual dependency.
        batch: questions answered together.
        progress: told after every batch how many of how many are done.
        there: what is known already, by the item's id: an answer, or why there is none.
        keep: given what every batch adds to that.
    """
    noise = noise or NoiseSettings()
    sampling = SamplingSettings(samples=samples, temperature=temperature)
    usable = [item for item in items if item.problem is None and item.label is not None]
    problems = [f"{item.id}: {item.problem or 'no label'}" for item in items if item not in usable]
    if len({item.id for item in items}) < len(items):
        raise SettingsError("Two items have the same id.", "Give every item an id of its own.")
    known = dict(there or {})
    missing = [item for item in usable if item.id not in known]
    for begin in range(0, len(missing), batch):
        part = missing[begin : begin + batch]
        added = dict(zip([item.id for item in part], _ask(reasoner, part, sampling, noise, system), strict=True))
        known |= added
        if keep is not None:
            keep(added)
        if progress is not None:
            progress(len(usable) - len(missing) + begin + len(part), len(usable))
    ends = [(item.id, known[item.id]) for item in usable]
    problems += [f"{name}: {end}" for name, end in ends if isinstance(end, str)]
    return [end for _, end in ends if isinstance(end, Question)], problems


def _ask(
    reasoner: LatentReasoner,
    items: Sequence[Item],
    sampling: SamplingSettings,
    noise: NoiseSettings,
    system: str | None,
) -> list[Question | str]:
    """The answer to every item, or why there is none: no item's error is another's."""
    from latent_tool.engine.engine import Job

    engine = reasoner.engine()
    jobs: dict[int, Job] = {}
    ends: dict[int, Question | Exception] = {}
    for place, item in enumerate(items):
        try:
            jobs[place] = Job(
                images=item.load(),
                question=item.question,
                system=system,
                settings=reasoner.settings,
                budget=reasoner.budget,
                generation=reasoner.generation,
                images_first=reasoner.images_first,
                seed=reasoner.seed,
            )
        except Exception as error:  # whatever a loader raises belongs to its item
            ends[place] = error
    places = list(jobs)
    searched = dict(zip(places, engine.answer_many([jobs[place] for place in places]), strict=True))
    drawn = dict(zip(places, engine.sample_many([jobs[place] for place in places], sampling), strict=True))
    good = [p for p in places if not isinstance(searched[p], Exception) and not isinstance(drawn[p], Exception)]
    outcomes: list[Outcome] = [searched[p] for p in good]  # type: ignore[misc]  # those that are no errors
    sampled: list[Sampled] = [drawn[p] for p in good]  # type: ignore[misc]
    attended = engine.attention_many(outcomes)
    dependent = engine.dependency_many(sampled, noise)
    for place, outcome, sample, attention, dependency in zip(good, outcomes, sampled, attended, dependent, strict=True):
        if isinstance(attention, Exception) or isinstance(dependency, Exception):
            ends[place] = attention if isinstance(attention, Exception) else dependency  # type: ignore[assignment]
            continue
        try:
            ends[place] = _question(engine.result(outcome), outcome, sample, attention, dependency, items[place])
        except Exception as error:  # a matching function of the user's, above all
            ends[place] = error
    for place in places:
        if place not in ends:
            failed = searched[place] if isinstance(searched[place], Exception) else drawn[place]
            ends[place] = failed  # type: ignore[assignment]  # one of the two is an error
    found = [ends[place] for place in range(len(items))]
    return [f"{type(end).__name__}: {end}" if isinstance(end, Exception) else end for end in found]


def _question(
    result: ReasoningResult,
    outcome: Outcome,
    sample: Sampled,
    attention: Sequence[float],
    dependency: Sequence[Grounding | None],
    item: Item,
) -> Question:
    """What the model said about one item, as plain numbers."""
    sequences = []
    for answer, grounding, chance in zip(sample.answers, dependency, sample.probabilities, strict=True):
        if grounding is None:
            continue
        reasoning = _reasoning(answer.raw_text, answer.text)
        sequences.append(
            Drawn(
                correct=_right(item, answer.text),
                confidence=chance,
                reasoning=reasoning,
                quality=None if item.reasoning is None else word_f1(reasoning, item.reasoning),
                reasoning_dependency=tuple(t.dependency for t in grounding.tokens[: answer.start]),
                answer_dependency=tuple(t.dependency for t in grounding.tokens[answer.start : answer.stop]),
            )
        )
    boxes = [cell.box if cell.image == 0 else None for cell in outcome.inputs.cells]
    return Question(
        id=item.id,
        correct=_right(item, result.answer),
        confidence=result.confidence,
        rewards=tuple(row.reward for row in result.trace),
        grounding=attention_lift(attention, boxes, item.boxes or ()),
        sequences=tuple(sequences),
    )


def _right(item: Item, answer: str) -> bool:
    """Whether an answer matches the item's label, by the item's own rule."""
    assert item.label is not None
    return item.match.right(answer, item.label)


def _reasoning(raw: str, answer: str) -> str:
    """What stands before the answer in the decoded text."""
    return raw[: len(raw) - len(answer)].strip() if raw.endswith(answer) else raw


def word_f1(text: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the words of a text, in [0, 1]; order does not count."""
    one, other = Counter(normalise(text).split()), Counter(normalise(truth).split())
    shared = (one & other).total()
    return 2 * shared / (one.total() + other.total()) if shared else 0.0


def attention_lift(attention: Sequence[float], cells: Sequence[Box | None], boxes: Sequence[Box]) -> float | None:
    """Share of the attention on the relevant boxes less the share of the picture they cover, in [-1, 1].

    ``None`` without relevant boxes, without attention, or where the place of a cell is not known.
    """
    if not boxes or not attention or len(attention) != len(cells) or math.fsum(attention) <= 0:
        return None
    covered = []
    for cell in cells:
        if cell is None:
            return None
        covered.append(max(_overlap(cell, box) for box in boxes))
    on_boxes = math.fsum(a * c for a, c in zip(attention, covered, strict=True)) / math.fsum(attention)
    return on_boxes - math.fsum(covered) / len(covered)


def _overlap(cell: Box, box: Box) -> float:
    """Share of a cell that a box covers."""
    wide = min(cell[2], box[2]) - max(cell[0], box[0])
    high = min(cell[3], box[3]) - max(cell[1], box[1])
    area = (cell[2] - cell[0]) * (cell[3] - cell[1])
    return max(wide, 0.0) * max(high, 0.0) / area if area > 0 else 0.0


# ---------------------------------------------------------------------- testing


def bootstrap(
    groups: Sequence[T],
    statistic: Callable[[Sequence[T]], float | None],
    null: float = 0.0,
    seed: int = 0,
    draws: int = DRAWS,
) -> Estimate | None:
    """A statistic with its 95 % percentile interval over resampled groups; ``None`` where it is not defined.

    The p value is twice the share of resamples on the side of ``null`` that has fewer, ``2 (1 + fewer) / (1 + draws)``
    (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 4.4). Resamples in which the statistic
    is not defined are left out; with more than a tenth of them, or fewer than 30 groups, there is nothing.
    """
    value = statistic(groups)
    if value is None or len(groups) < FEWEST:
        return None
    rng = np.random.default_rng(seed)
    tried = (statistic([groups[i] for i in rng.integers(len(groups), size=len(groups))]) for _ in range(draws))
    drawn = np.array([each for each in tried if each is not None])
    if len(drawn) < 0.9 * draws:
        return None
    low, high = np.quantile(drawn, [0.025, 0.975])
    fewer = min(int((drawn <= null).sum()), int((drawn >= null).sum()))
    return Estimate(value, float(low), float(high), min(1.0, 2 * (1 + fewer) / (1 + len(drawn))))


def verdict(found: Estimate | None, p: float, null: float, above: bool = True) -> str:
    """What an estimate says about a claim that its value lies above (or below) ``null``, at the adjusted p value."""
    if found is None or p >= LEVEL:
        return UNKNOWN
    return HOLDS if (found.value > null) is above else FAILS


def _enough(flags: Sequence[bool]) -> bool:
    """Whether there are enough right and wrong answers to compare them."""
    return min(sum(flags), len(flags) - sum(flags)) >= FEWEST_WRONG


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _ranks(values: Sequence[float]) -> Any:
    from scipy.stats import rankdata

    return rankdata(values)


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation; ``None`` if one side does not vary."""
    if len(pairs) < 3:
        return None
    one: Any = _ranks([pair[0] for pair in pairs])
    other: Any = _ranks([pair[1] for pair in pairs])
    if one.std() == 0 or other.std() == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def _area(pairs: Sequence[tuple[float, bool]]) -> float | None:
    """AUROC of (score, right) pairs; ``None`` if all are right or all wrong."""
    flags = np.array([flag for _, flag in pairs], dtype=bool)
    right = int(flags.sum())
    wrong = len(pairs) - right
    if not right or not wrong:
        return None
    total = float(_ranks([score for score, _ in pairs])[flags].sum())
    return (total - right * (right + 1) / 2) / (right * wrong)


def _by_quantile(pairs: Sequence[tuple[float, bool]], parts: int = QUANTILES) -> list[dict[str, Any]]:
    """Accuracy in parts of equal size, from the lowest score to the highest."""
    ordered = sorted(pairs)
    rows = []
    for part in np.array_split(np.arange(len(ordered)), parts):
        if len(part):
            inside = [ordered[i] for i in part]
            right = sum(flag for _, flag in inside)
            rows.append({"low": inside[0][0], "high": inside[-1][0], "n": len(inside), "accuracy": right / len(inside)})
    return rows


# ---------------------------------------------------------------------- the observations


def analyse(
    questions: Sequence[Question], noise: NoiseSettings | None = None, draws: int = DRAWS
) -> list[dict[str, Any]]:
    """The findings, as plain JSON: claim, verdict, interval and test in words, a table and the numbers of a plot.

    Raises ``SettingsError`` when there are no questions and ``MissingExtraError`` without scipy.
    """
    if not questions:
        raise SettingsError("No question was answered, so there is nothing to study.", "See the problems listed.")
    try:
        import scipy.stats  # noqa: F401
    except ImportError:
        raise MissingExtraError("A study", "evaluation") from None
    threshold = (noise or NoiseSettings()).threshold
    drafts = [
        *_few_tokens(questions, threshold, draws),
        _dependency_and_accuracy(questions, draws),
        _confidence_and_accuracy(questions, draws),
        _confidence_and_reasoning(questions, draws),
        _confidence_and_attention(questions, draws),
        *_confidence_by_round(questions, draws),
    ]
    tested = [draft for draft in drafts if draft.found is not None]
    adjusted = dict(
        zip(
            [draft.shown["key"] for draft in tested],
            holm([draft.found.p for draft in tested if draft.found]),
            strict=True,
        )
    )
    return [draft.finding(adjusted.get(draft.shown["key"])) for draft in drafts]


class _Draft(NamedTuple):
    """A finding before it is known how many statements were tested."""

    shown: dict[str, Any]
    found: Estimate | None
    null: float
    above: bool

    def finding(self, p: float | None) -> dict[str, Any]:
        interval = (
            None if self.found is None else {name: getattr(self.found, name) for name in ("value", "low", "high")}
        )
        judged = verdict(self.found, 1.0 if p is None else p, self.null, self.above)
        return {**self.shown, "verdict": judged, "interval": interval, "p": p}


def _finding(
    key: str,
    claim: str,
    test: str,
    found: Estimate | None,
    null: float,
    header: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
    plot: Mapping[str, Any] | None = None,
    above: bool = True,
) -> _Draft:
    shown = {
        "key": key,
        "claim": claim,
        "test": test,
        "header": list(header),
        "rows": [list(row) for row in rows],
        "plot": None if plot is None else dict(plot),
    }
    return _Draft(shown, found, null, above)


def _few_tokens(questions: Sequence[Question], threshold: float, draws: int) -> Iterator[_Draft]:
    parts: dict[str, Callable[[Drawn], tuple[float, ...]]] = {
        "reasoning": lambda each: each.reasoning_dependency,
        "answer": lambda each: each.answer_dependency,
    }
    for name, pick in parts.items():
        groups = [[value for each in question.sequences for value in pick(each)] for question in questions]

        counted = [(sum(value > threshold for value in group), len(group)) for group in groups]

        def share(chosen: Sequence[tuple[int, int]]) -> float | None:
            total = sum(count for _, count in chosen)
            return sum(above for above, _ in chosen) / total if total else None

        values = sorted(value for group in groups for value in group)
        interval = bootstrap(counted, share, 0.5, draws=draws)
        levels = (0.05, 0.25, 0.5, 0.75, 0.95)
        rows = [[f"{level:.0%}", f"{np.quantile(values, level):+.3f}"] for level in levels] if values else []
        counts, edges = np.histogram(np.clip(values, -2, 8), bins=40, range=(-2, 8))
        yield _finding(
            f"few-{name}-tokens",
            f"Few tokens of the {name} depend on the image.",
            f"Share of {name} tokens whose S exceeds {threshold:g} nats, below one half ({len(values)} tokens).",
            interval,
            0.5,
            ("quantile of S", "nats"),
            rows,
            {
                "kind": "histogram",
                "x": edges.tolist() if values else [],
                "y": counts.tolist(),
                "mark": threshold,
                "xlabel": f"visual dependency S of the {name}'s tokens, nats (cut to -2 to 8)",
            },
            above=False,
        )


def _dependency_and_accuracy(questions: Sequence[Question], draws: int) -> _Draft:
    mixed = [q for q in questions if len({each.correct for each in q.sequences}) == 2]

    gaps = []
    for question in mixed:
        right = [each.dependency for each in question.sequences if each.correct]
        wrong = [each.dependency for each in question.sequences if not each.correct]
        gaps.append(math.fsum(right) / len(right) - math.fsum(wrong) / len(wrong))
    enough = _enough([each.correct for question in mixed for each in question.sequences])
    interval = bootstrap(gaps, _mean, draws=draws) if enough else None
    pairs = [(each.dependency, each.correct) for question in questions for each in question.sequences]
    table = _by_quantile(pairs)
    return _finding(
        "dependency-and-accuracy",
        "Of several reasoning sequences, those that depend more on the image are right more often.",
        "Mean S of right less wrong sequences of the same question, above 0, in nats "
        f"({len(mixed)} questions have both kinds; {len(pairs)} sequences).",
        interval,
        0.0,
        ("S from", "to", "sequences", "accuracy"),
        [[f"{r['low']:+.3f}", f"{r['high']:+.3f}", str(r["n"]), f"{r['accuracy']:.3f}"] for r in table],
        _quantile_plot(table, "mean S of the sequence, nats"),
    )


def _confidence_and_accuracy(questions: Sequence[Question], draws: int) -> _Draft:
    pairs = [(q.confidence, q.correct) for q in questions if q.confidence is not None]
    interval = bootstrap(pairs, _area, 0.5, draws=draws) if _enough([flag for _, flag in pairs]) else None
    table = _by_quantile(pairs)
    return _finding(
        "confidence-and-accuracy",
        "The surer the search's answer, the more often it is right.",
        f"AUROC of the confidence, above 0.5 ({len(pairs)} questions).",
        interval,
        0.5,
        ("confidence from", "to", "questions", "accuracy"),
        [[f"{r['low']:.4f}", f"{r['high']:.4f}", str(r["n"]), f"{r['accuracy']:.3f}"] for r in table],
        _quantile_plot(table, "confidence"),
    )


def _quantile_plot(table: Sequence[Mapping[str, Any]], label: str) -> dict[str, Any]:
    return {
        "kind": "line",
        "x": [(row["low"] + row["high"]) / 2 for row in table],
        "y": [row["accuracy"] for row in table],
        "xlabel": label,
        "ylabel": "accuracy",
    }


def _confidence_and_reasoning(questions: Sequence[Question], draws: int) -> _Draft:
    groups = [
        [
            (each.confidence, each.quality)
            for each in q.sequences
            if each.confidence is not None and each.quality is not None
        ]
        for q in questions
    ]
    groups = [group for group in groups if group]

    def correlation(chosen: Sequence[list[tuple[float, float]]]) -> float | None:
        return _correlation([pair for group in chosen for pair in group])

    interval = bootstrap(groups, correlation, draws=draws)
    pairs = sorted(pair for group in groups for pair in group)
    rows, x, y = [], [], []
    for part in np.array_split(np.arange(len(pairs)), QUANTILES):
        if len(part):
            inside = [pairs[i] for i in part]
            quality = math.fsum(pair[1] for pair in inside) / len(inside)
            rows.append([f"{inside[0][0]:.4f}", f"{inside[-1][0]:.4f}", str(len(inside)), f"{quality:.3f}"])
            x.append((inside[0][0] + inside[-1][0]) / 2)
            y.append(quality)
    return _finding(
        "confidence-and-reasoning",
        "The better a reasoning sequence, the surer its answer.",
        "Spearman's correlation of a sequence's confidence and the F1 of its reasoning's words against the true "
        f"reasoning, above 0 ({len(pairs)} sequences of {len(groups)} questions whose true reasoning is known).",
        interval,
        0.0,
        ("confidence from", "to", "sequences", "mean F1"),
        rows,
        {"kind": "line", "x": x, "y": y, "xlabel": "confidence", "ylabel": "F1 of the reasoning"},
    )


def _confidence_and_attention(questions: Sequence[Question], draws: int) -> _Draft:
    pairs = [(q.confidence, q.grounding) for q in questions if q.confidence is not None and q.grounding is not None]
    interval = bootstrap(pairs, _correlation, draws=draws)
    lift = bootstrap([pair[1] for pair in pairs], _mean, draws=draws)
    rows = [] if lift is None else [[f"{lift[0]:+.4f}", f"{lift[1]:+.4f}", f"{lift[2]:+.4f}"]]
    return _finding(
        "confidence-and-attention",
        "The surer the answer, the more the latents attend to what the answer rests on.",
        "Spearman's correlation of the confidence and the attention lift, above 0. The lift is the share of the "
        "latents' attention on the relevant boxes less the share of the picture they cover "
        f"({len(pairs)} questions with boxes).",
        interval,
        0.0,
        ("mean lift", "low", "high"),
        rows,
        {
            "kind": "points",
            "x": [pair[0] for pair in pairs],
            "y": [pair[1] for pair in pairs],
            "xlabel": "confidence",
            "ylabel": "attention lift",
        },
    )


def _confidence_by_round(questions: Sequence[Question], draws: int) -> Iterator[_Draft]:
    searched = [q for q in questions if q.rewards]
    longest = max((len(q.rewards) for q in searched), default=0)

    def at(question: Question, number: int) -> float:
        return question.rewards[min(number, len(question.rewards) - 1)]

    right, wrong = ([q for q in searched if q.correct is flag] for flag in (True, False))
    means = [[_mean([at(q, number) for q in side]) for number in range(longest)] for side in (right, wrong)]
    rows = [
        [str(number), *("-" if side[number] is None else f"{side[number]:.4f}" for side in means)]
        for number in range(longest)
    ]
    plot = {
        "kind": "lines",
        "x": list(range(longest)),
        "series": {"ends right": means[0], "ends wrong": means[1]},
        "xlabel": "round of the search",
        "ylabel": "mean reward of the current state",
    }

    def widened(chosen: Sequence[Question]) -> float | None:
        last, first = (_area([(at(q, number), q.correct) for q in chosen]) for number in (longest - 1, 0))
        return None if last is None or first is None else last - first

    enough = _enough([q.correct for q in searched])
    numbers = [
        bootstrap([(at(q, number), q.correct) for q in searched], _area, 0.5, draws=draws) if enough else None
        for number in range(longest)
    ]
    known = [each for each in numbers if each is not None]
    # True of every round only if it is of the worst one, so that no correction for the number of rounds is due.
    worst = min(known, key=lambda each: each.low) if len(known) == longest and known else None
    yield _finding(
        "rounds-right-above-wrong",
        "In every round, questions that end right have a higher reward than those that end wrong.",
        "AUROC of the reward of the current state, above 0.5 in every round; the interval is that of the round with "
        f"the lowest bound ({len(right)} right, {len(wrong)} wrong).",
        worst,
        0.5,
        ("round", "mean reward, ends right", "ends wrong"),
        rows,
        plot,
    )
    interval = bootstrap(searched, widened, draws=draws) if longest > 1 and enough else None
    yield _finding(
        "rounds-widen-the-gap",
        "The search makes the reward tell right from wrong better than it did at the start.",
        "AUROC of the reward after the last round less that before the first, above 0 (the same questions).",
        interval,
        0.0,
    )


# ---------------------------------------------------------------------- reports


def study(
    reasoner: LatentReasoner,
    items: Sequence[Item],
    out: str | Path,
    *,
    name: str = "items",
    samples: int = 6,
    temperature: float = 1.0,
    system: str | None = None,
    noise: NoiseSettings | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask, analyse and write ``study.json``, ``study.md`` and ``study.html`` into a folder; gives back what the first
    holds. See ``collect`` for the arguments.

    Answers are kept in ``answers.jsonl`` as they come, and the same call again goes on there. Raises ``SettingsError``
    when the folder cannot be written, or holds the answers of another study.
    """
    from latent_tool.calibration.calibration import digest, is_folder
    from latent_tool.evaluation.datasets import dataset_fingerprint

    if not is_folder(reasoner.model):
        reasoner.engine()  # only then is it known which commit a hub id stands for
    folder, noise = Path(out).expanduser(), noise or NoiseSettings()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"The folder {str(out)!r} cannot be made ({error.strerror}).", "Name another.") from None
    facts = {
        "latent_tool": version("latent-tool"),
        "dataset": {"name": name, "fingerprint": dataset_fingerprint(items), "size": len(items)},
        "model": reasoner.model,
        "settings": reasoner.settings.model_dump(mode="json"),
        "budget": reasoner.budget.model_dump(mode="json"),
        "noise": noise.model_dump(mode="json"),
        "samples": samples,
        "temperature": temperature,
        "seed": reasoner.seed,
        "system": system,
    }
    made_of = {**facts, "configuration": reasoner.configuration(system=system)}
    with _kept(folder / ANSWERS, digest(made_of)) as (there, keep):
        questions, problems = collect(
            reasoner,
            items,
            samples=samples,
            temperature=temperature,
            system=system,
            noise=noise,
            batch=batch,
            progress=progress,
            there=there,
            keep=keep,
        )
    found = {
        "schema_version": "1",
        **facts,
        "answered": len(questions),
        "right": sum(question.correct for question in questions),
        "problems": problems,
        "findings": analyse(questions, noise),
    }
    write_study(folder, found)
    return found


@contextmanager
def _kept(
    path: Path, study: str
) -> Iterator[tuple[dict[str, Question | str], Callable[[Mapping[str, Question | str]], None]]]:
    """The answers that a file has from this study, and how further ones are appended to it; a torn line is dropped."""
    there: dict[str, Question | str] = {}
    whole = 0
    if path.exists():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        try:
            head, *lines = [json.loads(line) for line in data[:whole].splitlines()] or [{}]
            for line in lines:
                there[line["id"]] = line["problem"] or Question.model_validate(line["answer"])
        except (ValueError, KeyError, TypeError):
            raise SettingsError(f"{path.name} cannot be used; it was changed.", "Name another folder.") from None
        if whole and head.get("study") != study:
            raise SettingsError("The folder holds the answers of another study.", "Name another folder.")
    with path.open("ab") as file:
        if file.tell() > whole:
            file.truncate(whole)

        def append(lines: Sequence[Mapping[str, Any]]) -> None:
            file.write(b"".join(json.dumps(line, allow_nan=False).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

        def keep(added: Mapping[str, Question | str]) -> None:
            append(
                [
                    {
                        "id": name,
                        "answer": None if isinstance(end, str) else end.model_dump(mode="json"),
                        "problem": end if isinstance(end, str) else None,
                    }
                    for name, end in added.items()
                ]
            )

        if not whole:
            append([{"study": study}])
        yield there, keep


def write_study(folder: Path, found: Mapping[str, Any]) -> None:
    """Write the findings and both reports, each whole or not at all; the findings come last."""
    markdown, html = markdown_study(found), study_page(found)
    write_whole(folder / "study.md", markdown.encode())
    write_whole(folder / "study.html", html.encode())
    text = json.dumps(found, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    write_whole(folder / "study.json", text.encode())


def _facts(found: Mapping[str, Any]) -> list[str]:
    sequences = f"{found['samples']} reasoning sequences each, temperature {found['temperature']:g}"
    lines = [
        f"Model {found['model']}, data set {found['dataset']['name']}: {found['answered']} questions answered, "
        f"{found['right']} right; {sequences}; latent_tool {found['latent_tool']}.",
        "Intervals are 95 %, from a bootstrap over questions; p is two-sided and adjusted for the statements tested "
        f"(Holm). Below {LEVEL:g}, a statement *holds* or *does not hold*; else, with fewer than {FEWEST} questions, "
        f"or, where right and wrong answers are compared, fewer than {FEWEST_WRONG} of either, one *cannot tell*.",
    ]
    if found["problems"]:
        lines.append(f"Not asked, {len(found['problems'])}: {'; '.join(found['problems'][:20])}.")
    return lines


def _shown(interval: Mapping[str, float] | None) -> str:
    return "-" if interval is None else f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _tables(found: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]], str]]:
    from latent_tool.evaluation.report import p_value

    summary = [
        [each["claim"], each["verdict"], _shown(each["interval"]), "-" if each["p"] is None else p_value(each["p"])]
        for each in found["findings"]
    ]
    tables = [("What was found", ["observation", "verdict", "value and interval", "p"], summary, "")]
    for each in found["findings"]:
        title = f"{each['claim'].rstrip('.')}: {each['verdict']}"
        tables.append((title, each["header"], each["rows"], f"{each['test']} Found: {_shown(each['interval'])}."))
    return tables


def markdown_study(found: Mapping[str, Any]) -> str:
    """The findings as Markdown."""
    from latent_tool.evaluation.report import markdown_table

    lines = ["# Study", ""]
    for fact in _facts(found):
        lines += [fact, ""]
    for title, header, rows, note in _tables(found):
        lines += [f"## {title}", ""]
        if note:
            lines += [note, ""]
        if rows:
            lines += [markdown_table(header, rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def study_page(found: Mapping[str, Any]) -> str:
    """The findings as one self-contained page with plots. Raises ``MissingExtraError`` without matplotlib."""
    from latent_tool.evaluation.report import figure_svg, page

    figures = []
    for each in found["findings"]:
        plot = each["plot"]
        if plot is not None and plot["x"]:
            caption = f"{each['claim']} {each['verdict'].capitalize()}."
            figures.append((caption, figure_svg(_drawing(plot)), each["claim"]))
    return page("Study", [fact.replace("*", "") for fact in _facts(found)], _tables(found), figures)


def _drawing(plot: Mapping[str, Any]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        kind, x = plot["kind"], plot["x"]
        if kind == "histogram":
            axes.stairs(plot["y"], x, fill=True, color="#1b6ca8")
            axes.axvline(plot["mark"], color="#999", lw=0.8, ls=":")
            axes.set_ylabel("tokens")
        elif kind == "points":
            axes.plot(x, plot["y"], ".", ms=4, alpha=0.5, color="#1b6ca8")
        elif kind == "lines":
            for (name, values), colour in zip(plot["series"].items(), ("#3a7d44", "#c8553d"), strict=True):
                axes.plot(x, [math.nan if value is None else value for value in values], label=name, color=colour)
            axes.legend(frameon=False)
        else:
            axes.plot(x, plot["y"], marker="o", color="#1b6ca8")
        axes.set_xlabel(plot["xlabel"])
        if "ylabel" in plot:
            axes.set_ylabel(plot["ylabel"])

    return draw
