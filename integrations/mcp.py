"""The tool as an MCP server, for every client that speaks the Model Context Protocol.

``image_server`` makes the server; ``run_stdio`` serves the program that started it, ``run_http`` serves a port. One
tool, ``ask_about_image``: its text says what may be relied on, its structured content is the whole ``ReasoningResult``,
every step of the search is a progress notification, and cancelling a call stops its search. What goes wrong is a result
with ``isError``, whose ``_meta`` names the error.

Files are opened inside the operator's folders only and, where the client declares roots, inside its roots.
"""

from __future__ import annotations

import functools
import hmac
import os
import re
import secrets
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pydantic import Field, ValidationError
from pydantic.json_schema import SkipJsonSchema

from latent_tool.about import model_name, what_it_is
from latent_tool.errors import (
    ImageNotAllowedError,
    InputError,
    LatentToolError,
    MissingExtraError,
    SettingsError,
)
from latent_tool.langchain.image_tool import (
    DESCRIPTION,
    NAME,
    ImageTool,
    NamedImageArguments,
    ToolReply,
    explain_arguments,
)
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.schema import ReasoningResult, ReasoningStep
from latent_tool.settings import BudgetLevel, ImagePolicy
from latent_tool.words import without_places

try:
    from mcp.server import MCPServer
    from mcp.server.auth.provider import AccessToken
    from mcp.server.auth.settings import AuthSettings
    from mcp.server.mcpserver import Context, ListRoots, Resolve
    from mcp.server.mcpserver.exceptions import ResourceNotFoundError, ToolError
    from mcp.server.transport_security import TransportSecuritySettings
    from mcp_types import (
        CallToolResult,
        ContentBlock,
        ImageContent,
        InputRequiredResult,
        ListRootsResult,
        ResourceLink,
        TextContent,
        ToolAnnotations,
    )
    from sse_starlette.sse import AppStatus
except ImportError as error:
    raise MissingExtraError("The MCP server", "mcp") from error

from latent_tool.integrations.http_server import require_long  # isort: skip

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["ERROR_KEY", "PATH", "http_app", "image_server", "run_http", "run_stdio"]

ERROR_KEY = "latent-tool/error"  # in the _meta of a failed call: type, hint, and whether trying again can help
PATH = "/mcp"
SCHEME = "latent-tool://overlay/"

_PICTURES_KEPT = 16
_INSTRUCTIONS = (
    "Ask about images with ask_about_image. Every answer has a confidence between 0 and 1; an answer that is marked as "
    "not reliable is no fact: ask again with budget='thorough', ask more simply, or say that you are not sure."
)


def image_server(
    tool: ImageTool | None = None,
    *,
    trust_roots: bool = False,
    token: str | None = None,
    on_answer: Callable[[ReasoningResult], None] | None = None,
) -> MCPServer:
    """Return an MCP server with the tool.

    Args:
        tool: who answers, and which images may be opened; by default the embedded model, no files or URLs, and
            decoding in processes of their own (``ImagePolicy.server()``).
        trust_roots: the client may open files in its own roots although the image policy names no folder. Only for a
            client that could read them anyway: one that has started the server as its own process.
        token: bearer token that HTTP clients must send; at least 16 characters.
        on_answer: told every result, for counts.

    Raises:
        SettingsError: the token is too short.
    """
    asked = tool or _default_tool()
    server = _Server(
        "latent-tool",
        title="latent-tool",
        description="Questions about images, answered with a confidence.",
        instructions=_instructions(asked),
        version=version("latent-tool"),
        log_level="WARNING",
        **_guard(token),
    )
    pictures = _Pictures()

    async def ask(
        context: Context[Any, Any],
        question: Annotated[str, _argument("question", min_length=1)],
        image: Annotated[str, _argument("image")],
        roots: Annotated[ListRootsResult | None, Resolve(_client_roots)],
        options: Annotated[list[str] | None, _argument("options")] = None,
        budget: Annotated[BudgetLevel | None, _argument("budget")] = None,
        overlay: Annotated[bool, _argument("overlay")] = False,
    ) -> Annotated[CallToolResult, ReasoningResult]:
        try:
            given = {"question": question, "image": image, "options": options, "budget": budget, "overlay": overlay}
            arguments = NamedImageArguments.parse(given)
            folders = None if roots is None else _folders(roots)
            bounded = asked.but(image_policy=_within(asked.image_policy, folders, trust_roots))
            reply = await _follow(bounded, arguments, context)
            if on_answer is not None:
                on_answer(reply.result)
        except ImageNotAllowedError as error:
            return _failure(error if _NOT_A_FILE.match(image) else ImageNotAllowedError(error.message, _WHERE))
        except LatentToolError as error:
            return _failure(error)
        content: list[ContentBlock] = [TextContent(text=reply.text)]
        for png, uri in zip(reply.pictures, reply.picture_uris, strict=True):
            content.append(ImageContent(data=uri.partition(",")[2], mime_type="image/png"))
            content.append(
                ResourceLink(
                    uri=SCHEME + pictures.keep(png),
                    name="overlay.png",
                    description="The image with the regions marked that the answer rests on.",
                    mime_type="image/png",
                    size=len(png),
                )
            )
        return CallToolResult(content=content, structured_content=reply.data)

    if not asked.allow_overlay:  # it is not offered; sent all the same, it is refused
        ask.__annotations__["overlay"] = SkipJsonSchema[bool]
    server.tool(
        name=NAME,
        title="Ask about an image",
        description=DESCRIPTION,
        annotations=ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False),
    )(ask)

    @server.resource(
        SCHEME + "{key}",
        name="overlay",
        description="An image with the regions marked that an answer rests on; linked by that answer.",
        mime_type="image/png",
    )
    def overlay_picture(key: str) -> bytes:
        return pictures.find(key)

    return server


