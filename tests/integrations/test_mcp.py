"""The MCP server, asked by the SDK's own client: in memory, as a process, and over HTTP."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from http_server import serving
from langchain_core.callbacks import AsyncCallbackHandler
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPDeprecationWarning
from mcp_types import CallToolResult, ListRootsResult, Root
from pictures import draw_shapes
from scripted_agents import CIRCLE, small_reasoner
from typer.testing import CliRunner

from latent_tool import Budget, ImagePolicy, ReasoningResult
from latent_tool.cli import app
from latent_tool.errors import CalibrationError, SettingsError
from latent_tool.images import apart as image_process
from latent_tool.integrations.http_gate import problem_of
from latent_tool.integrations.mcp import ERROR_KEY, http_app, image_server
from latent_tool.langchain.image_tool import NAME, ImageTool
from latent_tool.langchain.messages import image_block
from latent_tool.testing import Reply, ScriptedReasoner

pytestmark = pytest.mark.filterwarnings(f"ignore::{MCPDeprecationWarning.__module__}.MCPDeprecationWarning")

ERAS = ["auto", "legacy"]  # the protocol without and with a handshake
TOKEN = "a-token-for-this-test"
URI = "data:image/png;base64," + str(image_block(draw_shapes())["base64"])
ASKED = {"question": CIRCLE, "image": URI}


def small_tool(**fields: Any) -> ImageTool:
    return ImageTool(reasoner=small_reasoner(), **fields)


def roots_of(*folders: Path) -> Callable[[Any], Any]:
    async def roots(context: Any) -> ListRootsResult:
        return ListRootsResult(roots=[Root(uri=folder.as_uri()) for folder in folders])

    return roots


def error_of(reply: CallToolResult) -> str:
    """The type of the error in a reply that failed, whose text must be what the error says."""
    assert reply.is_error and reply.meta is not None
    error = reply.meta[ERROR_KEY]
    assert reply.content[0].text == f"{error['message']} {error['hint']}".rstrip()
    return str(error["type"])


def answer_of(reply: CallToolResult) -> ReasoningResult:
    assert not reply.is_error, reply.content[0].text
    result = ReasoningResult.model_validate(reply.structured_content)
    assert reply.content[0].text.startswith(f"Answer: {result.answer}\nConfidence: ")
    return result


async def check_everything(client: Client) -> None:
    """Schema, structured result, progress, picture and resource, through any transport."""
    (tool,) = (await client.list_tools()).tools
    assert tool.name == NAME and "confidence" in tool.description
    assert set(tool.input_schema["properties"]) == {"question", "image", "options", "budget", "overlay"}
    assert tool.input_schema["required"] == ["question", "image"]
    assert all(field["description"] for field in tool.input_schema["properties"].values())
    assert set(tool.output_schema["properties"]) == set(ReasoningResult.model_fields)

    chosen = answer_of(await client.call_tool(NAME, {**ASKED, "options": ["green", "red"]}))
    assert chosen.answer == "red" and [choice.text for choice in chosen.choices or ()] == ["green", "red"]
    assert (await client.call_tool(NAME, {**ASKED, "options": ["red"]})).is_error

    seen: list[tuple[float, float | None, str | None]] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        seen.append((done, total, message))

    reply = await client.call_tool(NAME, {**ASKED, "overlay": True, "budget": "quick"}, progress_callback=progress)
    assert answer_of(reply).answer == "red"
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
    rounds = [message for _, _, message in seen if message and "round" in message]
    assert len(rounds) == len(answer_of(reply).trace) and seen[0][2] == "looking" and seen[-1][2] == "answering"

    _, picture, link = reply.content
    png = base64.b64decode(picture.data)
    assert picture.mime_type == "image/png" and png.startswith(b"\x89PNG")
    (kept,) = (await client.read_resource(link.uri)).contents
    assert base64.b64decode(kept.blob) == png and kept.mime_type == "image/png" and link.size == len(png)
    with pytest.raises(MCPError, match="no such picture"):
        await client.read_resource(link.uri + "x")


async def check_hostile(client: Client, outside: Path) -> None:
    """What is wrong is a typed error, and the server answers afterwards."""
    large = "data:image/bmp;base64," + base64.b64encode(b"BM" + bytes(20_000_000)).decode()
    wrong = {
        "ImageTooLargeError": {"question": CIRCLE, "image": large},
        "ImageDecodeError": {"question": CIRCLE, "image": "data:image/png;base64,R2FyYmFnZQ=="},
        "ImageNotAllowedError": {"question": CIRCLE, "image": str(outside)},
        "InputError": {"question": "", "image": URI},
    }
    for kind, arguments in wrong.items():
        assert error_of(await client.call_tool(NAME, arguments)) == kind
    assert answer_of(await client.call_tool(NAME, ASKED)).answer == "red"


async def check_cancelling(client: Client) -> None:
    """A call that is under way is given up; the next one is answered."""
    with anyio.CancelScope() as scope:

        async def progress(done: float, total: float | None, message: str | None) -> None:
            if done == 3:
                scope.cancel()

        await client.call_tool(NAME, {**ASKED, "budget": "thorough"}, progress_callback=progress)
    assert scope.cancelled_caught
    with anyio.fail_after(300):
        assert answer_of(await client.call_tool(NAME, ASKED)).answer == "red"


# --- in memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ERAS)
async def test_a_call(mode: str) -> None:
    async with Client(image_server(small_tool()), mode=mode) as client:
        await check_everything(client)


@pytest.mark.parametrize("mode", ERAS)
async def test_hostile_calls(mode: str, shapes: Path) -> None:
    tool = small_tool(image_policy=ImagePolicy.untrusted(max_bytes=10_000_000))
    async with Client(image_server(tool), mode=mode) as client:
        await check_hostile(client, shapes)


@contextlib.contextmanager
def decoding_apart() -> Iterator[None]:
    """What happens here must start the helper from which decoding processes are forked."""
    image_process._close()
    yield
    assert image_process._helper is not None


async def test_without_a_tool_images_are_decoded_in_processes_of_their_own() -> None:
    with decoding_apart():
        async with Client(image_server()) as client:
            assert answer_of(await client.call_tool(NAME, ASKED)).answer == "red"
    with decoding_apart(), serving(http_app()) as url:
        async with Client(f"{url}/mcp") as client:
            assert answer_of(await client.call_tool(NAME, ASKED)).answer == "red"


async def test_below_the_threshold_it_says_so() -> None:
    async with Client(image_server(small_tool(min_confidence=1.0))) as client:
        reply = await client.call_tool(NAME, ASKED)
        assert answer_of(reply).accepted is False and "NOT RELIABLE" in reply.content[0].text


async def test_wrong_arguments_are_explained_and_not_repeated() -> None:
    async with Client(image_server(small_tool())) as client:
        reply = await client.call_tool(NAME, {"image": ["secret"], "budget": "huge"})
    assert error_of(reply) == "InputError"
    for part in ("question: Field required", "budget: Input should be 'quick'", "Give 'question' and 'image' as text"):
        assert part in reply.content[0].text
    assert "secret" not in reply.content[0].text


async def test_a_model_that_does_not_load_is_a_typed_error() -> None:
    tool = ImageTool(reasoner=small_reasoner(model="/no/such/model"))
    async with Client(image_server(tool)) as client:
        assert error_of(await client.call_tool(NAME, ASKED)) == "ModelNotFoundError"


async def test_errors_tell_as_little_of_the_machine_as_over_http() -> None:
    """What the caller asked wrongly may come from a file of the machine's; the caller's own words stay."""
    error = CalibrationError(
        "/data9/ann/secret/c.json is of no use for 'Is it /red/, ~3/4?'.", "See ~ann/secret/README."
    )
    tool = ImageTool(reasoner=ScriptedReasoner(Reply(error=error)))
    async with Client(image_server(tool)) as client:
        reply = await client.call_tool(NAME, ASKED)
    assert error_of(reply) == "CalibrationError" and reply.meta is not None
    told, problem = reply.meta[ERROR_KEY], problem_of(error)
    assert told["message"] == problem.message == "c.json is of no use for 'Is it /red/, ~3/4?'."
    assert told["hint"] == problem.hint == "See README."


async def test_only_the_newest_pictures_are_kept() -> None:
    async with Client(image_server(small_tool())) as client:
        links = [(await client.call_tool(NAME, {**ASKED, "overlay": True})).content[2].uri for _ in range(17)]
        assert len(set(links)) == 17
        await client.read_resource(links[1])
        with pytest.raises(MCPError, match="the newest 16 are kept"):
            await client.read_resource(links[0])


@pytest.mark.parametrize("mode", ERAS)
async def test_roots(mode: str, shapes: Path, tmp_path: Path) -> None:
    """Files are opened where the operator allows them and, if there are roots, inside those."""
    inside, elsewhere = shapes.parent, tmp_path / "elsewhere"
    elsewhere.mkdir()
    draw_shapes(colour=(20, 150, 40)).save(elsewhere / "green.png")
    (inside / "link.png").symlink_to(elsewhere / "green.png")
    ours = ImagePolicy.untrusted(folders=(inside,))
    whole = ImagePolicy.untrusted(folders=(tmp_path,))
    nothing = ImagePolicy.untrusted()
    for policy, trusted, roots, image, answer in (
        (nothing, True, [inside], shapes, "red"),
        (nothing, True, [inside], "shapes.png", "red"),
        (nothing, True, [inside, elsewhere], inside / "link.png", "green"),
        (nothing, True, [inside], inside / "link.png", None),
        (nothing, True, [inside], elsewhere / "green.png", None),
        (nothing, True, [inside], inside / ".." / "elsewhere" / "green.png", None),
        (nothing, True, [], shapes, None),
        (nothing, True, None, shapes, None),
        (nothing, False, [inside], shapes, None),
        (ours, True, None, shapes, "red"),
        (ours, True, [elsewhere], shapes, None),
        (ours, True, [tmp_path], shapes, "red"),
        (ours, True, [tmp_path], elsewhere / "green.png", None),
        (whole, False, [elsewhere], elsewhere / "green.png", "green"),
        (whole, False, [elsewhere], shapes, None),
        (ImagePolicy.local(), False, [elsewhere], shapes, None),
    ):
        server = image_server(small_tool(image_policy=policy), trust_roots=trusted)
        declared = {} if roots is None else {"list_roots_callback": roots_of(*roots)}
        async with Client(server, mode=mode, **declared) as client:
            reply = await client.call_tool(NAME, {"question": CIRCLE, "image": str(image)})
            if answer is None:
                assert error_of(reply) == "ImageNotAllowedError", (trusted, roots, image)
                assert str(tmp_path) not in reply.content[0].text and "declares roots" in reply.content[0].text
            else:
                assert answer_of(reply).answer == answer
            # An image that is no file needs no roots.
            assert answer_of(await client.call_tool(NAME, ASKED)).answer == "red"


@pytest.mark.parametrize(
    "uris",
    [
        [f"file:///pictures/{number}" for number in range(20_000)],
        ["file:///%00"],
        ["file:///tmp%00/x"],
        ["file:///" + "a" * 5000],
        ["file:///tmp", "file:///%00"],
    ],
    ids=["many", "nul", "nul inside", "long", "second"],
)
async def test_roots_that_are_no_folders_are_refused(uris: list[str], shapes: Path) -> None:
    async def roots(context: Any) -> ListRootsResult:
        return ListRootsResult(roots=[Root(uri=uri) for uri in uris])

    tool = small_tool(image_policy=ImagePolicy.untrusted(folders=(shapes.parent,)))
    async with Client(image_server(tool, trust_roots=True), list_roots_callback=roots) as client:
        assert error_of(await client.call_tool(NAME, {"question": CIRCLE, "image": str(shapes)})) == "InputError"
        assert answer_of(await client.call_tool(NAME, ASKED)).answer == "red"


class Counted:
    """A reasoner, and how many steps it has really made."""

    def __init__(self) -> None:
        self.reasoner = small_reasoner(budget=Budget(iterations=10_000))
        self.steps = 0
        counted = self

        class Counter(AsyncCallbackHandler):
            async def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
                counted.steps += name == "latent_step"

        self.counter = Counter()

    def invoke(self, input: Any, config: Any = None) -> Any:
        raise AssertionError

    async def ainvoke(self, input: Any, config: Any = None) -> Any:
        raise AssertionError

    async def astream(self, input: Any, config: Any = None) -> AsyncIterator[Any]:
        async for step in self.reasoner.astream(input, {**(config or {}), "callbacks": [self.counter]}):
            yield step


@pytest.mark.parametrize("mode", ERAS)
async def test_cancelling_stops_the_search(mode: str) -> None:
    counted = Counted()
    async with Client(image_server(ImageTool(reasoner=counted)), mode=mode) as client:
        with anyio.CancelScope() as scope:

            async def progress(done: float, total: float | None, message: str | None) -> None:
                if done == 5:
                    scope.cancel()

            await client.call_tool(NAME, ASKED, progress_callback=progress)
        assert scope.cancelled_caught
        await anyio.sleep(0.5)  # a step that is under way may end
        stopped = counted.steps
        await anyio.sleep(1.5)
        assert 5 <= counted.steps == stopped < 10_000


# --- as a process -----------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "latent_tool.cli", "mcp"]


def environment(**values: str) -> dict[str, str]:
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **values}


async def test_over_standard_input_and_output(shapes: Path, tmp_path: Path) -> None:
    parameters = StdioServerParameters(command=COMMAND[0], args=COMMAND[1:], env=environment())
    async with Client(parameters, list_roots_callback=roots_of(shapes.parent)) as client:
        await check_everything(client)
        reply = await client.call_tool(NAME, {"question": CIRCLE, "image": str(shapes)})
        assert answer_of(reply).answer == "red"
        draw_shapes().save(tmp_path / "outside.png")
        await check_hostile(client, tmp_path / "outside.png")
        await check_cancelling(client)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that runs as a process of its own and wants a token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*COMMAND, "--http", "--port", str(port)], env=environment(LATENT_TOOL_TOKEN=TOKEN), stderr=errors
        )
    try:
        until = time.monotonic() + 240
        while True:
            try:
                httpx2.get(f"http://127.0.0.1:{port}/")
                break
            except httpx2.ConnectError:
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/mcp"
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(60)


def holder(token: str = TOKEN, **headers: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(headers={"Authorization": f"Bearer {token}", **headers}, timeout=300)


@pytest.mark.parametrize("mode", ERAS)
async def test_over_http(served: str, mode: str, shapes: Path) -> None:
    async with holder() as http, Client(streamable_http_client(served, http_client=http), mode=mode) as client:
        await check_everything(client)
        await check_hostile(client, shapes)
        await check_cancelling(client)


async def test_who_may_ask_over_http(served: str) -> None:
    listing = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    accepts = {"Accept": "application/json, text/event-stream"}
    async with httpx2.AsyncClient(headers=accepts) as stranger:
        assert (await stranger.post(served, json=listing)).status_code == 401
    async with holder("another-token-that-is-wrong", **accepts) as wrong:
        assert (await wrong.post(served, json=listing)).status_code == 401
    async with holder(**accepts, Host="rebound.example") as rebound:
        assert (await rebound.post(served, json=listing)).status_code == 421
    async with holder(**accepts, Origin="https://page.example") as page:
        assert (await page.post(served, json=listing)).status_code == 403
    async with holder(**accepts) as friend:
        assert (await friend.post(served, content=bytes(32_000_000))).status_code == 413
        assert (await friend.post(served, content=b"garbage")).status_code == 400


async def test_roots_give_nothing_away_over_http(served: str, shapes: Path) -> None:
    roots = roots_of(shapes.parent)
    async with (
        holder() as http,
        Client(streamable_http_client(served, http_client=http), list_roots_callback=roots) as client,
    ):
        reply = await client.call_tool(NAME, {"question": CIRCLE, "image": str(shapes)})
        assert error_of(reply) == "ImageNotAllowedError"


def test_other_machines_need_a_token() -> None:
    for host in ("0.0.0.0", "192.0.2.1", "::", "example.org"):
        with pytest.raises(SettingsError, match="Without a token"):
            http_app(small_tool(), host=host)
        http_app(small_tool(), host=host, token=TOKEN)
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        http_app(small_tool(), host=host)
    with pytest.raises(SettingsError, match="shorter than 16"):
        http_app(small_tool(), token="short")


def test_wrong_use_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATENT_TOOL_TOKEN", raising=False)
    for arguments, said in (
        (["--http", "--host", "0.0.0.0"], "Without a token"),
        (["--http", "--token-file", str(tmp_path / "none")], "cannot be read"),
        (["--folder", str(tmp_path / "none")], "is no folder"),
        (["--budget", "huge"], "huge"),
        (["--download-from", "*.example.org"], "host names"),
    ):
        done = CliRunner().invoke(app, ["mcp", *arguments])
        assert isinstance(done.exception, SettingsError) and said in str(done.exception), (arguments, done.exception)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = CliRunner().invoke(app, ["mcp", "--http", "--port", str(taken.getsockname()[1])])
    assert isinstance(done.exception, SettingsError) and "cannot be listened at" in str(done.exception)


async def test_where_no_pictures_are_returned_none_are_offered() -> None:
    async with Client(image_server(small_tool(allow_overlay=False))) as client:
        (tool,) = (await client.list_tools()).tools
        assert set(tool.input_schema["properties"]) == {"question", "image", "options", "budget"}
        assert answer_of(await client.call_tool(NAME, ASKED)).answer == "red"
        assert error_of(await client.call_tool(NAME, {**ASKED, "overlay": True})) == "InputError"
