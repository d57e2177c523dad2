"""Heat maps: the attention to image cells as colours to lay over a picture.

This module knows results, layouts and Pillow, nothing of models. Pillow and numpy are imported when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from latent_tool.errors import InputError
from latent_tool.schema import CellAttention, Patch
from latent_tool.views.layout import Box, Cells, Layout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from latent_tool.schema import ReasoningResult

__all__ = [
    "HEAT_OPACITY",
    "HEAT_STOPS",
    "attention_share",
    "heat_colours",
    "heat_layer",
    "heat_of",
    "heat_text",
    "painted",
]

HEAT_OPACITY = (0.35, 0.7)  # of the heat map's colours, from no weight to the largest
# Dark blue over grey to yellow: rises evenly in lightness and is told apart with every common colour blindness.
HEAT_STOPS = ((0, 34, 78), (66, 78, 108), (124, 123, 120), (186, 174, 108), (254, 232, 56))


def attention_share(attention: float, most: float) -> float:
    """Return the attention as a share of the largest, in [0, 1]; 1 where there is nothing to compare with."""
    return attention / most if 0 < most < math.inf else 1.0


def painted(layout: Layout, shades: Sequence[tuple[Cells, float]], ground: float) -> NDArray[np.float32]:
    """Return a map ``(height, width)`` of the picture with ``shades`` painted on it in their order."""
    import numpy as np

    plane = np.full((layout.height, layout.width), ground, dtype=np.float32)
    for (left, top, right, bottom), shade in shades:
        plane[top - layout.top : bottom - layout.top, left - layout.left : right - layout.left] = shade
    return plane


def heat_of(result: ReasoningResult, index: int) -> tuple[list[tuple[Box, float]], float]:
    """Return what a heat map of image ``index`` shows, boxes and weights, and the largest weight in all images."""
    cells: Sequence[CellAttention | Patch] = result.patches if result.attention is None else result.attention
    weights = [cell.attention if isinstance(cell, Patch) else cell.weight for cell in cells]
    pairs = zip(cells, weights, strict=True)
    shown = [(cell.box, weight) for cell, weight in pairs if cell.image == index and cell.box is not None]
    return shown, max(weights, default=0.0)


def heat_text(result: ReasoningResult, index: int) -> str:
    """Return one line about what the heat map of image ``index`` shows, and what it cannot show."""
    if result.attention is None:
        left = "the attention to all image cells was not measured"
        return f"colours: the patches alone, {left}" if heat_of(result, index)[0] else f"no heat map: {left}"
    cells = [cell for cell in result.attention if cell.image == index]
    placed = sum(cell.box is not None for cell in cells)
    if not placed:
        return f"no heat map: the places of the {len(cells)} image cells are not known"
    text = f"colours: attention of the latents to {placed} image {'cell' if placed == 1 else 'cells'}"
    return text if placed == len(cells) else f"{text}; the places of {len(cells) - placed} more are not known"


def heat_layer(layout: Layout, weighted: Sequence[tuple[Box, float]], most: float) -> Image.Image:
    """Return the colours of a heat map as a picture to lay over the other one, transparent where there is no box.

    Weights count from 0 to ``most``; where boxes overlap, the largest weight is seen. The picture has a palette, which
    makes it small as a PNG. Raises ``InputError`` for a weight that is negative or not finite.
    """
    from PIL import Image

    if not all(math.isfinite(weight) and weight >= 0 for _, weight in weighted):
        raise InputError("A weight of the heat map is negative or not finite.", "Weights start at 0, as attention.")
    rising = sorted(((layout.cells(box), weight / (most or 1.0)) for box, weight in weighted), key=lambda item: item[1])
    shades = [(where, round(1 + 254 * weight)) for where, weight in rising if where is not None]
    layer = Image.fromarray(painted(layout, shades, 0).astype("uint8"))
    layer.putpalette(heat_colours())
    low, high = HEAT_OPACITY
    layer.info["transparency"] = bytes(
        [0, *(round(255 * low + (high - low) * (level - 1) / 254 * 255) for level in range(1, 256))]
    )
    return layer


def heat_colours() -> list[int]:
    """256 colours, as red, green, blue, red, ...: one for no cell, then those of the heat map from 0 upwards."""
    colours = [0, 0, 0]
    for level in range(255):
        at = level / 254 * (len(HEAT_STOPS) - 1)
        low = min(int(at), len(HEAT_STOPS) - 2)
        colours += [round(a + (at - low) * (b - a)) for a, b in zip(HEAT_STOPS[low], HEAT_STOPS[low + 1], strict=True)]
    return colours
