"""Study a data set: ask, keep the answers, analyse them, write the reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latent_tool.about import model_name
from latent_tool.calibration.configuration import digest, is_folder
from latent_tool.errors import SettingsError
from latent_tool.evaluation.datasets import Item, dataset_fingerprint
from latent_tool.evaluation.journal import Journal, locked
from latent_tool.evaluation.study.asking import Progress, collect
from latent_tool.evaluation.study.observations import analyse
from latent_tool.evaluation.study.questions import Question
from latent_tool.evaluation.study.report import write_study
from latent_tool.files import make_folder
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.settings import NoiseSettings

__all__ = ["study"]

ANSWERS = "answers.jsonl"


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
    if not is_folder(reasoner.model):
        reasoner.engine()  # only then is it known which commit a hub id stands for
    folder, noise = make_folder(out), noise or NoiseSettings()
    facts = {
        "latent_tool": version("latent-tool"),
        "dataset": {"name": name, "fingerprint": dataset_fingerprint(items), "size": len(items)},
        "model": model_name(reasoner.model),
        "settings": reasoner.settings.model_dump(mode="json"),
        "budget": reasoner.budget.model_dump(mode="json"),
        "noise": noise.model_dump(mode="json"),
        "samples": samples,
        "temperature": temperature,
        "seed": reasoner.seed,
        "system": system,
    }
    made_of = {**facts, "configuration": reasoner.configuration(system=system)}
    with locked(folder):
        journal = Journal(folder / ANSWERS)
        there = _kept(journal, digest(made_of))
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
            keep=lambda added: journal.append([_record(name, end) for name, end in added.items()]),
        )
    findings = {
        "schema_version": "1",
        **facts,
        "answered": len(questions),
        "right": sum(question.correct for question in questions),
        "problems": problems,
        "findings": analyse(questions, noise),
    }
    write_study(folder, findings)
    return findings


def _kept(journal: Journal, study: str) -> dict[str, Question | str]:
    """The answers that a journal has from this study; an empty one is begun."""
    there: dict[str, Question | str] = {}
    if not journal.lines:
        journal.append([{"study": study}])
        return there
    try:
        head, *records = [json.loads(line) for line in journal.lines]
        for record in records:
            there[record["id"]] = record["problem"] or Question.model_validate(record["answer"])
        same = head["study"] == study
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SettingsError(f"{journal.path.name} cannot be used; it was changed.", "Name another folder.") from None
    if not same:
        raise SettingsError("The folder holds the answers of another study.", "Name another folder.")
    return there


def _record(name: str, end: Question | str) -> dict[str, Any]:
    """One line of the journal: an answer, or why there is none."""
    problem = end if isinstance(end, str) else None
    return {"id": name, "answer": None if isinstance(end, str) else end.model_dump(mode="json"), "problem": problem}
