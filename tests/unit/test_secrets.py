"""A marker goes in as image bytes, password, key or query, and comes out nowhere: reprs, errors, logs, traces."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
from image_samples import data_uri, encode, photo
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumps
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run
from PIL import Image, PngImagePlugin
from pydantic import ValidationError

from latent_tool import ConfidenceRouter, ImagePolicy, LatentReasoner, LatentReasoningTool, ReasoningRequest
from latent_tool.errors import ImageError, InputError, LatentToolError
from latent_tool.images.load import load_image
from latent_tool.langchain.reasoner import CallOptions
from latent_tool.settings import Budget, SearchSettings
from latent_tool.words import redact, shown_image

MARKER = "MARKERMARKERMARKER"
TEXT = base64.b64encode(MARKER.encode() * 3).decode()  # the marker at every place of a group of three


def marked(kind: str = "PNG") -> bytes:
    """A good picture whose metadata and pixels hold the marker."""
    picture = photo()
    picture.paste(Image.frombytes("RGB", (6, 1), MARKER.encode()), (0, 0))
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", MARKER * 3)
    return encode(picture, kind, pnginfo=info, compress_level=0)


GOOD = marked()
assert MARKER.encode() in GOOD
URLS = [
    f"https://user:{MARKER}@example.org/a.png",
    f"https://{MARKER}@example.org/a.png",
    f"https://example.org/a.png?token={MARKER}",
    f"https://example.org/{MARKER}/a.png",
    f"https://example.org/a.png#{MARKER}",
    f"HTTPS://user:{MARKER}@EXAMPLE.org",
    f"https:\\\\user:{MARKER}@example.org\\",
    f"ftp://user:{MARKER}@example.org/a.png",
    f"s3://{MARKER}@bucket/a.png",
    f"https://user:{MARKER}@[::1]/a.png",
]
IMAGES: dict[str, Any] = {
    "bytes": GOOD,
    "bytearray": bytearray(GOOD),
    "data URI": data_uri(GOOD),
    "data URI in capitals": data_uri(GOOD).replace("data:", "DATA:"),
    "percent": "data:image/png," + "".join(f"%{byte:02x}" for byte in GOOD) + MARKER,
    "block": {"type": "image", "base64": base64.b64encode(GOOD).decode(), "mime_type": "image/png"},
    "openai": {"type": "image_url", "image_url": {"url": data_uri(GOOD)}},
    "anthropic": {"type": "image", "source": {"type": "base64", "data": base64.b64encode(GOOD).decode()}},
    "bedrock": {"image": {"format": "png", "source": {"bytes": GOOD}}},
    "base64 taken for a path": base64.b64encode(GOOD).decode(),
    "picture": Image.open(io.BytesIO(GOOD)),
    **{f"url {number}": url for number, url in enumerate(URLS)},
    **{f"url block {number}": {"type": "image", "url": url} for number, url in enumerate(URLS)},
}


def assert_silent(*told: str) -> None:
    for text in told:
        assert MARKER not in text and TEXT[4:24] not in text and MARKER.encode().hex()[:20] not in text.lower()
        assert base64.b64encode(GOOD).decode()[100:130] not in text and repr(GOOD)[20:60] not in text


def everything_about(error: BaseException) -> Iterator[str]:
    """What a log or a tracer could write about an error, its chain included."""
    yield from (str(error), repr(error), repr(error.args), "".join(traceback.format_exception(error)))
    linked = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if linked is not None:
        yield from everything_about(linked)


@pytest.mark.parametrize("name", IMAGES)
def test_requests_and_what_is_shown_of_images(name: str) -> None:
    for request in (
        ReasoningRequest(image=IMAGES[name], question="what?"),
        ReasoningRequest(images=[IMAGES[name], b"x"], question=f"see https://u:{MARKER}@h/x and {data_uri(GOOD)}?"),
    ):
        assert_silent(repr(request), str(request), f"{request!r:.5000}", str(request.shown()))
        assert "question=" in repr(request)
    assert_silent(shown_image(IMAGES[name]), str(redact({"a": [{"image": IMAGES[name]}]})))
    json.dumps(redact({"image": IMAGES[name], "question": 3, "more": None}))


def test_what_is_shown_is_of_use() -> None:
    assert shown_image("a/b.png") == "a/b.png"
    assert shown_image("https://u:p@example.org:99/x?y") == "<https URL of example.org:99>"
    assert shown_image(b"12345") == "<5 bytes>"
    assert shown_image("data:image/png;base64,AA") == "<data URI of 24 characters>"
    assert shown_image(Image.new("RGB", (4, 5))) == "<picture of 4x5>"
    request = ReasoningRequest(image="x.png", question="is 1 < 2?", seed=3, budget=Budget(iterations=2))
    assert repr(request).startswith("ReasoningRequest(image='x.png', question='is 1 < 2?', budget={'iterations': 2,")


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("name", [name for name in IMAGES if "url" in name or "path" in name])
def test_errors_of_images_that_are_not_opened(name: str, isolate: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(1)
    policy = ImagePolicy.untrusted(isolate=isolate, hosts=["example.com"])
    with pytest.raises(ImageError) as caught:
        load_image(IMAGES[name], policy)
    assert_silent(*everything_about(caught.value), caplog.text)


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("spoil", ["cut", "spoilt", "short"])
def test_errors_and_logs_of_images_that_are_damaged(
    spoil: str, isolate: bool, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(1)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        data = bytearray(encode(photo(), kind) if kind != "PNG" else GOOD)
        if spoil == "cut":
            del data[len(data) // 2 :]
        else:
            data[20:20] = MARKER.encode()
        if spoil == "short":
            data = data[:16] + MARKER.encode()
        for reference in (bytes(data), data_uri(bytes(data)), {"base64": base64.b64encode(data).decode()}):
            with_errors(lambda reference=reference: load_image(reference, ImagePolicy.untrusted(isolate=isolate)))
    assert_silent(caplog.text, *capfd.readouterr())


def test_logs_of_images_that_are_opened(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(1)
    loaded = load_image(GOOD, ImagePolicy.untrusted())
    assert_silent(caplog.text, repr(loaded), *capfd.readouterr())
    assert not loaded.image.info


WRONG: list[tuple[Callable[[], object], type[Exception]]] = [
    (lambda: ReasoningRequest(image=GOOD, question=[MARKER]), ValidationError),  # type: ignore[arg-type]
    (lambda: ReasoningRequest(image=GOOD, images=[data_uri(GOOD)], question="what?"), ValidationError),
    (lambda: ReasoningRequest.parse({"image": GOOD, "question": {MARKER: MARKER}}), InputError),
    (lambda: ReasoningRequest.parse({"image": GOOD, "question": "?", "budget": MARKER}), InputError),
    (lambda: ReasoningRequest.parse({"image": GOOD, "question": "?", "seed": MARKER}), InputError),
    (lambda: ReasoningRequest.parse(data_uri(GOOD)), InputError),
    (lambda: ReasoningRequest.parse([GOOD]), InputError),
    (lambda: CallOptions(seed=MARKER), InputError),
    (lambda: CallOptions.model_validate({"seed": MARKER}), Exception),
    (lambda: SearchSettings(sigma=MARKER), InputError),
    (lambda: ImagePolicy.model_validate({"hosts": [f"https://u:{MARKER}@h"]}), Exception),
    (lambda: ImagePolicy(hosts=[f"https://u:{MARKER}@h"]), InputError),
    (lambda: LatentReasoner(token={"key": MARKER}), InputError),
    (lambda: LatentReasoner(image_policy={"hosts": [f"u:{MARKER}@h"]}), InputError),
    (lambda: LatentReasoningTool(image_policy={"hosts": [f"u:{MARKER}@h"]}), InputError),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_errors_of_what_is_not_valid(number: int) -> None:
    make, expected = WRONG[number]
    with pytest.raises(expected) as caught:
        make()
    assert_silent(*everything_about(caught.value))


def test_a_hub_token_is_kept() -> None:
    reasoner = LatentReasoner(token=MARKER)
    assert_silent(repr(reasoner), str(reasoner), dumps(reasoner), reasoner.model_dump_json())
    tool = LatentReasoningTool(reasoner=reasoner)
    router = ConfidenceRouter(rungs=[reasoner])
    assert_silent(repr(tool), dumps(tool), repr(router), dumps(router))


# Traces -----------------------------------------------------------------------------------------------------------


class Tracer(BaseTracer):
    """Keeps what LangSmith would be sent: inputs, outputs, errors and events of every run, as text."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.told: list[str] = []

    def _persist_run(self, run: Run) -> None:
        self.keep(run)

    def keep(self, run: Run) -> None:
        self.names.append(run.name)
        for part in (run.inputs, run.outputs, run.error, run.events, run.extra, run.serialized, run.tags):
            self.told += [repr(part), json.dumps(part, default=str)]
        for child in run.child_runs:
            self.keep(child)


