"""``latent-tool study``: do the observations of the method's authors hold for this model and these questions?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["study"]


def study(
    data: Annotated[
        str,
        typer.Argument(
            help="A .jsonl, .csv or .json file, a folder of images with a labels file, easy-vqa[:test|train], or "
            "scenes[:held_out|hard|train[:first-last]] (seeds, one question each)."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for study.md, study.html and study.json.")],
    model: Annotated[
        str, typer.Option(help="Checkpoint directory or hub id; the model that ships with the package by default.")
    ] = "embedded",
    device: Annotated[str, typer.Option(help="For example cpu or cuda:0; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    question: Annotated[str | None, typer.Option(help="Asked where a row has no question of its own.")] = None,
    system: Annotated[str | None, typer.Option(help="System text before every question.")] = None,
    budget: Annotated[str, typer.Option(help="quick, standard or thorough.")] = "standard",
    samples: Annotated[int, typer.Option(min=2, help="Reasoning sequences drawn for a question.")] = 6,
    temperature: Annotated[float, typer.Option(min=0.01, help="How freely they are drawn.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the search and of the sequences.")] = 0,
    match: Annotated[
        str | None, typer.Option(metavar="RULE", help="When an answer is right; as for latent-tool eval.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="At most N questions, drawn from the data set (always the same).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 8,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="List rows that cannot be used, and ask the others.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print study.json.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Look for the observations of the method's authors in a data set, and say which hold.

    The same command again goes on where the last one ended.

    Example: latent-tool study scenes:held_out --limit 100 --out study
    """
    import json

    from latent_tool.commands.evaluate import find_functions_here, require_libraries, show_progress

    find_functions_here(match)
    from latent_tool.evaluation.datasets import load_dataset
    from latent_tool.evaluation.study import study as run_study
    from latent_tool.langchain.reasoner import LatentReasoner

    require_libraries()
    items = load_dataset(data, match=match, question=question, keep_going=keep_going, limit=limit)
    reasoner = LatentReasoner(model=model, device=device, dtype=dtype, budget=budget, seed=seed)
    with show_progress(quiet) as tell:
        found = run_study(
            reasoner,
            items,
            out,
            name=Path(data).name if Path(data).exists() else data,
            samples=samples,
            temperature=temperature,
            system=system,
            batch=batch,
            progress=None if tell is None else lambda done, total: tell(done, total, "asking"),
        )
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=True))
        return
    for each in found["findings"]:
        interval = each["interval"]
        shown = "" if interval is None else f"  {interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
        print(f"{each['verdict']:14} {each['claim']}{shown}")
    print(f"\n{found['answered']} questions, {found['right']} right; {out}/study.html")
