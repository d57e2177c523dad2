"""The HTTP service, on a real socket: answers, streams, errors, limits, and clients that go away."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import serving
from langchain_core.runnables import RunnableLambda
from pictures import draw_shapes
from PIL import Image
from scripted_agents import CIRCLE, SQUARE, essence, small_reasoner

from latent_tool import Budget, ConfidenceRouter, ImagePolicy, ReasoningRequest, ReasoningResult
from latent_tool.errors import SettingsError
from latent_tool.images import apart as image_process
from latent_tool.integrations.http_service import ServiceLimits, create_app
from latent_tool.schema import ReasoningStep

PROBLEM = "application/problem+json"


def png(image: Image.Image | None = None) -> bytes:
    stream = io.BytesIO()
    (image or draw_shapes()).save(stream, "PNG")
    return stream.getvalue()


def data_uri(image: Image.Image | None = None) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def question(**fields: Any) -> dict[str, Any]:
    return {"image": data_uri(), "question": CIRCLE, **fields}


def problem(reply: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = reply.json()
    assert (reply.status_code, found["status"], found["type"]) == (status, status, kind), found
    assert reply.headers["content-type"] == PROBLEM
    assert found["message"].endswith(".")
    return found


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    limits = ServiceLimits(budget=Budget(iterations=40, max_patches=32, deadline_s=None), max_body_bytes=2_000_000)
    with serving(create_app(small_reasoner(), limits=limits)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


# ---------------------------------------------------------------------- answers


def test_the_answer_is_the_local_one(client: httpx.Client) -> None:
    expected = essence(small_reasoner().invoke(question(seed=3)))
    reply = client.post("/v1/ask", json=question(seed=3))
    assert reply.status_code == 200, reply.text
    assert essence(ReasoningResult.model_validate(reply.json())) == expected
    block = {"type": "image", "base64": base64.b64encode(png()).decode(), "mime_type": "image/png"}
    again = client.post("/v1/ask", json={"images": [block], "question": CIRCLE, "seed": 3})
    assert essence(ReasoningResult.model_validate(again.json())) == expected


def test_the_threshold_and_the_budget_are_the_requests(client: httpx.Client) -> None:
    reply = client.post("/v1/ask", json=question(min_confidence=1.0, budget={"iterations": 0})).json()
    assert (reply["accepted"], reply["abstained"], reply["budget"]["iterations"]) == (False, True, 0)
    assert client.post("/v1/ask", json=question(budget="quick")).json()["budget"] == dict(Budget.level("quick"))


def test_forms_carry_files(client: httpx.Client) -> None:
    reply = client.post(
        "/v1/ask/form", files=[("image", ("a.png", png(), "image/png"))], data={"question": CIRCLE, "seed": "3"}
    )
    assert essence(ReasoningResult.model_validate(reply.json())) == essence(small_reasoner().invoke(question(seed=3)))
    problem(client.post("/v1/ask/form", data={"question": CIRCLE}), 422, "InputError")


def test_options_come_with_json_and_with_forms(client: httpx.Client) -> None:
    asked = {"options": ["green", "red"], "unsure": True}
    expected = small_reasoner().invoke({**question(), **asked})
    by_json = ReasoningResult.model_validate(client.post("/v1/ask", json={**question(), **asked}).json())
    assert essence(by_json) == essence(expected) and len(by_json.choices or ()) == 3
    files = [("image", ("a.png", png(), "image/png"))]
    form = {"question": CIRCLE, "options": ["green", "red"], "unsure": "true"}
    by_form = ReasoningResult.model_validate(client.post("/v1/ask/form", files=files, data=form).json())
    assert by_form.answer == "red" and len(by_form.choices or ()) == 3
    for wrong in ({"options": ["red"]}, {"options": ["red", "red"]}, {"unsure": True}):
        problem(client.post("/v1/ask", json={**question(), **wrong}), 422, "InputError")


def test_a_stream_has_every_step_and_then_the_result(client: httpx.Client) -> None:
    reply = client.post("/v1/ask/stream", json=question())
    assert reply.headers["content-type"] == "application/x-ndjson"
    *steps, last = map(json.loads, reply.text.splitlines())
    parsed = [ReasoningStep.model_validate(each["step"]) for each in steps]
    assert [each.phase for each in parsed] == ["prefill", "search", "search", "decode"]
    assert essence(ReasoningResult.model_validate(last["result"])) == essence(small_reasoner().invoke(question()))


def test_steps_arrive_while_the_search_runs(client: httpx.Client) -> None:
    """The search cannot end before the client reads on: it is held at its first round."""
    held = threading.Event()

    def hold(request: ReasoningRequest) -> ReasoningResult:
        assert held.wait(30)
        return small_reasoner(0).invoke(request)

    class Held(RunnableLambda[Any, Any]):
        async def astream(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
            yield ReasoningStep(phase="prefill")
            yield await self.ainvoke(input)

    with serving(create_app(Held(hold))) as url, httpx.stream("POST", f"{url}/v1/ask/stream", json=question()) as reply:
        lines = reply.iter_lines()
        assert json.loads(next(lines))["step"]["phase"] == "prefill"
        held.set()
        assert "result" in json.loads(next(lines))


def test_routers_and_functions_are_served_too(client: httpx.Client) -> None:
    router = ConfidenceRouter(rungs=[small_reasoner(0), small_reasoner(1)], thresholds=[1.0, 0.0])
    with serving(create_app(router)) as url:
        reply = httpx.post(f"{url}/v1/ask", json=question(), timeout=60).json()
        assert [step["decision"] for step in reply["route"]] == ["unsure", "accepted"]
        # Its rungs may open files; its clients may not.
        problem(httpx.post(f"{url}/v1/ask", json=question(image="/etc/hostname")), 422, "ImageNotAllowedError")


def test_health_and_description(client: httpx.Client) -> None:
    health = client.get("/health").json()
    assert (health["status"], health["active"], health["capacity"]) == ("ok", 0, 64)
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {"/health", "/v1/ask", "/v1/ask/form", "/v1/ask/stream"}
    named = json.dumps(document)
    for reference in {part.split('"')[0] for part in named.split("#/components/schemas/")[1:]}:
        assert reference in document["components"]["schemas"]


# ---------------------------------------------------------------------- what is wrong with a request


@pytest.mark.parametrize("path", ["/v1/ask", "/v1/ask/stream"])
@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"image": None}, 422, "InputError"),
        ({"images": [data_uri()]}, 422, "InputError"),
        ({"image": None, "images": [data_uri()] * 9}, 422, "InputError"),
        ({"question": None}, 422, "InputError"),
        ({"question": "  "}, 422, "QuestionError"),
        ({"seed": -1}, 422, "InputError"),
        ({"budget": "endless"}, 422, "InputError"),
        ({"budget": {"iterations": 41}}, 422, "SettingsError"),
        ({"iterations": 1}, 422, "InputError"),
        ({"image": "data:image/png;base64,AAAA"}, 422, "ImageDecodeError"),
        ({"image": 7}, 422, "ImageDecodeError"),
        ({"image": "/etc/hostname"}, 422, "ImageNotAllowedError"),
        ({"image": {"path": "/etc/hostname"}}, 422, "ImageNotAllowedError"),
        ({"image": "http://127.0.0.1/secret.png"}, 422, "ImageNotAllowedError"),
        ({"budget": {"deadline_s": 1e-9}}, 504, "DeadlineError"),
    ],
)
def test_errors_name_themselves_and_the_remedy(
    client: httpx.Client, path: str, fields: dict[str, Any], status: int, kind: str
) -> None:
    reply = client.post(path, json=question(**fields))
    if reply.status_code == 200:  # it was found after the first step had been sent
        found = json.loads(reply.text.splitlines()[-1])["error"]
        assert path.endswith("stream") and (found["status"], found["type"]) == (status, kind)
    else:
        found = problem(reply, status, kind)
    assert found["hint"]
    assert found["retryable"] is (status == 504)


def test_what_is_no_request_at_all(client: httpx.Client) -> None:
    problem(client.post("/v1/ask", content=b"{", headers={"content-type": "application/json"}), 400, "InputError")
    problem(client.post("/v1/ask", content=b"[]", headers={"content-type": "application/json"}), 422, "InputError")
    undeclared = client.post("/v1/ask", content=b"{}", headers={"content-type": "application/x-www-form-urlencoded"})
    assert "Content-Type: application/json" in undeclared.json()["hint"]
    problem(
        client.post("/v1/ask", content=json.dumps(question()), headers={"content-type": "text/plain"}),
        422,
        "InputError",
    )
    problem(client.get("/v1/ask"), 405, "InputError")
    problem(client.get("/v1/nothing"), 404, "InputError")


def test_large_bodies_are_refused_unread(client: httpx.Client) -> None:
    problem(client.post("/v1/ask", json=question(system="x" * 3_000_000)), 413, "InputError")

    def pieces() -> Iterator[bytes]:  # without a length
        yield from [b" " * 100_000] * 30

    reply = client.post("/v1/ask", content=pieces(), headers={"content-type": "application/json"})
    problem(reply, 413, "InputError")
    assert client.get("/health").json()["active"] == 0


def test_files_and_hosts_are_opened_where_they_were_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    app = create_app(small_reasoner(0), policy=ImagePolicy.untrusted(folders=(tmp_path,)))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        assert client.post("/v1/ask", json=question(image="a.png")).json()["answer"]
        problem(client.post("/v1/ask", json=question(image="/etc/hostname")), 422, "ImageNotAllowedError")


def test_without_a_policy_images_are_decoded_in_processes_of_their_own() -> None:
    for reasoner in (small_reasoner(), small_reasoner().with_retry()):
        image_process._close()
        with serving(create_app(reasoner)) as url:
            assert httpx.post(f"{url}/v1/ask", json=question(), timeout=60).json()["answer"] == "red"
        assert image_process._helper is not None


def test_bugs_are_told_without_details(caplog: pytest.LogCaptureFixture) -> None:
    def broken(request: ReasoningRequest) -> ReasoningResult:
        raise ZeroDivisionError("secret detail")

    with serving(create_app(RunnableLambda(broken))) as url:
        for path in ("/v1/ask", "/v1/ask/stream"):
            reply = httpx.post(url + path, json=question())
            assert "secret" not in reply.text
            problem(reply, 500, "InternalError")


# ---------------------------------------------------------------------- who may ask


def test_with_a_token() -> None:
    with serving(create_app(small_reasoner(0), token="s3cret")) as url, httpx.Client(base_url=url) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic s3cret"}):
            reply = client.post("/v1/ask", json=question(), headers=headers)
            problem(reply, 401, "AccessError")
            assert reply.headers["www-authenticate"] == "Bearer"
        assert client.get("/openapi.json").status_code == 401
        assert client.get("/health").status_code == 200
        given = {"authorization": "Bearer s3cret", "host": "any.example"}
        assert client.post("/v1/ask", json=question(), headers=given).status_code == 200
        assert client.get("/openapi.json", headers=given).json()["security"] == [{"token": []}]
    with pytest.raises(SettingsError):
        create_app(small_reasoner(0), token=" ")


def test_web_pages_cannot_reach_it_without_a_token(client: httpx.Client) -> None:
    problem(client.get("/health", headers={"host": "evil.example"}), 400, "InputError")
    asked = {"headers": {"origin": "http://evil.example"}}
    problem(
        client.post("/v1/ask/form", files=[("image", png())], data={"question": CIRCLE}, **asked), 403, "InputError"
    )
    own = {"origin": str(client.base_url).rstrip("/")}
    assert client.get("/health", headers=own).status_code == 200


def test_a_reasoner_above_the_limits_is_refused() -> None:
    with pytest.raises(SettingsError, match="iterations is 500"):
        create_app(small_reasoner(500))


# ---------------------------------------------------------------------- many, slow and vanishing clients


class Waiting(RunnableLambda[Any, Any]):
    """Answers when it is told to; counts who waits and who gave up."""

    def __init__(self) -> None:
        super().__init__(lambda request: request)
        self.waiting = 0
        self.gone = 0
        self.go: Any = None

    async def ainvoke(self, input: Any, config: Any = None, **kwargs: Any) -> ReasoningResult:
        import asyncio

        self.waiting += 1
        try:
            while not self.go:
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.gone += 1
            raise
        finally:
            self.waiting -= 1
        return ReasoningResult(answer="x", raw_text="x", confidence=None, confidence_source="unscored")

    async def astream(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
        yield ReasoningStep(phase="prefill")
        yield await self.ainvoke(input)


def test_too_many_requests_are_told_to_come_back() -> None:
    waiting = Waiting()
    app = create_app(waiting, limits=ServiceLimits(max_requests=3, retry_after_s=7))
    with serving(app) as url, ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(httpx.post, f"{url}/v1/ask", json=question(), timeout=60) for _ in range(3)]
        until(lambda: waiting.waiting == 3)
        reply = httpx.post(f"{url}/v1/ask", json=question())
        assert problem(reply, 503, "OverloadedError")["retryable"] is True
        assert reply.headers["retry-after"] == "7"
        assert httpx.get(f"{url}/health").json()["active"] == 3
        waiting.go = True
        assert [each.result().status_code for each in asked] == [200] * 3
        assert httpx.get(f"{url}/health").json()["active"] == 0


def test_bodies_are_held_within_a_limit() -> None:
    waiting = Waiting()
    one = len(json.dumps(question()))
    app = create_app(waiting, limits=ServiceLimits(max_held_bytes=int(one * 1.5)))
    with serving(app) as url, ThreadPoolExecutor(1) as threads:
        asked = threads.submit(httpx.post, f"{url}/v1/ask", json=question(), timeout=60)
        until(lambda: waiting.waiting == 1)
        problem(httpx.post(f"{url}/v1/ask", json=question()), 503, "OverloadedError")
        waiting.go = True
        assert asked.result().status_code == 200
        assert httpx.post(f"{url}/v1/ask", json=question()).status_code == 200


def test_a_slow_body_is_given_up() -> None:
    with serving(create_app(small_reasoner(0), limits=ServiceLimits(body_s=0.2))) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            reply = connection.makefile("rb").readline()
        assert b" 408 " in reply
        assert httpx.get(f"{url}/health").json()["active"] == 0


@pytest.mark.parametrize("path", ["/v1/ask", "/v1/ask/stream"])
def test_a_client_that_goes_away_stops_its_search(path: str) -> None:
    waiting = Waiting()
    with serving(create_app(waiting)) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + path, json=question(), timeout=0.5)
        until(lambda: waiting.gone == 1)
        until(lambda: httpx.get(f"{url}/health").json()["active"] == 0)


def test_a_real_search_is_stopped_within_a_step() -> None:
    """Of 10,000 rounds: leaving the server waits for its threads."""
    before = set(threading.enumerate())
    limits = ServiceLimits(budget=Budget(iterations=10_000, deadline_s=None))
    with serving(create_app(small_reasoner(10_000), limits=limits)) as url:
        with httpx.stream("POST", f"{url}/v1/ask/stream", json=question(), timeout=60) as reply:
            lines = reply.iter_lines()
            assert [json.loads(next(lines))["step"]["phase"] for _ in range(2)] == ["prefill", "search"]
        until(lambda: httpx.get(f"{url}/health").json()["active"] == 0)
        assert httpx.post(f"{url}/v1/ask", json=question(budget={"iterations": 0}), timeout=60).status_code == 200
    assert not [each for each in set(threading.enumerate()) - before if not each.daemon]


def test_many_at_once_get_their_own_answers(client: httpx.Client) -> None:
    asked = [question(question=(CIRCLE, SQUARE)[i % 2], seed=i % 3) for i in range(24)]
    expected = {(i % 2, i % 3): essence(small_reasoner().invoke(asked[i])) for i in range(6)}
    with ThreadPoolExecutor(12) as threads:
        replies = list(threads.map(lambda each: client.post("/v1/ask", json=each), asked))
    for i, reply in enumerate(replies):
        assert essence(ReasoningResult.model_validate(reply.json())) == expected[i % 2, i % 3]
