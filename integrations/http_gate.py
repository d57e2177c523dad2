"""The gate before every HTTP server of this package: what a request may hold, who may come in, how many at a time.

``GateMiddleware`` looks at a request before the application does. Headers are counted before any token is read; host
names and origins must be well formed; a body must arrive in time, within its bytes and within those of all requests in
hand; of JSON the nesting and the number of values are bounded before anything is validated. What is refused is
``application/problem+json``. A request whose client goes away, or that outlives a server that stops, is given up.

This module knows nothing of questions and of models.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field
from pydantic_core import from_json

from latent_tool.errors import (
    AccessError,
    CancelledError,
    DeadlineError,
    ImageTooLargeError,
    InputError,
    LatentToolError,
    MissingExtraError,
    OverloadedError,
    ServiceUnavailableError,
)
from latent_tool.request import MAX_TEXT
from latent_tool.settings import Positive
from latent_tool.validation import Settings
from latent_tool.words import without_places

try:
    from starlette.responses import JSONResponse, Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError("The HTTP service", "serve") from error

__all__ = [
    "JSON_KEY",
    "LOOPBACK",
    "PROBLEM_JSON",
    "STOPPING",
    "ClientGoneError",
    "Gate",
    "GateLimits",
    "GateMiddleware",
    "Problem",
    "problem_of",
    "response_of",
]

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
PROBLEM_JSON = "application/problem+json"
JSON_KEY = "latent_tool.json"  # in the scope: the body as it was read, when it is JSON

STOPPING = ServiceUnavailableError("The service is being stopped.", "Ask again when it runs.")

_PIECE = 65_536  # bytes that are looked at, or handed on, before others have their turn
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]/@\s]+)(?::(\d{1,5}))?")
_log = logging.getLogger(__name__)


class GateLimits(Settings):
    """What one client, and all of them together, may send."""

    max_header_bytes: int = Field(32_768, ge=1024, description="Bytes of a request's headers at most.")
    max_headers: int = Field(100, ge=1, description="Headers of a request at most.")
    max_body_bytes: int = Field(32_000_000, ge=1, description="Bytes of a request's body at most.")
    max_held_bytes: int = Field(512_000_000, ge=1, description="Bytes of the bodies of all requests in hand at most.")
    max_values: int = Field(10_000, ge=1, description="Keys and values of a JSON body at most, at any depth.")
    max_depth: int = Field(16, ge=1, le=100, description="Nesting of a JSON body at most.")
    max_requests: int = Field(
        64, ge=1, description="Requests in hand at most, those that wait included; more are refused at once (503)."
    )
    body_s: Positive = Field(20.0, description="Seconds in which a request's body must have arrived.")
    retry_after_s: int = Field(1, ge=1, description="Seconds after which a refused client is told to try again.")


# --- errors as problems -----------------------------------------------------------------------------------------------


class Problem(BaseModel):
    """What is wrong, and what to do about it."""

    type: str = Field(description="Name of the error's class in latent_tool.errors, or InternalError.")
    status: int = Field(description="The HTTP status.")
    message: str = Field(description="What is wrong, in one sentence.")
    hint: str = Field("", description="What to do about it; may be empty.")
    retryable: bool = Field(False, description="Whether the same request may succeed later.")


_STATUS: dict[type[LatentToolError], int] = {
    AccessError: 401,
    ImageTooLargeError: 413,
    InputError: 422,
    OverloadedError: 503,
    ServiceUnavailableError: 503,
    CancelledError: 503,
    DeadlineError: 504,
    MissingExtraError: 501,
}


def problem_of(error: Exception, status: int | None = None) -> Problem:
    """Describe an error without the machine's paths; of one that is not this package's only that there was one."""
    if not isinstance(error, LatentToolError):
        _log.error("A question failed", exc_info=error)
        return Problem(type="InternalError", status=500, message="The service failed.", hint="See its log.")
    if status is None:
        status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
    return Problem(
        type=type(error).__name__,
        status=status,
        message=without_places(error.message),
        hint=without_places(error.hint),
        retryable=error.retryable,
    )


def response_of(problem: Problem, headers: dict[str, str] | None = None) -> Response:
    """Return the response that carries a problem."""
    return JSONResponse(
        problem.model_dump(), status_code=problem.status, headers=headers or {}, media_type=PROBLEM_JSON
    )


class _RefusedError(Exception):
    def __init__(self, error: LatentToolError, status: int | None = None, **headers: str) -> None:
        self.response = response_of(problem_of(error, status), {key.replace("_", "-"): headers[key] for key in headers})


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


# --- the gate ---------------------------------------------------------------------------------------------------------


class Gate:
    """Who may come in, how many at a time, and with how much.

    Args:
        limits: what requests may hold.
        token: what clients must send as ``Authorization: Bearer ...``; ``None`` lets everyone in.
        hosts: without a token, the host names by which the server may be called; ``None``: any.
        open_paths: paths that need no token.
    """

    def __init__(
        self,
        limits: GateLimits,
        token: str | None = None,
        hosts: Sequence[str] | None = None,
        open_paths: Sequence[str] = (),
    ) -> None:
        self.limits = limits
        self.token = None if token is None else token.encode()
        self.hosts = None if hosts is None or token is not None else {host.lower() for host in hosts}
        self.open_paths = frozenset(open_paths)
        self.places = limits.max_requests
        self.active = 0
        self.held = 0  # bytes of bodies
        self.closing = asyncio.Event()

    def close(self) -> None:
        """Give up the requests in hand: the server ends."""
        self.closing.set()

    def check(self, scope: Scope) -> None:
        """Raise unless the caller may come in."""
        headers = self._bounded_headers(scope)
        host = self._host(headers.get(b"host", b""))
        self._check_origin(headers.get(b"origin"), host)
        if self.token is not None and scope["path"] not in self.open_paths:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
                raise _RefusedError(
                    AccessError("The service wants a token.", "Send it as Authorization: Bearer <token>."),
                    WWW_Authenticate="Bearer",
                )

    def _bounded_headers(self, scope: Scope) -> dict[bytes, bytes]:
        """The headers by name. What would be read one way here and another way elsewhere is refused."""
        limits, headers = self.limits, scope["headers"]
        if len(headers) > limits.max_headers or sum(len(n) + len(v) + 4 for n, v in headers) > limits.max_header_bytes:
            raise _RefusedError(
                InputError(
                    f"The request has more than {limits.max_headers} headers or {limits.max_header_bytes} bytes of "
                    "them.",
                    "Send fewer or shorter headers.",
                ),
                431,
                Connection="close",
            )
        by_name: dict[bytes, bytes] = {}
        for name, value in headers:
            name = name.lower()
            if name in by_name and name in (b"host", b"origin", b"authorization", b"content-length", b"content-type"):
                raise _RefusedError(InputError(f"The header {name.decode()} is there twice.", "Send it once."), 400)
            by_name[name] = value
        return by_name

    def _host(self, value: bytes) -> str:
        host = value.decode("latin-1").lower()
        parts = _HOST.fullmatch(host)
        if (host and parts is None) or (self.hosts is not None and (parts is None or parts[1] not in self.hosts)):
            raise _RefusedError(
                InputError("This service is not known by that host name.", "Call it by a name it was started for."),
                400,
            )
        return host

    def _check_origin(self, value: bytes | None, host: str) -> None:
        if value is None:
            return
        try:
            origin = urlsplit(value.decode("latin-1")).netloc.lower()
        except ValueError:  # `http://[`
            origin = None
        if origin is None or (self.hosts is not None and origin != host):
            raise _RefusedError(InputError("Other web pages may not use this service.", "Give it a token."), 403)

    def busy(self) -> _RefusedError:
        return _RefusedError(
            OverloadedError("The service has too many requests in hand.", "Try again a little later."),
            Retry_After=str(self.limits.retry_after_s),
        )

    async def read(self, scope: Scope, receive: Receive, taken: list[int]) -> bytes:
        """Read the whole body; ``taken[0]`` is how many bytes of it are counted in ``held``."""
        declared = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"0")
        self._check_size(int(declared) if declared.isdigit() and len(declared) < 20 else 0)
        pieces, more = [], True
        try:
            async with asyncio.timeout(self.limits.body_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    piece = message.get("body", b"")
                    more = message.get("more_body", False)
                    taken[0] += len(piece)
                    self.held += len(piece)
                    self._check_size(taken[0])
                    if self.held > self.limits.max_held_bytes:
                        raise self.busy()
                    pieces.append(piece)
        except TimeoutError:
            raise _RefusedError(
                DeadlineError(f"The request did not arrive within {self.limits.body_s:g} s.", "Send a smaller image."),
                408,
                Connection="close",
            ) from None
        return b"".join(pieces)

    def _check_size(self, size: int) -> None:
        if size > self.limits.max_body_bytes:
            raise _RefusedError(
                InputError(
                    f"The request has more than {self.limits.max_body_bytes} bytes.",
                    "Scale the image down or compress it, or raise max_body_bytes of the service.",
                ),
                413,  # the rest is read and dropped, or the client would not see this
            )

    async def parse(self, body: bytes) -> Any:
        """Read a JSON body, of which only texts can be long: what makes a value is counted before any is made.

        Raises ``ValueError`` for what is not JSON.
        """
        limits = self.limits
        # A question and a system text may consist of these signs alone.
        signs = 4 * limits.max_values + 2 * MAX_TEXT
        for start in range(0, len(body), _PIECE):
            piece = body[start : start + _PIECE]
            signs -= sum(map(piece.count, b'[{,:"'))
            if signs < 0:
                raise self._too_much()
            await asyncio.sleep(0)
        try:
            value = from_json(body)
        except ValueError as error:
            if "recursion" in str(error):
                raise self._too_much() from None
            raise
        level, values = [value], 0
        for _ in range(limits.max_depth + 1):
            below: list[Any] = []
            for each in level:
                inner = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
                values += len(inner) * (2 if isinstance(each, dict) else 1)
                if values > limits.max_values:
                    raise self._too_much()
                below.extend(item for item in inner if isinstance(item, dict | list))
            if not below:
                return value
            level = below
        raise self._too_much()

    def _too_much(self) -> _RefusedError:
        return _RefusedError(
            InputError(
                f"The body has more than {self.limits.max_values} keys and values, or more than "
                f"{self.limits.max_depth} levels.",
                "Send one question; an image is one text.",
            ),
            413,
        )


class GateMiddleware:
    """Let a request in, read its body within the limits, and count it until its response has ended."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self.gate.check(scope)
            if scope["method"] in ("GET", "HEAD", "OPTIONS"):
                await self.app(scope, receive, send)
            else:
                await self._admit(scope, receive, send)
        except _RefusedError as refused:
            await refused.response(scope, receive, send)
        except ClientGoneError:
            pass

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        gate, taken = self.gate, [0]
        if gate.active >= gate.places:
            raise gate.busy()
        gate.active += 1
        try:
            body = await gate.read(scope, receive, taken)
            kind = next((value for name, value in scope["headers"] if name.lower() == b"content-type"), b"")
            if b"json" in kind.lower():
                with suppress(ValueError):  # the application refuses what is not JSON
                    scope[JSON_KEY] = await gate.parse(body)
            pending: list[bytes] = [body]
            at = 0
            del body

            async def replay() -> Message:
                nonlocal at
                if not pending:
                    return await receive()
                piece = pending[0][at : at + _PIECE]
                at += len(piece)
                more = at < len(pending[0])
                if not more:
                    pending.clear()
                await asyncio.sleep(0)  # what reads a form reads it without a pause
                return {"type": "http.request", "body": piece, "more_body": more}

            await self._until_closing(scope, replay, send)
        finally:
            gate.active -= 1
            gate.held -= taken[0]

    async def _until_closing(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; when the server gives up first, answer with a typed 503."""
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        work = asyncio.ensure_future(self.app(scope, receive, sending))
        end = asyncio.ensure_future(self.gate.closing.wait())
        try:
            await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
            if started and not work.done():  # a stream may still say why it ends
                await asyncio.wait({work}, timeout=0.5)
            if work.done():
                work.result()  # raises what the work raised
                return
        finally:
            for task in (work, end):
                task.cancel()
            await asyncio.gather(work, end, return_exceptions=True)
        if not started:
            await response_of(problem_of(STOPPING), {"Retry-After": "5", "Connection": "close"})(scope, receive, send)
