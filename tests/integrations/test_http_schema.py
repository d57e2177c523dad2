"""Schemathesis against the service: whatever its OpenAPI document allows or forbids, it keeps its word."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import serving
from scripted_agents import small_reasoner

from latent_tool.integrations.http_service import create_app


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(create_app(small_reasoner(0), token="s3cret")) as url:
        yield url


# A deadline that cannot be kept is the client's wish, and its 504 is documented.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


def test_the_service_keeps_to_its_description(url: str, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"),
            *("--header", "Authorization: Bearer s3cret"),
            *("--checks", "all"),
            # No schema can say which data URIs are pictures: a request may be well formed and still be refused.
            *("--exclude-checks", "positive_data_acceptance"),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "40", "--max-time", "60"),
            *("--seed", "1", "--continue-on-failure", "--warnings", "off", "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Tested: 4" in done.stdout
