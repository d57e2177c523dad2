"""Backgrounds, colours and camera artefacts: what every kind of scene is drawn with."""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from latent_tool.scenes.world import COLORS, UNSEEN_COMBINATIONS, Assets, Color, Split

_BACKGROUNDS: dict[str, Color] = {
    "white": (248, 248, 248),
    "black": (10, 10, 10),
    "gray": (175, 175, 175),
    "light blue": (195, 220, 245),
    "beige": (240, 228, 200),
    "dark blue": (20, 25, 70),
    "light green": (205, 240, 205),
}


@dataclass
class Context:
    """The state of one scene while it is drawn."""

    rng: random.Random
    split: Split
    assets: Assets
    objects: int | None = None
    size: tuple[int, int] = (96, 96)
    background: tuple[Color, ...] = field(default_factory=tuple)

    @property
    def hard(self) -> bool:
        return self.split == "hard"

    @property
    def unit(self) -> float:
        """1/96 of the shorter side, in pixels: the measure of all sizes."""
        return min(self.size) / 96

    def allowed(self, color: str, shape: str) -> bool:
        return self.hard or (color, shape) not in UNSEEN_COMBINATIONS


def jitter(rng: random.Random, color: Color, amount: int = 14) -> Color:
    red, green, blue = (max(0, min(255, value + rng.randint(-amount, amount))) for value in color)
    return red, green, blue


def distance(one: Color, other: Color) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def blend(one: Color, other: Color, share: float) -> Color:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def blank_canvas(context: Context, with_photographs: bool = True) -> Image.Image:
    """Return a background; sets ``context.size`` and the colours that objects must stand out from."""
    rng = context.rng
    short = rng.choice((64, 80, 96, 96, 112, 128, 160, 192))
    aspect = 1.0 if rng.random() < 0.45 else math.exp(rng.uniform(-0.29, 0.29))
    if rng.random() < 0.08:
        aspect = math.exp(rng.choice((-1, 1)) * rng.uniform(0.3, 0.75))
    context.size = (round(short * max(1.0, aspect)), round(short * max(1.0, 1 / aspect)))
    base = jitter(rng, _BACKGROUNDS[rng.choices(list(_BACKGROUNDS), (6, 2, 2, 2, 2, 1, 1))[0]], 10)
    style = rng.random()
    photographs = context.assets.photographs
    if with_photographs and photographs and style < 0.08:
        return _photograph(context, rng.choice(photographs))
    if style < 0.2:
        other = blend(base, rng.choice(((255, 255, 255), (0, 0, 0), (120, 140, 200), (200, 160, 120))), 0.22)
        context.background = (base, other)
        return gradient(rng, context.size, base, other)
    image = Image.new("RGB", context.size, base)
    context.background = (base,)
    if style < 0.26:
        other = blend(base, (128, 128, 128), 0.25)
        context.background = (base, other)
        draw, step = ImageDraw.Draw(image), rng.randint(5, 16)
        for offset in range(0, sum(context.size), step):
            draw.line((offset, 0, offset - context.size[1], context.size[1]), fill=other, width=1)
    return image


def _photograph(context: Context, photograph: Image.Image) -> Image.Image:
    """A random crop of a photograph, washed out towards white or black so that objects stand out."""
    rng, (width, height) = context.rng, context.size
    share = rng.uniform(0.4, 1.0)
    crop_w, crop_h = max(2, int(photograph.width * share)), max(2, int(photograph.height * share))
    left, top = rng.randint(0, photograph.width - crop_w), rng.randint(0, photograph.height - crop_h)
    crop = photograph.crop((left, top, left + crop_w, top + crop_h)).resize((width, height), Image.Resampling.BILINEAR)
    goal: Color = rng.choice(((255, 255, 255), (0, 0, 0)))
    image = Image.blend(crop, Image.new("RGB", crop.size, goal), rng.uniform(0.35, 0.7))
    pixels = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float64).reshape(-1, 3)
    low, mean, high = (np.quantile(pixels, q, axis=0) for q in (0.1, 0.5, 0.9))
    context.background = tuple((int(c[0]), int(c[1]), int(c[2])) for c in (low, mean, high))
    return image


def gradient(rng: random.Random, size: tuple[int, int], one: Color, other: Color) -> Image.Image:
    """Return a linear gradient between two colours, in one of four directions."""
    corners = [one, one, other, other]
    if rng.random() < 0.5:
        corners = [one, other, one, other]
    if rng.random() < 0.5:
        corners.reverse()
    small = Image.new("RGB", (2, 2))
    small.putdata(corners)
    return small.resize(size, Image.Resampling.BILINEAR)


def finish(context: Context, image: Image.Image) -> Image.Image:
    """Camera and file artefacts: sensor noise, blur, JPEG."""
    rng = context.rng
    if rng.random() < 0.06:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8) * context.unit))
    if rng.random() < 0.3:
        noise = np.random.default_rng(rng.getrandbits(63)).integers(-9, 10, (image.height, image.width, 3))
        image = Image.fromarray((np.asarray(image, dtype=np.int16) + noise).clip(0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(55, 95))
        image = Image.open(buffer).convert("RGB")
    return image


def visible(context: Context, contrast: int) -> list[str]:
    """Colour names that stand out from the background."""
    names = [n for n, c in COLORS.items() if all(distance(c, b) > contrast for b in context.background)]
    return names or sorted(COLORS, key=lambda n: -min(distance(COLORS[n], b) for b in context.background))[:4]


@lru_cache(maxsize=256)
def font_of(path: str | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)