class Listener(BaseCallbackHandler):
    """Keeps every argument of every callback."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def keep(self, *arguments: Any, run_id: UUID | None = None, **options: Any) -> None:
        self.told += [repr(arguments), repr(options)]

    on_chain_start = on_chain_end = on_chain_error = on_tool_start = on_tool_end = on_tool_error = keep
    on_custom_event = keep


def ask(policy: ImagePolicy | None = None) -> LatentReasoner:
    """The plain model: what is recorded does not depend on how long it thinks."""
    return LatentReasoner(
        budget=Budget(max_new_tokens=2),
        settings=SearchSettings(latents=0),
        image_policy=policy or ImagePolicy.untrusted(),
    )


REFERENCES = ["bytes", "data URI", "block", "openai", "bedrock", "picture", "url 0", "url block 2"]
REFERENCES += ["base64 taken for a path"]


@pytest.mark.parametrize("name", REFERENCES)
def test_traces_of_reasoner_and_router(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(1)
    reasoner = ask()
    request: dict[str, Any] = {"image": IMAGES[name], "question": "what colour?"}
    block = IMAGES[name] if isinstance(IMAGES[name], dict) else {"type": "image", "url": "data:,x"}
    messages = [SystemMessage("hello"), HumanMessage([block, {"type": "text", "text": "what?"}])]
    inputs = [request, ReasoningRequest(**request), messages]
    for runnable in (reasoner, ConfidenceRouter(rungs=[reasoner])):
        for value in inputs:
            tracer, listener = Tracer(), Listener()
            config: Any = {"callbacks": [tracer, listener]}
            with_errors(lambda runnable=runnable, value=value, config=config: runnable.invoke(value, config))
            with_errors(lambda runnable=runnable, value=value, config=config: list(runnable.stream(value, config)))
            with_errors(lambda runnable=runnable, value=value, config=config: runnable.batch([value, value], config))
            assert runnable.get_name() in tracer.names and len(tracer.names) >= 4
            assert_silent(*tracer.told, *listener.told)
            assert "what" in str(tracer.told)  # the question is there
    assert_silent(caplog.text)


def with_errors(call: Callable[[], object]) -> None:
    try:
        call()
    except LatentToolError as error:
        assert_silent(*everything_about(error))


def test_async_traces() -> None:
    reasoner = ask()
    request = {"image": GOOD, "question": "what colour?"}
    tracer, listener = Tracer(), Listener()
    config: Any = {"callbacks": [tracer, listener]}

    async def run(runnable: Any) -> None:
        await runnable.ainvoke(request, config)
        await runnable.abatch([request, request], config)
        async for _ in runnable.astream(request, config):
            pass

    for runnable in (reasoner, ConfidenceRouter(rungs=[reasoner])):
        asyncio.run(run(runnable))
    assert len(tracer.names) >= 8
    assert_silent(*tracer.told, *listener.told)


@pytest.mark.parametrize("name", ["data URI", "data URI in capitals", *(f"url {n}" for n in range(len(URLS)))])
def test_traces_of_the_tool(name: str) -> None:
    tool = LatentReasoningTool(reasoner=ask())
    tracer, listener = Tracer(), Listener()
    arguments = {"question": "what colour?", "image": IMAGES[name]}
    call = {"type": "tool_call", "id": "1", "name": tool.name, "args": arguments}
    for value in (arguments, call):
        reply = tool.invoke(value, {"callbacks": [tracer, listener]})
        assert_silent(str(reply))
    assert tool.name in tracer.names
    assert_silent(*tracer.told, *listener.told)
    assert "what colour?" in str(tracer.told)


def test_what_other_rungs_say_does_not_reach_the_result() -> None:
    def broken(_: Any) -> Any:
        raise ConnectionError(f"https://user:{MARKER}@host refused")

    router = ConfidenceRouter(
        rungs=[RunnableLambda(broken), ask()],
        on_error="next",
    )
    result = router.invoke({"image": GOOD, "question": "what colour?"})
    assert result.route[0].reason == "ConnectionError"
    assert_silent(result.model_dump_json(), repr(result))


def test_nothing_is_logged_at_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    ask().invoke({"image": GOOD, "question": "what colour?"})
    assert [record.name for record in caplog.records if record.name.startswith("latent_tool")] == []
