"""The reports of a run, in Markdown and as one self-contained page, both from ``summary.json`` and thumbnails.

``write_reports`` writes all three. ``page`` is there for other reports, too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tool.evaluation.plots import COLOURS, QUIET, figure_svg, label_lines
from latent_tool.evaluation.thumbnails import read_thumbnails
from latent_tool.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "figure_svg",
    "html_report",
    "markdown_report",
    "markdown_table",
    "measures_table",
    "page",
    "tables",
    "write_reports",
]

Table = tuple[str, list[str], list[list[str]], str]
_NONE = "-"
_HERE = Path(__file__).parent


def write_reports(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``, ``report.md`` and ``report.html``, each whole or not at all.

    The page shows the thumbnails that the folder has.
    """
    thumbnails = read_thumbnails(folder, [question["id"] for question in summary["wrong"]["shown"]])
    text = json.dumps(summary, indent=2, ensure_ascii=True, allow_nan=False) + "\n"
    write_whole(folder / "summary.json", text.encode())
    write_whole(folder / "report.md", markdown_report(summary).encode())
    write_whole(folder / "report.html", html_report(summary, thumbnails).encode())


# --- numbers and tables ------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def with_interval(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """``0.912 [0.890, 0.930]``."""
    if value is None or value["value"] is None:
        return _NONE
    return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return title, header, rows and an explanation of every table of a report."""
    methods = summary["methods"]
    found = [_methods_table(summary, methods)]
    if any(facts.get("measures") for facts in methods.values()):
        found.append(measures_table(methods))
    others = [pair for pair in summary["pairs"] if pair["against"] != summary["baseline"]]
    if others:
        found.append(_pairs_table(others))
    scored = [(name, facts) for name, facts in methods.items() if facts["scores"]]
    found += [_scores_table(summary, name, facts, explained=not number) for number, (name, facts) in enumerate(scored)]
    types = sorted({kind for facts in methods.values() for kind in facts["types"]})
    if len(types) > 1:
        rows = []
        for kind in types:
            shares = [facts["types"].get(kind) for facts in methods.values()]
            rows.append(
                [kind, *[_NONE if share is None else f"{share['value']:.3f} ({share['n']})" for share in shares]]
            )
        note = "In brackets: how many answers. Compare methods whose numbers are the same."
        found.append(("Accuracy by kind of question", ["kind", *methods], rows, note))
    failed = {name: facts["visual_errors"] for name, facts in methods.items() if facts["visual_errors"]}
    if failed:
        lines = [[name, str(each["count"]), each["first"]] for name, each in failed.items()]
        note = "The answers stand; their visual dependency or masked entropy is missing."
        found.append(("Visual scores that could not be measured", ["method", "answers", "first error"], lines, note))
    if summary["errors"]:
        shown = [
            [error["id"], error["method"], str(error["line"] or _NONE), f"{error['type']}: {error['message']}"]
            for error in summary["errors"][:200]
        ]
        note = f"{len(summary['errors'])} rows have an error" + (
            "; the first 200 are shown." if len(summary["errors"]) > 200 else "."
        )
        found.append(("Errors", ["item", "method", "line", "error"], shown, note))
    return found


def _methods_table(summary: Mapping[str, Any], methods: Mapping[str, Any]) -> Table:
    rows = []
    for name, facts in methods.items():
        paired, cost = facts["paired"], facts["cost"]
        rows.append(
            [
                name,
                str(facts["labelled"]),
                str(facts["errors"]),
                with_interval(facts["accuracy"]),
                _NONE if paired is None else f"{paired['fixed']} / {paired['broken']}",
                _NONE if paired is None else p_value(paired["p"]),
                _NONE if paired is None else with_interval(paired["gain"]),
                number(cost["candidates"], 0),
                number(cost["decoder_calls"], 0),
                number(cost["tokens"], 1),
                number(cost["seconds"]),
            ]
        )
    base = summary["baseline"]
    against = (
        ""
        if base is None
        else (
            f" *fixed / broken* counts answers that differ from {base}'s for the better and for the worse, *p* is "
            "McNemar's exact two-sided test of their difference, *gain* the difference in accuracy with its paired "
            "bootstrap interval."
        )
    )
    note = (
        "Accuracy with its 95 % interval (Wilson); an error counts as a wrong answer, a row that could not be asked "
        f"(of no use, or with an image that cannot be opened) is left out.{against} Costs are means per question, *s* "
        f"seconds in batches of {summary['batch']}."
    )
    header = ["method", "n", "errors", "accuracy", "fixed / broken", "p", "gain", "candidates", "calls", "tokens", "s"]
    return "Methods", header, rows, note


def measures_table(methods: Mapping[str, Any]) -> Table:
    """Return what a benchmark measures beside the share of right answers."""
    rows = []
    for name, facts in methods.items():
        measures = facts.get("measures") or {}
        yes_no = measures.get("yes_no") or {}
        rows.append(
            [
                name,
                with_interval(measures.get("credit")),
                with_interval(measures.get("groups")),
                *[number(yes_no.get(key)) for key in ("precision", "recall", "f1", "yes")],
            ]
        )
    note = (
        "*score*: mean of the rule's graded credit (VQA accuracy, ANLS, F1 of words). *groups*: share of pairs, or of "
        "questions asked with turned options, that were answered rightly every time. *precision*, *recall*, *F1*: of "
        "the answer yes, and the share of answers that are yes."
    )
    return "The benchmark's own measures", ["method", "score", "groups", "precision", "recall", "F1", "yes"], rows, note


def _pairs_table(pairs: Sequence[Mapping[str, Any]]) -> Table:
    from latent_tool.statistics import holm

    rows = [
        [
            pair["method"],
            pair["against"],
            str(pair["n"]),
            f"{pair['fixed']} / {pair['broken']}",
            p_value(pair["p"]),
            p_value(adjusted),
            with_interval(pair["gain"]),
        ]
        for pair, adjusted in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True)
    ]
    note = (
        "On the questions that both were asked: answers of the first that are right where the second's are wrong, and "
        "the other way round; McNemar's exact two-sided *p*, as it is for one comparison alone and adjusted for "
        f"{len(pairs)} by Holm's method; the *gain* in accuracy with its paired bootstrap interval."
    )
    header = ["method", "against", "n", "fixed / broken", "p", "p (Holm)", "gain"]
    return "Methods against each other", header, rows, note


def _scores_table(summary: Mapping[str, Any], name: str, facts: Mapping[str, Any], *, explained: bool) -> Table:
    """How good the scores of a method are; the columns are ``explained`` below the first of these tables."""
    named = dict(facts["scores"])
    fused = facts["fused"]
    if fused is not None:
        named["fused"] = fused
    rows = []
    for score, value in named.items():
        excess = None if value.get("ece") is None else max(0.0, value["ece"] - value["ece_floor"])
        rows.append(
            [
                score,
                str(value["n"]),
                str(value["missing"]),
                str(value["wrong"]),
                with_interval(value["auroc"]) + (" (few)" if value["few"] else ""),
                number(value["aurc"], 4),
                number(value.get("ece")),
                number(value.get("ece_floor")),
                number(excess),
                number(value["coverage"]),
            ]
        )
    notes = []
    if explained:
        notes.append(
            "Each score as a confidence in the answers: *missing* counts those without it (failed ones are among "
            "them), which no threshold accepts; *AUROC* (95 %, Newcombe's score interval; *few*: fewer than 30 wrong "
            "or right answers, and a rough interval), *AURC* (area under the risk-coverage curve, lower is better), "
            "*ECE* "
            "of scores that are probabilities, the *floor* that a perfectly calibrated score would show on as many "
            "answers, and the share of answers that can be accepted at "
            f"{summary['target_error']:.0%} error, chosen on these same answers (a threshold with a guarantee comes "
            "from `latent-tool calibrate`)."
        )
    if fused is not None:
        verdict = "beats" if fused["wins"] else "does not beat"
        notes.append(
            f"*fused* for {name}: logistic regression on {', '.join(fused['from'])} by nested cross-validation; it "
            f"{verdict} the best single score, {fused['best_single']} (AUROC {with_interval(fused['gain'])} higher)."
        )
    header = ["score", "n", "missing", "wrong", "AUROC", "AURC", "ECE", "floor", "above floor", "coverage"]
    return f"Confidence in the answers of {name}", header, rows, " ".join(notes)


def _facts(summary: Mapping[str, Any]) -> list[str]:
    data = summary["dataset"]
    lines = [
        f"{data['size']} questions of {data['name']} (fingerprint {data['fingerprint'][:12]}), model "
        f"{summary['model']['name']}, seed {summary['seed']}, latent-tool {summary['latent_tool']}."
    ]
    if data["problems"]:
        lines.append(f"{data['problems']} rows of the data set could not be used; they are listed under errors.")
    unlabelled = max((facts["unlabelled"] for facts in summary["methods"].values()), default=0)
    if unlabelled:
        lines.append(f"{unlabelled} questions have no label and are in no accuracy.")
    for name, facts in summary["methods"].items():
        if facts.get("abstained"):
            share, wrong = facts["answered"], facts["error_answered"]
            errors = "" if wrong is None else f", and {number(wrong)} of what it answers is wrong"
            lines.append(
                f"{name} says of {facts['abstained']} of {facts['labelled']} questions that it cannot be told; it "
                f"answers {with_interval(share)}{errors}. Accuracy counts what is not answered as not right."
            )
    if not summary["complete"]:
        lines.append("The run is not complete: run the same command again to go on.")
    return lines


# --- Markdown ----------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; signs that would end a cell or begin a tag are broken."""

    def written(cell: str) -> str:
        whole = " ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|")
        return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", whole)

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(written, cells))} |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def _markdown_wrong(wrong: Mapping[str, Any], most: int = 20) -> str:
    """The wrong answers, surest first, one line for each."""
    rows = []
    for question in wrong["shown"][:most]:
        answers = "; ".join(
            f"{answer['method']}: {answer['error'] or answer['answer']} ({number(answer['confidence'], 4)})"
            for answer in question["answers"]
        )
        rows.append([question["id"], ", ".join(question["images"]), question["question"], question["label"], answers])
    return markdown_table(["item", "picture", "question", "right", "answers (confidence)"], rows)


