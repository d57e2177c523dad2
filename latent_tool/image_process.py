"""Decoding in a process of its own, so that a picture that crashes or bloats the decoder takes nothing with it.

The process gets the bytes on its standard input, none of the environment's secrets, and, where the system knows such
limits, little memory, processor time and file space. It answers with one line of JSON and the raw pixels.

This module knows nothing of files, of networks or of policies.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from latent_tool.errors import ImageDecodeError, ImageError, ImageTooLargeError
from latent_tool.image_bytes import Limits, check_size, decode

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["decode_apart"]

_START = """
import json, sys
task = json.loads(sys.argv[1])
sys.path[:] = task.pop("path")
from latent_tool.image_process import _child
_child(**task)
"""
_ERRORS = {kind.__name__: kind for kind in (ImageDecodeError, ImageTooLargeError, ImageError)}
_ENVIRONMENT = ("LD_LIBRARY_PATH", "PATH", "SYSTEMROOT")


def decode_apart(data: bytes, limits: Limits, *, seconds: float, memory: int) -> tuple[Image, tuple[str, ...]]:
    """``image_bytes.decode`` in another process, for ``seconds`` and in ``memory`` bytes of address space at most.

    Raises:
        ImageTooLargeError: as ``decode``, or the time or memory did not suffice.
        ImageDecodeError: as ``decode``, or the process died.
    """
    from PIL import Image as pillow

    room = 3 * limits.max_pixels + 100_000
    task = {
        "path": [os.path.abspath(entry) for entry in sys.path],
        "limits": [limits.max_pixels, limits.max_side, limits.max_frames, list(limits.formats)],
        "resources": {"AS": memory, "CPU": math.ceil(seconds) + 1, "FSIZE": room, "CORE": 0},
    }
    with tempfile.TemporaryFile() as answer:
        try:
            process = subprocess.run(
                [sys.executable, "-I", "-c", _START, json.dumps(task)],
                input=data,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            )
        except OSError:
            error = ImageDecodeError("The decoding process cannot be started.", "Try again when the machine is idle.")
            error.retryable = True
            raise error from None
        except subprocess.TimeoutExpired:
            raise ImageTooLargeError(
                f"Decoding the image took longer than {seconds:.3g} s.",
                "Scale it down, or raise decode_s of the image policy.",
            ) from None
        answer.seek(0)
        try:
            head: dict[str, Any] = json.loads(answer.readline(100_000))
            if "error" in head:
                raise _ERRORS[head["error"]](head["message"], head["hint"])
            width, height = head["size"]
            check_size((width, height), limits)
            pixels = answer.read(3 * width * height + 1)
            return pillow.frombytes("RGB", (width, height), pixels), tuple(str(text) for text in head["warnings"])
        except ImageError:
            raise
        except (ValueError, KeyError, TypeError):
            raise ImageDecodeError(
                f"The decoding process ended without a picture (exit code {process.returncode}).",
                "The image may be made to harm, or decode_memory of the image policy may be too small.",
            ) from None


def _child(limits: list[Any], resources: dict[str, int]) -> None:
    """The other process: limit itself, then read, decode and answer."""
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        for name, most in resources.items():
            kind = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
    head: dict[str, Any]
    pixels = b""
    try:
        max_pixels, max_side, max_frames, formats = limits
        picture, warnings = decode(sys.stdin.buffer.read(), Limits(max_pixels, max_side, max_frames, tuple(formats)))
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
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n")
    sys.stdout.buffer.write(pixels)
    sys.stdout.buffer.flush()
