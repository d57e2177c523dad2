"""What people read: errors in the language of where they appear, questions in any locale, and proper English."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from latent_tool.commands.options import as_text
from latent_tool.commands.output import as_flags
from latent_tool.integrations.playground import _scene, _well_put

SHAPES = Path(__file__).parents[2] / "examples" / "images" / "shapes.png"
FLAGS = {"min_confidence": "--min-confidence", "calibration": "--calibration", "model": "--model"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("min_confidence='calibrated' needs a calibration.", "--min-confidence 'calibrated' needs a calibration."),
        ("Give one with calibration=, or use a number.", "Give one with --calibration, or use a number."),
        ("name a real one with model=", "name a real one with --model"),
        ("The model is small; min_confidence holds.", "The model is small; --min-confidence holds."),
        (
            "The folder 'min_confidence' and --min-confidence stay.",
            "The folder 'min_confidence' and --min-confidence stay.",
        ),
    ],
)
def test_arguments_are_flags_on_the_command_line(text: str, shown: str) -> None:
    assert as_flags(text, FLAGS) == shown


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    run = [os.fsencode(each) for each in (sys.executable, "-m", "latent_tool.cli", *arguments)]
    return subprocess.run(run, capture_output=True, env={**kept, **environment}, timeout=250)


def test_the_command_says_flags() -> None:
    done = command("ask", str(SHAPES), "What?", "--min-confidence", "calibrated")
    assert done.returncode == 2
    assert (
        b"--calibration" in done.stderr and b"calibration=" not in done.stderr and b"min_confidence" not in done.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize("utf8", ["0", "1"])
def test_a_question_is_read_in_any_locale(utf8: str, tmp_path: Path) -> None:
    picture = tmp_path / "Gr\u00f6\u00dfe.png"
    picture.write_bytes(SHAPES.read_bytes())
    arguments = ("ask", str(picture), "Gr\u00f6\u00dfe?", "--json", "--iterations", "0", "--quiet")
    done = command(*arguments, LC_ALL="C", PYTHONUTF8=utf8, PYTHONCOERCECLOCALE="0")
    assert done.returncode in (0, 3), done.stderr
    assert b'"answer"' in done.stdout and b"Traceback" not in done.stderr


def test_arguments_that_are_no_text_stay_as_they_are() -> None:
    assert as_text("Gr\u00f6\u00dfe?") == "Gr\u00f6\u00dfe?"


@pytest.mark.parametrize("kind", ["shapes", "bars", "text"])
def test_the_playground_proposes_good_english(kind: str) -> None:
    for seed in range(200):
        drawn = _scene(kind, seed)
        assert drawn["questions"], seed
        for question in drawn["questions"]:
            text = question["text"]
            assert re.fullmatch(r"([A-Z][^.?!]*\. )?[A-Z][^.?!]*[.?]", text), text
            assert not re.search(r"(?i), please|please\.|thanks|answer with|single word|hey,| a [aeio]\w", text), text


def test_what_people_say_around_a_question_is_left_out() -> None:
    assert _well_put("Hey, what color is the star? please.") == "What color is the star?"
    assert _well_put("Read the letter") == "Read the letter."
    assert _well_put("Which bar is lower, gray or the black?") is None
    assert _well_put("Which bar is lower, the gray or the black one?") is not None
