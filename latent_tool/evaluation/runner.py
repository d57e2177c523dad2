"""Run methods on the items of a data set, and write every answer down as soon as it is there.

Questions go through the model in fixed batches, so that a run that was killed and goes on gives the same rows as one
that was not: a batch that was not whole is answered again whole, and only the rows that are missing are written.
This module calls the engine; how a question is answered, scored and matched is told elsewhere.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tool.calibration.calibration import configuration, fingerprint, is_folder
from latent_tool.errors import LatentToolError, SettingsError
from latent_tool.evaluation.datasets import Item, dataset_fingerprint
from latent_tool.evaluation.methods import Method, parse_method
from latent_tool.evaluation.runs import (
    ITEMS,
    MANIFEST,
    DatasetFacts,
    Failure,
    Manifest,
    MethodFacts,
    Row,
    Run,
    extend_methods,
    load_run,
    read_manifest,
    read_rows,
    row_line,
)
from latent_tool.evaluation.scores import SCORES, answer_scores, measured, vote
from latent_tool.files import write_whole
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.settings import Budget, GenerationSettings, NoiseSettings, SearchSettings

if TYPE_CHECKING:
    from latent_tool.engine.engine import Engine, Examined, Job, Outcome, Sampled

__all__ = ["Found", "Progress", "Task", "Worker", "Workers", "evaluate"]

# Told how many answers are there, how many there will be, and which method is at work.
Progress = Callable[[int, int, str], None]
# A batch to answer: its first item, the one after its last, and which answers are there, with their candidates.
Task = tuple[int, int, dict[tuple[str, str], int]]
# The rows that were missing in a batch, method by method.
Found = list[tuple[str, list[Row]]]
# Who answers the batches: is given a function that makes a ``Worker`` in the process that calls it (both can be
# pickled) and the tasks; gives what was found for each, in their order, as it becomes known. Closing it ends the work.
Workers = Callable[[Callable[[], "Worker"], Sequence[Task]], Generator[Found, None, None]]


@dataclass(frozen=True)
class Plan:
    """What every batch needs to know."""

    methods: tuple[Method, ...]
    generation: GenerationSettings | None
    images_first: bool
    system: str | None
    seed: int
    noise: NoiseSettings | None


def evaluate(
    model: LatentReasoner | Engine,
    items: Sequence[Item],
    methods: Sequence[str | Method],
    out: str | Path,
    *,
    name: str = "items",
    batch: int = 16,
    processes: int = 1,
    workers: Workers | None = None,
    seed: int | None = None,
    system: str | None = None,
    noise: NoiseSettings | None = None,
    visual: bool = True,
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
        batch: questions answered together.
        processes: processes of one thread each; more than one needs a reasoner.
        workers: who answers instead, such as ``latent_tool.integrations.ray_actors.actors(8)``; needs a reasoner.
        seed: of the search and of samples; ``None``: the reasoner's.
        system: system text before every question.
        noise: how the image is noised for the visual dependency.
        visual: also measure the scores that need further images: visual dependency and masked entropy.
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
    folder = Path(out).expanduser()
    plan = Plan(
        methods=_ordered(methods, reasoner, _begun(folder)),
        generation=None if reasoner is None else reasoner.generation,
        images_first=True if reasoner is None else reasoner.images_first,
        system=system,
        seed=seed if seed is not None else 0 if reasoner is None else reasoner.seed,
        noise=(noise or NoiseSettings()) if visual else None,
    )
    if reasoner is not None and not is_folder(reasoner.model):
        reasoner.engine()  # only then is it known which commit a hub id stands for, and whether it is one
    _make(folder)
    with _locked(folder):
        manifest = _begin(folder, _manifest(model, plan, items, name, batch))
        rows, size = read_rows(folder / ITEMS, manifest)
        _check_rows(rows, items)
        _check_matched(plan, rows, items)
        serve = workers or (_here if processes == 1 else partial(_in_processes, processes))
        answers = partial(serve, partial(Worker, model, plan, items))
        _work_through(answers, plan, items, batch, folder / ITEMS, rows, size, progress)
        run = load_run(folder)
        if report:
            from latent_tool.evaluation.report import write_reports
            from latent_tool.evaluation.summary import summarise

            write_reports(folder, summarise(run))
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
    late = [each for each in methods if isinstance(each, str) and each.strip().startswith("random-latents")]
    early = [each for each in methods if each not in late]
    former = {} if there is None else there.methods
    known = tuple(
        Method(facts.name, facts.kind, SearchSettings(**facts.settings), Budget(**facts.budget))
        for facts in former.values()
    )
    found: list[Method] = []
    for each in [*early, *late]:
        if isinstance(each, str):
            settings, budget = (None, None) if reasoner is None else (reasoner.settings, reasoner.budget)
            each = parse_method(each, settings, budget, seen=(*found, *known))
            if each.kind == "random" and each.name in former:  # it goes on with what it was begun with
                each = replace(each, matches=former[each.name].matches)
        if any(other.name == each.name for other in found):
            raise SettingsError(f"The method {each.name!r} is named twice.", "Name every method once.")
        found.append(each)
    return tuple(found)


# --- the folder --------------------------------------------------------------------------------------------------


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"The folder {str(folder)!r} cannot be made ({error.strerror}).", "Give a folder that can be written to."
        ) from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time write to a run."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingsError(
                f"Another process is writing to {str(folder)!r}.", "Wait for it, or give another folder."
            ) from None
        yield


def _manifest(model: LatentReasoner | Engine, plan: Plan, items: Sequence[Item], name: str, batch: int) -> Manifest:
    if isinstance(model, LatentReasoner):
        facts: dict[str, Any] = {
            "model": model.model,
            "revision": model.revision,
            "dtype": model.dtype,
            "quantization_config": model.quantization_config,
        }
    else:
        facts = {"model": model.vlm.name, "dtype": str(model.vlm.dtype).removeprefix("torch.")}
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
            for score in SCORES
        }
        generation = None if plan.generation is None else plan.generation.model_dump(mode="json")
        methods[method.name] = MethodFacts(**method.described(), generation=generation, fingerprints=prints)
    return Manifest(
        latent_tool=version("latent-tool"),
        software={each: version(each) for each in ("torch", "transformers")},
        dataset=DatasetFacts(
            name=name,
            fingerprint=dataset_fingerprint(items),
            size=len(items),
            problems=sum(item.problem is not None for item in items),
        ),
        model={
            "name": facts["model"],
            "dtype": facts["dtype"],
            **configuration(score="reward", **facts)["model"],
        },
        seed=plan.seed,
        system=plan.system,
        batch=batch,
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
    for field in ("dataset", "model", "seed", "system", "batch", "noise", "latent_tool"):
        if getattr(there, field) != getattr(wanted, field):
            raise SettingsError(
                f"The folder {str(folder)!r} holds a run with another {field}.",
                "Give another folder, or the same arguments to go on with that run.",
            )
    both = extend_methods(there, wanted.methods)
    if both != there:
        write_whole(folder / MANIFEST, _json(both))
    return both


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
    workers: Callable[[Sequence[Task]], Generator[Found, None, None]],
    plan: Plan,
    items: Sequence[Item],
    size: int,
    path: Path,
    rows: Sequence[Row],
    whole: int,
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
            tasks.append((start, start + len(part), there))
    if progress is not None:
        progress(count, total, "loading the model" if tasks else "")
    with path.open("ab") as file:
        if file.tell() > whole:
            file.truncate(whole)
        if not tasks:
            return
        with closing(workers(tasks)) as answers:
            for found in answers:
                for name, answered in found:
                    file.write(b"".join(row_line(row) for row in answered))
                    file.flush()
                    os.fsync(file.fileno())
                    count += len(answered)
                    if progress is not None:
                        progress(count, total, name)


class Worker:
    """Answers batches of one run with one engine."""

    def __init__(self, model: LatentReasoner | Engine, plan: Plan, items: Sequence[Item]) -> None:
        self.engine = model.engine() if isinstance(model, LatentReasoner) else model
        self.plan = plan
        self.items = items

    def answer(self, task: Task) -> Iterator[tuple[str, list[Row]]]:
        """The rows of a batch that are missing, method by method. Errors of questions are rows."""
        start, stop, there = task
        return answer_batch(self.engine, self.plan, self.items[start:stop], there)


def _here(open_worker: Callable[[], Worker], tasks: Sequence[Task]) -> Generator[Found, None, None]:
    """Answer in this process: every method is told as soon as it is through."""
    worker = open_worker()
    for task in tasks:
        for found in worker.answer(task):
            yield [found]


def _in_processes(count: int, open_worker: Callable[[], Worker], tasks: Sequence[Task]) -> Generator[Found, None, None]:
    """Answer in other processes of this machine, each with one thread."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(count, len(tasks)), context, initializer=_open, initargs=(open_worker,))
    try:
        yield from pool.map(_serve, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


# The worker of a process.
_opened: list[Worker] = []


def _open(open_worker: Callable[[], Worker]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from latent_tool.engine.engine import use_threads

    use_threads(1)
    _opened.append(open_worker())


def _end_with_parent() -> None:
    """A killed run leaves no process behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _serve(task: Task) -> Found:
    return list(_opened[0].answer(task))


def answer_batch(
    engine: Engine, plan: Plan, items: Sequence[Item], there: dict[tuple[str, str], int]
) -> Iterator[tuple[str, list[Row]]]:
    """The rows of one batch that are missing, method by method.

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
    from latent_tool.engine.engine import Job

    asked = [item for item in items if not isinstance(images[item.id], Exception)]
    jobs = []
    for item in asked:
        matched = None if method.matches is None else candidates.get((item.id, method.matches))
        jobs.append(
            Job(
                images=images[item.id],
                question=item.question,
                system=plan.system,
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
            rows.append(_row(engine, method, item, outcome, examined.get(item.id), seconds))
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
    from latent_tool.engine.engine import Outcome

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
) -> Row:
    from latent_tool.engine.engine import Outcome

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
    return Row(
        id=item.id,
        method=method.name,
        type=item.type,
        question=item.question,
        label=item.label,
        answer=answer,
        correct=None if item.label is None else item.match.right(answer, item.label),
        scores=scores,
        seconds=seconds,
        candidates=outcome.usage.candidates,
        decoder_calls=outcome.usage.decoder_calls,
        tokens=outcome.usage.generated_tokens,
        details=details,
    )


def _failed(method: Method, item: Item, error: Exception, seconds: float, asked: bool = True) -> Row:
    """A row without an answer; ``asked=False``: its images could not be opened, so that no method had a chance."""
    message = error.message if isinstance(error, LatentToolError) else str(error)
    line = {} if item.line is None else {"line": item.line}
    return Row(
        id=item.id,
        method=method.name,
        type=item.type,
        question=item.question,
        label=item.label,
        seconds=seconds,
        error=Failure(type=type(error).__name__, message=message),
        details=line if asked else {**line, "asked": False},
    )
