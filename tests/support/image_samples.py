"""Pictures that the image tests start from, made with Pillow in memory."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def photo(width: int = 48, height: int = 32, mode: str = "RGB") -> Image.Image:
    """A picture whose four corners differ: top left red, top right green, bottom left blue, bottom right white."""
    corners = Image.new("RGB", (2, 2))
    corners.putdata([(250, 10, 10), (10, 250, 10), (10, 10, 250), (245, 245, 245)])
    picture = corners.resize((width, height), Image.Resampling.NEAREST)
    if mode in ("I", "F", "I;16"):
        return picture.convert("L").convert(mode)
    return picture.convert(mode)


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    picture.save(target, kind, **options)
    return target.getvalue()


def data_uri(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 0, pixels: bytes | None = None) -> bytes:
    """A grey PNG that may lie about its size; ``extra`` chunks stand between header and pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    if pixels is None:
        pixels = zlib.compress(b"\0" * 100)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