def markdown_report(summary: Mapping[str, Any]) -> str:
    """Return the report in Markdown."""
    parts = ["# Evaluation", "\n".join(_facts(summary))]
    if summary["wrong"]["shown"]:
        parts += ["## The surest wrong answers", _markdown_wrong(summary["wrong"])]
    for title, header, rows, note in tables(summary):
        parts += [f"## {title}", *([markdown_table(header, rows)] if rows else []), *([note] if note else [])]
    return "\n\n".join(parts) + "\n"


# --- HTML --------------------------------------------------------------------------------------------------------


def page(
    title: str,
    facts: Sequence[str],
    tables: Sequence[Table],
    figures: Sequence[tuple[str, str, str]],
    wrong: Mapping[str, Any] | None = None,
) -> str:
    """Return one page without scripts and without anything from elsewhere; its template is ``report.html``.

    Args:
        figures: caption, SVG text and a description for those who cannot see it.
        wrong: the answers that are shown first, as ``_wrong_answers`` has them.
    """
    from jinja2 import Environment
    from markupsafe import Markup, escape

    def emphasised(text: str) -> Markup:
        shown = str(escape(text))
        shown = re.sub(r"\*([^*]+)\*", r"<em>\1</em>", shown)
        return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", shown))

    template = Environment(autoescape=True).from_string(_HERE.joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        facts=facts,
        tables=tables,
        figures=[(caption, Markup(svg), alt) for caption, svg, alt in figures],
        emphasised=emphasised,
        css=Markup(_HERE.joinpath("report.css").read_text(encoding="utf-8")),
        wrong=wrong,
        kinds=[] if wrong is None else wrong["kinds"],
    )


