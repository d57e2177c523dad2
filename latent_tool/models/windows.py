"""Windows of a picture that are shown to the model beside it, each encoded at its own resolution.

A window goes through the model's own processor and vision tower like any picture; its cells are cells of the picture
it was cut from. Values only: nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from latent_tool.models.prefix import Cell, Inputs
from latent_tool.models.prefix_cache import PER_TOKEN

__all__ = ["Window", "beside", "cut_out", "moved", "remainder"]


@dataclass(frozen=True)
class Window:
    """A part of a picture: which one, and left, top, right, bottom in its pixels."""

    image: int
    box: tuple[int, int, int, int]


def cut_out(images: Sequence[Image], windows: Sequence[Window]) -> list[Image]:
    """Cut windows out of the pictures, pixel for pixel."""
    return [images[window.image].crop(window.box) for window in windows]


def moved(cells: Sequence[Cell], pictures: int, windows: Sequence[Window]) -> tuple[Cell, ...]:
    """Name cells of windows by the pictures they were cut from, their boxes in those pictures' pixels.

    ``pictures``: how many pictures stand before the windows; cells of these stay as they are.
    """
    found = []
    for cell in cells:
        if cell.image >= pictures:
            window = windows[cell.image - pictures]
            box, (left, top, _, _) = cell.box, window.box
            placed = None if box is None else (box[0] + left, box[1] + top, box[2] + left, box[3] + top)
            cell = Cell(window.image, placed, cell.image - pictures)
        found.append(cell)
    return tuple(found)


def beside(inputs: Inputs, parts: Sequence[Inputs], windows: Sequence[Window]) -> Inputs:
    """Return a question's inputs with the cells of windows injected, whose own prompts are ``parts``."""
    placed = []
    for number, (part, window) in enumerate(zip(parts, windows, strict=True)):
        own = [replace(cell, window=number) for cell in moved(part.cells, 0, [window])]
        placed.append(replace(part, cells=tuple(own)))
    cells = (*inputs.cells, *(cell for part in placed for cell in part.cells))
    return replace(inputs, cells=cells, injected=tuple(placed))


def remainder(tensors: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Take from a prompt's inputs those of another prompt that it begins with; ``None`` if it does not.

    What stands per picture is told apart by its values: along the one dimension in which it is longer, it has to begin
    with the other's. The attention mask, which hides nothing, is left out.
    """
    length = known["input_ids"].shape[1]
    rest: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or name == "attention_mask":
            continue
        before = known.get(name)
        if not isinstance(before, Tensor) or before.dim() != value.dim():
            return None
        if name in PER_TOKEN:
            if not torch.equal(value[:, :length], before):
                return None
            rest[name] = value[:, length:]
            continue
        longer = [at for at, (one, other) in enumerate(zip(value.shape, before.shape, strict=True)) if one != other]
        if len(longer) != 1 or value.shape[longer[0]] < before.shape[longer[0]]:
            return None
        (along,), count = longer, before.shape[longer[0]]
        if not torch.equal(value.narrow(along, 0, count), before):
            return None
        rest[name] = value.narrow(along, count, value.shape[along] - count)
    return rest
