"""Plots of the reports: SVG text whose colours are those of the page, in light and in dark.

matplotlib knows no CSS variables, so that everything is drawn in stand-in colours that are replaced in the text. The
same drawing gives the same text.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from latent_tool.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "INK", "QUIET", "figure_svg", "label_lines"]

INK, QUIET = "#010101", "#020202"
COLOURS = ("#030301", "#030302", "#030303", "#030304", "#030305", "#030306", "#030307", "#030308")
_VARIABLES = {INK: "var(--ink)", QUIET: "var(--quiet)"} | {
    colour: f"var(--line-{place})" for place, colour in enumerate(COLOURS, start=1)
}


def figure_svg(*draws: Callable[[Axes], None], width: float = 7.0, height: float = 3.6) -> str:
    """Draw one panel for every function, side by side from the left, three in a row; SVG text without a header.

    ``width`` and ``height``: inches of a panel. Raises ``MissingExtraError`` without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Reports with figures", "evaluation") from error
    settings: dict[str, Any] = {"svg.hashsalt": "latent-tool", "svg.fonttype": "path", "font.size": 9}
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK)
    across = min(3, len(draws))
    down = -(-len(draws) // across)
    with matplotlib.rc_context({**settings, "axes.edgecolor": QUIET}):
        figure = Figure(figsize=(width * across, height * down), layout="constrained")
        for place, draw in enumerate(draws, start=1):
            axes = figure.add_subplot(down, across, place)
            axes.patch.set_visible(False)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            draw(axes)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text[text.index("<svg") :]


def label_lines(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write names beside the ends of lines, in their colours, moved apart where they would lie on one another.

    ``ends``: name, x and y of the last point, colour. Called when everything else is drawn.
    """
    if not ends:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    # A line of text is about 9 points high; the axes of a panel about 60 % of its height.
    figure: Any = axes.get_figure()
    apart = (high - low) * 11 / (0.8 * 72 * (figure.get_size_inches()[1] if figure is not None else 3.6))
    places: list[float] = []
    for _, _, y, _ in sorted(ends, key=lambda end: end[2]):
        places.append(max(y, places[-1] + apart) if places else y)
    over = places[-1] - high
    if over > 0:  # what was moved out at the top comes back in, downwards
        places[-1] = high
        for place in range(len(places) - 2, -1, -1):
            places[place] = min(places[place], places[place + 1] - apart)
    right = axes.get_xlim()[1]
    for (name, _, _, colour), at in zip(sorted(ends, key=lambda end: end[2]), places, strict=True):
        axes.text(
            right + 0.02 * (right - axes.get_xlim()[0]), at, name, color=colour, fontsize=8, va="center", clip_on=False
        )
