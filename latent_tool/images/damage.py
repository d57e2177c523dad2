"""Damage pictures on purpose: what a domain check learns to tell from whole ones, without any label.

Knows pictures; every draw comes from the generator that is given.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

__all__ = ["DAMAGES", "Damaging", "covered", "shaded", "shrunk", "warped"]

# A picture, another one of the same source, and the generator that decides -> the picture after it.
Damaging = Callable[[Image.Image, Image.Image, random.Random], Image.Image]

_OCTAVES = (2, 3, 5, 9, 17, 33)  # points a side, of the light that is laid over a picture


def shrunk(picture: Image.Image, _: Image.Image, rng: random.Random) -> Image.Image:
    """Return the picture at 1/1.5 to 1/4 of its size, somewhere on a plain canvas of its own size: details too small to
    see.

    The canvas has the colour of a corner, or any.
    """
    scale = 1 / math.exp(rng.uniform(math.log(1.5), math.log(4)))
    width, height = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    corner = picture.getpixel((0, 0))
    color = corner if rng.random() < 0.5 else tuple(rng.randrange(256) for _ in range(3))
    canvas = Image.new("RGB", picture.size, color)
    small = picture.resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(small, (rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)))
    return canvas


def covered(picture: Image.Image, other: Image.Image, rng: random.Random) -> Image.Image:
    """Return the picture with a part of the other one over it, 30 to 70 % of its width and of its height: two pictures
    in one.
    """
    width, height = (max(1, round(side * rng.uniform(0.3, 0.7))) for side in picture.size)
    left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
    box = (left, top, left + width, top + height)
    result = picture.copy()
    result.paste(other.resize(picture.size, Image.Resampling.BICUBIC).crop(box), box)
    return result


def warped(picture: Image.Image, _: Image.Image, rng: random.Random) -> Image.Image:
    """Return the picture bent, as if drawn on rubber: the same colours and edges, but shapes that nobody named.

    The corners of 2 x 2 to 7 x 7 tiles are moved by 4 to 15 % of a side (one standard deviation).
    """
    tiles, spread = rng.choice((2, 3, 5, 7)), rng.uniform(0.04, 0.15)

    def moved(place: int, side: int) -> float:
        return min(max(side * (place / tiles + rng.gauss(0, spread)), 0.0), side - 1.0)

    corners = {
        (x, y): (moved(x, picture.width), moved(y, picture.height)) for x in range(tiles + 1) for y in range(tiles + 1)
    }
    across, down = ([round(side * k / tiles) for k in range(tiles + 1)] for side in picture.size)
    mesh = [
        (
            (across[x], down[y], across[x + 1], down[y + 1]),
            (*corners[x, y], *corners[x, y + 1], *corners[x + 1, y + 1], *corners[x + 1, y]),
        )
        for x in range(tiles)
        for y in range(tiles)
        if across[x] < across[x + 1] and down[y] < down[y + 1]  # in a tiny picture some tiles have no pixel
    ]
    return picture.transform(picture.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def shaded(picture: Image.Image, _: Image.Image, rng: random.Random) -> Image.Image:
    """Return the picture under uneven light, in patches of all sizes: nothing in it is plain any more."""
    source = np.random.default_rng(rng.getrandbits(63))
    side = 3 * _OCTAVES[-1]
    light = np.zeros((side, side), np.float32)
    for points in _OCTAVES:
        spots = Image.fromarray(source.normal(size=(points, points)).astype(np.float32))
        weight = 0.8 * rng.uniform(0.3, 1) / math.sqrt(points)
        light += weight * np.asarray(spots.resize((side, side), Image.Resampling.BICUBIC))
    whole = np.asarray(Image.fromarray(light).resize(picture.size, Image.Resampling.BICUBIC))
    bands = [np.asarray(band, np.float32) * np.exp(whole) for band in picture.split()]
    return Image.merge("RGB", [Image.fromarray(band.clip(0, 255).astype(np.uint8)) for band in bands])


# Part of a check -> what its pictures are damaged by, in turn.
DAMAGES: Mapping[str, tuple[Damaging, ...]] = {
    "shrunk": (shrunk, covered),
    "warped": (warped, shaded),
}
