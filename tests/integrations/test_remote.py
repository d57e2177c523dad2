"""RemoteReasoner: the tests of LatentReasoner over a real socket, and what only happens on a network."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import serving
from langchain_core.load import dumpd, load
from PIL import Image

# The very tests of the local reasoner, with the fixture below in place of its own.
from reasoner_calls import (  # noqa: F401
    test_a_closed_stream_stops,
    test_a_deadline_that_has_passed_is_an_error,
    test_a_graph_streams_the_steps,
    test_a_sync_call_can_be_stopped,
    test_another_seed_searches_elsewhere,
    test_copies_and_pickles_are_equal,
    test_errors_in_a_batch_take_their_place,
    test_names_tags_and_parents_reach_the_callbacks,
    test_options_of_a_batch_belong_to_their_question,
    test_prompts_and_messages_are_requests_too,
    test_retries_and_fallbacks_compose,
    test_schemas_name_the_classes,
    test_steps_go_out_as_events,
    test_streams_end_in_the_result,
    test_the_request_is_left_as_it_was,
    test_the_same_answer_however_it_is_asked,
    test_what_others_put_into_configurable_is_left_alone,
    test_with_budget_changes_the_budget_alone,
    test_wrong_options_are_errors,
    test_wrong_requests_are_input_errors,
)
from recorder import Recorder
from scripted_agents import CIRCLE, SQUARE, essence, small_reasoner

from latent_tool import Budget, ConfidenceRouter, ImagePolicy, LatentReasoningTool, RemoteReasoner
from latent_tool.errors import (
    AccessError,
    DeadlineError,
    ImageNotAllowedError,
    LatentToolError,
    OverloadedError,
    QuestionError,
    ServiceError,
    ServiceUnavailableError,
    SettingsError,
)
from latent_tool.integrations.http_service import ServiceLimits, create_app
from latent_tool.langchain.image_tool import ImageTool
from latent_tool.schema import ReasoningResult, ReasoningStep

LIMITS = ServiceLimits(
    budget=Budget(iterations=10_000, max_patches=64, max_views=16, max_new_tokens=1024, deadline_s=None)
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(create_app(small_reasoner(), token="s3cret", limits=LIMITS)) as url:
        yield url


@pytest.fixture
def reasoner(url: str) -> RemoteReasoner:
    return RemoteReasoner(url, token="s3cret", retries=0)


@pytest.fixture
def request_(picture: Image.Image) -> dict[str, Any]:
    return {"image": picture, "question": CIRCLE}


# ---------------------------------------------------------------------- the same as here


def test_moving_a_chain_changes_one_line(reasoner: RemoteReasoner, request_: dict[str, Any]) -> None:
    expected = essence(small_reasoner().invoke(request_))
    assert essence(reasoner.invoke(request_)) == expected
    here, there = (
        ConfidenceRouter(rungs=[each.with_budget("quick"), each], thresholds=[1.0, 0.0])
        for each in (small_reasoner(), reasoner)
    )
    assert [step.decision for step in there.invoke(request_).route] == ["unsure", "accepted"]
    assert there.invoke(request_).answer == here.invoke(request_).answer
    message = LatentReasoningTool(reasoner=reasoner).invoke({"question": CIRCLE, "image": _uri(request_["image"])})
    assert message.startswith("Answer: red")


def test_options_are_sent(reasoner: RemoteReasoner, request_: dict[str, Any]) -> None:
    asked = {**request_, "options": ["green", "red"], "unsure": True}
    found = reasoner.invoke(asked)
    assert essence(found) == essence(small_reasoner().invoke(asked)) and len(found.choices or ()) == 3


def test_images_are_read_here(reasoner: RemoteReasoner, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    expected = essence(reasoner.invoke({"image": picture, "question": CIRCLE}))
    block = {"type": "image", "base64": _uri(picture).partition(",")[2], "mime_type": "image/png"}
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), block):
        assert essence(reasoner.invoke({"image": image, "question": CIRCLE})) == expected
    guarded = reasoner.model_copy(update={"image_policy": ImagePolicy.untrusted()})
    with pytest.raises(ImageNotAllowedError, match="Files"):
        guarded.invoke({"image": tmp_path / "a.png", "question": CIRCLE})
    with pytest.raises(ImageNotAllowedError, match="Downloads"):  # by the service
        reasoner.invoke({"image": "https://example.org/a.png", "question": CIRCLE})


def test_a_tool_sends_nothing_that_it_may_not_open(picture: Image.Image, tmp_path: Path) -> None:
    """A URL that an agent names is not left to the service: the tool's policy decides."""
    picture.save(tmp_path / "a.png")
    with scripted(GOOD) as (url, asked):
        tool = ImageTool(reasoner=RemoteReasoner(url))
        for image in ("https://example.org/a.png", str(tmp_path / "a.png")):
            with pytest.raises(ImageNotAllowedError):
                tool.ask({"question": CIRCLE, "image": image})
        assert asked == []
        reply = tool.ask({"question": CIRCLE, "image": _uri(picture), "overlay": True})
        assert len(reply.pictures) == 1 and asked[0][1]["images"][0].startswith("data:image/png;base64,")


