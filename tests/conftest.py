"""What many tests share: the embedded model, and a picture it understands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from browser import Browser, opened
from pictures import draw_shapes
from PIL import Image

if TYPE_CHECKING:
    from latent_tool.engine.engine import Engine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: processes that share files out end together where the last ones are short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The embedded model's engine."""
    # Here, and not above: the process that shares the files out reads this file too, and needs no torch.
    from latent_tool.engine.engine import get_engine
    from latent_tool.models.loading import ModelSpec

    return get_engine(ModelSpec())


@pytest.fixture
def picture() -> Image.Image:
    """A red circle on the left, a blue square on the right."""
    return draw_shapes()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium, for one page at a time."""
    with opened() as found:
        yield found
