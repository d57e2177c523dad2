"""``latent-tool study``: do the observations of the method's authors hold for this model and these questions?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latent_tool.commands import options

__all__ = ["study"]


def study(
    data: options.Data,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for study.md, study.html and study.json.")],
    model: options.Model = "embedded",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    compile: options.Compile = "auto",
    question: options.Question = None,
    system: options.System = None,
    budget: options.Budget = options.Level.standard,
    samples: Annotated[int, typer.Option(min=2, help="Reasoning sequences drawn for a question.")] = 6,
    temperature: Annotated[float, typer.Option(min=0.01, help="How freely they are drawn.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the search and of the sequences.")] = 0,
    match: Annotated[
        str | None, typer.Option(metavar="RULE", help="When an answer is right; as for latent-tool eval.")
    ] = None,
    limit: options.Limit = None,
    batch: options.Batch = 8,
    keep_going: options.KeepGoing = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Look for the observations of the method's authors in a data set, and say which hold.

    The same command again goes on where the last one ended.

    Example: latent-tool study scenes:held_out --limit 100 --out study
    """
    import json

    from latent_tool.commands.evaluate import find_functions_here, require_libraries, show_progress

    find_functions_here(match)
    from latent_tool.evaluation.datasets import is_built_in, load_dataset
    from latent_tool.evaluation.study import study as run_study

    require_libraries()
    items = load_dataset(data, match=match, question=question, keep_going=keep_going, limit=limit)
    options.tell_what_it_is(model)
    reasoner = options.make_reasoner(
        model=model, device=device, dtype=dtype, quantize=quantize, compile=compile, budget=budget.value, seed=seed
    )
    with show_progress(quiet) as tell:
        found = run_study(
            reasoner,
            items,
            out,
            name=data if is_built_in(data) else Path(data).name,
            samples=samples,
            temperature=temperature,
            system=system,
            batch=batch,
            progress=None if tell is None else lambda done, total: tell(done, total, "asking"),
        )
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=True))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for each in found["findings"]:
        interval = each["interval"]
        shown = "" if interval is None else f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
        said = "\n".join(line for line in (each["claim"], shown, each["lacking"]) if line)
        table.add_row(Text(each["verdict"]), Text(said))
    console = Console(highlight=False)
    console.print(table)
    console.print(Text(f"\n{found['answered']} questions, {found['right']} right; {out}/study.html"))
