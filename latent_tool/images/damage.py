"""Damage pictures on purpose: what a domain check learns to tell from whole ones, without any label.

Knows pictures; every draw comes from the generator that is given.
"""

from __future__ import annotations

import math
import random

from PIL import Image, ImageFilter

__all__ = ["DAMAGES", "shrunk", "smoothed"]


def shrunk(picture: Image.Image, rng: random.Random) -> Image.Image:
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


def smoothed(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Return the picture blurred over 5 to 30 % of its short side, every other one grey: no shape is left in it."""
    radius = rng.uniform(0.05, 0.3) * min(picture.size)
    blurred = picture.filter(ImageFilter.GaussianBlur(radius))
    return blurred.convert("L").convert("RGB") if rng.random() < 0.5 else blurred


DAMAGES = {"shrunk": shrunk, "smoothed": smoothed}