def html_report(summary: Mapping[str, Any], thumbnails: Mapping[str, str] | None = None) -> str:
    """Return the report as one self-contained page, the wrong answers first.

    ``thumbnails``: pictures as data URIs, by the id of their question. Raises ``MissingExtraError`` without matplotlib.
    """
    wrong = _wrong_answers(summary, thumbnails or {})
    return page("Evaluation", _facts(summary), tables(summary), _figures(summary), wrong)


def _wrong_answers(summary: Mapping[str, Any], thumbnails: Mapping[str, str]) -> dict[str, Any] | None:
    """The wrong answers of a summary as the page shows them: numbers as text, kinds by their place from 1."""
    listed = summary["wrong"]
    if not listed["shown"]:
        return None
    counts = Counter(question["type"] or "no kind" for question in listed["shown"])
    places = {kind: place for place, kind in enumerate(sorted(counts), start=1)}
    shown = [
        {
            **question,
            "kind": places[question["type"] or "no kind"],
            "thumbnail": thumbnails.get(question["id"]),
            "answers": [{**answer, "shown": number(answer["confidence"], 4)} for answer in question["answers"]],
        }
        for question in listed["shown"]
    ]
    few = f"; the {len(shown)} surest are shown" if len(shown) < listed["count"] else ""
    note = (
        f"Questions that some method answered wrongly, the surest wrong answer first: {listed['count']}{few}. The "
        "confidence is the raw score that a method is gated on by default."
    )
    return {"shown": shown, "kinds": [(kind, counts[kind]) for kind in places], "note": note}


