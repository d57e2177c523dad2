"""Which pixels of the upright image every image cell of the prompt stands for, one short recipe per kind of processor.

A recipe gets a ``View`` of one image and returns one box per image cell of that image, in the order of the cells, and
``None`` in place of a box for cells that stand for no pixels (row separators). It may raise anything or return the
wrong number of boxes when an image does not fit it: ``cell_boxes`` then says that the geometry is not known.
This module needs neither torch nor transformers to be imported; ``families`` says which family uses which recipe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Box",
    "Recipe",
    "View",
    "cell_boxes",
    "global_then_tiles",
    "merged_grid",
    "named_tiles_then_global",
    "overview_then_unpadded_grid",
    "pooled_grid",
    "resized_and_cropped",
    "sized_grid",
    "spatial_shapes",
    "tiles_then_thumbnail",
    "whole_square",
]

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """One image as the processor saw it.

    ``inputs``: what the processor returned, for all images. ``index``: which image. ``width``, ``height``: of the
    upright image, in pixels. ``cells``: image cells of this image. ``texts``: per image, what the processor wrote into
    the prompt in its place; empty if the processor does not say.
    """

    config: Any
    image_processor: Any
    inputs: Mapping[str, Any]
    index: int
    width: int
    height: int
    cells: int
    texts: Sequence[str] = ()

    @property
    def whole(self) -> Box:
        """The whole image."""
        return (0.0, 0.0, float(self.width), float(self.height))


Recipe = Callable[[View], list[Box | None]]


def cell_boxes(recipe: Recipe, view: View) -> list[Box | None] | None:
    """Return boxes of one image's cells, clipped to the image; ``None`` if the recipe does not fit the image."""
    try:
        boxes = recipe(view)
    except (ArithmeticError, AttributeError, ImportError, LookupError, TypeError, ValueError):
        return None
    if len(boxes) != view.cells:
        return None
    return [None if box is None else _clip(box, view) for box in boxes]


def _clip(box: Box, view: View) -> Box | None:
    left, top = max(box[0], 0.0), max(box[1], 0.0)
    right, bottom = min(box[2], float(view.width)), min(box[3], float(view.height))
    return (left, top, right, bottom) if right > left and bottom > top else None


def grid(columns: int, rows: int, area: Box) -> list[Box | None]:
    """Return boxes of a grid over an area, row by row."""
    left, top, right, bottom = area
    width, height = (right - left) / columns, (bottom - top) / rows
    return [
        (left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height)
        for row in range(rows)
        for column in range(columns)
    ]


def square(cells: int, area: Box) -> list[Box | None]:
    """Return boxes of a square grid of so many cells over an area."""
    side = math.isqrt(cells)
    return grid(side, side, area)


def tiles(columns: int, rows: int, cells: int, area: Box) -> list[Box | None]:
    """Return boxes of a grid of tiles, tile by tile; each tile is a square grid of ``cells`` cells."""
    return [box for tile in grid(columns, rows, area) if tile is not None for box in square(cells, tile)]


def _size(size: Any, name: str) -> int | None:
    """An entry of an image processor's ``size``, which is a mapping or an object."""
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return None if value is None else int(value)


# ------------------------------------------------------------------------------------------------------ one grid


def whole_square(view: View) -> list[Box | None]:
    """Return boxes where the image is resized to a square. More cells than one view has are crops of it, whose boxes
    are not known.
    """
    per_view = getattr(view.config, "mm_tokens_per_image", None) or view.cells
    return square(per_view, view.whole) + [None] * (view.cells - per_view)