def test_request_before_call_before_reasoner(url: str, request_: dict[str, Any]) -> None:
    plain = RemoteReasoner(url, token="s3cret", seed=1, min_confidence=0.1, budget={"iterations": 0})
    result = plain.invoke(request_)
    assert (result.seed, result.min_confidence, result.budget) == (1, 0.1, Budget(iterations=0))
    call = {"configurable": {"latent_reasoner": {"seed": 2, "min_confidence": 1.0, "budget": {"iterations": 1}}}}
    result = plain.invoke(request_, call)
    assert (result.seed, result.min_confidence, result.budget) == (2, 1.0, Budget(iterations=1))
    assert result.abstained is True
    result = plain.invoke({**request_, "seed": 3, "min_confidence": 0.0, "budget": "quick"}, call)
    assert (result.seed, result.accepted, result.budget) == (3, True, Budget.level("quick"))


def test_a_level_keeps_the_limits_of_either_side(url: str, request_: dict[str, Any]) -> None:
    tight = Budget(iterations=1, deadline_s=500, max_new_tokens=9, max_candidates=6)
    expected = Budget.level("thorough").but(deadline_s=500, max_new_tokens=9, max_candidates=6)
    ours = RemoteReasoner(url, token="s3cret", budget=tight)
    assert ours.invoke({**request_, "budget": "thorough"}).budget == expected
    with serving(create_app(small_reasoner(budget=tight), limits=LIMITS)) as other:
        theirs = RemoteReasoner(other)
        assert theirs.invoke({**request_, "budget": "thorough"}).budget == expected
        options = {"configurable": {"latent_reasoner": {"budget": "thorough"}}}
        assert theirs.invoke(request_, options).budget == expected


def test_a_deadline_counts_from_the_call(reasoner: RemoteReasoner, request_: dict[str, Any]) -> None:
    result = reasoner.with_budget({"iterations": 1, "deadline_s": 50}).invoke(request_)
    assert result.budget == Budget(iterations=1, deadline_s=50)


def test_errors_are_those_of_the_other_side(reasoner: RemoteReasoner, request_: dict[str, Any]) -> None:
    for ask in (reasoner.invoke, lambda each: list(reasoner.stream(each))):
        with pytest.raises(QuestionError) as caught:
            ask({**request_, "question": " "})
        assert caught.value.hint
    with pytest.raises(SettingsError, match="service allows"):
        reasoner.with_budget({"iterations": 1, "max_new_tokens": 2000}).invoke(request_)
    for wrong in (None, "other"):
        with pytest.raises(AccessError):
            RemoteReasoner(reasoner.url, token=wrong).invoke(request_)


async def test_many_at_once(reasoner: RemoteReasoner, picture: Image.Image) -> None:
    requests = [{"image": picture, "question": (CIRCLE, SQUARE)[i % 2], "seed": i % 3} for i in range(18)]
    expected = {(i % 2, i % 3): essence(small_reasoner().invoke(requests[i])) for i in range(6)}
    answers = await reasoner.abatch(requests)
    answers += await asyncio.to_thread(reasoner.batch, requests)
    for i, answer in enumerate(answers):
        assert essence(answer) == expected[i % 18 % 2, i % 18 % 3]


@pytest.mark.parametrize("way", ["ainvoke", "astream"])
async def test_cancelling_a_task_stops_the_search(
    reasoner: RemoteReasoner,
    request_: dict[str, Any],
    way: str,
) -> None:
    long, searching = reasoner.with_budget({"iterations": 10_000}), asyncio.Event()
    recorder = Recorder(on_step=searching.set)

    async def ask() -> None:
        if way == "ainvoke":
            await long.ainvoke(request_, {"callbacks": [recorder]})
        else:
            _ = [each async for each in long.astream(request_, {"callbacks": [recorder]})]

    task = asyncio.create_task(ask())
    await searching.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with httpx.AsyncClient() as client:
        while (await client.get(f"{reasoner.url}/health")).json()["active"]:
            await asyncio.sleep(0.01)


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_saved_and_loaded_again_without_its_token() -> None:
    reasoner = RemoteReasoner("http://host:1", budget="quick", seed=3, image_policy=ImagePolicy.untrusted())
    saved = dumpd(reasoner)
    assert load(saved, allowed_objects=[RemoteReasoner], valid_namespaces=["latent_tool"]) == reasoner
    secret = RemoteReasoner("http://host:1", token="s3cret")
    assert "s3cret" not in f"{dumpd(secret)} {secret!r}"


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"url": "localhost:8000"},
        {"url": "ftp://host"},
        {"url": "http://user:secret@host"},
        {"url": "http://host/?a=b"},
        {"url": "http://host", "token": "a\nb"},
        {"url": "http://host", "seed": -1},
        {"url": "http://host", "timeout_s": 0},
        {"url": "http://host", "model": "x"},
    ],
)
def test_wrong_fields_are_settings_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        RemoteReasoner(**wrong)
    assert caught.value.hint and "secret" not in str(caught.value)