def _instructions(tool: ImageTool) -> str:
    about = what_it_is(tool.reasoner.model) if isinstance(tool.reasoner, LatentReasoner) else None
    return _INSTRUCTIONS if about is None else f"{_INSTRUCTIONS} {about}"


_WHERE = (
    "Send a data URI, or name a file in a folder the server was started with and, where the client declares roots, in "
    "one of them."
)


def _default_tool() -> ImageTool:
    return ImageTool(image_policy=ImagePolicy.server())


def run_stdio(tool: ImageTool | None = None) -> None:
    """Serve the program at the other end of standard input and output, until it closes them.

    Its roots are trusted: it runs as the same user and has started this process.
    """
    image_server(tool, trust_roots=True).run("stdio")


def run_http(
    tool: ImageTool | None = None, *, host: str = "127.0.0.1", port: int = 8765, token: str | None = None
) -> None:
    """Serve streamable HTTP at ``http://host:port/mcp`` until interrupted.

    Raises:
        SettingsError: the host is not a loopback address and there is no token, the token is too short, or the port
            cannot be had.
        ModelError: the model cannot be used.
    """
    from latent_tool.integrations.http_server import bind, in_url, serve_app

    tool = tool or _default_tool()
    app = http_app(tool, host=host, token=token)
    with bind(host, port) as listener:
        if isinstance(tool.reasoner, LatentReasoner):
            tool.reasoner.engine()  # a model that does not load is told before anybody asks
        address = f"http://{in_url(host)}:{listener.getsockname()[1]}{PATH}"
        listener.listen(64)
        print(f"Listening at {address}", file=sys.stderr, flush=True)
        # Standing streams end when no call is in hand any more, not when the signal comes.
        AppStatus.disable_automatic_graceful_drain()
        serve_app(app, listener, gate=app.state.gate, at_end=_end_streams)


def _end_streams() -> None:
    AppStatus.should_exit = True


