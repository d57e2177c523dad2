"""Answer the questions of one batch by every method of a run, and make a row of each answer.

An error belongs to its question and becomes that question's row: nothing in a row ends a run. Scores are kept to six
significant digits, those that compare two images to a thousandth of a nat: what follows is float32's noise. This module
calls the engine; it knows nothing of folders and processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from latent_tool.cannot_tell import PHRASES_OF_ALL, says_cannot_tell
from latent_tool.errors import LatentToolError
from latent_tool.evaluation.datasets import Item
from latent_tool.evaluation.datasets.items import sound
from latent_tool.evaluation.matching import GRADED
from latent_tool.evaluation.methods import Method
from latent_tool.evaluation.runs import Failure, Row
from latent_tool.schema import ReasoningResult
from latent_tool.scores import SCORES, score_of
from latent_tool.settings import GenerationSettings, NoiseSettings

if TYPE_CHECKING:
    from latent_tool.engine.engine import Engine
    from latent_tool.engine.job import Examined, Job, Outcome, Sampled

__all__ = ["Plan", "answer_batch", "answer_scores", "measured", "vote"]


@dataclass(frozen=True)
class Plan:
    """What every batch needs to know; ``options``: questions with options are asked by them."""

    methods: tuple[Method, ...]
    generation: GenerationSettings | None
    images_first: bool
    system: str | None
    seed: int
    noise: NoiseSettings | None
    options: bool = True
    cannot_tell: tuple[str, ...] = PHRASES_OF_ALL


def answer_batch(
    engine: Engine, plan: Plan, items: Sequence[Item], there: dict[tuple[str, str], int]
) -> Iterator[tuple[str, list[Row]]]:
    """Return the rows of one batch that are missing, method by method.

    ``there``: rows that exist already, by item and method (of this plan or not), with their candidates.
    """
    candidates = dict(there)
    images: dict[str, Any] = {}
    for item in items:
        try:
            images[item.id] = item.load()
        except Exception as error:  # whatever a loader raises belongs to its item
            images[item.id] = error
    for method in plan.methods:
        if all((item.id, method.name) in there for item in items):
            continue
        rows = _answer(engine, plan, method, items, images, candidates)
        for row in rows:
            candidates.setdefault((row.id, row.method), row.candidates)
        yield method.name, [row for row in rows if (row.id, row.method) not in there]


def _answer(
    engine: Engine,
    plan: Plan,
    method: Method,
    items: Sequence[Item],
    images: dict[str, Any],
    candidates: dict[tuple[str, str], int],
) -> list[Row]:
    """One row for every item, by one method."""
    from latent_tool.engine.job import Job

    asked = [item for item in items if not isinstance(images[item.id], Exception)]
    jobs = []
    for item in asked:
        matched = None if method.matches is None else candidates.get((item.id, method.matches))
        jobs.append(
            Job(
                images=images[item.id],
                question=item.question,
                system=plan.system,
                options=item.options if plan.options and method.sampling is None else None,
                settings=method.settings,
                budget=method.budget_for(matched),
                generation=plan.generation,
                images_first=plan.images_first,
                seed=plan.seed,
            )
        )
    # Every method pays for looking at the images: none may find them in the cache because another came before it.
    engine.vlm.prefix_cache.clear()
    began = time.perf_counter()
    found: dict[str, Outcome | Sampled | Exception] = {}
    if method.sampling is not None:
        found |= zip([item.id for item in asked], engine.sample_many(jobs, method.sampling), strict=True)
    else:
        found |= zip([item.id for item in asked], _in_time(engine, jobs), strict=True)
    seconds = (time.perf_counter() - began) / max(len(asked), 1)
    examined = _examined(engine, plan, found)
    rows = []
    for item in items:
        if isinstance(images[item.id], Exception):
            rows.append(_failed(method, item, images[item.id], 0.0, asked=False))
            continue
        outcome = found[item.id]
        try:
            rows.append(_row(engine, method, item, outcome, examined.get(item.id), seconds, plan.cannot_tell))
        except Exception as error:  # a matching function of the user's, above all
            rows.append(_failed(method, item, error, seconds))
    return rows


def _in_time(engine: Engine, jobs: Sequence[Job]) -> list[Outcome | Exception]:
    """All answers in one batch; one after another where a deadline is to hold for each."""
    if not any(job.budget.deadline_s for job in jobs):
        return engine.answer_many(jobs)
    found: list[Outcome | Exception] = []
    for job in jobs:
        deadline = None if job.budget.deadline_s is None else engine.clock() + job.budget.deadline_s
        found += engine.answer_many([replace(job, deadline=deadline)])
    return found


def _examined(
    engine: Engine, plan: Plan, found: dict[str, Outcome | Sampled | Exception]
) -> dict[str, Examined | Exception]:
    from latent_tool.engine.job import Outcome

    if plan.noise is None:
        return {}
    outcomes = {name: outcome for name, outcome in found.items() if isinstance(outcome, Outcome)}
    return dict(zip(outcomes, engine.examine_many(list(outcomes.values()), plan.noise), strict=True))


def _row(
    engine: Engine,
    method: Method,
    item: Item,
    outcome: Outcome | Sampled | Exception,
    examined: Examined | Exception | None,
    seconds: float,
    cannot_tell: Sequence[str],
) -> Row:
    from latent_tool.engine.job import Outcome

    if isinstance(outcome, Exception):
        return _failed(method, item, outcome, seconds)
    details: dict[str, Any]
    if isinstance(outcome, Outcome):
        result = engine.result(outcome)
        answer = result.answer
        details = {
            "raw_text": result.raw_text,
            "canonical": item.match.canonical(answer),
            "finish_reason": result.finish_reason,
            "stop_reason": result.stop_reason,
            "patches": len(result.patches),
        }
        if result.choices is not None:
            details["options"] = [measured(choice.probability) for choice in result.choices]
            details["mass"] = measured(result.mass)
        scores = answer_scores(result, None if isinstance(examined, Exception) else examined)
        if isinstance(examined, Exception):  # the answer stands; its visual scores are missing, and say why
            details["visual_error"] = f"{type(examined).__name__}: {examined}"
    else:
        forms = {place: item.match.canonical(each.text) for place, each in enumerate(outcome.answers)}
        chosen, share, chance = vote(outcome, forms)
        answer = outcome.answers[chosen].text
        scores = {"agreement": share, "answer_probability": measured(chance)}
        details = {
            "raw_text": outcome.answers[chosen].raw_text,
            "canonical": forms[chosen],
            "votes": [forms[place] for place in sorted(forms)],
            "probabilities": [measured(each) for each in outcome.probabilities],
        }
    graded = item.match.kind in GRADED
    details["abstained"] = abstained = says_cannot_tell(answer, cannot_tell)
    # Where "cannot tell" is an accepted answer, it is matched like any other.
    accepted = item.match.answers or (item.label or "",)
    judged = item.label is not None and (not abstained or any(says_cannot_tell(each, cannot_tell) for each in accepted))
    return Row(
        id=item.id,
        method=method.name,
        type=item.type,
        question=item.question,
        images=item.images,
        content=item.digest,
        label=item.label,
        answer=answer,
        correct=item.match.right(answer, item.label or "") if judged else None,
        credit=item.match.credit(answer, item.label or "") if judged and graded else None,
        group=item.group,
        scores=scores,
        seconds=seconds,
        candidates=outcome.usage.candidates,
        decoder_calls=outcome.usage.decoder_calls,
        tokens=outcome.usage.generated_tokens,
        details=details,
    )


def _failed(method: Method, item: Item, error: Exception, seconds: float, asked: bool = True) -> Row:
    """A row without an answer; ``asked=False``: its images could not be opened, so that no method had a chance."""
    try:
        message = error.message if isinstance(error, LatentToolError) else str(error)
    except Exception:  # an error of a function of the user's, which need not have a text
        message = "without a message"
    line = {} if item.line is None else {"line": item.line}
    return Row(
        id=item.id,
        method=method.name,
        type=item.type,
        question=item.question,
        images=item.images,
        content=item.digest,
        label=item.label,
        group=item.group,
        seconds=seconds,
        error=Failure(type=type(error).__name__, message=sound(message)),
        details=line if asked else {**line, "asked": False},
    )


def measured(value: float | None) -> float | None:
    """Return the value to six significant digits; ``None`` if it is no finite number."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _nats(value: float | None) -> float | None:
    """A difference of two images' logarithms to three decimals: theirs is the noise of both, some 1e-6."""
    return round(value, 3) if value is not None and math.isfinite(value) else None