def _reliability(score: str, points: Sequence[Sequence[float]]) -> Callable[[Axes], None]:
    """A panel with one score's share of right answers per bin, and how many answers each bin has."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=QUIET, lw=0.8, ls=":")
        axes.plot(
            [mean for mean, _, _ in points], [share for _, share, _ in points], "o-", ms=3, lw=1, color=COLOURS[0]
        )
        for number, (mean, share, count) in enumerate(points):
            above = number % 2 == 0  # bins lie close together: numbers take turns
            axes.annotate(
                f"{count:.0f}",
                (mean, share),
                (0, 6 if above else -6),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                fontsize=7,
                color=QUIET,
            )
        axes.set_xlim(-0.05, 1.05)
        axes.set_ylim(-0.12, 1.12)
        axes.set_title(score, fontsize=9)
        axes.set_xlabel("score")
        axes.set_ylabel("share of right answers")

    return draw


def _figures(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    methods = {name: facts for name, facts in summary["methods"].items() if facts["accuracy"] is not None}
    if not methods:
        return []

    def accuracy(axes: Axes) -> None:
        for place, facts in enumerate(methods.values()):
            share = facts["accuracy"]
            reach = [[share["value"] - share["low"]], [share["high"] - share["value"]]]
            axes.errorbar(share["value"], place, xerr=reach, fmt="o", color=COLOURS[0], capsize=3)
        axes.set_yticks(range(len(methods)), list(methods))
        axes.invert_yaxis()
        axes.set_xlabel("accuracy")

    drawn = [
        ("Accuracy with 95 % intervals.", figure_svg(accuracy, height=1 + 0.35 * len(methods)), "accuracy by method")
    ]
    for name, facts in methods.items():
        scores = facts["scores"]
        if not scores:
            continue

        def curves(axes: Axes, scores: Mapping[str, Any] = scores) -> None:
            ends = []
            for place, (score, value) in enumerate(scores.items()):
                coverage, risk = zip(*value["curve"], strict=True)
                colour = COLOURS[place % len(COLOURS)]
                axes.plot(coverage, risk, color=colour, lw=1.4)
                ends.append((score, coverage[-1], risk[-1], colour))
            axes.axhline(summary["target_error"], color=QUIET, lw=0.8, ls=":")
            axes.set_xlabel("share of answers accepted, surest first")
            axes.set_ylabel("error among them")
            label_lines(axes, ends)

        drawn.append((f"Risk and coverage, answers of {name}.", figure_svg(curves), f"risk-coverage curves of {name}"))
        probabilities = {score: value["reliability"] for score, value in scores.items() if "reliability" in value}
        if not probabilities:
            continue

        panels = [_reliability(score, points) for score, points in probabilities.items()]
        caption = (
            f"Reliability, answers of {name}: above the line, answers are right more often than the score says. The "
        )
        caption += "numbers are how many answers a point stands for."
        drawn.append((caption, figure_svg(*panels, width=3.1, height=2.9), f"reliability of {name}"))
    return drawn
