"""What the tests of the integrations share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray_cluster import ray_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray cluster of this machine."""
    with ray_cluster():
        yield