def answer_scores(result: ReasoningResult, examined: Examined | None) -> dict[str, float | None]:
    """Return the scores of one answer, by name; ``None`` where not measured."""
    grounding = None if examined is None else examined.grounding
    seen = result.model_copy(update={"grounding": grounding})
    plain = [score for score in SCORES.values() if score.read and score.compared and score.name != "visual_dependency"]
    return {
        **{score.name: measured(score_of(result, score.name)) for score in plain},
        "visual_dependency": _nats(score_of(seen, "visual_dependency")),
        "masked_entropy_gain": None if examined is None else _nats(examined.masked_entropy_gain),
    }


def vote(sampled: Sampled, canonical: Mapping[int, str]) -> tuple[int, float, float]:
    """Return the most common answer among samples: which sample stands for it, its share, its mean probability.

    ``canonical``: the form in which each sample's answer is counted. Ties go to the larger sum of probabilities.
    """
    chances = sampled.probabilities
    groups: dict[str, list[int]] = {}
    for place, form in canonical.items():
        groups.setdefault(form, []).append(place)
    best = max(groups.values(), key=lambda places: (len(places), sum(chances[place] for place in places)))
    first = max(best, key=lambda place: chances[place])
    return first, len(best) / len(canonical), sum(chances[place] for place in best) / len(best)
