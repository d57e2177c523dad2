"""These tests run with `make test-integrations`, in an environment that has every framework: a skip is a failure."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pictures import draw_shapes
from ray_cluster import ray_cluster

# Nothing that runs here may report to anybody.
os.environ.update(OTEL_SDK_DISABLED="true", HAYSTACK_TELEMETRY_ENABLED="False", OPENAI_AGENTS_DISABLE_TRACING="1")


def pytest_configure(config: pytest.Config) -> None:
    # The frameworks' own warnings are theirs to fix.
    config.addinivalue_line("filterwarnings", "default")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"a skip is a failure here: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"a skip is a failure here: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def closed_loop() -> Iterator[None]:
    """An event loop for the frameworks' `run_sync`, which takes the thread's one, or makes one, and leaves it open."""
    loops = {asyncio.new_event_loop()}
    asyncio.set_event_loop(*loops)
    yield
    with suppress(RuntimeError):  # none is left
        loops.add(asyncio.get_event_loop_policy().get_event_loop())
    for loop in loops:
        loop.close()
    asyncio.set_event_loop(None)


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A picture in a folder of its own: a red circle on the left, a blue square on the right."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw_shapes().save(folder / "shapes.png")
    return folder / "shapes.png"


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray cluster of this machine."""
    with ray_cluster():
        yield
