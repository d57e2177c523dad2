"""``latent-tool models``: which families are supported, how well each is verified, what their checkpoints need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latent_tool.commands import options
from latent_tool.commands.output import print_out, reaching_stdout

if TYPE_CHECKING:
    from rich.table import Table

    from latent_tool.models.facts import Published
    from latent_tool.models.families import Family

__all__ = ["models"]

MARKS = {"prefix": "exact_prefix", "boxes": "boxes_verified", "decoding": "decoding_verified"}
TABLE_WIDTH = 130  # characters


def models(
    fits: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Only models that answer questions in so much memory, such as 8GB."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """List the model families that are supported, how well each was verified, and what their checkpoints need."""
    from latent_tool.models.facts import AS_OF, fitting, parse_size
    from latent_tool.models.families import family, supported

    size = None if fits is None else parse_size(fits)
    known = fitting(size)
    if as_json:
        import json

        print_out(json.dumps(_rows(known, size), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    wide = console.width >= TABLE_WIDTH
    if fits is None:
        if wide:
            with reaching_stdout():
                console.print(_table(supported()))
        else:
            print_out(_list(supported()))
        print_out(
            "\nprefix: scoring from the cache equals one full forward pass; boxes: every image cell found in the "
            "pixels;\ndecoding: equals the model's own generate. Checked on tiny random checkpoints of each family.\n"
        )
    if not known:
        print_out(f"No model that is listed answers questions in {fits}.")
        return
    notes = {each.family: family(each.family) for each, _ in known}
    if wide:
        with reaching_stdout():
            console.print(_published_table(known, notes))
    else:
        print_out("\n".join(_published_line(each, how) for each, how in known))
    print_out(
        f"\nB: thousand million parameters; GB: what the weights take; {AS_OF}. Rows with ~ are from memory: look at "
        "the\nmodel's card before you rely on them, above all on a licence. Pictures and candidates need about a fifth "
        "more.\nlatent-tool doctor --model NAME measures it on this machine."
    )


def _rows(known: Sequence[tuple[Published, str | None]], size: float | None) -> list[dict[str, Any]]:
    """The families as they were always listed; each with the published facts of its checkpoints."""
    from latent_tool.models.facts import AS_OF, BYTES
    from latent_tool.models.families import supported

    rows = []
    for row in supported():
        checkpoints = [
            {
                "model": each.model,
                "parameters": None if each.billions is None else round(each.billions * 1e9),
                "licence": each.licence,
                "gated": each.gated,
                "checked": each.checked,
                "context": each.context,
                "gigabytes": {name: _rounded(each.gigabytes(name)) for name in BYTES},
                **({} if how is None else {"fits": how}),
            }
            for each, how in known
            if each.family == row.model_type
        ]
        if size is not None and not checkpoints:
            continue
        rows.append(
            {
                "family": row.model_type,
                "example": row.example,
                **{mark: getattr(row, mark) for mark in MARKS.values()},
                "needs": list(row.needs),
                "note": row.note,
                "checkpoints": checkpoints,
                "as_of": AS_OF,
            }
        )
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _cells(each: Published, how: str | None) -> list[str]:
    from latent_tool.models.facts import BYTES

    def shown(value: float | None) -> str:
        return "?" if value is None else f"{value:.1f}"

    context = "?" if each.context is None else f"{each.context:,}"
    sizes = [shown(each.gigabytes(name)) for name in BYTES]
    own = ("" if each.checked or each.billions is None else "~") + shown(each.billions)
    return [each.model, own, each.licence + (" (gated)" if each.gated else ""), context, *sizes] + (
        [] if how is None else [how]
    )


def _published_table(known: Sequence[tuple[Published, str | None]], notes: dict[str, Family | None]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    names = ["checkpoint", "B", "licence", "context", "GB bf16", "8 bit", "4 bit"]
    for name in [*names, *(["fits in"] if known[0][1] is not None else []), "needs"]:
        table.add_column(
            name,
            no_wrap=name == "checkpoint",
            justify="left" if name in ("checkpoint", "licence", "needs") else "right",
        )
    for each, how in known:
        row = notes[each.family]
        table.add_row(*_cells(each, how), ", ".join(row.needs) if row is not None else "")
    return table


def _published_line(each: Published, how: str | None) -> str:
    model, billions, licence, context, half, eight, four, *best = _cells(each, how)
    fits = f"; fits in {best[0]}" if best else ""
    return (
        f"{model}\n    {billions} B, {licence}, context {context}; GB: bf16 {half}, 8 bit {eight}, 4 bit {four}{fits}"
    )


def _table(rows: Sequence[Family]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("family", "for example", *MARKS, "needs", "note"):
        table.add_column(name, no_wrap=name in ("family", "for example"), overflow="fold")
    for row in rows:
        marks = ("yes" if getattr(row, mark) else "no" for mark in MARKS.values())
        table.add_row(row.model_type, row.example, *marks, ", ".join(row.needs), row.note)
    return table


def _list(rows: Sequence[Family]) -> str:
    """The same where lines are short: an id is there to be copied, and is never broken."""
    lines = []
    for row in rows:
        lines += [row.model_type, f"    {row.example}"]
        verified = ", ".join(name for name, mark in MARKS.items() if getattr(row, mark))
        lines.append(f"    {verified or 'nothing verified'}" + (f"; needs {', '.join(row.needs)}" if row.needs else ""))
        if row.note:
            lines.append(f"    {row.note}")
    return "\n".join(lines)
