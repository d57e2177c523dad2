"""Where the commands listen: addresses, tokens, sockets, and a server that strangers cannot wear out.

``bind`` takes an address, ``serve_app`` runs an ASGI app there. What a connection may take is bounded here, before
any request exists: bytes of a request's head, seconds for it to arrive, seconds a connection idles or does not read its
reply, and how many there are. A newcomer takes the place of the connection that has waited longest without asking
anything, so that half-sent requests never shut others out. The parser is h11 and the loop asyncio's, whatever else is
installed: the limits are theirs.

SIGTERM and Ctrl-C end the listening at once and give requests in hand ``grace_s`` seconds; what is not answered by then
gets a typed 503. This module knows nothing of questions: what a request may hold is the business of ``http_gate``.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pydantic import Field

from latent_tool.errors import InputError, LatentToolError, MissingExtraError, OverloadedError, SettingsError
from latent_tool.files import expanded
from latent_tool.integrations.http_gate import PROBLEM_JSON, Gate, problem_of
from latent_tool.settings import Positive
from latent_tool.validation import Settings

try:
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise MissingExtraError("The HTTP server", "serve") from error

__all__ = ["TOKEN", "TOKEN_LENGTH", "ServerLimits", "bind", "in_url", "is_loopback", "read_token", "serve_app"]

TOKEN = "LATENT_TOOL_TOKEN"
TOKEN_LENGTH = 16  # characters; a shorter one can be guessed


class ServerLimits(Settings):
    """What the connections of a server may take."""

    connections: int = Field(
        512, ge=1, description="Connections at most; fewer where the process may open fewer file descriptors."
    )
    head_bytes: int = Field(32_768, ge=1024, description="Bytes of a request's first line and headers at most.")
    head_s: Positive = Field(10.0, description="Seconds from connecting to the end of the first request's headers.")
    idle_s: Positive = Field(60.0, description="Seconds from a reply to the end of the next request's headers.")
    arrive_s: Positive = Field(30.0, description="Seconds from a request's headers to the end of its body.")
    stall_s: Positive = Field(30.0, description="Seconds in which a client must read something of its reply.")
    grace_s: Positive = Field(20.0, description="Seconds that requests in hand have left when the server is stopped.")

    @property
    def backlog(self) -> int:
        """Connections that the system holds until they are accepted; whoever asks then waits for all before it."""
        return 128

    @property
    def accepted_at_once(self) -> int:
        """Connections that asyncio accepts in one turn of its loop, before it looks at anything else."""
        return 32 if _descriptors() >= 1024 else 8

    @property
    def most_connections(self) -> int:
        """``connections``, or what file descriptors are left for them: images and new connections need some.

        A connection that is sent away is closed some turns later, and every turn may accept more.
        """
        return max(8, min(self.connections, _descriptors() - 6 * self.accepted_at_once - 32))


def _descriptors() -> int:
    try:
        import resource
    except ImportError:  # Windows, where a process may have many
        return 8192
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if soft == resource.RLIM_INFINITY else soft


# --- addresses and tokens ---------------------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def in_url(host: str) -> str:
    """Return a host as URLs and ``Host`` headers write it."""
    return f"[{host}]" if ":" in host else host


def read_token(file: Path | None) -> str | None:
    """Return the token in a file, or in the environment; ``None`` when there is none.

    Raises ``SettingsError`` when the file cannot be read or the token is too short.
    """
    if file is None:
        token = os.environ.get(TOKEN, "")
        if not token:
            return None
    else:
        try:
            token = expanded(file).read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise SettingsError(
                f"{str(file)[:200]!r} cannot be read.", "Name a text file that holds the token."
            ) from None
    require_long(token)
    return token


def require_long(token: str) -> None:
    """Raise ``SettingsError`` for a token that can be guessed."""
    if len(token) < TOKEN_LENGTH:
        raise SettingsError(
            f"The token is shorter than {TOKEN_LENGTH} characters.",
            "Make one with: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )


def bind(host: str, port: int) -> socket.socket:
    """Take an address, at which nobody can connect yet; port 0 takes a free one. Raises ``SettingsError``."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise SettingsError(
            f"{host}, port {port}, cannot be listened at ({getattr(error, 'strerror', None) or error}).",
            "Name another --host or --port; port 0 takes a free one.",
        ) from None
    return listener


# --- the server -------------------------------------------------------------------------------------------------------


