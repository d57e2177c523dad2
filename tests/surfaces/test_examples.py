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


def test_middleware(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run("middleware.py", capsys).splitlines()
    assert first.startswith("unsure: ") and second.split(":")[0] in ("unsure", "accepted")


def test_several_images(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run("several_images.py", capsys).splitlines()
    assert first == "[1] red" and second.startswith("[2] ")


def test_examples_are_short_and_each_is_run() -> None:
    tests = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 41 or path.stem == "make_images", f"{path.name}: {len(lines)} lines"
        assert f'run("{path.name}"' in tests or path.stem in ("make_images",), path.name


def test_human_review(capsys: pytest.CaptureFixture[str]) -> None:
    certain, asked, answered = run("human_review.py", capsys).splitlines()
    assert certain.endswith("-> red")
    assert "needs a person" in asked and answered.endswith("-> there is no star")


def test_batch_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("batch_folder.py", capsys).splitlines()[-1].split()[:2] == ["shapes.png", "3"]
    (tmp_path / "broken.png").write_text("no picture")
    assert "broken.png           cannot be read" in run("batch_folder.py", capsys, str(tmp_path), "what is this?")
