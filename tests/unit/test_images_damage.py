"""Damage done on purpose: whole pictures in, pictures of the same size out, decided by the generator alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from latent_tool.images.damage import DAMAGES, Damaging, covered, shaded, warped
from latent_tool.scenes import generate

WAYS = {f"{part}: {way.__name__}": way for part, ways in DAMAGES.items() for way in ways}
SIZES = ((1, 1), (1, 50), (50, 1), (3, 2), (33, 96), (301, 64))


def scene(seed: int) -> Image.Image:
    return generate(5_300_000 + seed, "held_out").image


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_any_size_keeps_its_size_and_its_picture(way: Damaging, size: tuple[int, int]) -> None:
    for seed in range(8):
        picture, other = noise(size), noise(SIZES[seed % len(SIZES)], 1)
        before = picture.tobytes(), other.tobytes()
        found = way(picture, other, random.Random(seed))
        assert found.size == size and found.mode == "RGB"
        assert (picture.tobytes(), other.tobytes()) == before


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_generator_decides_and_nothing_else(way: Damaging) -> None:
    picture, other = scene(0), scene(1)
    random.seed(3)
    np.random.seed(3)
    one = way(picture, other, random.Random(5))
    assert random.random() == random.Random(3).random()
    assert np.random.random() == np.random.RandomState(3).random()
    again = way(picture, other, random.Random(5))
    assert one.tobytes() == again.tobytes() != way(picture, other, random.Random(6)).tobytes()
    assert one.tobytes() != picture.tobytes()


def test_what_is_bent_stays_inside() -> None:
    """No colour comes from beyond the picture: a plain one stays as it is, and a frame keeps to its two colours."""
    plain = Image.new("RGB", (70, 40), (200, 30, 90))
    assert all(warped(plain, plain, random.Random(seed)).tobytes() == plain.tobytes() for seed in range(20))
    framed = Image.new("RGB", (70, 40), (255, 255, 255))
    framed.paste((200, 200, 200), (5, 5, 65, 35))
    assert min(np.asarray(warped(framed, plain, random.Random(seed))).min() for seed in range(20)) >= 200


def test_a_part_of_the_other_picture_covers_a_part() -> None:
    """Between 30 and 70 % of each side, up to a pixel."""
    white, black = Image.new("RGB", (200, 100), "white"), Image.new("RGB", (10, 30), "black")
    for seed in range(30):
        share = (np.asarray(covered(white, black, random.Random(seed)))[..., 0] == 0).mean()
        assert 0.29**2 < share < 0.71**2


def test_uneven_light_leaves_nothing_plain() -> None:
    grey = Image.new("RGB", (96, 96), (120, 120, 120))
    for seed in range(20):
        found = np.asarray(shaded(grey, grey, random.Random(seed)), float)
        assert found[..., 0].std() > 5 and np.ptp(found, axis=2).max() == 0  # light, not colour
