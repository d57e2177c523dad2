"""The service on a real Ray cluster of one machine: fused questions, a replica that is killed, a full queue."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pictures import draw_shapes
from ray_cluster import free_ports
from scripted_agents import CIRCLE, SQUARE, essence, small_reasoner

from latent_tool import Budget, ImagePolicy, RemoteReasoner
from latent_tool.errors import AccessError, ImageDecodeError, SettingsError
from latent_tool.images.load import portable_image
from latent_tool.integrations.http_service import ServiceLimits
from latent_tool.testing import Reply, ScriptedReasoner

# Ray's own warnings are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

LIMITS = ServiceLimits(budget=Budget(iterations=10_000, max_patches=64, max_new_tokens=1024, deadline_s=None))


@pytest.fixture(scope="module")
def started(cluster: None) -> Iterator[str]:
    """The URL of Ray's proxy."""
    from ray import serve

    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def deployed(started: str) -> tuple[str, Any]:
    """The URL of a service of two replicas, and a handle to them."""
    from ray import serve

    from latent_tool.integrations.ray_serve import application

    found = application(small_reasoner(), token="s3cret", limits=LIMITS, replicas=2, num_cpus=0.5)
    return started, serve.run(found, name="questions", route_prefix="/")


def processes(handle: Any) -> dict[int, list[int]]:
    """The batches of every replica that answers, by process."""
    found = [handle.statistics.remote().result(timeout_s=60) for _ in range(8)]
    return {each["pid"]: each["batches"] for each in found}


def test_64_at_once_while_a_replica_is_killed(deployed: tuple[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    url, handle = deployed
    image = draw_shapes()
    requests = [{"image": image, "question": (CIRCLE, SQUARE)[i % 2], "seed": i % 3} for i in range(64)]
    expected = {i: essence(small_reasoner().invoke(requests[i])) for i in range(6)}
    reasoner = RemoteReasoner(url, token="s3cret", retries=30, timeout_s=280)
    victim = next(iter(processes(handle)))
    began = time.monotonic()
    with ThreadPoolExecutor(64) as threads:
        asked = [threads.submit(reasoner.invoke, each) for each in requests]
        while sum(each.done() for each in asked) < 4:
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        answers = [each.result() for each in asked]
    seconds = time.monotonic() - began
    for i, answer in enumerate(answers):
        assert essence(answer) == expected[i % 6]
    sizes = [size for pid, batches in processes(handle).items() if pid != victim for size in batches]
    assert max(sizes) > 1
    with capsys.disabled():
        print(f"\n64 questions, one of two replicas killed: {seconds:.1f} s; batches of the survivors {sizes}")


def test_it_is_the_same_service(deployed: tuple[str, Any]) -> None:
    url, _ = deployed
    reasoner = RemoteReasoner(url, token="s3cret", timeout_s=120)
    request = {"image": draw_shapes(), "question": CIRCLE}
    *steps, result = reasoner.stream(request)
    assert [step.phase for step in steps] == ["prefill", "search", "search", "decode"]
    assert essence(result) == essence(small_reasoner().invoke(request))
    with pytest.raises(ImageDecodeError):
        reasoner.invoke({"image": b"garbage", "question": CIRCLE})
    with pytest.raises(AccessError):
        RemoteReasoner(url).invoke(request)
    assert httpx.get(f"{url}/health", timeout=60).json()["status"] == "ok"


def test_a_client_that_goes_away_stops_its_search(deployed: tuple[str, Any]) -> None:
    url, _ = deployed
    endless = RemoteReasoner(url, token="s3cret", budget={"iterations": 10_000})
    stream = endless.stream({"image": draw_shapes(), "question": CIRCLE})
    next(stream)
    stream.close()
    end = time.monotonic() + 60
    while any(httpx.get(f"{url}/health", timeout=60).json()["active"] for _ in range(6)):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_full_queue_is_a_clear_503(started: str) -> None:
    from ray import serve

    from latent_tool.integrations.ray_serve import application

    slow = application(
        ScriptedReasoner(Reply("late", seconds=5.0)),
        limits=ServiceLimits(max_requests=1, retry_after_s=3),
        num_cpus=0.5,
        batch_size=1,
        max_ongoing=1,
        max_queued=2,
        name="slow",
    )
    serve.run(slow, name="slow", route_prefix="/slow")
    body = {"image": portable_image(draw_shapes(), ImagePolicy.local())[0], "question": CIRCLE}
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: httpx.post(f"{started}/slow/v1/ask", json=body, timeout=120), range(8)))
    refused = [each for each in replies if each.status_code == 503]
    assert 0 < len(refused) < 8
    assert {each.status_code for each in replies} == {200, 503}
    assert {each.headers["retry-after"] for each in refused} == {"3"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 64},
        {"max_ongoing": 1000},
        {"batch_size": 0},
        {"token": ""},
        {"replicas": 0},
        {"replicas": (3, 2)},
        {"num_gpus": -1},
    ],
)
def test_what_is_wrong_is_said_before_it_starts(wrong: dict[str, Any]) -> None:
    from latent_tool.integrations.ray_serve import application

    with pytest.raises(SettingsError):
        application(small_reasoner(), limits=LIMITS, **wrong)


@pytest.mark.parametrize(("args", "means"), [({}, "auto"), ({"compile": False}, False), ({"compile": "off"}, False)])
def test_a_config_says_whether_passes_are_compiled(args: dict[str, Any], means: Any) -> None:
    from latent_tool.integrations.ray_serve import Arguments, from_arguments

    deployment = from_arguments(Arguments.model_validate({"budget": "quick", **args}))._bound_deployment
    service = deployment.init_args[0]
    assert service["reasoner"].compile == means
