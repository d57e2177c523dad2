"""Look for the observations that the method's authors report in plain answers, and say which hold.

Each observation is a statement with a test: a bootstrap over *questions* (the sequences of a question belong together)
gives a 95 % interval and a two-sided p value, which Holm's method adjusts for the statements that were tested. Where it
is below 5 %, the statement *holds* or *does not hold*, by the side on which the value lies; otherwise, and with too few
questions or too few wrong answers, one *cannot tell*. This module knows no model and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from latent_tool.errors import MissingExtraError, SettingsError
from latent_tool.evaluation.study.questions import Drawn, Question
from latent_tool.settings import NoiseSettings
from latent_tool.statistics import Estimate, auroc, bootstrap, holm, spearman

__all__ = ["FAILS", "FEWEST", "FEWEST_WRONG", "HOLDS", "LEVEL", "UNKNOWN", "analyse", "lacking", "verdict"]

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot tell"
DRAWS = 1000
FEWEST = 30  # questions below which nothing is tested
FEWEST_WRONG = 20  # wrong answers, and right ones, below which the two are not compared
LEVEL = 0.05
QUANTILES = 5


def verdict(found: Estimate | None, p: float, null: float, above: bool = True) -> str:
    """Return what an estimate says about a claim that its value lies above (or below) ``null``, at the adjusted p
    value.
    """
    if found is None or p >= LEVEL:
        return UNKNOWN
    return HOLDS if (found.value > null) is above else FAILS


def _enough(flags: Sequence[bool]) -> bool:
    """Whether there are enough right and wrong answers to compare them."""
    return min(sum(flags), len(flags) - sum(flags)) >= FEWEST_WRONG


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _area(pairs: Sequence[tuple[float, bool]]) -> float | None:
    """AUROC of (score, right) pairs; ``None`` if all are right or all wrong."""
    area = auroc([score for score, _ in pairs], [flag for _, flag in pairs]) if pairs else math.nan
    return None if math.isnan(area) else area


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


def analyse(
    questions: Sequence[Question], noise: NoiseSettings | None = None, draws: int = DRAWS
) -> list[dict[str, Any]]:
    """Return the findings, as plain JSON: claim, verdict, interval and test in words, a table and the numbers of a
    plot.

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
    *,
    of: int,
    groups: int,
    flags: Sequence[bool] | None = None,
) -> _Draft:
    """Draft a finding. ``of``: questions answered; ``groups``: those that can say something about it; ``flags``: right
    or wrong, where the two are compared."""
    shown = {
        "key": key,
        "claim": claim,
        "test": test,
        "header": list(header),
        "rows": [list(row) for row in rows],
        "plot": None if plot is None else dict(plot),
        "lacking": lacking(of, groups, flags) if found is None else None,
    }
    return _Draft(shown, found, null, above)


def lacking(of: int, groups: int, flags: Sequence[bool] | None = None) -> str:
    """Say what keeps a statement from being tested, and about how many questions like these it would take.

    Args:
        of: questions answered.
        groups: those that can say something about the statement.
        flags: right or wrong, where right and wrong answers are compared.
    """
    if not groups:
        return f"None of the {of} questions has what this needs."
    factor, why = FEWEST / groups, f"{groups} questions can be used, of at least {FEWEST}"
    if flags is not None:
        right = sum(flags)
        rarer, name = min((right, "right"), (len(flags) - right, "wrong"))
        if not rarer:
            wanted = "harder" if right else "easier"
            return f"No answer is {name}, so there is nothing to compare: ask {wanted} questions."
        if rarer < FEWEST_WRONG and FEWEST_WRONG / rarer > factor:
            factor, why = FEWEST_WRONG / rarer, f"{rarer} answers are {name}, of at least {FEWEST_WRONG}"
    if factor <= 1:
        return "The values hardly differ from question to question, so that nothing can be tested."
    return f"Too few to tell: {why}. It would take about {math.ceil(of * factor)} questions like these; there are {of}."


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
            of=len(questions),
            groups=sum(1 for _, count in counted if count),
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
        of=len(questions),
        groups=len(mixed),
        flags=[each.correct for question in mixed or questions for each in question.sequences],
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
        of=len(questions),
        groups=len(pairs),
        flags=[flag for _, flag in pairs],
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
        return spearman([pair for group in chosen for pair in group])

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
        of=len(questions),
        groups=len(groups),
    )


def _confidence_and_attention(questions: Sequence[Question], draws: int) -> _Draft:
    pairs = [(q.confidence, q.grounding) for q in questions if q.confidence is not None and q.grounding is not None]
    interval = bootstrap(pairs, spearman, draws=draws)
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
        of=len(questions),
        groups=len(pairs),
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
        of=len(questions),
        groups=len(searched),
        flags=[q.correct for q in searched],
    )
    interval = bootstrap(searched, widened, draws=draws) if longest > 1 and enough else None
    yield _finding(
        "rounds-widen-the-gap",
        "The search makes the reward tell right from wrong better than it did at the start.",
        "AUROC of the reward after the last round less that before the first, above 0 (the same questions).",
        interval,
        0.0,
        of=len(questions),
        groups=len(searched),
        flags=[q.correct for q in searched],
    )
