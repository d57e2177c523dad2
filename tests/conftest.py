"""What many tests share: the embedded model, and a picture it understands."""

from __future__ import annotations

import pytest
from PIL import Image, ImageDraw

from latent_tool.engine import Engine, get_engine
from latent_tool.models.loading import ModelSpec


def draw_shapes(left: str = "circle", colour: tuple[int, int, int] = (220, 25, 25)) -> Image.Image:
    """A shape on the left and a blue square on the right, 200 by 150 pixels."""
    image = Image.new("RGB", (200, 150), "white")
    draw = ImageDraw.Draw(image)
    if left == "circle":
        draw.ellipse((20, 50, 70, 100), fill=colour)
    else:
        draw.polygon([(45, 50), (20, 100), (70, 100)], fill=colour)
    draw.rectangle((120, 50, 170, 100), fill=(30, 50, 225))
    return image


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The embedded model's engine."""
    return get_engine(ModelSpec())


@pytest.fixture
def picture() -> Image.Image:
    """A red circle on the left, a blue square on the right."""
    return draw_shapes()
