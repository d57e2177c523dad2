"""The README: its code runs, its generated parts are up to date, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from latent_tool.models.families import markdown_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@cache
def printed(code: str) -> str:
    """Run a piece of Python in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_runs(code: str) -> None:
    printed(code)


@pytest.mark.slow
def test_the_first_example_says_what_it_prints() -> None:
    promised = re.search(r'# "(.+?)"', BLOCKS[0])
    assert promised is not None
    assert printed(BLOCKS[0]).startswith(promised[1])


def test_the_table_of_families_is_up_to_date() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    found = re.search(r"<!-- families:.*?-->\n(.*?)\n<!-- end of families -->", page, re.DOTALL)
    assert found is not None
    assert found[1] == markdown_table()


def test_it_can_be_read_in_a_few_minutes() -> None:
    assert len(README.split()) <= 1_450


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
