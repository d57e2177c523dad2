"""What a missing extra says: the command that works for this installation, whatever it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latent_tool import errors
from latent_tool.errors import MissingExtraError

REQUIRES = [
    "numpy>=1.26",
    'fastapi>=0.115; extra == "serve"',
    'uvicorn>=0.32; extra == "serve"',
    'latent-tool[serve]; extra == "metrics"',
    'prometheus-client>=0.20; extra == "metrics"',
]


class Installed:
    """An installation as importlib.metadata shows it."""

    def __init__(self, origin: dict[str, Any] | None) -> None:
        self.origin = origin
        self.requires = REQUIRES

    def read_text(self, name: str) -> str | None:
        return None if self.origin is None else json.dumps(self.origin)


def hint(monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None, extra: str = "metrics") -> str:
    monkeypatch.setattr(errors, "distribution", lambda name: Installed(origin))
    return MissingExtraError("This", extra).hint.removeprefix("Install them with: ")


def test_the_hint_names_the_form_that_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clone = tmp_path / "my clone"
    clone.mkdir()
    wheel = tmp_path / "latent_tool-0.1.0-py3-none-any.whl"
    wheel.touch()
    assert hint(monkeypatch, None) == "pip install 'latent-tool[metrics]'"
    assert hint(monkeypatch, {"url": clone.as_uri(), "dir_info": {}}) == f"pip install '{clone}[metrics]'"
    editable = {"url": clone.as_uri(), "dir_info": {"editable": True}}
    assert hint(monkeypatch, editable) == f"pip install -e '{clone}[metrics]'"
    assert hint(monkeypatch, {"url": wheel.as_uri(), "archive_info": {}}) == f"pip install '{wheel}[metrics]'"
    wheel.unlink()
    needed = "pip install 'fastapi>=0.115' 'uvicorn>=0.32' 'prometheus-client>=0.20'"
    assert hint(monkeypatch, {"url": wheel.as_uri(), "archive_info": {}}) == needed
    assert "latent-tool[metrics]" in hint(monkeypatch, {"url": "https://example.org/a.whl"})


@pytest.mark.parametrize("broken", ["{", "[1]", "null"])
def test_broken_metadata_is_no_second_error(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    class Broken(Installed):
        def read_text(self, name: str) -> str | None:
            return broken

    monkeypatch.setattr(errors, "distribution", lambda name: Broken(None))
    assert "[mcp]" in MissingExtraError("This", "mcp").hint
