"""Options that every command that asks has, that mean the same everywhere, and that are never taken for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from latent_tool.cli import app
from latent_tool.commands.options import make_reasoner
from latent_tool.errors import CalibrationError, SettingsError

ASKING = {
    "ask": ("a.png", "?"),
    "serve": ("--port", "0"),
    "mcp": (),
    "play": ("--no-open", "--port", "0"),
}
BLOCK = ("model", "device", "dtype", "quantize", "compile", "budget", "min_confidence", "calibration", "check_domain")
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def params(command: str) -> dict[str, Any]:
    return {str(param.name): param for param in COMMANDS[command].params}


@pytest.mark.parametrize("command", ASKING)
def test_every_command_that_asks_has_the_block(command: str) -> None:
    own, first = params(command), params("ask")
    for name in BLOCK:
        assert name in own, name
        assert own[name].opts == first[name].opts
        if name != "budget":  # of a server it is what clients begin with
            assert own[name].help == first[name].help


@pytest.mark.parametrize("command", ["eval", "study", "doctor"])
def test_every_command_that_loads_a_model_says_which_alike(command: str) -> None:
    own, first = params(command), params("ask")
    for name in ("model", "device", "dtype", "quantize", "compile"):
        assert own[name].opts == first[name].opts and own[name].help == first[name].help


@pytest.mark.parametrize("command", ASKING)
@pytest.mark.parametrize("wanted", ["nan", "-0.1", "1.5", "inf", "high", "", "Calibrated"])
def test_a_threshold_that_is_none_is_bad_usage(command: str, wanted: str) -> None:
    done = CliRunner().invoke(app, [command, *ASKING[command], "--min-confidence", wanted])
    assert done.exit_code == 2 and "calibrated" in done.output


@pytest.mark.parametrize("command", ASKING)
def test_a_calibrated_threshold_without_a_calibration_is_an_error(command: str) -> None:
    done = CliRunner().invoke(app, [command, *ASKING[command], "--min-confidence", "calibrated"])
    assert isinstance(done.exception, CalibrationError) and "calibration" in done.exception.hint


def test_the_playground_begins_with_the_threshold_of_its_calibration() -> None:
    from latent_tool.integrations.http_service import ServiceLimits
    from latent_tool.integrations.playground import _setup
    from latent_tool.settings import ImagePolicy

    named = {"model": "embedded", "device": "auto", "dtype": "auto", "quantize": None, "budget": "standard"}
    reasoner = make_reasoner(**named, calibration="embedded", min_confidence="calibrated")
    assert reasoner.calibration is not None
    at = reasoner.calibration.require_threshold().probability
    begins = _setup(reasoner, ImagePolicy.server(), ServiceLimits())["min_confidence"]
    assert at < begins <= min(1.0, at + 0.011) or begins == 1.0  # never below
    assert _setup(make_reasoner(**named), ImagePolicy.server(), ServiceLimits())["min_confidence"] == 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--replicas", "2"),
        ("serve", "--num-gpus", "1"),
        ("serve", "--batch-size", "4"),
        ("mcp", "--port", "9000"),
        ("mcp", "--host", "127.0.0.1"),
        ("mcp", "--token-file", "token"),
        ("eval", "scenes:held_out:5000000-5000001", "--out", "x", "--actors", "2"),
        ("eval", "scenes:held_out:5000000-5000001", "--out", "x", "--num-cpus", "2"),
    ],
)
def test_options_that_would_change_nothing_are_refused(arguments: tuple[str, ...]) -> None:
    refused = CliRunner().invoke(app, list(arguments)).exception
    assert isinstance(refused, SettingsError) and refused.message.startswith("--") and "alone" in refused.message


@pytest.mark.parametrize("data", ["q.jsonl", "q.csv", "scenes:held_out:5000000-5000001", "easy-vqa"])
def test_a_folder_of_pictures_that_would_change_nothing_is_refused(data: str) -> None:
    refused = CliRunner().invoke(app, ["eval", data, "--out", "x", "--images", "."]).exception
    assert isinstance(refused, SettingsError) and "changes nothing" in refused.message
