"""How a picture looks, in a few numbers of its pixels: colours and edges, whatever model reads it.

Knows pictures; knows nothing of what the numbers are compared with.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["PIXEL_NUMBERS", "pixel_numbers"]

PIXEL_NUMBERS = 21
_SIDE = 48  # pixels of the square that is described
_GRID = 4 * _SIDE  # pixels a side, at most, that the square is made of
_SHARES = np.array((0.25, 0.5, 0.75, 0.9, 0.97, 1.0))
_LEVELS = np.arange(256.0)
_STEPS = np.array((1, 7, 29))  # the largest step, in levels, that counts as none, faint, or soft
_LEAST = 0.005  # added to shares before logarithms

Levels = NDArray[np.int16]


def pixel_numbers(picture: Image.Image) -> tuple[float, ...]:
    """Describe a picture of any size by ``PIXEL_NUMBERS`` numbers, of a square of 48 x 48 pixels made of it.

    The mean of each colour in [0, 1]; logarithms of ``1 + x`` of six quantiles and the mean of how colourful the pixels
    are, and of the steps between neighbours, in levels of 0 to 255; logarithms of the shares of the steps that are
    none, faint, soft and hard.
    """
    planes = np.ascontiguousarray(np.asarray(_small(picture)).transpose(2, 0, 1), np.int16)  # (3, 48, 48)
    across, down = planes[:, :, 1:] - planes[:, :, :-1], planes[:, 1:] - planes[:, :-1]
    both = np.concatenate([across.reshape(3, -1), down.reshape(3, -1)], axis=1)
    colourful, _ = _spread(_largest(planes) - _least(planes))
    steps, (none, faint, soft) = _spread(_largest(np.abs(both, out=both)))
    means = planes.reshape(3, -1) @ np.ones(_SIDE**2) / _SIDE**2
    return (
        *(mean / 255 for mean in means.tolist()),
        *(math.log1p(level) for level in (*colourful, *steps)),
        *(math.log(share + _LEAST) for share in (none, faint - none, soft - faint, 1 - soft)),
    )


def _small(picture: Image.Image) -> Image.Image:
    """The picture on the square; of a large one a grid of pixels is taken, so that its size costs nothing."""
    if min(picture.size) > _GRID:
        picture = picture.resize((_GRID, _GRID), Image.Resampling.NEAREST)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    return picture.resize((_SIDE, _SIDE), Image.Resampling.BOX)


def _largest(planes: Levels) -> Levels:
    """The largest of the three colours, pixel by pixel; ``max`` over the axis takes ten times as long."""
    found: Levels = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    return found


def _least(planes: Levels) -> Levels:
    found: Levels = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    return found


def _spread(values: Levels) -> tuple[list[float], list[float]]:
    """Six quantiles and the mean of levels in 0 to 255, and the share at or below each of ``_STEPS``."""
    counts = np.bincount(values.ravel(), minlength=256)
    rising = counts.cumsum()
    quantiles = rising.searchsorted(_SHARES * rising[-1] - 1e-9)
    return [*quantiles.tolist(), float(counts @ _LEVELS) / values.size], (rising[_STEPS] / values.size).tolist()
