"""What an operator sees: metrics, health, the page at the door, logs, signals, and the files in deploy/."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from asked import URI
from http_server import serving
from mcp import Client
from scripted_agents import CIRCLE, small_reasoner

from latent_tool import LatentReasoner
from latent_tool.integrations.http_service import create_app
from latent_tool.integrations.mcp import http_app
from latent_tool.langchain.image_tool import ImageTool
from latent_tool.settings import ImagePolicy
from latent_tool.testing import Reply, ScriptedReasoner

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TOKEN = "a-token-for-this-test"
SECRETS = (TOKEN, "s3cret-in-a-query", "s3cret-in-a-path", "s3cret-question")


def value(text: str, name: str, **labels: str) -> float:
    """One sample of Prometheus' text format."""
    for line in text.splitlines():
        found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if found and found[1] == name and dict(re.findall(r'(\w+)="([^"]*)"', found[2] or "")) == labels:
            return float(found[3])
    return 0.0


def body(**fields: Any) -> dict[str, Any]:
    return {"image": URI, "question": CIRCLE, **fields}


def test_metrics_count_requests_and_answers() -> None:
    reasoner = ScriptedReasoner([Reply("blue", 0.9), Reply("red", 0.2), Reply("green", None)])
    with serving(create_app(reasoner)) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert client.post("/v1/ask", json=body(min_confidence=0.5)).json()["accepted"] is True
        assert client.post("/v1/ask/stream", json=body(min_confidence=0.5)).status_code == 200
        assert client.post("/v1/ask", json=body()).json()["accepted"] is None
        assert client.post("/v1/ask", json={"question": "?"}).status_code == 422
        assert client.get("/s3cret-in-a-path").status_code == 404
        text = client.get("/metrics").text
    counted = "latent_tool_requests_total"
    assert value(text, counted, method="POST", path="/v1/ask", status="200") == 2
    assert value(text, counted, method="POST", path="/v1/ask", status="422") == 1
    assert value(text, counted, method="POST", path="/v1/ask/stream", status="200") == 1
    assert value(text, counted, method="GET", path="other", status="404") == 1
    assert value(text, "latent_tool_request_seconds_count", path="/v1/ask") == 3
    for verdict in ("accepted", "abstained", "ungated"):
        assert value(text, "latent_tool_answers_total", verdict=verdict) == 1, text
    assert value(text, "latent_tool_confidence_count") == 2
    assert value(text, "latent_tool_requests_capacity") == 64 and value(text, "latent_tool_requests_in_hand") == 0
    assert "s3cret" not in text


async def test_metrics_of_the_mcp_server_count_calls_and_answers() -> None:
    reasoner = ScriptedReasoner([Reply("blue", 0.9), Reply("red", 0.2)])
    tool = ImageTool(reasoner=reasoner, image_policy=ImagePolicy.server())
    with serving(http_app(tool)) as url:
        async with Client(f"{url}/mcp") as client:
            for _ in range(2):
                assert not (await client.call_tool("ask_about_image", body())).is_error
            assert (await client.call_tool("ask_about_image", {**body(), "image": "nowhere.png"})).is_error
        text = httpx.get(f"{url}/metrics").text
    assert value(text, "latent_tool_answers_total", verdict="accepted") == 1, text
    assert value(text, "latent_tool_answers_total", verdict="abstained") == 1
    assert value(text, "latent_tool_confidence_count") == 2
    assert value(text, "latent_tool_requests_total", method="POST", path="/mcp", status="200") >= 3
    assert value(text, "latent_tool_request_seconds_count", path="/mcp") >= 3


