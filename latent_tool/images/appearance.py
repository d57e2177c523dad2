"""How a picture looks, in a few numbers of its pixels: colours, contrast, edges, palette; whatever model reads it.

Knows pictures; knows nothing of what the numbers are compared with.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["PIXEL_NUMBERS", "pixel_numbers"]

PIXEL_NUMBERS = 29
_SIDE = 48  # pixels of the square that is described
_COARSE = 4  # pixels of it that a coarse one takes, in either direction
_SHARES = np.array((0.25, 0.5, 0.75, 0.9, 0.97, 1.0))
_LEVELS = np.arange(256.0)
_STEPS = (1, 7, 29)  # the largest step, in levels, that counts as none, faint, or soft
_LEAST = 0.005  # added to shares before logarithms

Array = NDArray[np.floating]
Levels = NDArray[np.int16]


def pixel_numbers(picture: Image.Image) -> tuple[float, ...]:
    """Describe a picture of any size by ``PIXEL_NUMBERS`` numbers, of a square of 48 x 48 pixels made of it.

    The mean of each colour in [0, 1]; then logarithms. Of ``1 + x`` in levels of 0 to 255: the deviation of the light
    and of two colour differences; six quantiles and the mean of how colourful the pixels are, and of the steps between
    neighbours; the mean step between blocks of 4 x 4. Of the palette of 16 levels a colour: how many colours there
    are, its entropy (no logarithm of that), and what the commonest and the three commonest leave. Of the steps: the
    shares that are none, faint, soft and hard.
    """
    planes = np.ascontiguousarray(np.asarray(_small(picture)).transpose(2, 0, 1)).astype(np.int16)  # (3, 48, 48)
    red, green, blue = planes
    colourful, _ = _spread(_largest(planes) + _largest(-planes))
    across, down = (
        _largest(np.abs(step)) for step in (planes[:, :, 1:] - planes[:, :, :-1], planes[:, 1:] - planes[:, :-1])
    )
    steps, rising = _spread(np.concatenate([across.ravel(), down.ravel()]))
    palette = np.bincount((red >> 4 << 8 | green >> 4 << 4 | blue >> 4).ravel())
    share = np.sort(palette[palette > 0])[::-1] / _SIDE**2
    numbers = np.concatenate(
        [
            [plane.mean() / 255 for plane in planes],
            np.log1p(
                [
                    _deviation(red + green + blue) / 3,
                    _deviation(red - green) / 2,
                    _deviation(blue - green) / 2,
                    *colourful,
                    *steps,
                    _coarse_step(planes),
                ]
            ),
            [np.log(len(share)), -(share @ np.log(share)), np.log(1.01 - share[0]), np.log(1.01 - share[:3].sum())],
            np.log(np.diff([0, *rising[list(_STEPS)], 1]) + _LEAST),
        ]
    )
    return tuple(numbers.tolist())


def _small(picture: Image.Image) -> Image.Image:
    """The picture on the square; of a large one a grid of pixels is taken, so that its size costs nothing."""
    most = _COARSE * _SIDE
    if min(picture.size) > most:
        picture = picture.resize((most, most), Image.Resampling.NEAREST)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    return picture.resize((_SIDE, _SIDE), Image.Resampling.BOX)


def _largest(planes: Levels) -> Levels:
    """The largest of the three colours, pixel by pixel; ``max`` over the axis takes ten times as long."""
    found: Levels = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    return found


def _spread(values: Levels) -> tuple[list[float], Array]:
    """Quantiles and mean of levels in 0 to 255, and the share at or below every level."""
    counts = np.bincount(values.ravel(), minlength=256)
    rising = counts.cumsum()
    quantiles = rising.searchsorted(_SHARES * rising[-1] - 1e-9)
    return [*quantiles.tolist(), float(counts @ _LEVELS / rising[-1])], rising / rising[-1]


def _deviation(values: Levels) -> float:
    flat = values.ravel().astype(np.float64)
    return float(np.sqrt(max(flat @ flat / flat.size - flat.mean() ** 2, 0.0)))


def _coarse_step(planes: Levels) -> float:
    """The mean step between neighbouring blocks of 4 x 4 pixels, over colours and directions."""
    blocks = _SIDE // _COARSE
    weights = np.full(_COARSE, 1 / _COARSE)
    rows = (planes.reshape(-1, _COARSE) @ weights).reshape(3 * blocks, _COARSE, blocks)
    coarse = (weights @ rows).reshape(3, blocks, blocks)
    across, down = np.abs(coarse[:, :, 1:] - coarse[:, :, :-1]), np.abs(coarse[:, 1:] - coarse[:, :-1])
    return float(across.mean() + down.mean()) / 2
