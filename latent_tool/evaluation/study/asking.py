"""Ask the model everything that a study needs to know of every question; gives plain rows. Knows no tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from latent_tool.errors import SettingsError
from latent_tool.evaluation.datasets import Item
from latent_tool.evaluation.study.questions import Drawn, Question, attention_lift, word_f1
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.schema import Grounding, ReasoningResult
from latent_tool.settings import NoiseSettings, SamplingSettings

if TYPE_CHECKING:
    from latent_tool.engine.job import Job, Outcome, Sampled

__all__ = ["Progress", "collect"]

Progress = Callable[[int, int], None]


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
    problems = [
        f"{item.id}: {item.problem or 'no label'}" for item in items if item.problem is not None or item.label is None
    ]
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
    from latent_tool.engine.job import Job

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
