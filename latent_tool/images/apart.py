"""Decoding in a process of its own, so that a picture that crashes or bloats the decoder takes nothing with it.

A helper process that has loaded Pillow, but never sees a picture, forks one process for every picture: that takes a few
milliseconds, and nothing of one picture is left when the next one comes. The process gets the bytes over a socket and
answers with one line of JSON and the raw pixels. It has none of the environment's secrets and cannot open files or
connections or start processes; memory and processor time are limited. The helper is started when it is first needed,
again when it has died, and ends with this process. Where processes cannot be forked (Windows), a new one is started
for every picture, and such limits do not exist.

Why not a pool of processes (``concurrent.futures``, ``pebble``)? Its workers answer by ``pickle``: one that a picture
has taken over could run code on this side. A worker that serves several pictures carries what one did to it into the
next; one started anew for each takes a fifth of a second instead of milliseconds. ``spawn`` and ``forkserver`` run the
caller's main module again and hand on its whole environment. And to end one worker of the standard library's pool
breaks the pool.

This module knows nothing of files, of networks or of policies.
"""

from __future__ import annotations

import atexit
import importlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from latent_tool.errors import ImageDecodeError, ImageError, ImageTooLargeError
from latent_tool.images.containers import decode
from latent_tool.images.limits import Limits, check_size

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["decode_apart"]

