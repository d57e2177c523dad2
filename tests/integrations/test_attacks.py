"""Attacks on real servers of this machine: whatever is sent, others are answered, and memory keeps to the limits.

Every attack ends by itself. What somebody waits for who asks for ``/health`` meanwhile is measured in processor time of
the event loop: tests share their machine, and 100 ms are promised of an idle one. Memory is compared with what the
limits allow.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from attacks import Server, Watch, command

pytestmark = pytest.mark.timeout(900)

TOKEN = "a-token-for-this-test"
PATIENCE = 0.2  # seconds of the event loop
MEGABYTE = 1_000_000
COMMANDS = {
    "serve": ("serve", "--port", "0"),
    "play": ("play", "--port", "0", "--no-open"),
    "mcp": ("mcp", "--http", "--port", "0"),
}
PATHS = {"serve": "/v1/ask", "play": "/v1/ask", "mcp": "/mcp"}


@pytest.fixture(scope="module", params=COMMANDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(kind: str) -> Iterator[Server]:
    with command(*COMMANDS[kind], LATENT_TOOL_TOKEN=TOKEN if kind == "serve" else "") as server:
        if kind == "mcp":
            server.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        yield server


def head(kind: str, *lines: str, token: bool = True) -> bytes:
    given = [f"Authorization: Bearer {TOKEN}"] if token and kind == "serve" else []
    accept = "Accept: application/json, text/event-stream"
    return "\r\n".join([f"POST {PATHS[kind]} HTTP/1.1", "Host: localhost", accept, *given, *lines, "", ""]).encode()


def posted(kind: str, body: bytes, content_type: str = "application/json") -> bytes:
    lines = (f"Content-Type: {content_type}", f"Content-Length: {len(body)}", "Connection: close")
    return head(kind, *lines) + body


def status(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1]) if reply else 0


def unharmed(watch: Watch, allowed: int, patience: float = PATIENCE) -> None:
    assert watch.count and watch.slowest < patience, (watch.count, watch.slowest)
    assert watch.most - watch.before < allowed, (watch.most - watch.before) / MEGABYTE


# --- headers and connections ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [b"X-%d: " + b"a" * 900, b"X: a" + b" " * 60_000, b"X%d:" + b"\t" * 3])
def test_headers_without_end(kind: str, server: Server, line: bytes) -> None:
    """Forty megabytes of them, from somebody without a token."""

    def lines() -> Iterator[bytes]:
        yield f"POST {PATHS[kind]} HTTP/1.1\r\nHost: localhost\r\n".encode()
        block = b"".join((line % n if b"%d" in line else line) + b"\r\n" for n in range(max(1, 60_000 // len(line))))
        for _ in range(40 * MEGABYTE // len(block)):
            yield block

    with Watch(server) as watch:
        assert status(server.send(*lines())) in (0, 431)
    unharmed(watch, 40 * MEGABYTE)


@pytest.mark.parametrize(
    "lines",
    [
        [f"X-{n}: a" for n in range(101)],
        ["X: " + "a" * 40_000],
        ["X" * 40_000 + ": a"],
    ],
    ids=["many", "long", "long name"],
)
def test_too_many_headers_are_a_typed_error(kind: str, server: Server, lines: list[str]) -> None:
    reply = server.send(head(kind, "Content-Length: 0", "Connection: close", *lines, token=False))
    assert status(reply) == 431 and b'"InputError"' in reply


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=list(COMMANDS))
def test_half_sent_requests_shut_nobody_out(arguments: tuple[str, ...]) -> None:
    """With 128 file descriptors, six hundred of them."""
    with command(*arguments, descriptors=128) as server:
        half: list[socket.socket] = []
        with Watch(server) as watch:
            for number in range(600):
                half.append(server.connect())
                begun = head("play", "Content-Type: application/json", "Content-Length: 100")
                with suppress(ConnectionResetError, BrokenPipeError):
                    half[-1].sendall(begun[:-4] if number < 300 else begun + b"{")
        unharmed(watch, 60 * MEGABYTE)
        assert server.health() < PATIENCE
        for each in half:
            each.close()


def test_idle_connections_are_closed(server: Server) -> None:
    """One that says nothing, one that drips its first headers, one that drips after a reply."""
    with server.connect(60) as silent, server.connect(60) as dripping:
        ends = {}

        def until_closed(name: str, connection: socket.socket) -> None:
            began = time.monotonic()
            with suppress(OSError):
                while connection.recv(1000):
                    pass
            ends[name] = time.monotonic() - began

        threads = [
            threading.Thread(target=until_closed, args=pair) for pair in (("silent", silent), ("drips", dripping))
        ]
        [each.start() for each in threads]
        dripping.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        for _ in range(60):
            if len(ends) == 2:
                break
            with suppress(OSError):
                dripping.sendall(b"a")
            time.sleep(0.5)
        [each.join(60) for each in threads]
    assert set(ends) == {"silent", "drips"}


# --- bodies -----------------------------------------------------------------------------------------------------------

HOSTILE = {
    "unknown keys": lambda size: b"{" + b",".join(b'"k%07d":1' % n for n in range(size // 12)) + b"}",
    "a thousand unknown keys": lambda size: (
        b"{" + b",".join(b'"' + b"k" * 900 + b'%07d":1' % n for n in range(1000)) + b"}"
    ),
    "lists": lambda size: b'{"question":"?","images":[' + b"[]," * (size // 3) + b"[]]}",
    "texts": lambda size: b'{"question":"?","images":[' + b'"",' * (size // 3) + b'""]}',
    "deep lists": lambda size: b'{"question":"?","image":' + b"[" * (size // 2) + b"]" * (size // 2) + b"}",
    "deep objects": lambda size: b'{"a":' * 90_000 + b"1" + b"}" * 90_000,
    "numbers": lambda size: b'{"question":"?","seed":' + b"9" * size + b"}",
    "quotes": lambda size: b'{"question":"' + b'\\"' * (size // 2) + b'"}',
    "escapes": lambda size: b'{"question":"' + b"\\u00e9" * (size // 6) + b'"}',
    "spaces": lambda size: b" " * size + b"{}",
    "zeros": bytes,
    "a long text": lambda size: b'{"image":"data:image/png;base64,' + b"A" * size + b'","question":"?"}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json(kind: str, server: Server, name: str) -> None:
    """Small replies, and no turn of the loop taken by it."""
    body = HOSTILE[name](18 * MEGABYTE)
    with Watch(server) as watch:
        reply = server.send(posted(kind, body))
        assert 400 <= status(reply) < 500 or kind == "mcp", reply[:300]
        assert len(reply) < 8_000
    # The MCP SDK reads what the gate lets in by itself, in the loop: a long text takes it that much.
    texts = kind == "mcp" and name in ("quotes", "escapes", "a long text")
    unharmed(watch, 5 * len(body) + 60 * MEGABYTE, 2.0 if texts else PATIENCE)


FORMS = {
    "parts": lambda size: b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n' * (size // 54) + b"--x--\r\n",
    "headers of a part": lambda size: b"--x\r\n" + b"A: b\r\n" * (size // 6) + b"\r\n\r\nb\r\n--x--\r\n",
    "a part without end": lambda size: (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + b"\r\n--" * (size // 4)
    ),
    "fields": lambda size: b"a=b&" * (size // 4),
}


@pytest.mark.parametrize("name", FORMS)
def test_hostile_forms(kind: str, server: Server, name: str) -> None:
    if kind == "mcp":
        return  # it takes no forms
    body = FORMS[name](18 * MEGABYTE)
    sent = "application/x-www-form-urlencoded" if name == "fields" else "multipart/form-data; boundary=x"
    with Watch(server) as watch:
        reply = server.send(posted(kind, body, sent).replace(b"/v1/ask ", b"/v1/ask/form ", 1))
    assert 400 <= status(reply) < 500 and len(reply) < 8_000, reply[:300]
    unharmed(watch, 5 * len(body) + 60 * MEGABYTE)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        ["Host: [::1].evil.example"],
        ["Host: [::1"],
        ["Host: localhost:80:80"],
        ["Host: localhost@evil.example"],
        ["Host: localhost:evil.example"],
        ["Host: localhost", "Origin: http://["],
        ["Host: localhost", "Origin: http://[::1].evil.example"],
        ["Host: localhost", "Origin: http://evil.example/http://localhost"],
        ["Host: localhost", "Origin: null", "Origin: http://localhost"],
        ["Host: localhost", "Host: evil.example"],
    ],
    ids="; ".join,
)
def test_names_that_are_none(kind: str, server: Server, lines: list[str]) -> None:
    if kind == "serve" and "evil" in lines[-1] and "Origin" in lines[-1]:
        return  # it has a token: pages may use it
    request = "\r\n".join([f"GET {PATHS[kind]} HTTP/1.1", "Connection: close", *lines, "", ""]).encode()
    assert status(server.send(request)) in (400, 401, 403, 421)


# --- the end ----------------------------------------------------------------------------------------------------------


def ask_slowly(server: Server, replies: list[bytes]) -> threading.Thread:
    picture = (
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR42u3NMQEAAAQAMLTQv5YwSvBtBZbTHZ8q"
        "ngkEAoFAIBAIBIIrC1lZAU48zQieAAAAAElFTkSuQmCC"
    )
    body = json.dumps({"image": picture, "question": "What is this?", "budget": {"iterations": 9_000}}).encode()
    request = posted("play", body)

    def run() -> None:
        with server.connect(120) as connection:
            connection.sendall(request)
            reply = b""
            while piece := connection.recv(65_536):
                reply += piece
            replies.append(reply)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def stop_while_asking(seconds: str, iterations: str, count: int = 4) -> tuple[list[bytes], float]:
    arguments = ("--port", "0", "--max-iterations", "9000", "--max-seconds", iterations, "--grace", seconds)
    with command("serve", *arguments) as server:
        replies: list[bytes] = []
        threads = [ask_slowly(server, replies) for _ in range(count)]
        end = time.monotonic() + 60
        while time.monotonic() < end:
            reply = server.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            if json.loads(reply.partition(b"\r\n\r\n")[2])["active"] == count:
                break
            time.sleep(0.05)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(120)
        took = time.monotonic() - began
        [each.join(60) for each in threads]
    return replies, took


def test_requests_in_hand_are_finished() -> None:
    """The deadline ends their search, within the grace."""
    replies, _ = stop_while_asking("100", "6")
    assert [status(each) for each in replies] == [200] * 4
    assert all(b'"answer"' in each for each in replies)


def test_what_is_not_finished_gets_a_typed_error() -> None:
    replies, _ = stop_while_asking("0.5", "100")
    assert [status(each) for each in replies] == [503] * 4
    assert all(b'"ServiceUnavailableError"' in each and b"etry-" in each for each in replies)
