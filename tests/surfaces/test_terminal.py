"""What a person at a terminal sees of a result."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from results import HOSTILE, a_result, hostile_result, scene
from rich.console import Console

from latent_tool.errors import InputError
from latent_tool.views import terminal as module
from latent_tool.views.terminal import can_draw, print_result, tiny_picture, what_to_do

BLUE, RED, GREEN, PAPER = (30, 90, 200), (200, 30, 30), (10, 200, 10), (245, 245, 240)


def console(**changes: Any) -> Console:
    options: dict[str, Any] = {
        "file": io.TextIOWrapper(io.BytesIO(), encoding="utf-8"),
        "force_terminal": True,
        "color_system": "truecolor",
        "width": 100,
        "highlight": False,
        "_environ": {},
    }
    return Console(**{**options, **changes})


def printed(screen: Console, *arguments: Any, **options: Any) -> str:
    with screen.capture() as capture:
        print_result(screen, *arguments, **options)
    return capture.get()


def colours(picture: Any) -> list[list[str]]:
    """The colours of a tiny picture's pixels, by row."""
    rows: list[list[str]] = []
    styles = {at: str(span.style) for span in picture.spans for at in range(span.start, span.end)}
    at = 0
    for line in picture.plain.split("\n"):
        pairs = [styles[at + i].split(" on ") for i in range(len(line))]
        rows += [[upper for upper, _ in pairs], [lower for _, lower in pairs]]
        at += len(line) + 1
    return rows


def test_the_evidence_keeps_its_colours_and_the_rest_is_grey() -> None:
    """5 x 5 cells on 10 x 10 pixels: two pixels a side."""
    scene_of_squares = Image.new("RGB", (60, 60), PAPER)
    scene_of_squares.paste(BLUE, (12, 12, 36, 36))
    scene_of_squares.paste(RED, (0, 48, 12, 60))
    result = a_result(patches=a_result().patches[:4])  # the cells (1, 1) to (2, 2)
    rows = colours(tiny_picture(result, scene_of_squares, columns=10, rows=5))
    assert [len(row) for row in rows] == [10] * 10
    blue = "#" + bytes(BLUE).hex()
    assert {(x, y) for y in range(10) for x in range(10) if rows[y][x] == blue} == {
        (x, y) for x in range(2, 6) for y in range(2, 6)
    }
    for x, y in ((0, 0), (9, 0), (0, 9), (8, 8)):
        red, green, low = (int(rows[y][x][i : i + 2], 16) for i in (1, 3, 5))
        assert red == green == low  # grey, even where the image is red


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (1000, 10), (10, 1000), (8000, 6000)])
def test_any_image_fits(size: tuple[int, int]) -> None:
    box = (0.0, 0.0, size[0] / 2, size[1] / 2)
    patch = a_result().patches[0].model_copy(update={"box": box})
    odd = patch.model_copy(update={"box": (size[0] * 2.0, 0.0, size[0] * 3.0, 5.0)})
    result = a_result(patches=[patch, odd], image_sizes=[size])
    drawn = tiny_picture(result, Image.new("RGB", size, BLUE)).plain.split("\n")
    assert 1 <= len(drawn) <= module.ROWS
    assert {len(line) for line in drawn} <= set(range(1, module.COLUMNS + 1))


def test_another_image_is_refused() -> None:
    with pytest.raises(InputError, match="50 x 60"):
        tiny_picture(a_result(), scene().resize((50, 60)))


@pytest.mark.parametrize(
    ("changes", "drawn"),
    [
        ({}, True),
        ({"color_system": "256"}, True),
        ({"color_system": "standard"}, False),
        ({"force_terminal": False}, False),
        ({"no_color": True}, False),
        ({"_environ": {"NO_COLOR": "1"}}, False),
        ({"width": 40}, False),
        ({"file": io.TextIOWrapper(io.BytesIO(), encoding="latin-1")}, False),
    ],
    ids=str,
)
def test_it_is_drawn_only_where_it_can_be_seen(changes: dict[str, Any], drawn: bool) -> None:
    screen = console(**changes)
    assert can_draw(screen) is drawn
    text = printed(screen, a_result(), pictures=lambda: [scene()])
    assert ("▀" in text) is drawn
    assert ("\x1b[38" in text) is drawn  # a colour of its own


