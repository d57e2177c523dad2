"""The code in the pages about frameworks and MCP."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / "docs" / name).read_text() for name in ("mcp.md", "frameworks.md")}
BLOCKS = [(name, code) for name, page in PAGES.items() for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
# What needs other people's models or environments is parsed only.
ELSEWHERE = ("openai:", "/path/to/env")


@pytest.mark.parametrize(("name", "code"), BLOCKS, ids=range(len(BLOCKS)))
def test_python_runs(name: str, code: str) -> None:
    if any(part in code for part in ELSEWHERE):
        compile(code, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        return
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_what_is_pasted_into_clients_is_json() -> None:
    pasted = [json.loads(code) for code in re.findall(r"```json\n(.*?)```", PAGES["mcp.md"], re.DOTALL)]
    assert [list(each) for each in pasted] == [["mcpServers"], ["servers"], ["mcpServers"]]


def test_links_exist() -> None:
    for page in PAGES.values():
        for target in re.findall(r"\]\(([^)#]+)\)", page):
            assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target


def test_options_exist() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "latent_tool.cli", "mcp", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"COLUMNS": "200", "PATH": ""},
    ).stdout
    for option in set(re.findall(r"--[a-z][a-z-]+", PAGES["mcp.md"])):
        assert option in shown, option
