"""``latent-tool models``: which families of models are supported, and how well each was verified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from latent_tool.commands import options
from latent_tool.commands.output import print_out, reaching_stdout

if TYPE_CHECKING:
    from rich.table import Table

    from latent_tool.models.families import Family

__all__ = ["models"]

MARKS = {"prefix": "exact_prefix", "boxes": "boxes_verified", "decoding": "decoding_verified"}
TABLE_WIDTH = 130  # characters


def models(as_json: options.AsJson = False) -> None:
    """List the model families that are supported, and how well each was verified."""
    from latent_tool.models.families import supported

    if as_json:
        import json

        rows = [
            {
                "family": row.model_type,
                "example": row.example,
                **{mark: getattr(row, mark) for mark in MARKS.values()},
                "needs": list(row.needs),
                "note": row.note,
            }
            for row in supported()
        ]
        print_out(json.dumps(rows, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if console.width >= TABLE_WIDTH:
        with reaching_stdout():
            console.print(_table(supported()))
    else:
        print_out(_list(supported()))
    print_out(
        "\nprefix: scoring from the cache equals one full forward pass; boxes: every image cell found in the pixels;"
        "\ndecoding: equals the model's own generate. Checked on tiny random checkpoints of each family."
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