# ---------------------------------------------------------------------- a service that fails

Reply = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def scripted(*replies: Reply) -> Iterator[tuple[str, list[tuple[float, dict[str, Any]]]]]:
    """A server that gives these replies one after another, the last for ever; and what it was asked, and when."""
    asked: list[tuple[float, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((time.monotonic(), {"path": self.path, **body}))
            replies[min(len(asked), len(replies)) - 1](self)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply(status: int, body: Any, kind: str = "application/json", declared: int | None = None, **headers: str) -> Reply:
    def send(handler: BaseHTTPRequestHandler) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data) if declared is None else declared))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return send


def problem(status: int, kind: str, **headers: str) -> Reply:
    found = {"type": kind, "status": status, "message": "It went wrong.", "hint": "Do better.", "retryable": True}
    return reply(status, found, "application/problem+json", **headers)


RESULT = ReasoningResult(answer="red", raw_text="red", confidence=None, confidence_source="unscored")
GOOD = reply(200, RESULT.model_dump(mode="json"))
FULL = problem(503, "OverloadedError", Retry_After="1")
DEAD = reply(500, b"Internal Server Error", "text/plain")
TORN = reply(200, b'{"answer"', declared=1000)


def lines(*items: ReasoningStep | ReasoningResult | None) -> bytes:
    """A stream; ``None`` breaks it off."""
    named = {ReasoningStep: "step", ReasoningResult: "result"}
    return b"".join(
        json.dumps({named[type(each)]: each.model_dump(mode="json")}).encode() + b"\n" for each in items if each
    )


STEPS = [ReasoningStep(phase="prefill"), ReasoningStep(phase="search"), ReasoningStep(phase="decode")]


def ask(url: str, way: str, **fields: Any) -> ReasoningResult:
    reasoner = RemoteReasoner(url, **fields)
    request = {"image": b"any bytes", "question": CIRCLE}
    if way == "invoke":
        return reasoner.invoke(request)
    return asyncio.run(reasoner.ainvoke(request))


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
@pytest.mark.parametrize("lost", [DEAD, TORN, problem(503, "CancelledError"), reply(502, b"<html>", "text/html")])
def test_what_was_lost_is_asked_again(way: str, lost: Reply) -> None:
    with scripted(lost, lost, GOOD) as (url, asked):
        assert ask(url, way).answer == "red"
        assert len(asked) == 3
        assert asked[0][1] == asked[2][1]
    with scripted(lost) as (url, asked):
        with pytest.raises(ServiceUnavailableError):
            ask(url, way, retries=1)
        assert len(asked) == 2


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_a_full_service_says_when_to_come_back(way: str) -> None:
    with scripted(FULL, GOOD) as (url, asked):
        assert ask(url, way).answer == "red"
        assert asked[1][0] - asked[0][0] >= 1
    with scripted(FULL) as (url, asked):
        with pytest.raises(OverloadedError):
            ask(url, way, timeout_s=1)  # no time to come back
        assert len(asked) == 1


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (problem(422, "ImageDecodeError"), LatentToolError),
        (problem(504, "DeadlineError"), DeadlineError),
        (problem(500, "InternalError"), ServiceError),
        (problem(500, "MissingExtraError"), ServiceError),
        (problem(418, "SystemExit"), ServiceError),
        (reply(404, b"no", "text/plain"), ServiceError),
        (reply(401, b"no", "text/plain"), AccessError),
        (reply(307, b"", Location="http://127.0.0.1:9/"), ServiceError),
        (reply(200, b"<html>", "text/html"), ServiceError),
        (reply(200, {"answer": "red"}), ServiceError),
        (reply(200, [1]), ServiceError),
    ],
)
def test_what_is_no_loss_is_not_asked_again(way: str, answer: Reply, kind: type[LatentToolError]) -> None:
    with scripted(answer) as (url, asked):
        with pytest.raises(kind) as caught:
            ask(url, way)
        assert not isinstance(caught.value, ServiceUnavailableError)
        assert len(asked) == 1