@pytest.mark.parametrize("kind", ["http", "mcp"])
def test_no_path_of_the_machine_is_told(kind: str, tmp_path: Path) -> None:
    """A model in a folder that is none: what clients are told of it is the folder's name."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    reasoner = LatentReasoner(model=str(folder))
    tool = ImageTool(reasoner=reasoner, image_policy=ImagePolicy.server())
    with serving(create_app(reasoner) if kind == "http" else http_app(tool)) as url:
        told = [httpx.get(url + path).text for path in ("/", "/health", "/metrics")]
        assert httpx.get(f"{url}/health").json()["model"] == "my-model"
        if kind == "http":
            told += [httpx.post(f"{url}/v1/ask", json=body(), timeout=60).text]
            told += [httpx.post(f"{url}/v1/ask/stream", json=body(), timeout=60).text]
            assert "config.json is missing" in told[-1] and "'my-model'" in told[-1]
    assert str(tmp_path) not in "".join(told)


def test_metrics_want_the_token_and_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(create_app(ScriptedReasoner(Reply("x")), token=TOKEN)) as url:
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert httpx.get(f"{url}/health").status_code == httpx.get(url).status_code == 200
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with serving(create_app(ScriptedReasoner(Reply("x")))) as url:
        reply = httpx.get(f"{url}/metrics")
        assert reply.status_code == 501 and "metrics" in reply.json()["hint"]
        assert httpx.post(f"{url}/v1/ask", json=body(), timeout=60).json()["answer"] == "x"


def test_health_tells_model_device_version_and_queue() -> None:
    with serving(create_app(small_reasoner(0))) as url:
        before = httpx.get(f"{url}/health").json()
        assert before["model"] == "embedded" and before["version"]
        httpx.post(f"{url}/v1/ask", json=body(), timeout=120).raise_for_status()
        after = httpx.get(f"{url}/health").json()
        assert (after["device"], after["loaded"], after["queue"]) == ("cpu", True, 0)
        assert value(httpx.get(f"{url}/metrics").text, "latent_tool_engine_loaded") == 1


@pytest.mark.parametrize("kind", ["http", "mcp"])
def test_the_page_says_what_is_served(kind: str) -> None:
    reasoner = ScriptedReasoner(Reply("x"), model='<script>alert("&")</script>')
    tool = ImageTool(reasoner=reasoner, image_policy=ImagePolicy.server())
    app = create_app(reasoner) if kind == "http" else http_app(tool)
    with serving(app) as url:
        page = httpx.get(url)
        assert "&lt;script&gt;alert" in page.text and "<script" not in page.text
        assert ("/v1/ask" if kind == "http" else "/mcp") in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert httpx.get(f"{url}/health").json()["model"] == reasoner.model
        assert httpx.get(f"{url}/metrics").status_code == 200
        for path in ("/", "/health", "/metrics"):
            assert httpx.get(url + path, headers={"host": "evil.example"}).status_code == 400


@contextmanager
def command(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[tuple[Any, str, list[str]]]:
    """A server as a process of its own, where it listens, and what it said until then."""
    process = subprocess.Popen(
        [sys.executable, "-m", "latent_tool.cli", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LATENT_TOOL_TOKEN": TOKEN, **(environment or {})},
    )
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            if line.startswith("Listening at "):
                break
        yield process, said[-1].removeprefix("Listening at ").strip(), said
    finally:
        process.kill()
        process.wait(30)
        process.stderr.close()


def test_the_access_log_has_no_secrets_and_sigterm_ends_it_cleanly() -> None:
    with command("serve", "--port", "0", "--log-level", "info") as (process, url, _):
        headers = {"authorization": f"Bearer {TOKEN}"}
        asked = body(question="s3cret-question", budget={"iterations": 0})
        httpx.post(f"{url}/v1/ask?key=s3cret-in-a-query", json=asked, headers=headers, timeout=120).raise_for_status()
        httpx.get(f"{url}/s3cret-in-a-path", headers=headers)
        assert httpx.get(f"{url}/metrics?token={TOKEN}").status_code == 401
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in said
    lines = [line for line in said.splitlines() if "latent_tool.access" in line]
    assert len(lines) == 3, said
    assert "POST /v1/ask 200" in lines[0] and "GET other 404" in lines[1] and "GET /metrics 401" in lines[2]
    assert not [secret for secret in SECRETS if secret in said]


def test_an_interrupted_evaluation_says_that_nothing_is_lost(tmp_path: Path) -> None:
    arguments = ["eval", "scenes:held_out:5000000-5000399", "--method", "greedy", "--batch", "1", "--no-visual"]
    process = subprocess.Popen(
        [sys.executable, "-m", "latent_tool.cli", *arguments, "--out", str(tmp_path / "run"), "--quiet"],
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore the signal, and hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    rows = tmp_path / "run" / "items.jsonl"
    try:
        while process.poll() is None and not (rows.exists() and rows.stat().st_size):
            pass
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in said
    assert "the same command goes on" in said


# --- deploy/ ----------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]  # type: ignore[misc]


def test_the_lines_of_the_container_run_in_an_empty_environment(tmp_path: Path) -> None:
    """Its command, environment and health check; the line that installs is run by ``make test-install``."""
    said = dict(instructions())
    environment = dict(part.split("=", 1) for part in shlex.split(said["ENV"]))
    arguments = ["0" if each == "8000" else each for each in json.loads(said["CMD"])]
    check = json.loads(said["HEALTHCHECK"].partition(" CMD ")[2])
    bare = {"PATH": "/usr/bin:/bin", "LATENT_TOOL_TOKEN": TOKEN, **environment, "HF_HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "latent_tool.cli", *arguments], stderr=subprocess.PIPE, text=True, env=bare, cwd=tmp_path
    )
    assert process.stderr is not None
    try:
        port = next(found[1] for line in process.stderr if (found := re.search(r"Listening at .*:(\d+)", line)))
        healthy = subprocess.run([sys.executable, *check[1:-1], check[-1].replace("8000", port)], env=bare)
        assert healthy.returncode == 0
        process.send_signal(getattr(signal, said["STOPSIGNAL"]))
        assert process.wait(60) in (0, -signal.SIGTERM)
        sick = subprocess.run(
            [sys.executable, *check[1:-1], check[-1].replace("8000", port)], env=bare, capture_output=True
        )
        assert sick.returncode != 0
    finally:
        process.kill()
        process.communicate()
    assert not any(tmp_path.iterdir())  # a root that is read-only is no obstacle


def test_the_container_runs_without_privileges() -> None:
    said = instructions()
    assert [what for name, what in said if name == "USER"] == ["10001:10001"]
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["latent-tool"]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    known = subprocess.run(
        [sys.executable, "-m", "latent_tool.cli", "serve", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    (started,) = re.findall(r"^ExecStart=(.*)$", (DEPLOY / "latent-tool.service").read_text(), re.MULTILINE)
    for line in (*service["command"], *json.loads(dict(said)["CMD"]), *started.split()):
        assert not line.startswith("--") or line in known, line


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "latent-tool.service"
    unit.write_text((DEPLOY / unit.name).read_text().replace("/opt/latent-tool/bin/latent-tool", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert unit.name not in done.stderr, done.stderr
