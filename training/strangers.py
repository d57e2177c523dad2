"""Pictures of nothing this world knows: photographs, noise, blank sheets, pages of text, plots, clouds.

Whatever is asked about them, the answer is that one cannot tell.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from latent_tool.scenes import COLORS
from training.world import assets


def stranger(rng: random.Random) -> Image.Image:
    """A picture of any size that no question of this world fits."""
    makers: dict[Callable[[random.Random], Image.Image], float] = {
        photograph: 0.4,
        noise: 0.12,
        blank: 0.1,
        page: 0.18,
        plot: 0.1,
        clouds: 0.1,
    }
    return rng.choices(list(makers), list(makers.values()))[0](rng)


def _size(rng: random.Random, least: int = 64, most: int = 260) -> tuple[int, int]:
    short = rng.randint(least, most)
    aspect = math.exp(rng.uniform(-0.5, 0.5))
    return round(short * max(1.0, aspect)), round(short * max(1.0, 1 / aspect))


def photograph(rng: random.Random) -> Image.Image:
    """A crop of a photograph; mirrored, recoloured, blended with another or drained of colour now and then."""
    chosen = rng.choice(assets().photographs)
    share = rng.uniform(0.15, 1.0)
    wide, high = max(8, int(chosen.width * share)), max(8, int(chosen.height * share))
    left, top = rng.randint(0, chosen.width - wide), rng.randint(0, chosen.height - high)
    image = chosen.crop((left, top, left + wide, top + high)).resize(_size(rng), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.25:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if rng.random() < 0.4:
        bands = list(image.split())
        rng.shuffle(bands)
        image = Image.merge("RGB", bands)
    if rng.random() < 0.25:
        image = Image.blend(image, rng.choice(assets().photographs).resize(image.size), rng.uniform(0.2, 0.5))
    if rng.random() < 0.25:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 6)))
    if rng.random() < 0.1:
        image = ImageChops.invert(image)
    return image


def noise(rng: random.Random) -> Image.Image:
    """Independent pixels, grey or coloured, fine or coarse."""
    width, height = _size(rng)
    grain = rng.choice((1, 1, 2, 3, 5))
    source = np.random.default_rng(rng.getrandbits(63))
    shape = (max(2, height // grain), max(2, width // grain), 3)
    even = rng.random() < 0.6
    values = source.integers(0, 256, shape).astype(float) if even else source.normal(128, rng.uniform(20, 70), shape)
    if rng.random() < 0.3:
        values[:] = values[..., :1]
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.resize((width, height), rng.choice((Image.Resampling.NEAREST, Image.Resampling.BICUBIC)))


def blank(rng: random.Random) -> Image.Image:
    """One colour, unlike the backgrounds of scenes: an empty scene has no star, a blank sheet says nothing."""
    draw = rng.random()
    if draw < 0.35:
        level = rng.choice((128, 128, 128, rng.randint(60, 150)))
        color = level, level, level
    else:
        color = rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)
    return Image.new("RGB", _size(rng, 32), color)


_LETTERS = "eeeetttaaaoooiiinnnsshhrrddlluuccmmwwffggyyppbbvk"


def _word(rng: random.Random) -> str:
    word = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 9)))
    return word.title() if rng.random() < 0.15 else word.upper() if rng.random() < 0.05 else word


@lru_cache(maxsize=128)
def _font(path: str | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def page(rng: random.Random) -> Image.Image:
    """Lines of words, a heading, a bill with prices, or one large word."""
    width, height = _size(rng, 90, 320)
    paper = tuple(rng.randint(225, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 90) for _ in range(3))
    if rng.random() < 0.2:
        paper, ink = ink, paper
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    path = rng.choice((None, *assets().fonts))
    if rng.random() < 0.15:
        text = _word(rng)
        font = _font(path, max(8, int(1.5 * width / len(text))))
        draw.text((width * 0.04, height * rng.uniform(0.1, 0.5)), text, font=font, fill=rng.choice((ink, _any(rng))))
        return image
    size = rng.randint(6, max(7, min(width, height) // 9))
    font, margin = _font(path, size), rng.randint(2, max(3, width // 8))
    y, gap = rng.randint(2, max(3, height // 6)), size * rng.uniform(1.1, 1.8)
    last = height * rng.uniform(0.5, 1.0)
    bill = rng.random() < 0.25
    while y < last:
        words = [_word(rng) for _ in range(rng.randint(1, max(2, 2 * width // (5 * size))))]
        if bill:
            words = [words[0], f"{rng.randint(0, 99)}.{rng.randint(0, 99):02}"]
        draw.text((margin, y), ("    " if bill else " ").join(words), font=font, fill=ink)
        y += round(gap * (2 if rng.random() < 0.08 else 1))
    return image


def _any(rng: random.Random) -> tuple[int, ...]:
    return rng.choice(list(COLORS.values()))


def plot(rng: random.Random) -> Image.Image:
    """A pie, lines, points or a map of squares: charts of kinds that are not taught."""
    width, height = _size(rng, 90, 260)
    image = Image.new("RGB", (width, height), tuple(rng.randint(235, 255) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    kind = rng.randrange(4)
    if kind == 0:
        side = min(width, height) * rng.uniform(0.6, 0.95)
        left, top = (width - side) / 2, (height - side) / 2
        angle = rng.uniform(0, 360)
        shares = [rng.uniform(0.3, 1) for _ in range(rng.randint(3, 7))]
        for share in shares:
            turn = 360 * share / sum(shares)
            draw.pieslice((left, top, left + side, top + side), angle, angle + turn, fill=_any(rng), outline=(255,) * 3)
            angle += turn
        return image
    if kind == 3:
        columns, rows = rng.randint(4, 12), rng.randint(4, 12)
        one, other = _any(rng), _any(rng)
        for x in range(columns):
            for y in range(rows):
                share = rng.random()
                fill = tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
                box = (x * width / columns, y * height / rows, (x + 1) * width / columns, (y + 1) * height / rows)
                draw.rectangle(box, fill=fill)
        return image
    draw.line((8, 4, 8, height - 8, width - 4, height - 8), fill=(60, 60, 60))
    for _ in range(rng.randint(1, 4)):
        color, level = _any(rng), height * rng.uniform(0.2, 0.8)
        points = []
        for k in range(rng.randint(8, 30)):
            level = min(height - 10.0, max(5.0, level + rng.gauss(0, height / 12)))
            points.append((10 + k * (width - 14) / 30, level))
        if kind == 1:
            draw.line(points, fill=color, width=rng.randint(1, 3))
        else:
            radius = rng.uniform(1, 3)
            for across, down in points:
                draw.ellipse((across - radius, down - radius, across + radius, down + radius), fill=color)
    return image


def clouds(rng: random.Random) -> Image.Image:
    """Coloured noise of several sizes laid over each other: what photographs look like to a coarse eye."""
    width, height = _size(rng)
    source = np.random.default_rng(rng.getrandbits(63))
    total = np.zeros((height, width, 3))
    slope = rng.uniform(0.4, 1.1)
    for octave in range(6):
        side = 2 ** (octave + 1)
        part = Image.fromarray(source.integers(0, 256, (side, side, 3)).astype(np.uint8))
        total += np.asarray(part.resize((width, height), Image.Resampling.BICUBIC), float) * 0.5 ** (slope * octave)
    total -= total.min()
    if rng.random() < 0.3:
        total[:] = total.mean(2, keepdims=True)
    low, high = np.quantile(total, (0.02, 0.98))
    image = Image.fromarray(((total - low) / (high - low) * 255).clip(0, 255).astype(np.uint8))
    return image.quantize(rng.randint(3, 9)).convert("RGB") if rng.random() < 0.25 else image
