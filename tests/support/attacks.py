"""A server in a process of its own, for tests that attack it, and what it costs meanwhile."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# The model answers nothing here that takes time: what is attacked is the door.
SERVE = """
import resource, sys
if int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
from latent_tool.cli import main
sys.argv[1:] = sys.argv[2:]
main()
"""


class Server:
    """Where it is, and what its process takes."""

    def __init__(self, process: subprocess.Popen[str], host: str, port: int) -> None:
        self.process = process
        self.host, self.port = host, port

    @property
    def resident(self) -> int:
        """Bytes of memory at present."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def worked(self) -> float:
        """Seconds of processor time that its event loop's thread has taken so far."""
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[0]) / 1e9

    def connect(self, timeout: float = 30.0) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=timeout)

    def send(self, *pieces: bytes) -> bytes:
        """Send all of it, as far as it is taken, and give the reply, which must end the connection."""
        with self.connect() as connection:
            with suppress(BrokenPipeError, ConnectionResetError):
                for piece in pieces:
                    connection.sendall(piece)
            reply = b""
            with suppress(ConnectionResetError):
                while (piece := connection.recv(65_536)) and len(reply) < 1_000_000:
                    reply += piece
            return reply

    def settle(self) -> None:
        """Wait until its memory stays the same: some servers load their model beside the first requests."""
        still, before = 0, self.resident
        for _ in range(600):
            time.sleep(0.25)
            still = still + 1 if abs(self.resident - before) < 1_000_000 else 0
            before = self.resident
            if still == 12:
                return

    def health(self) -> float:
        """Seconds of the event loop's work that a caller of ``/health`` waits for.

        Not those of a clock: tests share their machine.
        """
        began = self.worked
        reply = self.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b" 200 " in reply.partition(b"\r\n")[0] or b" 404 " in reply.partition(b"\r\n")[0], reply[:200]
        return self.worked - began


@contextmanager
def command(*arguments: str, descriptors: int = 0, **environment: str) -> Iterator[Server]:
    """Run ``latent-tool`` with a server, until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(descriptors), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LATENT_TOOL_TOKEN": "", "OMP_WAIT_POLICY": "PASSIVE", **environment},
    )
    assert process.stderr is not None and process.stdout is not None
    readers: list[threading.Thread] = []
    stream = process.stdout if arguments[0] == "play" else process.stderr
    try:
        said = ""
        for line in stream:
            said += line
            where = re.search(r"http://([^:/]+):(\d+)", line)
            if where:
                break
        else:
            raise AssertionError(said + process.stderr.read())
        # Nobody else reads what it says, and a full pipe would stop it.
        for each in (process.stdout, process.stderr):
            readers.append(threading.Thread(target=lambda each=each: [None for _ in each], daemon=True))
            readers[-1].start()
        server = Server(process, where[1], int(where[2]))
        server.settle()
        yield server
    finally:
        process.kill()
        process.wait(60)
        [each.join(60) for each in readers]
        process.stdout.close()
        process.stderr.close()


class Watch:
    """Asks for ``/health`` again and again beside an attack."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.slowest = 0.0
        self.count = 0
        self.failure: BaseException | None = None
        self.most = self.before = server.resident
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                self.slowest = max(self.slowest, self.server.health())
                self.most = max(self.most, self.server.resident)
                self.count += 1
                self._end.wait(0.02)
        except BaseException as error:
            self.failure = error

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(60)
        if self.failure is not None:
            raise self.failure
