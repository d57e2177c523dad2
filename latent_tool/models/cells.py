"""Which pixels of the upright image every image cell of the prompt stands for, one short recipe per family.

A recipe gets a ``View`` of one image and returns one box per image cell of that image, in the order of the cells, or
``None`` in place of a box for cells that stand for no pixels (row separators, padding).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["RECIPES", "Box", "View", "cell_boxes"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """One image as the processor saw it."""

    config: Any
    image_processor: Any
    inputs: Mapping[str, Any]
    index: int
    width: int
    height: int
    cells: int


def grid(columns: int, rows: int, area: Box) -> list[Box]:
    """Boxes of a grid over an area, row by row."""
    left, top, right, bottom = area
    width, height = (right - left) / columns, (bottom - top) / rows
    return [
        (left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height)
        for row in range(rows)
        for column in range(columns)
    ]


def _merged_grid(view: View) -> list[Box | None]:
    """Qwen-VL and GLM-V: patches merged ``spatial_merge_size`` at a time, over the whole image."""
    _, rows, columns = (int(value) for value in view.inputs["image_grid_thw"][view.index])
    merge = view.config.vision_config.spatial_merge_size
    return list(grid(columns // merge, rows // merge, (0, 0, view.width, view.height)))


def _resized_and_cropped(view: View) -> list[Box | None]:
    """LLaVA: pad to a square, resize, crop the centre, each only if the image processor does so."""
    processor = view.image_processor
    side = math.isqrt(view.cells)
    width, height = float(view.width), float(view.height)
    left = top = 0.0
    if getattr(processor, "do_pad", False):
        square = max(width, height)
        left, top = -(square - width) / 2, -(square - height) / 2
        width = height = square
    area = (left, top, left + width, top + height)
    if getattr(processor, "do_center_crop", False):
        size, crop = processor.size, processor.crop_size
        if getattr(processor, "do_resize", True):
            edge = size.get("shortest_edge") if hasattr(size, "get") else getattr(size, "shortest_edge", None)
            if edge:
                scale_x = scale_y = edge / min(width, height)
            else:
                scale_x, scale_y = size["width"] / width, size["height"] / height
        else:
            scale_x = scale_y = 1.0
        crop_width, crop_height = crop["width"] / scale_x, crop["height"] / scale_y
        left, top = area[0] + (width - crop_width) / 2, area[1] + (height - crop_height) / 2
        area = (left, top, left + crop_width, top + crop_height)
    return list(grid(side, side, area))


RECIPES: dict[str, Callable[[View], list[Box | None]]] = {
    "llava": _resized_and_cropped,
    "qwen2_vl": _merged_grid,
    "qwen2_5_vl": _merged_grid,
}


def cell_boxes(model_type: str, view: View) -> list[Box | None] | None:
    """Boxes of one image's cells, clipped to the image; ``None`` if the family's geometry is not known."""
    recipe = RECIPES.get(model_type)
    if recipe is None:
        return None
    boxes = recipe(view)
    if len(boxes) != view.cells:
        return None
    return [None if box is None else _clip(box, view.width, view.height) for box in boxes]


def _clip(box: Box, width: int, height: int) -> Box | None:
    left, top, right, bottom = max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height)
    return (left, top, right, bottom) if right > left and bottom > top else None
