"""``latent-tool eval``: methods and confidences side by side on labelled questions.

Progress goes to stderr; stdout carries the table, or with ``--json`` the summary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latent_tool.commands import options

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["evaluate", "find_functions_here", "require_libraries", "show_progress"]


def evaluate(
    context: typer.Context,
    data: options.Data,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run; the same command again goes on there.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:SETTINGS]",
            help="May be repeated: greedy, reasoning, search, search-no-patches, patches-no-search, random-latents, "
            "random-draw, self-consistency, or all; with settings as in search:paper or search:latents=4,sigma=0.5. "
            "By default greedy, reasoning and search.",
        ),
    ] = None,
    preset: options.Preset = None,
    images: options.Images = None,
    match: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="When an answer is right: exact, choice, numeric, numeric:0.5, numeric:5%, rounded:2, yes-no, vqa, "
            "vqa:averaged, anls, relaxed:0.05, f1 or module:function; rows of the data may say otherwise.",
        ),
    ] = None,
    synonyms: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Words that mean the same, a group a line: square = rectangle."),
    ] = None,
    question: options.Question = None,
    model: options.Model = "embedded",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    compile: options.Compile = "auto",
    system: options.System = None,
    budget: options.Budget = options.Level.standard,
    seed: Annotated[int, typer.Option(help="Seed of the search and of samples.")] = 0,
    limit: options.Limit = None,
    batch: options.Batch = 16,
    processes: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 1,
    on_ray: Annotated[
        bool, typer.Option("--ray", help="Answer on Ray: the cluster of RAY_ADDRESS, or this machine alone.")
    ] = False,
    actors: Annotated[
        int, typer.Option(min=1, help="With --ray: engines at most, fewer while the cluster has no room.")
    ] = 1,
    num_cpus: Annotated[float, typer.Option(min=0, help="With --ray: processors of an engine.")] = 1,
    num_gpus: Annotated[float, typer.Option(min=0, help="With --ray: GPUs of an engine, also a fraction.")] = 0,
    visual: Annotated[
        bool, typer.Option(help="Also measure the scores that need further images: visual dependency, masked entropy.")
    ] = True,
    free_text: Annotated[
        bool,
        typer.Option("--free-text", help="Also answer questions that have options in the model's own words."),
    ] = False,
    keep_going: options.KeepGoing = False,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Rows need no label: scores are measured, accuracy is not.")
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure methods and confidences side by side on labelled questions.

    Example: latent-tool eval questions.jsonl --out runs/first --method greedy --method search --limit 200
    """
    find_functions_here(match)
    from latent_tool.evaluation.datasets import is_built_in, load_dataset
    from latent_tool.evaluation.methods import DEFAULT_METHODS, METHODS
    from latent_tool.evaluation.runner import evaluate as run_evaluation
    from latent_tool.evaluation.runs import Source
    from latent_tool.files import expanded

    require_libraries()
    workers = None
    if not on_ray:
        options.require_used(context, "with --ray", "actors", "num_cpus", "num_gpus")
    if on_ray:
        from latent_tool.integrations import ray_actors

        workers = ray_actors.actors(actors, num_cpus=num_cpus, num_gpus=num_gpus)
    items = load_dataset(
        data,
        preset=preset,
        images=images,
        match=match,
        synonyms=synonyms,
        question=question,
        keep_going=keep_going,
        unlabelled=unlabelled,
        limit=limit,
    )
    chosen = list(method or DEFAULT_METHODS)
    if "all" in chosen:
        chosen = list(METHODS)
    options.tell_what_it_is(model)
    reasoner = options.make_reasoner(
        model=model, device=device, dtype=dtype, quantize=quantize, compile=compile, budget=budget.value, seed=seed
    )
    with show_progress(quiet) as progress:
        run = run_evaluation(
            reasoner,
            items,
            chosen,
            out,
            name=data if is_built_in(data) else Path(data).name,
            source=Source.of(expanded(out), data, preset, images),
            batch=batch,
            processes=processes,
            workers=workers,
            system=system,
            visual=visual,
            options=not free_text,
            progress=progress,
        )
    summary = (run.path / "summary.json").read_text(encoding="utf-8")
    if as_json:
        print(summary, end="")
        return
    import json

    _show(json.loads(summary), run.path)


def find_functions_here(match: str | None) -> None:
    """Functions for ``--match`` are looked for in the current folder, too."""
    if match is not None and "" not in sys.path:
        sys.path.insert(0, "")


def require_libraries() -> None:
    """Raise ``MissingExtraError`` before any work is done if the reports could not be made after it."""
    from importlib.util import find_spec

    from latent_tool.errors import MissingExtraError

    if any(find_spec(name) is None for name in ("scipy", "sklearn", "matplotlib")):
        raise MissingExtraError("Evaluation", "evaluation")


@contextmanager
def show_progress(quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """Show a progress bar with the time left, on stderr; where it is interrupted, say that nothing is lost."""
    try:
        with _bar(quiet) as tell:
            yield tell
    except KeyboardInterrupt:
        print("Stopped. What was answered is kept: the same command goes on from there.", file=sys.stderr, flush=True)
        raise


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        # Speed is judged by what is done now, not by answers that a former run left.
        already: list[int] = []

        def tell(done: int, total: int, name: str) -> None:
            if not already:
                already.append(done)
            bar.update(task, description=name, completed=done - already[0], total=total - already[0])

        yield tell


def _show(summary: dict[str, Any], folder: Path) -> None:
    """The table of methods, for people."""
    from rich.console import Console
    from rich.text import Text

    from latent_tool.evaluation.report import measures_table, number, p_value, with_interval
    from latent_tool.evaluation.summary import GATED

    header = ["method", "n", "errors", "accuracy", "fixed / broken", "p", "AUROC", "candidates", "s"]
    rows = []
    for name, facts in summary["methods"].items():
        paired = facts["paired"]
        scores = facts["scores"]
        confidence = next((scores[name] for name in GATED if name in scores), None)
        rows.append(
            [
                name,
                str(facts["labelled"]),
                str(facts["errors"]),
                with_interval(facts["accuracy"]),
                "-" if paired is None else f"{paired['fixed']} / {paired['broken']}",
                "-" if paired is None else p_value(paired["p"]),
                with_interval(None if confidence is None else confidence["auroc"]),
                number(facts["cost"]["candidates"], 0),
                number(facts["cost"]["seconds"]),
            ]
        )
    console: Console = Console(highlight=False)
    _print_table(console, header, rows)
    if any(facts["measures"] for facts in summary["methods"].values()):
        _, header, rows, _ = measures_table(summary["methods"])
        console.print()
        _print_table(console, header, rows)
    console.print(Text(f"\nfixed, broken, p: against greedy (McNemar). AUROC: of the confidence. {folder}/report.html"))


def _print_table(console: Console, header: list[str], rows: list[list[str]]) -> None:
    """Print a table; where the terminal is too narrow for it, one block for every row."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in header:
        table.add_column(name, justify="left" if name == header[0] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
        console.print(table)
        return
    for row in rows:
        console.print(Text(row[0], style="bold"))
        own = Table.grid(padding=(0, 2))
        for name, value in zip(header[1:], row[1:], strict=True):
            own.add_row(Text("  " + name), Text(value))
        console.print(own)
