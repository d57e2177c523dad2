"""Where things lie on a drawn picture: the image in its frame, the patches as cells of the canvas, and their labels.

This module knows boxes and sizes, nothing of results; Pillow and numpy are imported when labels are placed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["LARGEST_SIDE", "LEGIBLE_SIDE", "Box", "Cells", "Label", "Layout", "labels_of", "layout_of"]

Box = tuple[float, float, float, float]
Cells = tuple[int, int, int, int]

LEGIBLE_SIDE = 480  # pixels: images with a shorter side below are scaled up by a whole factor ...
LARGEST_SIDE = 2048  # ... and those with a longer side above are scaled down


class Layout(NamedTuple):
    """Where the picture lies on the canvas; all in pixels of the canvas."""

    size: tuple[int, int]  # of the original image, in its own pixels
    left: int
    top: int
    width: int
    height: int
    canvas: tuple[int, int]
    line: int  # width of each of the outline's two tones
    font: int

    def cells(self, box: Box) -> Cells | None:
        """Return a box of the original image on the canvas, rounded outwards and cut at the picture; ``None``
        if empty.
        """
        if not all(math.isfinite(edge) for edge in box):
            return None
        across, down = self.width / self.size[0], self.height / self.size[1]
        tiny = 1e-6  # so that 12.0 computed in another order does not become 13
        x, y = ([min(max(0.0, edge), side) for edge in box[i::2]] for i, side in enumerate(self.size))
        left, right = math.floor(x[0] * across + tiny), math.ceil(x[1] * across - tiny)
        top, bottom = math.floor(y[0] * down + tiny), math.ceil(y[1] * down - tiny)
        if right <= left or bottom <= top:
            return None
        return left + self.left, top + self.top, right + self.left, bottom + self.top


def layout_of(size: tuple[int, int], largest: int = LARGEST_SIDE) -> Layout:
    """Scale and place an image of ``size`` (width, height) so that no side is above ``largest``, in pixels."""
    shorter, longer = min(size), max(size)
    if longer > largest:
        factor = largest / longer
        width, height = (max(1, round(side * factor)) for side in size)
    else:
        whole = max(1, min(math.ceil(LEGIBLE_SIDE / shorter), largest // longer))
        width, height = size[0] * whole, size[1] * whole
    font = min(30, max(15, min(width, height) // 24))
    line = max(2, font // 8)
    frame = font + 4 * line + 8  # room for a label beside the outline
    wide, high = max(width + 2 * frame, LEGIBLE_SIDE), height + 2 * frame
    return Layout(size, (wide - width) // 2, frame, width, height, (wide, high), line, font)


def _regions(placed: Sequence[tuple[int, Cells]]) -> list[list[tuple[int, Cells]]]:
    """Patches grouped so that those that overlap or share a stretch of an edge are together, each by rank."""
    import numpy as np

    if not placed:
        return []
    placed = sorted(placed)
    left, top, right, bottom = np.array([cells for _, cells in placed]).T
    across = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
    down = np.minimum(bottom[:, None], bottom) - np.maximum(top[:, None], top)
    touching = (across >= 0) & (down >= 0) & (across + down > 0)
    regions, waiting = [], np.ones(len(placed), dtype=bool)
    for first in range(len(placed)):
        if not waiting[first]:
            continue
        members, fresh = set[int](), [first]
        waiting[first] = False
        while fresh:
            members.update(fresh)
            reached = touching[fresh].any(axis=0) & waiting
            waiting[reached] = False
            fresh = [int(i) for i in np.flatnonzero(reached)]
        regions.append([placed[i] for i in sorted(members)])
    return regions


def _rank_text(ranks: Sequence[int]) -> str:
    """Ranks in rising order as a short label: ``"1-3, 7, +4"``."""
    runs: list[tuple[int, int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], rank)
        else:
            runs.append((rank, rank))
    shown = runs if len(runs) <= 4 else runs[:3]
    parts = [f"{a}" if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in shown]
    rest = sum(b - a + 1 for a, b in runs[len(shown) :])
    return ", ".join([*parts, f"+{rest}"] if rest else parts)


class Label(NamedTuple):
    """Ranks of a region and where they are written."""

    text: str
    box: Cells
    leader: tuple[int, int] | None  # the point of the region that a line leads to, if the label is not right beside it

    @property
    def middle(self) -> tuple[int, int]:
        left, top, right, bottom = self.box
        return (left + right) // 2, (top + bottom) // 2


def labels_of(layout: Layout, placed: Sequence[tuple[int, Cells]]) -> list[Label]:
    """Return a label for every region, where no evidence and no other label is; regions without such a place
    have none.
    """
    import numpy as np
    from PIL import ImageFont

    font = ImageFont.load_default(layout.font)
    taken = np.zeros((layout.canvas[1], layout.canvas[0]), dtype=bool)
    reach = 2 * layout.line
    for _, (left, top, right, bottom) in placed:
        taken[top - reach : bottom + reach, left - reach : right + reach] = True
    labels = []
    for region in _regions(placed):
        text = _rank_text([rank for rank, _ in region])
        size = math.ceil(font.getlength(text)) + layout.font // 2 + 2, layout.font + 6
        for (x, y), leader in _places([cells for _, cells in region], size, reach):
            right, bottom = x + size[0], y + size[1]
            on_canvas = x >= 0 and y >= 0 and right <= layout.canvas[0] and bottom <= layout.canvas[1]
            if on_canvas and not taken[y:bottom, x:right].any():
                taken[y:bottom, x:right] = True
                labels.append(Label(text, (x, y, right, bottom), leader))
                break
    return labels


def _places(
    region: Sequence[Cells], size: tuple[int, int], reach: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int] | None]]:
    """Places for a label, best first: its corner, and the point of the region that a line has to lead to, if any.

    First beside the cells, in the order of their ranks; then further and further off.
    """
    wide, high = size
    for left, top, right, bottom in region:
        for x in (left, right - wide):
            yield (x, top - reach - high), None
            yield (x, bottom + reach), None
        for y in (top, bottom - high):
            yield (right + reach, y), None
            yield (left - reach - wide, y), None
    for distance in range(1, 5):
        for left, top, right, bottom in region[:64]:
            for step_x, step_y in ((0, -1), (0, 1), (1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1)):
                corner_x = left - reach - wide if step_x < 0 else right + reach if step_x > 0 else left
                corner_y = top - reach - high if step_y < 0 else bottom + reach if step_y > 0 else top
                edge_x = left if step_x < 0 else right - 1 if step_x > 0 else (left + right) // 2
                edge_y = top if step_y < 0 else bottom - 1 if step_y > 0 else (top + bottom) // 2
                yield (corner_x + step_x * distance * high, corner_y + step_y * distance * high), (edge_x, edge_y)
