"""Run methods on the items of a data set, and write every answer down as soon as it is there.

Questions go through the model in fixed batches, so that a run that was killed and goes on gives the same rows as one
that was not: a batch that was not whole is answered again whole, and only the rows that are missing are written.
How a question is answered, scored and matched, and by which process, is told elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tool.calibration.configuration import configuration, fingerprint, is_folder, plain_quantization
from latent_tool.cannot_tell import PHRASES_OF_ALL
from latent_tool.errors import SettingsError
from latent_tool.evaluation.answers import Plan
from latent_tool.evaluation.datasets import Item, dataset_fingerprint
from latent_tool.evaluation.journal import Journal, locked
from latent_tool.evaluation.methods import Method, parse_method
from latent_tool.evaluation.runs import (
    ITEMS,
    MANIFEST,
    DatasetFacts,
    Manifest,
    MethodFacts,
    Row,
    Run,
    Source,
    extend_methods,
    load_run,
    read_manifest,
    read_rows,
)
from latent_tool.evaluation.workers import BatchRows, Task, Worker, Workers, here, in_processes
from latent_tool.files import expanded, make_folder, write_whole
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.scores import COMPARED
from latent_tool.settings import Budget, NoiseSettings, SearchSettings

if TYPE_CHECKING:
    from latent_tool.engine.engine import Engine

__all__ = ["Progress", "evaluate"]

# Told how many answers are there, how many there will be, and which method is at work.
Progress = Callable[[int, int, str], None]


def evaluate(
    model: LatentReasoner | Engine,
    items: Sequence[Item],
    methods: Sequence[str | Method],
    out: str | Path,
    *,
    name: str = "items",
    source: Source | None = None,
    batch: int = 16,
    processes: int = 1,
    workers: Workers | None = None,
    seed: int | None = None,
    system: str | None = None,
    noise: NoiseSettings | None = None,
    visual: bool = True,
    options: bool = True,
    report: bool = True,
    progress: Progress | None = None,
) -> Run:
    """Answer every item by every method, and report.

    What is in the folder already is kept: the same call again goes on where the last one ended, and a call with
    further methods adds them. Errors of single questions become rows; the run goes on.

    Args:
        model: a reasoner, whose settings, budget, generation and seed count, or an engine with the defaults.
        items: the questions; those with a ``problem`` become rows with an error.
        methods: names (``methods.parse_method``) or methods.
        out: folder of the run.
        name: the data set's name in the reports.
        source: where the data set lies, for ``latent-tool calibrate``, which looks at its pictures; ``None``: where the
            folder says it does.
        batch: questions answered together.
        processes: processes of one thread each; more than one needs a reasoner.
        workers: who answers instead, such as ``latent_tool.integrations.ray_actors.actors(8)``; needs a reasoner.
        seed: of the search and of samples; ``None``: the reasoner's.
        system: system text before every question.
        noise: how the image is noised for the visual dependency.
        visual: also measure the scores that need further images: visual dependency and masked entropy.
        options: ask questions that have options by the options' probabilities; otherwise every answer is free.
        report: also write the summary and the reports, which needs the extra ``evaluation``.
        progress: told after every batch.

    Raises ``SettingsError`` when the folder holds another run, ``DatasetError`` when its rows cannot be used, and what
    loading the model raises.
    """
    reasoner = model if isinstance(model, LatentReasoner) else None
    if processes < 1 or batch < 1:
        raise SettingsError("Processes and batch are at least 1.", "Leave them out for the defaults.")
    if (processes > 1 or workers is not None) and reasoner is None:
        raise SettingsError("Other processes need a reasoner, not an engine.", "Pass a LatentReasoner.")
    if processes > 1 and workers is not None:
        raise SettingsError("Processes are named beside other workers.", "Name one of the two.")
    _require_unique(items)
    folder = expanded(out)
    plan = Plan(
        methods=_ordered(methods, reasoner, _begun(folder)),
        generation=None if reasoner is None else reasoner.generation,
        images_first=True if reasoner is None else reasoner.images_first,
        system=system,
        seed=seed if seed is not None else 0 if reasoner is None else reasoner.seed,
        noise=(noise or NoiseSettings()) if visual else None,
        options=options and any(item.options for item in items),
        cannot_tell=PHRASES_OF_ALL if reasoner is None or reasoner.cannot_tell is None else reasoner.cannot_tell,
    )
    if reasoner is not None and not is_folder(reasoner.model):
        reasoner.engine()  # only then is it known which commit a hub id stands for, and whether it is one
    make_folder(folder)
    with locked(folder):
        manifest = _begin(folder, _manifest(model, plan, items, name, batch, source))
        journal = Journal(folder / ITEMS)
        rows = read_rows(journal.lines, manifest)
        _check_rows(rows, items)
        _check_matched(plan, rows, items)
        serve = workers or (here if processes == 1 else partial(in_processes, processes))
        answers = partial(serve, partial(Worker, model, plan, items))
        _work_through(answers, plan, items, batch, journal, rows, progress)
        run = load_run(folder)
        if report:
            from latent_tool.evaluation.report import write_reports
            from latent_tool.evaluation.summary import summarise
            from latent_tool.evaluation.thumbnails import make_thumbnails

            summary = summarise(run)
            make_thumbnails(folder, items, [question["id"] for question in summary["wrong"]["shown"]])
            write_reports(folder, summary)
    return run


def _require_unique(items: Sequence[Item]) -> None:
    if not items:
        raise SettingsError("There is nothing to evaluate.", "Pass at least one item.")
    if len({item.id for item in items}) < len(items):
        raise SettingsError("Two items have the same id.", "Give every item an id of its own.")


def _ordered(
    methods: Sequence[str | Method], reasoner: LatentReasoner | None, there: Manifest | None
) -> tuple[Method, ...]:
    """The methods, the random control after the search that it matches; that may be one that the run has already."""
    if not methods:
        raise SettingsError("There is no method to evaluate.", "Name at least one, such as greedy.")
    late = [name for name in methods if isinstance(name, str) and name.strip().startswith("random-latents")]
    early = [name for name in methods if name not in late]
    former = {} if there is None else there.methods
    known = tuple(
        Method(facts.name, facts.kind, SearchSettings(**facts.settings), Budget(**facts.budget))
        for facts in former.values()
    )
    chosen: list[Method] = []
    for wanted in [*early, *late]:
        method = wanted
        if isinstance(method, str):
            settings, budget = (None, None) if reasoner is None else (reasoner.settings, reasoner.budget)
            method = parse_method(method, settings, budget, seen=(*chosen, *known))
            if method.kind == "random" and method.name in former:  # it goes on with what it was begun with
                method = replace(method, matches=former[method.name].matches)
        if any(other.name == method.name for other in chosen):
            raise SettingsError(f"The method {method.name!r} is named twice.", "Name every method once.")
        chosen.append(method)
    return tuple(chosen)


# --- the folder --------------------------------------------------------------------------------------------------


def _manifest(
    model: LatentReasoner | Engine, plan: Plan, items: Sequence[Item], name: str, batch: int, source: Source | None
) -> Manifest:
    if isinstance(model, LatentReasoner):
        facts: dict[str, Any] = {
            "model": model.model,
            "revision": model.revision,
            "dtype": model.dtype,
            "quantization_config": model.quantization_config,
        }
    else:
        facts = {
            "model": model.vlm.name,
            "dtype": str(model.vlm.dtype).removeprefix("torch."),
            "quantization_config": getattr(model.vlm.model.config, "quantization_config", None),
        }
    methods = {}
    for method in plan.methods:
        other = {} if method.kind == "answer" else {"method": f"{method.kind} {method.sampling}"}
        prints = {
            score: fingerprint(
                score=score,
                **facts,
                system=plan.system,
                images_first=plan.images_first,
                settings=method.settings,
                budget=method.budget,
                generation=plan.generation,
                noise=plan.noise if score == "visual_dependency" else None,
                **other,
            )
            for score in COMPARED
        }
        generation = None if plan.generation is None else plan.generation.model_dump(mode="json")
        methods[method.name] = MethodFacts(**method.described(), generation=generation, fingerprints=prints)
    quantization = plain_quantization(facts.get("quantization_config"))
    return Manifest(
        latent_tool=version("latent-tool"),
        software={package: version(package) for package in ("torch", "transformers")},
        dataset=DatasetFacts(
            name=name,
            fingerprint=dataset_fingerprint(items),
            size=len(items),
            problems=sum(item.problem is not None for item in items),
            source=source,
        ),
        model={
            "name": facts["model"],
            "dtype": facts["dtype"],
            **({} if quantization is None else {"quantization": quantization}),
            **configuration(score="reward", **facts)["model"],
        },
        seed=plan.seed,
        system=plan.system,
        batch=batch,
        options=plan.options,
        noise=None if plan.noise is None else plan.noise.model_dump(mode="json"),
        methods=methods,
    )


def _begun(folder: Path) -> Manifest | None:
    """The manifest of a folder that has answers; one without, as of a model that could not be loaded, binds nobody."""
    items = folder / ITEMS
    return read_manifest(folder) if items.exists() and items.stat().st_size else None


def _begin(folder: Path, wanted: Manifest) -> Manifest:
    """Write the manifest, or check that the one that is there belongs to the same run; further methods are added."""
    there = _begun(folder)
    if there is None:
        if (folder / ITEMS).exists() and (folder / ITEMS).stat().st_size:
            raise SettingsError(f"{str(folder)!r} holds answers of an unknown run.", "Give an empty folder.")
        write_whole(folder / MANIFEST, _json(wanted))
        return wanted
    # A data set may have been moved since; a caller who does not say where it lies takes nothing from what is known.
    source = wanted.dataset.source or there.dataset.source
    there, wanted = _with_source(there, source), _with_source(wanted, source)
    for field in ("dataset", "model", "seed", "system", "batch", "noise", "options", "latent_tool"):
        if getattr(there, field) != getattr(wanted, field):
            raise SettingsError(
                f"The folder {str(folder)!r} holds a run with another {field}.",
                "Give another folder, or the same arguments to go on with that run.",
            )
    both = extend_methods(there, wanted.methods)
    if both != _begun(folder):
        write_whole(folder / MANIFEST, _json(both))
    return both


def _with_source(manifest: Manifest, source: Source | None) -> Manifest:
    return manifest.model_copy(update={"dataset": manifest.dataset.model_copy(update={"source": source})})


def _json(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(indent=2).encode() + b"\n"


def _check_rows(rows: Sequence[Row], items: Sequence[Item]) -> None:
    known = {item.id for item in items}
    if any(row.id not in known for row in rows):
        raise SettingsError("The folder holds answers to other questions.", "Give another folder.")


def _check_matched(plan: Plan, rows: Sequence[Row], items: Sequence[Item]) -> None:
    """A method whose evaluations are matched is in this call, or has answered everything."""
    names = {method.name for method in plan.methods}
    for method in plan.methods:
        wanted = method.matches
        if wanted is not None and wanted not in names and sum(row.method == wanted for row in rows) < len(items):
            raise SettingsError(
                f"{method.name} needs the evaluations of {wanted}, which has not answered every question yet.",
                f"Name {wanted} in the same call.",
            )


# --- the work ----------------------------------------------------------------------------------------------------


def _work_through(
    workers: Callable[[Sequence[Task]], Generator[BatchRows, None, None]],
    plan: Plan,
    items: Sequence[Item],
    size: int,
    journal: Journal,
    rows: Sequence[Row],
    progress: Progress | None,
) -> None:
    """Answer what is missing, batch by batch, and append it."""
    names = {method.name for method in plan.methods}
    known: dict[str, dict[tuple[str, str], int]] = {}
    for row in rows:
        known.setdefault(row.id, {})[row.id, row.method] = row.candidates
    total = len(items) * len(plan.methods)
    count = sum(row.method in names for row in rows)
    tasks: list[Task] = []
    for start in range(0, len(items), size):
        part = items[start : start + size]
        there = {key: candidates for item in part for key, candidates in known.get(item.id, {}).items()}
        if sum(name in names for _, name in there) < len(part) * len(plan.methods):
            tasks.append(Task(start, start + len(part), there))
    if progress is not None:
        progress(count, total, "loading the model" if tasks else "")
    if not tasks:
        return
    with closing(workers(tasks)) as answers:
        for batch in answers:
            for name, added in batch:
                journal.append([row.model_dump(mode="json") for row in added])
                count += len(added)
                if progress is not None:
                    progress(count, total, name)
