"""A real server on loopback that answers as badly as its paths say. Used by ``test_images_remote``."""

from __future__ import annotations

import gzip
import socket
import socketserver
import ssl
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from image_samples import encode, photo

PNG = encode(photo(), "PNG")
PEM = Path(__file__).with_name("image_server.pem")  # self-signed for img.test, key and certificate


def head(status: str = "200 OK", **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def whole(body: bytes, **headers: object) -> bytes:
    return head(Content_Length=len(body), **headers) + body


class BadServer(socketserver.ThreadingTCPServer):
    """Listens at ``netloc``; ``requests`` are the heads received, ``sent`` the bytes of endless answers."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, *, tls: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = int(self.server_address[1])
        self.netloc = f"img.test:{self.port}"
        self.requests: list[str] = []
        self.names: list[str | None] = []
        self.sent = 0
        self.over = threading.Event()
        self.context: ssl.SSLContext | None = None
        if tls:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(PEM)
            self.context.sni_callback = lambda _socket, name, _context: self.names.append(name)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are the rule here."""


class _Handler(socketserver.BaseRequestHandler):
    server: BadServer

    def handle(self) -> None:
        if self.server.context is None:
            self.serve()
            return
        with suppress(OSError), self.server.context.wrap_socket(self.request, server_side=True) as self.request:
            self.serve()
            self.request.unwrap()

    def serve(self) -> None:
        received = b""
        while b"\r\n\r\n" not in received and (piece := self.request.recv(4096)):
            received += piece
        self.server.requests.append(received.decode("latin-1"))
        target = received.split(b" ", 2)[1].decode("latin-1")
        path = urlsplit(target).path if target.startswith("http://") else target.partition("?")[0]
        self.answer(path.lstrip("/"))

    def answer(self, path: str) -> None:
        name, _, rest = path.partition("/")
        behaviour: Callable[[str], None] | None = getattr(self, "do_" + name.replace("-", "_"), None)
        if behaviour:
            behaviour(rest)
        else:
            self.request.sendall(STATIC.get(name, head("404 Not Found", Content_Length=0)))

    def do_redirect(self, rest: str) -> None:
        """/redirect/302/<percent-encoded location>"""
        status, _, location = rest.partition("/")
        location = unquote(location, "latin-1").replace("PORT", str(self.server.port))
        cookie = "session=1; Path=/"
        self.request.sendall(head(f"{status} Moved", Location=location, Set_Cookie=cookie, Content_Length=0))

    def do_loop(self, rest: str) -> None:
        self.request.sendall(head("302 Found", Location="/loop", Content_Length=0))

    def do_count(self, rest: str) -> None:
        """/count/3 redirects three times, then gives the image."""
        left = int(rest)
        location = f"/count/{left - 1}"
        self.request.sendall(head("307 Again", Location=location, Content_Length=0) if left else whole(PNG))

    def do_stall_before_head(self, rest: str) -> None:
        self.server.over.wait(60)

    def do_stall_in_head(self, rest: str) -> None:
        self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-")
        self.server.over.wait(60)

    def do_stall_in_body(self, rest: str) -> None:
        self.request.sendall(whole(PNG)[:-20])
        self.server.over.wait(60)

    def drip(self, data: bytes) -> None:
        for place in range(len(data)):
            self.request.sendall(data[place : place + 1])
            if self.server.over.wait(0.02):
                return

    def do_drip_head(self, rest: str) -> None:
        self.drip(b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 20_000)

    def do_drip_body(self, rest: str) -> None:
        self.request.sendall(head(Content_Length=20_000))
        self.drip(PNG + bytes(20_000))

    def do_drip_body_without_length(self, rest: str) -> None:
        self.request.sendall(head())
        self.drip(PNG + bytes(20_000))

    def do_drip_chunks(self, rest: str) -> None:
        self.request.sendall(head(Transfer_Encoding="chunked"))
        self.drip(b"1\r\nx\r\n" * 5_000)

    def do_continue_for_ever(self, rest: str) -> None:
        while not self.server.over.wait(0.005):
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def endless(self, piece: bytes) -> None:
        while not self.server.over.is_set():
            self.request.sendall(piece)
            self.server.sent += len(piece)

    def do_endless(self, rest: str) -> None:
        self.request.sendall(head())
        self.endless(PNG + bytes(100_000))

    def do_ten_gigabytes(self, rest: str) -> None:
        self.request.sendall(head(Content_Length=10_000_000_000, Content_Type="image/png"))
        self.endless(bytes(100_000))

    def do_ten_gigabytes_as_chunks(self, rest: str) -> None:
        self.request.sendall(head(Transfer_Encoding="chunked"))
        self.request.sendall(b"%x\r\n" % 10_000_000_000)
        self.endless(bytes(100_000))

    def do_ten_gigabytes_packed(self, rest: str) -> None:
        """Zeros, packed a thousand to one."""
        self.request.sendall(head(Content_Encoding="gzip"))
        pack = zlib.compressobj(9, wbits=31)
        for _ in range(10_000):
            self.request.sendall(pack.compress(bytes(1_000_000)))

    def do_ten_gigabytes_told_as_100(self, rest: str) -> None:
        self.request.sendall(head(Content_Length=100))
        self.endless(PNG[:50] + bytes(100_000))

    def do_endless_chunks(self, rest: str) -> None:
        self.request.sendall(head(Transfer_Encoding="chunked"))
        self.endless(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    def do_endless_head(self, rest: str) -> None:
        self.request.sendall(b"HTTP/1.1 200 OK\r\n")
        self.endless(b"X-More: " + b"a" * 1000 + b"\r\n")

    def do_reset(self, rest: str) -> None:
        self.request.sendall(whole(PNG)[:100])
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def do_hang_up(self, rest: str) -> None:
        pass


_bomb = zlib.compressobj(9, wbits=31)
BOMB = _bomb.compress(bytes(5_000_000)) + _bomb.flush()

STATIC: dict[str, bytes] = {
    "ok.png": whole(PNG, Content_Type="image/png"),
    "as-text.png": whole(PNG, Content_Type="text/html"),
    "as-nonsense.png": whole(PNG, Content_Type="\xff;;;/"),
    "no-type.png": head() + PNG,
    "chunked.png": head(Transfer_Encoding="chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(PNG), PNG),
    "gzip.png": whole(gzip.compress(PNG), Content_Encoding="gzip"),
    "deflate.png": whole(zlib.compress(PNG), Content_Encoding="deflate"),
    "identity.png": whole(PNG, Content_Encoding="identity"),
    "longer-than-told.png": head(Content_Length=len(PNG)) + PNG + bytes(1000),
    "html.png": whole(b"<!doctype html><title>Log in</title>", Content_Type="image/png"),
    "empty.png": whole(b"", Content_Type="image/png"),
    "half.png": whole(PNG[: len(PNG) // 2]),
    "less-than-told.png": head(Content_Length=len(PNG)) + PNG[:-30],
    "shorter-than-sent.png": head(Content_Length=50) + PNG,
    "huge-length.png": head(Content_Length="9" * 18) + PNG,
    "absurd-length.png": head(Content_Length="9" * 5000) + PNG,
    "negative-length.png": head(Content_Length=-5) + PNG,
    "two-lengths.png": head(Content_Length=f"{len(PNG)}\r\nContent-Length: 5") + PNG,
    "bomb.png": whole(BOMB, Content_Encoding="gzip"),
    "brotli.png": whole(PNG, Content_Encoding="br"),
    "twice.png": whole(gzip.compress(gzip.compress(PNG)), Content_Encoding="gzip, gzip"),
    "not-gzip.png": whole(PNG, Content_Encoding="gzip"),
    "half-gzip.png": whole(gzip.compress(PNG)[:-30], Content_Encoding="gzip"),
    "bad-chunks.png": head(Transfer_Encoding="chunked") + b"zz\r\n" + PNG,
    "part.png": whole(PNG).replace(b"200 OK", b"206 Partial Content"),
    "nothing.png": head("204 No Content"),
    "same.png": head("304 Not Modified"),
    "private.png": whole(b"who are you", WWW_Authenticate="Basic realm=x").replace(b"200 OK", b"401 Unauthorized"),
    "broken.png": whole(b"oops").replace(b"200 OK", b"500 Internal Server Error"),
    "busy.png": whole(b"later", Retry_After="9999").replace(b"200 OK", b"429 Too Many Requests"),
    "not-http.png": b"SSH-2.0-OpenSSH_9.6\r\n",
    "binary.png": bytes(range(256)) * 10,
    "no-location.png": head("302 Found", Content_Length=0),
    "many-headers.png": head(**{f"X_{number}": "a" * 900 for number in range(300)}) + PNG,
    "switch.png": head("101 Switching Protocols", Upgrade="websocket"),
}
