"""The charts of a report: rewards and how sure the model was, round by round, as points of an SVG.

This module knows the rows of a trace, nothing of pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from latent_tool.words import confidence_text, number_text

if TYPE_CHECKING:
    from latent_tool.schema import TraceRow

__all__ = ["reward_chart"]

CHART_POINTS = 200
LARGEST_DRAWN = 1e100  # differences of larger rewards need not be finite, and NaN is not below it


def _thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of the rows, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def reward_chart(
    trace: Sequence[TraceRow], confidence: float | None = None, threshold: float | None = None
) -> dict[str, Any] | None:
    """Return lines and marks of the reward per round, in a view box of 640 x 300; ``None`` if there is nothing to draw.

    Under ``"sure"`` the probability of the first token, with confidence and threshold on the same scale from 0 to 1, in
    a view box of 640 x 170; ``None`` if no round has it.
    """
    rows = [row for row in trace if all(abs(value) <= LARGEST_DRAWN for value in (row.reward, row.best_reward))]
    if not rows:
        return None
    values = [value for row in rows for value in (row.reward, row.best_reward)]
    low, high = min(values), max(values)
    margin = (high - low) * 0.08 or max(abs(high) * 0.05, 1e-3)
    low, high = low - margin, high + margin
    first, last = rows[0].round, max(rows[-1].round, rows[0].round + 1)
    left, right, top, bottom = 92, 624, 24, 244

    def x(number: float) -> float:
        return round(left + (number - first) / (last - first) * (right - left), 1)

    def y(value: float) -> float:
        return round(bottom - (value - low) / (high - low) * (bottom - top), 1)

    thinned = _thinned(rows, CHART_POINTS)
    accepted = [row for row in rows if row.accepted]
    rises = (
        f"from {number_text(rows[0].best_reward, 4)} in round {rows[0].round} to {number_text(rows[-1].best_reward, 4)}"
    )
    where = ", ".join(str(row.round) for row in accepted[:20]) + (" and more" if len(accepted) > 20 else "")
    return {
        "best": " ".join(f"{x(row.round)},{y(row.best_reward)}" for row in thinned),
        "current": " ".join(f"{x(row.round)},{y(row.reward)}" for row in thinned),
        "sure": _sure(thinned, x, confidence, threshold),
        "single": len(rows) == 1,
        "marks": [
            {
                "x": x(row.round),
                "y": y(row.best_reward),
                "text_y": y(row.best_reward) + (26 if y(row.best_reward) < top + 20 else -14),
                "text": f"+{len(row.accepted)}",
                "title": f"Round {row.round}: {len(row.accepted)} {_plural(row.accepted)} accepted, "
                f"best reward {number_text(row.best_reward, 4)}",
            }
            for row in _thinned(accepted, 60)
        ],
        "ticks_y": [{"at": y(value), "text": number_text(value, 4)} for value in _ticks(low, high)],
        "ticks_x": [{"at": x(number), "text": str(number)} for number in _whole_ticks(first, last)],
        "summary": f"The best reward goes {rises} in round {rows[-1].round}. "
        + (f"Patches were accepted in round {where}." if accepted else "No patches were accepted."),
    }


def _sure(
    rows: Sequence[TraceRow], x: Callable[[float], float], confidence: float | None, threshold: float | None
) -> dict[str, Any] | None:
    """How probable the first token was, round by round; ``x`` places a round."""
    known = [(row.round, row.first_token_probability) for row in rows if row.first_token_probability is not None]
    if not known:
        return None

    def y(value: float) -> float:
        return round(150 - 134 * min(1.0, max(0.0, value)), 1)

    (_, start), (last, end) = known[0], known[-1]
    ends = "" if confidence is None else f"; the confidence of the answer is {confidence_text(confidence)}"
    return {
        "line": " ".join(f"{x(number)},{y(value)}" for number, value in known),
        "single": len(known) == 1,
        "ticks": [{"at": y(value), "text": f"{value:g}"} for value in (0, 0.5, 1)],
        "final": None if confidence is None else {"x": x(last), "y": y(confidence)},
        "threshold": None if threshold is None else y(threshold),
        "summary": f"The most probable first token goes from {confidence_text(start)} to {confidence_text(end)}{ends}.",
    }


def _plural(patches: Sequence[Any]) -> str:
    return "patch" if len(patches) == 1 else "patches"


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between ``low`` and ``high``."""
    rough = (high - low) / 4
    step: float = 10.0 ** math.floor(math.log10(rough))
    step *= min((1, 2, 5, 10), key=lambda factor: abs(factor * step - rough))
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _whole_ticks(first: int, last: int) -> list[int]:
    return sorted({round(first + (last - first) * i / 5) for i in range(6)})