def serve_app(
    app: Any,
    listener: socket.socket,
    *,
    gate: Gate,
    limits: ServerLimits | None = None,
    at_end: Callable[[], None] | None = None,
) -> None:
    """Run an ASGI app on a listening socket until SIGTERM or Ctrl-C.

    Args:
        app: the application.
        listener: the socket, from ``bind``.
        gate: the app's own gate, which knows the requests in hand.
        limits: what connections may take.
        at_end: called when the grace is over, or when nothing is in hand any more, to end what waits for ever.
    """
    limits = ServerLimits() if limits is None else limits
    gate.places = min(gate.places, max(1, limits.most_connections // 2))  # others must be able to ask how it is
    _Server(app, gate, limits, at_end).run(sockets=[listener])


class _Config(uvicorn.Config):
    def __init__(self, app: Any, limits: ServerLimits) -> None:
        super().__init__(
            app,
            http=_Connection,
            loop="asyncio",
            ws="none",
            log_config=None,
            log_level="error",  # what strangers send is no news
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=limits.accepted_at_once,  # asyncio takes it for both; the system's own is set again below
            h11_max_incomplete_event_size=limits.head_bytes,
            timeout_keep_alive=round(limits.idle_s) + 1,  # ours comes first
            timeout_graceful_shutdown=round(limits.grace_s) + 5,
        )
        self.limits = limits
        self.most_connections = limits.most_connections
        # Connections without a whole request, the one that has waited longest first.
        self.waiting: dict[_Connection, None] = {}


class _Server(uvicorn.Server):
    """Gives requests in hand their grace, and a typed error after it."""

    def __init__(self, app: Any, gate: Gate, limits: ServerLimits, at_end: Callable[[], None] | None) -> None:
        super().__init__(_Config(app, limits))
        self.gate = gate
        self.limits = limits
        self.at_end = at_end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(self.limits.backlog)  # a burst waits there; where it is full, newcomers lose a second

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end(self) -> None:
        if self.gate.active:
            print(f"Stopping: {self.gate.active} requests in hand.", file=sys.stderr, flush=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.grace_s):
                while self.gate.active:
                    await asyncio.sleep(0.05)
        self.gate.close()
        if self.at_end is not None:
            self.at_end()
        await asyncio.sleep(1.0)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        for task in self.server_state.tasks:
            task.cancel()


class _Connection(H11Protocol):
    """A connection with limits: its first line and headers, its pauses, its place among the others."""

    config: _Config

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._seen: tuple[Any, ...] = ()
        self._since = self.loop.time()
        self.config.waiting[self] = None
        self._timer = self.loop.call_later(1.0, self._watch)
        if len(self.connections) > self.config.most_connections:
            # Not at once: what has come of the others' requests is read first, so that a burst shuts nobody out.
            self.loop.call_soon(self.loop.call_soon, self._make_room)

    def _make_room(self) -> None:
        """Send away whoever has waited longest without asking, if there still are too many connections."""
        if len(self.connections) <= self.config.most_connections or self.transport.is_closing():
            return
        oldest = next(iter(self.config.waiting), self)
        if oldest is self:
            self._refuse(OverloadedError("The server has too many connections.", "Try again a little later."), 503)
        else:
            oldest.leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self.config.waiting.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._asking() and not self.cycle.more_body:
            self.config.waiting.pop(self, None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self._asking():
            self.config.waiting[self] = None

    def leave(self) -> None:
        """Close, and at once if the client does not read what was written for it."""
        self.config.waiting.pop(self, None)
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _asking(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """Once a second: has this connection been in one and the same state for too long?"""
        self._timer = self.loop.call_later(1.0, self._watch)
        limits, unread = self.config.limits, self.transport.get_write_buffer_size()
        if self.transport.is_closing():
            allowed, state = limits.stall_s, ("closing", unread)
        elif not self._asking():
            allowed, state = limits.head_s if self.cycle is None else limits.idle_s, ("head", id(self.cycle))
        elif self.cycle.more_body:
            allowed, state = limits.arrive_s, ("body", id(self.cycle))
        elif unread:
            allowed, state = limits.stall_s, ("reply", unread)
        else:  # the answer is being found
            allowed, state = float("inf"), ("answer", 0)
        now = self.loop.time()
        if state != self._seen:
            # The first look comes a second late at most; before it the connection was made, or was in another state.
            self._since, self._seen = (self._since if not self._seen else now), state
        elif now - self._since > allowed:
            self.config.waiting.pop(self, None)
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with what is not HTTP, or has too long a head."""
        wrong = sys.exc_info()[1]
        status = getattr(wrong, "error_status_hint", 400)
        if status == 431:
            limit = self.config.limits.head_bytes
            error = InputError(f"The request has more than {limit} bytes of headers.", "Send fewer or shorter headers.")
        else:
            error = InputError("This is not a valid HTTP request.", "Send HTTP/1.1.")
        self._refuse(error, status)

    def _refuse(self, error: LatentToolError, status: int) -> None:
        if not self._asking() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(problem_of(error, status).model_dump()).encode()
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {PROBLEM_JSON}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.config.waiting.pop(self, None)
        self.transport.close()
