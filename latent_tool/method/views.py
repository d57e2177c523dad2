"""Where to look again: windows of a picture in which the attention to it is densest.

The attention is that of the position from which the answer is predicted. Some cells are attended to whatever is asked
(sinks), so it is taken relative to the attention under a neutral question; what lies below the median is no sign. This
module knows no model: cells are boxes with a weight.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["density", "is_surer", "propose_windows", "random_windows", "relative_attention", "support"]

Box = tuple[float, float, float, float]

_GRID = 32  # bins per side in which the attention to a picture is laid out
_SIDES = (3 / 8, 4 / 8, 5.5 / 8)  # of a window, in sides of what it is a window of
_SECOND = (3 / 8, 4 / 8)  # the second place: as large as it is searched for, and as it is cut
_PRIOR = 0.3  # what a cell that the neutral question ignores counts, in shares of an even spread
_LEAST_PIXELS = 8  # a side of a window has at least
_SURER = 1.15  # times as sure as before is what a window has to make an answer
_LIKELY = 0.5  # what replaces "cannot tell" has at least: more likely right than wrong


def relative_attention(attention: Tensor, neutral: Tensor | None = None) -> Tensor:
    """Return attention ``(C,)`` relative to that under a neutral question, less its median; zero where it is below."""
    weights = attention.double()
    if neutral is not None:
        weights, usual = weights / weights.sum().clamp(min=1e-12), neutral.double()
        usual = usual / usual.sum().clamp(min=1e-12)
        weights = weights / (usual + _PRIOR / len(usual))
    return (weights - weights.median()).clamp(min=0)


def density(weights: Tensor, boxes: Sequence[Box | None], area: Box) -> Tensor:
    """Lay out the weights ``(C,)`` of cells over an area: ``(bins, bins)``, row by row.

    A cell spreads its weight evenly over its box; cells without a box, and what lies outside the area, are left out.
    """
    known = [index for index, box in enumerate(boxes) if box is not None]
    if not known:
        return torch.zeros(_GRID, _GRID, dtype=torch.double)
    placed = torch.tensor([boxes[index] for index in known], dtype=torch.double)  # (n, 4)
    steps = torch.arange(_GRID + 1, dtype=torch.double) / _GRID
    across, down = area[0] + (area[2] - area[0]) * steps, area[1] + (area[3] - area[1]) * steps

    def covered(low: Tensor, high: Tensor, edges: Tensor) -> Tensor:
        return (torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])).clamp(min=0)

    sizes = (placed[:, 2] - placed[:, 0]) * (placed[:, 3] - placed[:, 1])
    spread = weights.double()[known] / sizes.clamp(min=1e-9)
    columns, rows = covered(placed[:, 0], placed[:, 2], across), covered(placed[:, 1], placed[:, 3], down)
    return torch.einsum("n,ny,nx->yx", spread, rows, columns)


def propose_windows(layout: Tensor, area: Box, second: bool) -> list[tuple[int, int, int, int]]:
    """Propose windows of several sizes where a layout ``(bins, bins)`` of an area is densest.

    Args:
        layout: see ``density``.
        area: left, top, right, bottom of what is looked at again, in pixels.
        second: propose another place, too, where the layout is densest beside the first.

    Returns:
        Left, top, right, bottom in whole pixels inside the area; none where nothing stands out, or where the area is
        too small to hold a window that is smaller than itself.
    """
    if not bool((layout > 0).any()):
        return []
    found = [_cut(area, *_densest(layout, side), side) for side in _SIDES]
    if second:
        column, row = _densest(layout, _SIDES[1])
        rest = layout.clone()
        rest[
            round(row * _GRID) : round((row + _SIDES[1]) * _GRID),
            round(column * _GRID) : round((column + _SIDES[1]) * _GRID),
        ] = 0
        if bool((rest > 0).any()):
            small, large = _SECOND
            column, row = (min(max(0.0, start - (large - small) / 2), 1 - large) for start in _densest(rest, small))
            found.append(_cut(area, column, row, large))
    return _usable(found, area)


def is_surer(reward: float, before: float, blind: bool, min_gain: float = 0.0) -> bool:
    """Say whether an answer with a window beside the picture is so much surer than the one before that it stays.

    The surest of several windows is surer by chance alone, above all where it shows nothing new; and something is
    always said of some window.

    Args:
        reward: how sure the answer with the window is, in [0, 1].
        before: how sure the one before was.
        blind: whether the one before was "cannot tell".
        min_gain: what the reward has to rise by more than.
    """
    rises = round(reward - before, 6) > min_gain and reward >= _SURER * before
    return rises and (before > 0 or not blind or reward >= _LIKELY)


def support(
    answer: str, windows: Sequence[tuple[str, float]], whole: Sequence[tuple[str, float]], shrunk: float
) -> float:
    """Return how far all that was said support an answer with a window, in [0, 1].

    This is the share of the answer in all that was said, to the power of ``1 / shrunk``; what is said of the whole
    picture counts ``1 / shrunk`` as much as what is said of a window. The surest of several windows is surer than it is
    right, unless others say the same. The smaller a picture was made, the less is seen in the whole of it, the more of
    its windows show something else, and the less does it mean that something else is said. It is 1 where nothing else
    is said.

    Args:
        answer: what is supported, said of one of the windows at least.
        windows: of every window the answer with it, and how sure it was, in [0, 1]: 0 for "cannot tell", so that
            windows that show nothing of it are no objection.
        whole: the same of the whole picture alone.
        shrunk: how many times as long the picture's sides are as those that the model was given, at least 1.
    """
    smaller = max(1.0, shrunk)
    said = [*windows, *((other, reward / smaller) for other, reward in whole)]
    total = sum(reward for _, reward in said)
    ours = sum(reward for other, reward in said if _same(other, answer))
    return (ours / total) ** (1 / smaller) if total else 1.0


def _same(one: str, other: str) -> bool:
    """Whether two answers of one model differ in case, white space and a full stop at most."""
    first, second = (" ".join(text.casefold().split()).rstrip(".") for text in (one, other))
    return first == second


def _usable(windows: Sequence[tuple[int, int, int, int]], area: Box) -> list[tuple[int, int, int, int]]:
    """The windows that are large enough and smaller than the whole area, each once."""
    whole = math.floor(area[0]), math.floor(area[1]), math.ceil(area[2]), math.ceil(area[3])
    kept = [box for box in windows if box != whole and min(box[2] - box[0], box[3] - box[1]) >= _LEAST_PIXELS]
    return list(dict.fromkeys(kept))


def random_windows(area: Box, second: bool, source: random.Random) -> list[tuple[int, int, int, int]]:
    """Propose windows of the same number and sizes anywhere in an area: the control of ``propose_windows``."""
    sides = (*_SIDES, _SECOND[1]) if second else _SIDES
    return _usable([_cut(area, source.uniform(0, 1 - side), source.uniform(0, 1 - side), side) for side in sides], area)


def _densest(layout: Tensor, side: float) -> tuple[float, float]:
    """Left and top, in shares of the area, of the window of so many sides that holds most; its middle counts more."""
    bins = round(side * _GRID)
    ramp = 1 - ((torch.arange(bins, dtype=torch.double) + 0.5) / bins * 2 - 1).abs()
    kernel = 1 + 0.25 * torch.minimum(ramp[:, None], ramp)
    held = F.conv2d(layout[None, None], kernel[None, None])[0, 0]
    best = int(held.argmax())
    return best % held.shape[1] / _GRID, best // held.shape[1] / _GRID


def _cut(area: Box, column: float, row: float, side: float) -> tuple[int, int, int, int]:
    """A window in whole pixels: at a place and with sides in shares of the area."""
    width, height = area[2] - area[0], area[3] - area[1]
    left, top = math.floor(area[0] + column * width), math.floor(area[1] + row * height)
    right, bottom = math.ceil(area[0] + (column + side) * width), math.ceil(area[1] + (row + side) * height)
    return max(0, left), max(0, top), min(math.ceil(area[2]), right), min(math.ceil(area[3]), bottom)