def http_app(tool: ImageTool | None = None, *, host: str = "127.0.0.1", token: str | None = None) -> Starlette:
    """Return the server as an ASGI application for ``host``; ``run_http`` says the rest.

    A request may have three times the bytes an image may have, so that an image that is too large gets an error that
    says so; beyond that the answer is status 413. The gate before it is that of the HTTP service (``http_gate``).
    """
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    from latent_tool.integrations.http_gate import (
        LOOPBACK,
        Gate,
        GateLimits,
        GateMiddleware,
        problem_of,
        response_of,
    )
    from latent_tool.integrations.http_server import in_url, is_loopback
    from latent_tool.integrations.http_watch import Watcher, WatchMiddleware, engine_facts, front_page

    if token is None and not is_loopback(host):
        raise SettingsError(
            f"Without a token the server listens to this machine only, not on {host}.",
            "Set LATENT_TOOL_TOKEN or give --token-file; clients then send it as bearer token.",
        )
    tool = tool or _default_tool()
    names = {host, "127.0.0.1", "localhost", "[::1]"}
    max_body = 3 * tool.image_policy.max_bytes + 2**20
    gate = Gate(GateLimits(max_body_bytes=max_body), token, open_paths=("/", "/health"))
    model = tool.reasoner.model if isinstance(tool.reasoner, LatentReasoner) else None
    watcher = Watcher(gate, model)
    server = image_server(tool, token=token, on_answer=watcher.answered)
    app: Starlette = server.streamable_http_app(
        streamable_http_path=PATH,
        host=host,
        max_request_body_size=max_body,
        # A page in a browser on this machine must not reach the server under a name of its own.
        transport_security=TransportSecuritySettings(
            enable_dns_rebinding_protection=is_loopback(host),
            allowed_hosts=[entry for name in names for entry in (name, f"{name}:*")],
            allowed_origins=[f"http://{name}:*" for name in names],
        ),
    )
    # The SDK checks host names at PATH; here they are those of the machine, too.
    own_names = Gate(GateLimits(), None, (*LOOPBACK, in_url(host)) if is_loopback(host) else None)

    def state() -> dict[str, Any]:
        device = tool.reasoner.device if isinstance(tool.reasoner, LatentReasoner) else None
        engine: dict[str, Any] = (
            {}
            if model is None
            else {"model": model_name(model), "about": what_it_is(model), **engine_facts(model, device)}
        )
        return {
            "status": "ok",
            "version": version("latent-tool"),
            "active": gate.active,
            "capacity": gate.places,
            **engine,
        }

    def page(answer: Callable[[], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def send(request: Request) -> Response:
            try:
                own_names.check(request.scope)
                return answer()
            except LatentToolError as error:
                return response_of(problem_of(error))

        return send

    front = functools.partial(front_page, "latent-tool, for MCP clients")
    app.router.routes.extend(
        [
            Route("/", page(lambda: front(state(), _PATHS, _CLIENT))),
            Route("/health", page(lambda: JSONResponse(state()))),
            Route("/metrics", page(watcher.metrics)),
        ]
    )
    watcher.paths = {PATH, "/", "/health", "/metrics"}
    app.add_middleware(GateMiddleware, gate=gate)
    app.add_middleware(WatchMiddleware, watcher=watcher)
    app.state.gate = gate
    return app


_PATHS = (
    (f"POST {PATH}", "The Model Context Protocol, over streamable HTTP: one tool, ask_about_image."),
    ("GET /health", "Whether the server works, and how much it has in hand."),
    ("GET /metrics", "Counts for Prometheus."),
)
_CLIENT = '{"mcpServers": {"latent-tool": {"type": "http", "url": "http://127.0.0.1:8765/mcp"}}}'


# --- a call -----------------------------------------------------------------------------------------------------------


def _argument(name: str, **limits: Any) -> Any:
    """An argument of the tool, described as everywhere."""
    return Field(description=NamedImageArguments.model_fields[name].description, **limits)


async def _follow(tool: ImageTool, arguments: NamedImageArguments, context: Context[Any, Any]) -> ToolReply:
    """Answer, and report every step of the search to the client."""
    async with aclosing(tool.steps(arguments)) as steps:  # closing them stops the search
        done = 0
        async for item in steps:
            if isinstance(item, ToolReply):
                return item
            done += 1
            # Looking, round 0, the rounds, answering. A router may search several times: its total is not known.
            total = item.iterations + 3 if item.iterations and isinstance(tool.reasoner, LatentReasoner) else None
            await context.report_progress(done, total, _said(item))
    raise LatentToolError("The reasoner gave no result.")


def _said(step: ReasoningStep) -> str:
    if step.view is not None:
        return f"looked again at {step.view.where}" + (": surer" if step.view.accepted else "")
    if step.trace is None:
        return {"prefill": "looking", "look": "looking again", "search": "thinking", "decode": "answering"}[step.phase]
    return f"thinking: round {step.trace.round} of {step.iterations}, reward {step.trace.best_reward:.4f}"


def _failure(error: LatentToolError) -> CallToolResult:
    """A result that says what went wrong: to the model in words, to code by type; without the machine's paths.

    An ``InputError`` is no exception: what is wrong may be a file of the machine's. As over HTTP, the caller's own
    words stay, but for what is before the last name of a path.
    """
    shown = LatentToolError(without_places(error.message), without_places(error.hint))
    kind = {"type": type(error).__name__, "message": shown.message, "hint": shown.hint, "retryable": error.retryable}
    return CallToolResult(content=[TextContent(text=str(shown))], is_error=True, _meta={ERROR_KEY: kind})


class _Server(MCPServer[Any]):
    """Explains wrong arguments in the words of this package, and repeats none of them."""

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            if isinstance(error.__cause__, ValidationError):
                return _failure(InputError(explain_arguments(error.__cause__, NamedImageArguments)))
            raise


class _Pictures:
    """The newest pictures, under names that cannot be guessed: clients of one server do not see each other's."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def keep(self, png: bytes) -> str:
        key = secrets.token_urlsafe(16)
        self._kept[key] = png
        while len(self._kept) > _PICTURES_KEPT:
            self._kept.popitem(last=False)
        return key

    def find(self, key: str) -> bytes:
        if key not in self._kept:
            raise ResourceNotFoundError(
                f"There is no such picture (any more): the newest {_PICTURES_KEPT} are kept. Ask again with overlay."
            )
        return self._kept[key]


# --- roots ------------------------------------------------------------------------------------------------------------

MAX_ROOTS = 256
MAX_PATH = 4096  # characters
_NOT_A_FILE = re.compile(r"\s*(?:data|https?):", re.IGNORECASE)


def _client_roots(image: str, context: Context[Any, Any]) -> ListRoots | None:
    """Ask the client for its roots if it has any and the image is a file."""
    capabilities = context.client_capabilities
    if capabilities is None or capabilities.roots is None or _NOT_A_FILE.match(image):
        return None
    return ListRoots()


def _folders(roots: ListRootsResult) -> list[Path]:
    """The folders among the client's roots. Raises ``InputError`` for too many, or for one that cannot be a folder."""
    if len(roots.roots) > MAX_ROOTS:
        raise InputError(
            f"The client declares {len(roots.roots)} roots; at most {MAX_ROOTS} are taken.",
            "Declare the folders that hold the pictures, or one above them.",
        )
    folders = []
    for root in roots.roots:
        try:
            url = urlsplit(str(root.uri))
            if url.scheme != "file" or url.netloc.lower() not in ("", "localhost") or not url.path:
                continue
            path = url2pathname(url.path)
            if "\0" in path or len(path) > MAX_PATH:
                raise ValueError
            folders.append(Path(os.path.realpath(path)))
        except (ValueError, OSError):
            raise InputError("A root of the client names no folder.", "Declare roots as file:///folder URLs.") from None
    return list(dict.fromkeys(folders))


def _within(policy: ImagePolicy, roots: list[Path] | None, trust_roots: bool) -> ImagePolicy:
    """The policy, its files bounded by the client's roots; ``None``: the client declares none."""
    if roots is None:
        return policy
    ours = [Path(os.path.realpath(each)) for each in policy.folders]
    if policy.files == "any" or (policy.files == "none" and trust_roots):
        allowed = roots
    else:
        operator, client = set(ours), set(roots)
        allowed = [root for root in roots if not operator.isdisjoint((root, *root.parents))]
        allowed += [folder for folder in ours if not client.isdisjoint((folder, *folder.parents))]
    return policy.but(files="folders" if allowed else "none", folders=tuple(dict.fromkeys(allowed)))


# --- access -----------------------------------------------------------------------------------------------------------


class _OneToken:
    """Knows one bearer token."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    async def verify_token(self, token: str) -> AccessToken | None:
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self._token):
            return None
        return AccessToken(token=token, client_id="holder", scopes=[])


def _guard(token: str | None) -> dict[str, Any]:
    """What makes a server ask for the token."""
    if token is None:
        return {}
    require_long(token)
    # The issuer is never asked: tokens are compared here.
    settings = AuthSettings(issuer_url="https://latent-tool.invalid", resource_server_url=None)
    return {"auth": settings, "token_verifier": _OneToken(token)}
