"""A scene -> one label per image cell, for the dense losses of both stages. Knows boxes and cells, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latent_tool.scenes import CHARACTERS, COLORS, SHAPES, Box, SceneObject
from training.settings import CELLS, CELLS_PER_SIDE, PATCH_SIZE

NAMES = (*SHAPES, "bar", *CHARACTERS, "nothing")
COLOR_NAMES = (*COLORS, "nothing")
NAME_INDEX = {name: index for index, name in enumerate(NAMES)}
COLOR_INDEX = {name: index for index, name in enumerate(COLOR_NAMES)}
IGNORE = -100
_COVERED = 0.15  # share of a cell that must be covered before the cell is labelled


def cells_of(boxes: Sequence[Box]) -> list[int]:
    """Indices of the image cells that the boxes touch, sorted. Boxes are in pixels of the model's square."""
    found: set[int] = set()
    for left, top, right, bottom in boxes:
        columns = range(max(0, int(left) // PATCH_SIZE), min(CELLS_PER_SIDE - 1, int(right) // PATCH_SIZE) + 1)
        rows = range(max(0, int(top) // PATCH_SIZE), min(CELLS_PER_SIDE - 1, int(bottom) // PATCH_SIZE) + 1)
        found.update(row * CELLS_PER_SIDE + column for row in rows for column in columns)
    return sorted(found)


def dense_labels(objects: Sequence[SceneObject] | None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Labels of every cell.

    Returns:
        ``(3, CELLS)`` integers: name, colour, and whether an object's centre lies in the cell (``IGNORE`` where
        unknown), and ``(CELLS, 2)`` offsets from the cell's middle to the object's centre, in cells.
    """
    classes = np.full((3, CELLS), IGNORE, np.int64)
    offsets = np.zeros((CELLS, 2), np.float32)
    if objects is None:
        return classes, offsets
    classes[0], classes[1], classes[2] = NAME_INDEX["nothing"], COLOR_INDEX["nothing"], 0
    best = np.zeros(CELLS)
    for thing in objects:
        left, top, right, bottom = thing.box
        for cell in cells_of([thing.box]):
            x, y = cell % CELLS_PER_SIDE * PATCH_SIZE, cell // CELLS_PER_SIDE * PATCH_SIZE
            wide = max(0.0, min(right, x + PATCH_SIZE) - max(left, x))
            high = max(0.0, min(bottom, y + PATCH_SIZE) - max(top, y))
            cover = wide * high / PATCH_SIZE**2
            central = x <= thing.center[0] < x + PATCH_SIZE and y <= thing.center[1] < y + PATCH_SIZE
            if cover + central <= best[cell]:
                continue
            best[cell] = cover + central
            if cover + central < _COVERED:
                classes[:, cell] = IGNORE
                continue
            classes[:, cell] = NAME_INDEX[thing.name], COLOR_INDEX[thing.color], int(central)
            offsets[cell] = (
                (thing.center[0] - x) / PATCH_SIZE - 0.5,
                (thing.center[1] - y) / PATCH_SIZE - 0.5,
            )
    return classes, offsets
