"""The measures of benchmarks that are more than a share of right answers: graded credit, groups, yes and no.

Made from the rows of a run; an answer that failed earns nothing. This module knows no files and no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latent_tool import statistics
from latent_tool.evaluation.runs import Row

__all__ = ["benchmark_measures"]


def benchmark_measures(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Return the measures that rows with labels have, ``None`` for each that they do not, or ``None`` if they have
    none.

    ``credit``: mean score by a graded rule. ``groups``: share of groups whose every question was answered rightly, such
    as MMVP's pairs and HR-Bench's turned options. ``yes_no``: precision, recall and F1 of the answer yes, as POPE has
    them, and the share of answers that are yes; an answer that is neither counts as wrong, and not as yes.
    """
    found = {"credit": _credit(rows), "groups": _groups(rows), "yes_no": _yes_no(rows)}
    return found if any(found.values()) else None


def _credit(rows: Sequence[Row]) -> dict[str, Any] | None:
    if not any(row.credit is not None for row in rows):
        return None
    earned = [row.credit or 0.0 for row in rows]
    return {"n": len(earned), **statistics.paired_bootstrap([0.0] * len(earned), earned)._asdict()}


def _groups(rows: Sequence[Row]) -> dict[str, Any] | None:
    members: dict[str, list[bool]] = {}
    for row in rows:
        if row.group is not None:
            members.setdefault(row.group, []).append(row.correct is True)
    if not members:
        return None
    whole = sum(map(all, members.values()))
    return {"n": len(members), **statistics.accuracy_interval(whole, len(members))._asdict()}


def _yes_no(rows: Sequence[Row]) -> dict[str, Any] | None:
    labels = [(row.label or "").strip().casefold() for row in rows]
    if not labels or set(labels) != {"yes", "no"}:
        return None
    said = [_said(row) for row in rows]
    both = sum(label == "yes" == answer for label, answer in zip(labels, said, strict=True))
    precision = both / said.count("yes") if "yes" in said else 0.0
    recall = both / labels.count("yes")
    return {
        "n": len(rows),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "yes": said.count("yes") / len(said),
    }


def _said(row: Row) -> str:
    """What an answer comes down to: as the label if it is right, else as it was counted."""
    if row.correct:
        return (row.label or "").strip().casefold()
    form = str(row.details.get("canonical", ""))
    return "yes" if form == "yes" or form.startswith("yes ") else form
