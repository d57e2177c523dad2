"""``latent-tool serve`` as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from pictures import draw_shapes
from scripted_agents import CIRCLE

from latent_tool import RemoteReasoner
from latent_tool.errors import AccessError, ImageNotAllowedError

TOKEN = "a-token-for-this-test"


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "latent_tool.cli", "serve", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LATENT_TOOL_TOKEN": "", **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "LATENT_TOOL_TOKEN"),
        (["--token-file", "nowhere.txt"], "cannot be read"),
        (["--token-file", "SHORT"], "shorter than 16"),
        (["--folder", "nowhere"], "no folder"),
        (["--max-iterations", "3"], "allows 3"),
        (["--calibration", "nowhere.json"], "'nowhere.json' cannot be read"),
        (["--host", "192.0.2.1", "--token-file", "TOKEN"], "cannot be listened at"),
        (["--model", "nowhere", "--port", "0"], "nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_it_listens(arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "short").write_text("s3cret\n")
    files = {each.upper(): str(tmp_path / each) for each in ("token", "short")}
    process = command(*(files.get(each, each) for each in arguments))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert words in said


def test_it_serves_until_it_is_stopped(tmp_path: Path) -> None:
    draw_shapes().save(tmp_path / "a.png")
    (tmp_path / "token").write_text(TOKEN + "\n")
    process = command("--port", "0", "--folder", str(tmp_path), "--token-file", str(tmp_path / "token"))
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        url = said.strip().removeprefix("Listening at ")
        assert url.startswith("http://127.0.0.1:"), said + process.stderr.read()
        reasoner = RemoteReasoner(url, token=TOKEN, budget="quick")
        assert reasoner.invoke({"image": draw_shapes(), "question": CIRCLE}).answer
        with pytest.raises(AccessError):
            RemoteReasoner(url).invoke({"image": draw_shapes(), "question": CIRCLE})
        headers = {"authorization": f"Bearer {TOKEN}"}
        for image, status in ((str(tmp_path / "a.png"), 200), ("/etc/hostname", 422)):
            body = {"image": image, "question": CIRCLE, "budget": {"iterations": 0}}
            reply = httpx.post(f"{url}/v1/ask", json=body, headers=headers, timeout=60)
            assert reply.status_code == status
        assert reply.json()["type"] == ImageNotAllowedError.__name__
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode in (0, 130, -signal.SIGINT)
    assert "Traceback" not in said
