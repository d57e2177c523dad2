"""Write what a study says, in Markdown and as one self-contained page, both from the findings alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tool.evaluation.plots import COLOURS, QUIET, figure_svg, label_lines
from latent_tool.evaluation.report import markdown_table, p_value, page
from latent_tool.evaluation.study.observations import FEWEST, FEWEST_WRONG, LEVEL
from latent_tool.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["markdown_study", "study_page", "write_study"]


def write_study(folder: Path, found: Mapping[str, Any]) -> None:
    """Write the findings and both reports, each whole or not at all; the findings come last."""
    markdown, html = markdown_study(found), study_page(found)
    write_whole(folder / "study.md", markdown.encode())
    write_whole(folder / "study.html", html.encode())
    text = json.dumps(found, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    write_whole(folder / "study.json", text.encode())


def _facts(found: Mapping[str, Any]) -> list[str]:
    sequences = f"{found['samples']} reasoning sequences each, temperature {found['temperature']:g}"
    lines = [
        f"Model {found['model']}, data set {found['dataset']['name']}: {found['answered']} questions answered, "
        f"{found['right']} right; {sequences}; latent_tool {found['latent_tool']}.",
        "Intervals are 95 %, from a bootstrap over questions; p is two-sided and adjusted for the statements tested "
        f"(Holm). Below {LEVEL:g}, a statement *holds* or *does not hold*; else, with fewer than {FEWEST} questions, "
        f"or, where right and wrong answers are compared, fewer than {FEWEST_WRONG} of either, one *cannot tell*.",
    ]
    if found["problems"]:
        lines.append(f"Not asked, {len(found['problems'])}: {'; '.join(found['problems'][:20])}.")
    return lines


def _shown(interval: Mapping[str, float] | None) -> str:
    return "-" if interval is None else f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _tables(found: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]], str]]:
    summary = [
        [each["claim"], each["verdict"], _shown(each["interval"]), "-" if each["p"] is None else p_value(each["p"])]
        for each in found["findings"]
    ]
    tables = [("What was found", ["observation", "verdict", "value and interval", "p"], summary, "")]
    for each in found["findings"]:
        title = f"{each['claim'].rstrip('.')}: {each['verdict']}"
        if lacking := each.get("lacking"):
            tables.append((title, [], [], f"{each['test']} {lacking}"))
        else:
            tables.append((title, each["header"], each["rows"], f"{each['test']} Found: {_shown(each['interval'])}."))
    return tables


def markdown_study(found: Mapping[str, Any]) -> str:
    """Return the findings as Markdown."""
    lines = ["# Study", ""]
    for fact in _facts(found):
        lines += [fact, ""]
    for title, header, rows, note in _tables(found):
        lines += [f"## {title}", ""]
        if note:
            lines += [note, ""]
        if rows:
            lines += [markdown_table(header, rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def study_page(found: Mapping[str, Any]) -> str:
    """Return the findings as one self-contained page with plots. Raises ``MissingExtraError`` without matplotlib."""
    figures = []
    for each in found["findings"]:
        plot = each["plot"]
        if plot is not None and plot["x"] and not each.get("lacking"):
            caption = f"{each['claim']} {each['verdict'].capitalize()}."
            figures.append((caption, figure_svg(_drawing(plot)), each["claim"]))
    return page("Study", [fact.replace("*", "") for fact in _facts(found)], _tables(found), figures)


def _drawing(plot: Mapping[str, Any]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        kind, x = plot["kind"], plot["x"]
        if kind == "histogram":
            axes.stairs(plot["y"], x, fill=True, color=COLOURS[0])
            axes.axvline(plot["mark"], color=QUIET, lw=0.8, ls=":")
            axes.set_ylabel("tokens")
        elif kind == "points":
            axes.plot(x, plot["y"], ".", ms=4, alpha=0.5, color=COLOURS[0])
        elif kind == "lines":
            ends = []
            for (name, values), colour in zip(plot["series"].items(), (COLOURS[2], COLOURS[1]), strict=True):
                known = [(at, value) for at, value in zip(x, values, strict=True) if value is not None]
                axes.plot([at for at, _ in known], [value for _, value in known], color=colour)
                ends += [(name, *known[-1], colour)] if known else []
            axes.locator_params(axis="x", integer=True)
            label_lines(axes, ends)
        else:
            axes.plot(x, plot["y"], marker="o", color=COLOURS[0])
        axes.set_xlabel(plot["xlabel"])
        if "ylabel" in plot:
            axes.set_ylabel(plot["ylabel"])

    return draw