def merged_grid(view: View) -> list[Box | None]:
    """Patches are merged ``spatial_merge_size`` at a time; ``image_grid_thw`` counts patches before that."""
    _, rows, columns = (int(value) for value in view.inputs["image_grid_thw"][view.index])
    merge = view.config.vision_config.spatial_merge_size
    return grid(columns // merge, rows // merge, view.whole)


def sized_grid(view: View) -> list[Box | None]:
    """``image_sizes`` holds height and width in pixels after resizing; a cell is a square of merged patches."""
    height, width = (int(value) for value in view.inputs["image_sizes"][view.index])
    side = view.config.vision_config.patch_size * view.config.spatial_merge_size
    return grid(width // side, height // side, view.whole)


def pooled_grid(view: View) -> list[Box | None]:
    """``image_position_ids`` holds column and row of every patch (-1: padding), pooled into cells."""
    positions = view.inputs["image_position_ids"][view.index]
    pool = view.config.vision_config.pooling_kernel_size
    columns, rows = (int(positions[:, axis].max()) + 1 for axis in (0, 1))
    return grid(columns // pool, rows // pool, view.whole)


def resized_and_cropped(view: View) -> list[Box | None]:
    """Pad to a square, resize, crop the centre, each only if the image processor does so; what is cut has no cell."""
    processor = view.image_processor
    width, height = float(view.width), float(view.height)
    left = top = 0.0
    if getattr(processor, "do_pad", False):
        longest = max(width, height)
        left, top = (width - longest) / 2, (height - longest) / 2
        width = height = longest
    if getattr(processor, "do_center_crop", False):
        scale_x = scale_y = 1.0
        if getattr(processor, "do_resize", True):
            edge = _size(processor.size, "shortest_edge")
            if edge:
                scale_x = scale_y = edge / min(width, height)
            else:
                scale_x = (_size(processor.size, "width") or 0) / width
                scale_y = (_size(processor.size, "height") or 0) / height
        crop_width = (_size(processor.crop_size, "width") or 0) / scale_x
        crop_height = (_size(processor.crop_size, "height") or 0) / scale_y
        left, top = left + (width - crop_width) / 2, top + (height - crop_height) / 2
        width, height = crop_width, crop_height
    return square(view.cells, (left, top, left + width, top + height))


# ------------------------------------------------------------------------------------------------------ several views


def overview_then_unpadded_grid(view: View) -> list[Box | None]:
    """Return boxes of a square grid over the image, then a finer one from which the padding was cut, with one separator
    per row.

    Of several images in one prompt some families show the overview alone, with one separator.
    """
    tower = view.config.vision_config
    side = tower.image_size // tower.patch_size
    overview, rest = square(side * side, view.whole), view.cells - side * side
    if rest <= 1:
        return overview + [None] * rest
    height, width = (int(value) for value in view.inputs["image_sizes"][view.index])
    best = max(view.config.image_grid_pinpoints, key=lambda point: _fit(point, height, width))
    rows, columns = (edge // tower.image_size * side for edge in best)
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
    limit = re.fullmatch(r"anyres_max_(\d+)", getattr(view.config, "vision_aspect_ratio", None) or "")
    if limit:
        ratio = math.sqrt(rows * columns / (int(limit[1]) * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    boxes = grid(columns, rows, view.whole)
    return overview + [box for row in range(rows) for box in [*boxes[row * columns : (row + 1) * columns], None]]


def _fit(point: Sequence[int], height: int, width: int) -> tuple[int, int]:
    """How well an image fits a resolution ``(height, width)``: pixels kept, then as little padding as possible."""
    scale = min(point[1] / width, point[0] / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, -(point[0] * point[1] - kept)


_ROW_COLUMN = re.compile(r"row_(\d+)_col_(\d+)")


def _named_tiles(text: str) -> tuple[int, int]:
    """Columns and rows of the tiles that are named ``row_R_col_C`` in the prompt; ``(0, 0)`` without tiles."""
    named = [(int(row), int(column)) for row, column in _ROW_COLUMN.findall(text)]
    return (max(column for _, column in named), max(row for row, _ in named)) if named else (0, 0)


def named_tiles_then_global(view: View) -> list[Box | None]:
    """Tiles that the prompt names by row and column, then the whole image."""
    columns, rows = _named_tiles(view.texts[view.index])
    per_view = view.cells // (columns * rows + 1)
    split = tiles(columns, rows, per_view, view.whole) if columns else []
    return split + square(per_view, view.whole)


def tiles_then_thumbnail(view: View) -> list[Box | None]:
    """Tiles of the canvas that fits the image best, then the whole image; a single tile is the whole image."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    per_view = getattr(view.config, "image_seq_length", None)
    if per_view is None:
        tower = view.config.vision_config
        per_view = (tower.image_size // tower.patch_size // view.config.downsample_factor) ** 2
    if view.cells == per_view:
        return square(per_view, view.whole)
    processor = view.image_processor
    tile = (_size(processor.size, "height"), _size(processor.size, "width"))
    columns, rows = get_optimal_tiled_canvas(
        (view.height, view.width), tile, processor.min_patches, processor.max_patches
    )
    return tiles(columns, rows, per_view, view.whole) + square(per_view, view.whole)


def global_then_tiles(view: View) -> list[Box | None]:
    """Return boxes of the whole image, then of tiles between which the prompt has column and row markers."""
    text = view.texts[view.index]
    rows = text.count("<IMG_ROW>") + 1
    columns = text.count("<IMG_COL>") // rows + 1
    if rows * columns == 1:
        return square(view.cells, view.whole)
    per_view = view.cells // (rows * columns + 1)
    return square(per_view, view.whole) + tiles(columns, rows, per_view, view.whole)


def spatial_shapes(view: View) -> list[Box | None]:
    """``spatial_shapes`` holds rows and columns of patches per view; tiles, if the prompt names any, come first."""
    columns, rows = _named_tiles(view.texts[view.index]) if view.texts else (0, 0)
    before = 0
    for text in view.texts[: view.index]:
        named = _named_tiles(text)
        before += named[0] * named[1] + (1 if not named[0] or "thumbnail" in text else 0)
    factor = view.config.downsample_factor

    def view_grid(index: int, area: Box) -> list[Box | None]:
        high, wide = (math.ceil(int(value) / factor) for value in view.inputs["spatial_shapes"][index])
        return grid(wide, high, area)

    boxes: list[Box | None] = []
    for number, tile in enumerate(grid(columns, rows, view.whole) if columns else []):
        boxes += view_grid(before + number, tile or view.whole)
    if len(boxes) < view.cells:
        boxes += view_grid(before + columns * rows, view.whole)
    return boxes
