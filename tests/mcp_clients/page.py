"""The code of docs/frameworks.md, run with a scripted model in place of the one it names.

It runs in the framework's own environment, where latent-tool is not installed: the server is that of the environment
whose command ``LATENT_TOOL_COMMAND`` names.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
from pathlib import Path
from typing import Any

# Nothing that runs here may report to anybody.
os.environ.update(OTEL_SDK_DISABLED="true", CREWAI_DISABLE_TELEMETRY="true", CREWAI_TRACING_ENABLED="false")

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "examples" / "images"
TOOL = "ask_about_image"
ASKED = {"question": "What is below the blue square?", "image": str(PICTURES / "shapes.png"), "budget": "quick"}
# Whether an answer may be relied on is the server's to say: by its usual threshold, and by one that nothing reaches.
THRESHOLDS = [0.5, 1.0]


def run(
    name: str, model: str, scripted: Any, threshold: float, changed: dict[str, str] | None = None
) -> dict[str, Any]:
    """The variables of the page's code for a framework, after it ran.

    Args:
        name: the framework, as in the first line of its code.
        model: the code that names the model on the page.
        scripted: the model that is put in its place.
        threshold: below it the server says that an answer is not reliable.
        changed: further code of the page, and what is put in its place.
    """
    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if code.startswith(f"# {name}:")]
    for there, here in {
        "/path/to/env/bin/latent-tool": os.environ["LATENT_TOOL_COMMAND"],
        '"mcp", ': f'"mcp", "--min-confidence", "{threshold}", ',
        "/home/me/pictures": str(PICTURES),
        model: "scripted",
        **(changed or {}),
    }.items():
        assert there in code, there
        code = code.replace(there, here)
    variables: dict[str, Any] = {"scripted": scripted}
    begun = eval(compile(code, "frameworks.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), variables)
    if inspect.iscoroutine(begun):
        asyncio.run(begun)
    return variables


def check(text: str, threshold: float) -> None:
    """What the agent's model reads: the answer, and whether it may be relied on."""
    assert "Answer: green triangle" in text and "Confidence: high, " in text
    assert ("NOT RELIABLE" in text) == (threshold == 1.0)
