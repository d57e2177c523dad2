"""What many tests share: the embedded model, and a picture it understands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import Browser, opened
from pictures import draw_shapes
from PIL import Image

if TYPE_CHECKING:
    from latent_tool.engine.engine import Engine


# The files that take longest, the longest first.
LONGEST = [
    Path(__file__).parent / name
    for name in (
        "unit/test_training.py",
        "models/test_engine_faults.py",
        "unit/test_evaluation_runs.py",
        "surfaces/test_cli.py",
        "surfaces/test_readme.py",
        "unit/test_study.py",
        "models/families/test_doctor.py",
        "models/families/test_models_compiled.py",
        "unit/test_images_hostile.py",
    )
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, then others with slow tests: processes that share files out end together where the last
    ones are short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    rank = {path: place for place, path in enumerate(LONGEST)}
    items.sort(key=lambda item: (rank.get(item.path, len(rank)), item.path not in slow))


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