_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from latent_tool.images import apart as image_process
image_process._serve()
"""
_START_ALONE = _START.replace("_serve()", "_alone(sys.argv[2])")
_ERRORS = {kind.__name__: kind for kind in (ImageDecodeError, ImageTooLargeError, ImageError)}
_ENVIRONMENT = ("LD_LIBRARY_PATH", "PATH", "SYSTEMROOT")
_CAN_FORK = hasattr(os, "fork") and hasattr(socket, "send_fds")
_HELPER_S = 60.0  # within which the helper must have started, and answer
_MAX_HEAD = 100_000  # bytes of the answer's first line
_NOBODY = 65_534  # user and group without rights


def decode_apart(data: bytes, limits: Limits, *, seconds: float, memory: int) -> tuple[Image, tuple[str, ...]]:
    """Decode as ``containers.decode`` does, in another process, for ``seconds`` and in ``memory`` bytes at most.

    Raises:
        ImageTooLargeError: as ``decode``, or the time or memory did not suffice.
        ImageDecodeError: as ``decode``, or the process died.
    """
    task = {
        "limits": [limits.max_pixels, limits.max_side, limits.max_frames, list(limits.formats)],
        "resources": {"AS": memory, "CPU": math.ceil(seconds) + 1, "FSIZE": 0, "CORE": 0, "NPROC": 0, "NOFILE": 0},
    }
    room = 3 * limits.max_pixels + _MAX_HEAD
    try:
        answer, code = (_ask if _CAN_FORK else _ask_alone)(data, task, room, seconds)
    except (TimeoutError, subprocess.TimeoutExpired):
        raise ImageTooLargeError(
            f"Decoding the image took longer than {seconds:.3g} s.",
            "Scale it down, or raise decode_s of the image policy.",
        ) from None
    except (OSError, ValueError):
        error = ImageDecodeError("The decoding process cannot be started.", "Try again when the machine is idle.")
        error.retryable = True
        raise error from None
    return _picture(answer, limits, code)


def _picture(answer: bytearray, limits: Limits, code: int) -> tuple[Image, tuple[str, ...]]:
    """What the process answered; nothing of it is believed without a check."""
    from PIL import Image as pillow

    try:
        end = answer.index(b"\n", 0, _MAX_HEAD) + 1
        head: dict[str, Any] = json.loads(answer[:end])
        if "error" in head:
            raise _ERRORS[head["error"]](head["message"], head["hint"])
        width, height = head["size"]
        check_size((width, height), limits)
        del answer[:end]
        if len(answer) != 3 * width * height:
            raise ValueError
        return pillow.frombytes("RGB", (width, height), answer), tuple(str(text) for text in head["warnings"])
    except ImageError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ImageDecodeError(
            f"The decoding process ended without a picture (exit code {code}).",
            "The image may be made to harm, or decode_memory of the image policy may be too small.",
        ) from None


# This side --------------------------------------------------------------------------------------------------------


class _Helper:
    """The process from which the others are forked. Its standard input is a socket for orders.

    An order is a task, with a socket for the picture, and is answered by the number of a new process; or such a number:
    then the process is killed, if it still runs, and its exit code is the answer. Until then its number is not given to
    another process, so that no other one can be killed by mistake.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._orders, theirs = socket.socketpair()
        self._orders.settimeout(_HELPER_S)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-c", _START, _search_path()],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=_environment(),
                    start_new_session=True,  # an interrupt from the keyboard is not meant for it
                )
        except BaseException:
            self._orders.close()
            raise

    def begin(self, task: dict[str, Any]) -> tuple[int, socket.socket]:
        """Begin a process, and return its number and a connection to it. Raises ``OSError`` or ``ValueError`` if there
        is none.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                return self._order(json.dumps(task).encode(), [theirs.fileno()]), ours
        except BaseException:
            ours.close()
            raise

    def end(self, number: int) -> int:
        """Kill the process; the exit code that it had, or minus the signal that it died of."""
        return self._order(str(number).encode(), [])

    def _order(self, order: bytes, sockets: list[int]) -> int:
        with self._lock:
            try:
                socket.send_fds(self._orders, [order], sockets)
                return int(self._orders.recv(100))
            except TimeoutError as error:  # which says nothing of a picture
                raise ConnectionError("The helper does not answer.") from error

    def close(self) -> None:
        self._orders.close()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """It belongs to another process: this one was forked from it."""
        self._orders.close()
        self._process.returncode = 0


_helper: _Helper | None = None
_helper_lock = threading.Lock()


def _current() -> _Helper:
    global _helper
    with _helper_lock:
        if _helper is None:
            _helper = _Helper()
        return _helper


def _close(which: _Helper | None = None) -> None:
    """End the helper, or ``which`` if it is still the one."""
    global _helper
    with _helper_lock:
        if _helper is not None and which in (None, _helper):
            _helper.close()
            _helper = None


def _forget() -> None:
    global _helper, _helper_lock
    _helper_lock = threading.Lock()
    if _helper is not None:
        _helper.forget()
        _helper = None


if _CAN_FORK:
    atexit.register(_close)
    os.register_at_fork(after_in_child=_forget)


def _ask(data: bytes, task: dict[str, Any], room: int, seconds: float) -> tuple[bytearray, int]:
    """Answer, of at most ``room`` bytes and one piece, and exit code of a process forked for ``data``."""
    helper = _current()
    try:
        number, connection = helper.begin(task)
    except (OSError, ValueError):  # it was killed: once more with another one
        _close(helper)
        helper = _current()
        number, connection = helper.begin(task)
    end = time.monotonic() + seconds
    answer, code = bytearray(), 0
    try:
        with connection:
            connection.settimeout(seconds)
            with suppress(BrokenPipeError, ConnectionResetError):  # it died, or answers before it has read everything
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while len(answer) <= room:
                    connection.settimeout(max(0.001, end - time.monotonic()))
                    piece = connection.recv(1 << 20)
                    if not piece:
                        break
                    answer += piece
    finally:
        try:
            code = helper.end(number)
        except (OSError, ValueError):
            _close(helper)
    return answer, code


def _ask_alone(data: bytes, task: dict[str, Any], room: int, seconds: float) -> tuple[bytearray, int]:
    """``_ask`` where processes cannot be forked."""
    process = subprocess.run(
        [sys.executable, "-I", "-c", _START_ALONE, _search_path(), json.dumps(task)],
        input=data,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=seconds,
        env=_environment(),
    )
    return bytearray(process.stdout[:room]), process.returncode


def _search_path() -> str:
    return json.dumps([os.path.abspath(entry) for entry in sys.path])


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}


# The other side ---------------------------------------------------------------------------------------------------


def _serve() -> None:
    """The helper: fork, kill and report, until whoever gives the orders is gone."""
    for name in ("Bmp", "Gif", "Jpeg", "Png", "Tiff", "WebP"):  # what is forked cannot open files, modules neither
        importlib.import_module(f"PIL.{name}ImagePlugin")
    importlib.import_module("PIL.ImageCms")
    orders = socket.socket(fileno=0)
    running: set[int] = set()
    while True:
        order, given, _, _ = socket.recv_fds(orders, 65_536, 1)
        if not order:
            break
        if given:
            number = _fork(given[0], json.loads(order), orders)
            running.add(number)
            os.close(given[0])
            orders.sendall(str(number).encode())
        else:
            number = int(order)
            running.discard(number)
            os.kill(number, signal.SIGKILL)
            orders.sendall(str(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])).encode())
    for number in running:
        os.kill(number, signal.SIGKILL)


def _fork(connection: int, task: dict[str, Any], orders: socket.socket) -> int:
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        orders.close()
        _child(connection, task)
        code = 0
    finally:
        os._exit(code)


def _child(connection: int, task: dict[str, Any]) -> None:
    """A forked process: limit itself, then read, decode and answer."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when the machine's memory runs out, this process goes first
    with socket.socket(fileno=connection) as peer:
        _limit(task["resources"])
        data = bytearray()
        while piece := peer.recv(1 << 20):
            data += piece
        for part in _answer(bytes(data), task["limits"]):
            peer.sendall(part)


def _alone(task: str) -> None:
    """A process that was started for one picture."""
    limits = json.loads(task)["limits"]
    for part in _answer(sys.stdin.buffer.read(), limits):
        sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()


def _limit(resources: dict[str, int]) -> None:
    import resource

    if os.geteuid() == 0:
        with suppress(OSError):  # root may lack the right to become somebody else
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
    for name, most in resources.items():
        if name == "AS" and sys.platform == "darwin":  # not kept there, and refused
            continue
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _answer(data: bytes, limits: list[Any]) -> tuple[bytes, bytes]:
    """The line of JSON, and the pixels if there are any."""
    head: dict[str, Any]
    pixels = b""
    try:
        max_pixels, max_side, max_frames, formats = limits
        picture, warnings = decode(data, Limits(max_pixels, max_side, max_frames, tuple(formats)))
        pixels = picture.tobytes()
        head = {"size": picture.size, "warnings": warnings}
    except ImageError as error:
        head = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    except MemoryError:
        head = {
            "error": "ImageTooLargeError",
            "message": "There is not enough memory to decode the image.",
            "hint": "Scale it down, or raise decode_memory of the image policy.",
        }
    return json.dumps(head).encode() + b"\n", pixels
