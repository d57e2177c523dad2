"""The extras: they resolve together, and what is missing names the one that brings it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import metadata, requires

import pytest

# Module of latent_tool.integrations, the extra that brings what it needs, and the package that is needed.
MODULES = [
    ("ag2", "ag2", "ag2"),
    ("autogen", "autogen", "autogen_core"),
    ("google_adk", "google-adk", "google.adk"),
    ("haystack", "haystack", "haystack"),
    ("langgraph", "langgraph", "langgraph"),
    ("llama_index", "llama-index", "llama_index"),
    ("mcp", "mcp", "mcp"),
    ("openai_agents", "openai-agents", "agents"),
    ("pydantic_ai", "pydantic-ai", "pydantic_ai"),
    ("ray_actors", "ray", "ray"),
    ("ray_connection", "ray", "ray"),
    ("ray_serve", "ray", "ray"),
    ("smolagents", "smolagents", "smolagents"),
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=280)


def test_all_extras_are_installed_and_agree() -> None:
    checked = run("-m", "pip", "check")
    assert checked.returncode == 0, checked.stdout
    everything = [each for each in requires("latent-tool") or [] if each.endswith('extra == "all"')]
    named = {extra for each in everything for extra in each.partition("[")[2].partition("]")[0].split(",")}
    assert {extra for _, extra, _ in MODULES} <= named <= set(metadata("latent-tool").get_all("Provides-Extra", []))


def test_a_missing_extra_names_itself() -> None:
    blocked = [package for _, _, package in MODULES]
    code = f"""
import importlib, sys
for package in {blocked!r}:
    sys.modules[package] = None
from latent_tool.errors import MissingExtraError
for module in {[module for module, _, _ in MODULES]!r}:
    try:
        importlib.import_module("latent_tool.integrations." + module)
    except MissingExtraError as error:
        print(module, error.extra, error)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    for line, (module, extra, _) in zip(done.stdout.splitlines(), MODULES, strict=True):
        assert line.startswith(f"{module} {extra} ") and line.endswith(f"[{extra}]'")


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [(["mcp"], "mcp", "mcp"), (["eval", "scenes", "--out", "run", "--ray"], "ray", "ray")],
)
def test_the_command_names_the_missing_extra(arguments: list[str], package: str, extra: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['latent-tool', *{arguments!r}]\n"
    done = run("-c", code + "from latent_tool.cli import main; main()")
    assert done.returncode == 1 and done.stdout == ""
    assert "pip install " in done.stderr and f"[{extra}]'" in done.stderr
