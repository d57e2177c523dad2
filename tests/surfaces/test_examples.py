"""The examples run offline and print what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.disable_socket

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What an example prints."""
    before = sys.argv
    sys.argv = [name, *arguments]
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before
    return capsys.readouterr().out


def test_agent(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("agent.py", capsys)
    assert "Answer: blue square" in printed and "Confidence:" in printed and "ai: It is the blue square." in printed


def test_chain(capsys: pytest.CaptureFixture[str]) -> None:
    red, blue, chat = run("chain.py", capsys).splitlines()
    assert red.startswith("reasoner:   red (") and blue.startswith("reasoner:   blue (")
    assert chat == "chat model: red"


def test_decide(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("langchain_core.decisions")
    shapes, chart = run("decide.py", capsys).splitlines()
    assert shapes.startswith("shapes.png: to the red shelf (")
    assert chart.startswith("chart.png: to a person (")


def test_fallback(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("fallback.py", capsys)
    assert "-> red   (cost 1)" in printed and "-> There is no star.   (cost 105)" in printed


def test_human_review(capsys: pytest.CaptureFixture[str]) -> None:
    certain, asked, answered = run("human_review.py", capsys).splitlines()
    assert certain.endswith("-> red")
    assert "needs a person" in asked and answered.endswith("-> there is no star")


def test_batch_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("batch_folder.py", capsys).splitlines()[-1].split()[:2] == ["shapes.png", "3"]
    (tmp_path / "broken.png").write_text("no picture")
    assert "broken.png           cannot be read" in run("batch_folder.py", capsys, str(tmp_path), "what is this?")