def test_a_broken_stream_goes_on_after_its_last_step() -> None:
    broken = reply(200, lines(*STEPS[:2]), "application/x-ndjson", declared=5000)
    cut = reply(200, lines(STEPS[0]), "application/x-ndjson")
    whole = reply(200, lines(*STEPS, RESULT), "application/x-ndjson")
    request = {"image": b"any bytes", "question": CIRCLE}
    with scripted(broken, cut, whole) as (url, asked):
        assert list(RemoteReasoner(url).stream(request)) == [*STEPS, RESULT]
        assert [each["path"] for _, each in asked] == ["/v1/ask/stream"] * 3

    async def collect(url: str) -> list[Any]:
        return [each async for each in RemoteReasoner(url).astream(request)]

    with scripted(broken, cut, whole) as (url, _):
        assert asyncio.run(collect(url)) == [*STEPS, RESULT]


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_nobody_there(way: str) -> None:
    with scripted(GOOD) as (url, _):
        pass
    with pytest.raises(ServiceUnavailableError, match="cannot be reached"):
        ask(url, way, retries=1)


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_time_limits_hold(way: str) -> None:
    stop = threading.Event()

    def hang(handler: BaseHTTPRequestHandler) -> None:
        stop.wait(30)

    with scripted(hang) as (url, asked):
        with pytest.raises(DeadlineError, match=r"within 0\.5 s"):
            ask(url, way, timeout_s=0.5)
        stop.set()
    assert len(asked) == 1


def test_the_service_gets_what_is_left_of_the_deadline() -> None:
    with scripted(DEAD, GOOD) as (url, asked):
        ask(url, "invoke", budget={"deadline_s": 60})
    first, second = (each["budget"]["deadline_s"] for _, each in asked)
    assert 0 < second < first < 60


def test_what_was_not_chosen_is_the_services_own() -> None:
    with scripted(GOOD) as (url, asked):
        ask(url, "invoke")
    assert set(asked[0][1]) == {"path", "images", "question"}


def test_many_threads_share_one_reasoner() -> None:
    with scripted(GOOD) as (url, asked), ThreadPoolExecutor(8) as threads:
        reasoner = RemoteReasoner(url)
        request = {"image": b"any bytes", "question": CIRCLE}
        assert {each.answer for each in threads.map(reasoner.invoke, [request] * 24)} == {"red"}
        assert len(asked) == 24


def _uri(image: Image.Image) -> str:
    from latent_tool.images.load import portable_image

    return portable_image(image, ImagePolicy.local())[0]


# ---------------------------------------------------------------------- a service that means harm


def drip(stream: bool, stop: threading.Event) -> Reply:
    """A reply that never ends and never pauses long."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        if stream:
            handler.wfile.write(b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
        with suppress(OSError):
            while not stop.wait(0.05):
                handler.wfile.write(b" " if stream else b"x: y\r\n")
                handler.wfile.flush()

    return send


@pytest.mark.parametrize("body", [False, True])
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
@pytest.mark.parametrize("limits", [{"timeout_s": 3}, {"budget": {"deadline_s": 2}, "timeout_s": 600}])
def test_time_limits_hold_against_a_reply_that_drips(way: str, body: bool, limits: dict[str, Any]) -> None:
    stop = threading.Event()
    with scripted(drip(body, stop)) as (url, _):
        try:
            with pytest.raises(DeadlineError):
                ask(url, way, **limits)
        finally:
            stop.set()


DEEP = b"[" * 200_000


@pytest.mark.parametrize(
    "line",
    [
        b'{"error": "x"}',
        b'{"error": ["x"]}',
        b'{"error": {"type": ["x"], "message": {"a": 1}}}',
        b'{"error": {"type": "LatentToolError.__init__", "message": "no"}}',
        b'{"step": {"phase": "prefill", "trace": 7}}',
        b'{"result": ' + DEEP + b"}",
        b'{"result": {"answer": ' + DEEP,
        b"\xff\xfe",
        b"",
        b"1" * 5000,
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_no_reply_is_a_service_error(line: bytes, whole: bool) -> None:
    request = {"image": b"any bytes", "question": CIRCLE}
    with scripted(reply(200, line + b"\n", "application/x-ndjson")) as (url, _):
        reasoner = RemoteReasoner(url, retries=0)
        with pytest.raises(ServiceError):
            reasoner.invoke(request) if whole else list(reasoner.stream(request))


@pytest.mark.parametrize("wanted", ["²", "-1", "1e9", "9" * 500, "Wed, 21 Oct 2026 07:28:00 GMT", "nan"])
def test_an_odd_retry_after_is_passed_over(wanted: str) -> None:
    def full(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 503 Full\r\nContent-Length: 0\r\nRetry-After: " + wanted.encode() + b"\r\n\r\n")

    with scripted(full, GOOD) as (url, asked):
        assert ask(url, "invoke").answer == "red"
    assert len(asked) == 2
