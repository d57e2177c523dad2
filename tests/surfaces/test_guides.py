"""The Python in the guides runs, in the order of its page; what cannot says so above it.

A guide may speak of things that its reader has (a picture, a model to ask next): those are made here, by name. The
guides of frameworks and of MCP are run with the frameworks, elsewhere.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import draw_shapes
from PIL import Image

from latent_tool import ConfidenceRouter, LatentReasoner, SearchSettings
from latent_tool.scheduler import get_scheduler

pytestmark = pytest.mark.disable_socket

ROOT = Path(__file__).parents[2]
ELSEWHERE = ("frameworks.md", "mcp.md")
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*) -->\n\n?)?^```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)
# What keeps a block from being run here; anything else must run.
REASONS = {"it asks a server", "it downloads a model"}


def blocks(page: Path) -> list[tuple[str | None, str]]:
    return [(found["reason"], found["code"]) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


PAGES = {
    page.name: blocks(page)
    for page in sorted((ROOT / "docs").glob("*.md"))
    if page.name not in ELSEWHERE and blocks(page)
}


def what_readers_have() -> dict[str, Any]:
    """What guides name without making or importing it."""
    from langchain_core.language_models import GenericFakeChatModel
    from langchain_core.load import dumpd, load
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_core.runnables import RunnableLambda

    reasoner = LatentReasoner(budget="quick", settings=SearchSettings(latents=0))
    picture = draw_shapes()
    request = {"image": picture, "question": "what color is the circle?"}
    return {
        "ChatPromptTemplate": ChatPromptTemplate,
        "ConfidenceRouter": ConfidenceRouter,
        "LatentReasoner": LatentReasoner,
        "load": load,
        "reasoner": reasoner,
        "picture": picture,
        "image": picture,
        "requests": [request, request],
        "result": reasoner.invoke(request),
        "chat_model": GenericFakeChatModel(messages=iter(["red"])),
        "strong_model": GenericFakeChatModel(messages=iter(["red"])),
        "prompt": RunnableLambda(lambda request: request),
        "saved": dumpd(reasoner),
    }


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_guide_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("photo.png", "chart.png"):
        draw_shapes().save(tmp_path / name)
    shutil.copy(ROOT / "latent_tool" / "models" / "embedded" / "calibration.json", tmp_path / "mine.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image.Image, "show", lambda picture: None)  # there is no viewer
    threads = torch.get_num_threads()
    names = what_readers_have()
    scheduler = get_scheduler(names["reasoner"].engine())
    limits = scheduler.max_active, scheduler.max_queue
    try:
        for reason, code in PAGES[page]:
            compiled = compile(code, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            if reason is not None:
                continue
            done = eval(compiled, names)
            if inspect.isawaitable(done):
                asyncio.run(_finish(done))
    finally:
        torch.set_num_threads(threads)
        scheduler.max_active, scheduler.max_queue = limits


async def _finish(work: Any) -> None:
    await work


def test_what_is_not_run_says_a_reason_that_is_known() -> None:
    marked = [reason for page in PAGES.values() for reason, _ in page if reason is not None]
    assert set(marked) <= REASONS and len(marked) <= 3
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    assert sum(page.count("<!-- not run:") for page in pages) == len(marked)  # each stands above a block


def test_every_block_is_seen() -> None:
    for name, found in PAGES.items():
        assert len(found) == (ROOT / "docs" / name).read_text(encoding="utf-8").count("```python")
    assert sum(map(len, PAGES.values())) >= 15