def test_pictures_are_opened_only_if_they_are_drawn() -> None:
    def refuse() -> list[Image.Image]:
        raise AssertionError

    printed(console(force_terminal=False, color_system=None), a_result(), pictures=refuse)
    printed(console(), a_result(patches=[]), pictures=refuse)
    printed(console(), a_result(patches=a_result().patches[-1:]), pictures=refuse)  # no box


def test_of_several_images_those_with_evidence_are_drawn() -> None:
    moved = [patch.model_copy(update={"image": 1}) for patch in a_result().patches]
    result = a_result(patches=moved, image_sizes=[(60, 60), (60, 60)])
    text = printed(console(), result, pictures=lambda: [Image.new("RGB", (60, 60), GREEN), scene()])
    assert text.count("▀") == printed(console(), a_result(), pictures=lambda: [scene()]).count("▀") > 100
    assert "38;2;10;200;10" not in text


def test_hostile_text_stays_text() -> None:
    screen = console(force_terminal=False, color_system=None, width=400)
    result = hostile_result().model_copy(update={"answer": "[bold]\x1b]0;title\x07[/nope]" + HOSTILE})
    text = printed(screen, result, written=[Path("\x1b[2Jout[red].png")])
    assert "[bold]\ufffd]0;title\ufffd[/nope]<img src=x" in text
    assert "\ufffd[2Jout[red].png" in text
    assert not {"\x1b", "\x07", "\x00", "\u202e"} & set(text)


def test_what_to_do_when_the_answer_is_unsure() -> None:
    def advice(**changes: Any) -> str:
        return what_to_do(a_result(**changes)) or ""

    free = {"accepted": None, "abstained": None, "min_confidence": None}
    assert advice() == ""
    assert "below 0.8: do not rely on this answer" in advice(accepted=False, abstained=True)
    assert advice(**free, confidence=0.5) == ""
    assert "more likely wrong than right" in advice(**free, confidence=0.49)
    assert advice(**free, confidence=0.49, confidence_source="reward") == ""  # no probability
    assert advice(confidence=0.3, min_confidence=0.2) == ""  # the caller said what is enough
    for text in (advice(accepted=False), advice(**free, confidence=0.1)):
        assert "--budget thorough" in text and "--model" in text


def test_the_embedded_model_says_once_what_it_is() -> None:
    unsure = a_result(accepted=False, abstained=True)
    advice = what_to_do(unsure) or ""
    assert "small model of synthetic scenes; name a real one with --model. Or allow more work" in advice
    assert "synthetic" not in printed(console(), unsure)
    assert "synthetic" not in printed(console(), a_result())  # the command says it on standard error
    other = a_result(model="Qwen/Qwen3-VL-8B-Instruct")
    assert "synthetic" not in printed(console(), other) + (what_to_do(other) or "")


def test_a_real_terminal_gets_the_picture_and_no_color_is_respected(tmp_path: Path) -> None:
    """The command on a pseudo-terminal of its own."""
    scene().resize((120, 120)).save(tmp_path / "scene.png")
    code = (
        "import sys; from rich.console import Console; from PIL import Image;"
        "from results import a_result; from latent_tool.views.terminal import print_result;"
        "picture = Image.open(sys.argv[1]).resize((60, 60));"
        "print_result(Console(highlight=False), a_result(), pictures=lambda: [picture])"
    )
    seen = {}
    for name, environment in (("colour", {}), ("no colour", {"NO_COLOR": "1"})):
        ours, theirs = pty.openpty()
        kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "scene.png")],
            env={
                **kept,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "TERM": "xterm-256color",
                "COLUMNS": "100",
                **environment,
            },
            stdout=theirs,
        )
        os.close(theirs)
        content = b""
        while True:
            try:
                more = os.read(ours, 65536)
            except OSError:  # the other end was closed
                break
            if not more:
                break
            content += more
        os.close(ours)
        assert process.wait(60) == 0
        seen[name] = content.decode()
    assert "▀" in seen["colour"] and "\x1b[38;5" in seen["colour"]
    assert "▀" not in seen["no colour"] and "\x1b[38" not in seen["no colour"]
    for text in seen.values():
        assert "answer probability" in text and "█" in text
