"""How a picture looks in numbers of its pixels: equal to a naive twin, finite for whatever is a picture."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from latent_tool.images.appearance import PIXEL_NUMBERS, pixel_numbers
from latent_tool.scenes import generate

SIZES = ((1, 1), (1, 300), (300, 1), (3, 2), (48, 48), (191, 193), (193, 400), (1000, 700))


def noise(size: tuple[int, int]) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(values.astype(np.uint8))


def naive(picture: Image.Image) -> list[float]:
    """Pixel by pixel, of a picture that needs no grid."""
    small = picture.resize((48, 48), Image.Resampling.BOX)
    at = [[small.getpixel((x, y)) for x in range(48)] for y in range(48)]
    pixels = [pixel for row in at for pixel in row]

    def summary(values: list[int]) -> list[float]:
        rising = sorted(values)
        places = [math.ceil(share * len(values) - 1e-9) - 1 for share in (0.25, 0.5, 0.75, 0.9, 0.97, 1)]
        return [*(rising[place] for place in places), sum(values) / len(values)]

    def step(one: tuple[int, ...], other: tuple[int, ...]) -> int:
        return max(abs(a - b) for a, b in zip(one, other, strict=True))

    columns = list(zip(*at, strict=True))
    steps = [step(*pair) for line in (*at, *columns) for pair in pairwise(line)]
    kinds = [
        sum(value <= 1 for value in steps),
        sum(1 < value <= 7 for value in steps),
        sum(7 < value <= 29 for value in steps),
        sum(value > 29 for value in steps),
    ]
    levels = [*summary([max(pixel) - min(pixel) for pixel in pixels]), *summary(steps)]
    return [
        *(sum(pixel[color] for pixel in pixels) / len(pixels) / 255 for color in range(3)),
        *(math.log(1 + level) for level in levels),
        *(math.log(count / len(steps) + 0.005) for count in kinds),
    ]


@pytest.mark.parametrize("seed", range(6))
def test_the_numbers_are_the_naive_ones(seed: int) -> None:
    picture = noise((90, 61)) if seed == 0 else generate(5_300_000 + seed, "held_out").image
    assert min(picture.size) <= 192
    np.testing.assert_allclose(pixel_numbers(picture), naive(picture), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_every_picture_has_finite_numbers(size: tuple[int, int]) -> None:
    """Plain ones, noise and slopes, of any size; the picture stays as it was."""
    for picture in (Image.new("RGB", size), Image.new("RGB", size, (255, 255, 255)), noise(size)):
        before = picture.tobytes()
        found = pixel_numbers(picture)
        assert len(found) == PIXEL_NUMBERS and np.isfinite(found).all()
        assert picture.tobytes() == before and pixel_numbers(picture) == found


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_other_modes_are_described_as_rgb(mode: str) -> None:
    for size in ((60, 40), (400, 300)):
        picture = noise(size).convert("L").convert(mode) if mode in ("I", "F", "I;16") else noise(size).convert(mode)
        assert pixel_numbers(picture) == pytest.approx(pixel_numbers(picture.convert("RGB")))


def test_a_large_picture_looks_like_itself() -> None:
    """A grid of pixels is taken of it: the same scene, twelve times as large, has about the same numbers."""
    for seed in range(5):
        scene = generate(5_300_100 + seed, "held_out").image.resize((96, 96))
        large = scene.resize((1152, 1152), Image.Resampling.NEAREST)
        np.testing.assert_allclose(pixel_numbers(large), pixel_numbers(scene), atol=0.25)
