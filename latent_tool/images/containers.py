"""From the bytes of a picture to an upright RGB picture, however hostile the bytes are.

The order matters. First the format is recognised by its first bytes. Then this module walks the container itself: it
reads size, frames and orientation, checks them against the limits, and copies only the parts that hold pixels. Pillow
sees that copy, so colour profiles, EXIF, text and later frames never reach a parser that might choke on them. Pixels
are decoded last.

This module knows nothing of files, of networks or of policies. Pillow is imported when a picture is decoded.
"""

from __future__ import annotations

import io
import math
import re
import struct
import threading
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from latent_tool.errors import ImageDecodeError, ImageError, ImageTooLargeError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

__all__ = ["Header", "Limits", "check_size", "convert_copy", "decode", "read_header"]

MAX_PARTS = 100_000  # chunks, segments or directory entries in one file
MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten
MAX_RLE = 2_000_000  # pixels, and bytes, of a run-length encoded BMP: Pillow decodes these in Python
MAX_TAG_BYTES = 2_000_000  # of one TIFF tag; strip offsets and colour maps are the largest


@dataclass(frozen=True)
class Limits:
    """What a picture may be at most: ``max_pixels`` in all, ``max_side`` pixels, ``max_frames``, and its formats."""

    max_pixels: int
    max_side: int
    max_frames: int
    formats: tuple[str, ...]


class Header(NamedTuple):
    """What the container says, and a copy of it without metadata.

    ``size`` is (width, height) in pixels as stored, ``orientation`` the EXIF value 1 to 8 (1: already upright).
    """

    format: str
    size: tuple[int, int]
    frames: int
    orientation: int
    pixels: bytes


def decode(data: bytes, limits: Limits) -> tuple[Image, tuple[str, ...]]:
    """The upright RGB picture in ``data``, and warnings about what was left out.

    Raises:
        ImageTooLargeError: more pixels, a longer side or more frames than ``limits`` allow.
        ImageDecodeError: not an image, not one of the formats, damaged or cut short.
    """
    try:
        header = read_header(data, limits)
        picture, warnings = _decode(header, limits)
    except MemoryError:
        raise ImageTooLargeError("There is not enough memory to decode the image.", "Scale it down.") from None
    if header.frames > 1:
        warnings = (f"The image has {header.frames} frames; only the first is used.", *warnings)
    return picture, warnings


def _decode(header: Header, limits: Limits) -> tuple[Image, tuple[str, ...]]:
    try:
        with _opener(header.format)(io.BytesIO(header.pixels)) as image:
            check_size(image.size, limits)
            if image.size != header.size:
                raise _damaged(header.format)
            image.load()
            return convert(image, header.orientation)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise _damaged(header.format, cut="truncated" in str(error)) from None


def read_header(data: bytes, limits: Limits) -> Header:
    """Size, frames and orientation of the picture, checked against ``limits``, without decoding a pixel.

    Raises:
        ImageTooLargeError: more pixels, a longer side or more frames than ``limits`` allow.
        ImageDecodeError: not an image, not one of the formats, damaged or cut short.
    """
    name = _recognise(data)
    if name not in limits.formats or name not in _WALKERS:
        raise ImageDecodeError(
            f"{name} images are not opened here.", f"Convert it to one of: {', '.join(limits.formats)}."
        )
    try:
        header = _WALKERS[name](data)
    except (struct.error, IndexError, OverflowError):
        raise _damaged(name, cut=True) from None
    check_size(header.size, limits)
    if header.frames > limits.max_frames:
        raise ImageTooLargeError(
            f"The image has {header.frames} frames; at most {limits.max_frames} are allowed.",
            "Send one frame, or raise max_frames of the image policy.",
        )
    return header


def check_size(size: tuple[int, int], limits: Limits) -> None:
    """Raise ``ImageTooLargeError`` or, for a picture without pixels, ``ImageDecodeError``."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageDecodeError(f"The image is {width}x{height} pixels: there is nothing to see.", "Send another image.")
    if max(width, height) > limits.max_side:
        raise ImageTooLargeError(
            f"The image is {width}x{height} pixels; a side may have at most {limits.max_side}.",
            "Scale or cut it down, or raise max_side of the image policy.",
        )
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"The image is {width}x{height} pixels; at most {limits.max_pixels} pixels in all are allowed.",
            "Scale it down, or raise max_pixels of the image policy.",
        )


# Pixels -----------------------------------------------------------------------------------------------------------

_loading = threading.Lock()  # Pillow's lazy loading is not safe in two threads at once


def convert_copy(image: Image) -> tuple[Image, tuple[str, ...]]:
    """``convert`` for an image of the caller's, which is loaded if it was not, but not changed.

    Of an animation the current frame is taken, with a warning. Its EXIF data say whether it is upright.

    Raises:
        ImageDecodeError: the image cannot be loaded, its mode has no RGB form, or a float pixel is not finite.
        ImageTooLargeError: there is not enough memory.
    """
    try:
        with _loading:
            copy = image.copy()
            frame = image.tell() if getattr(image, "is_animated", False) else None
        picture, warnings = convert(copy, _exif_orientation(copy.info.get("exif")))
    except ImageError:
        raise
    except MemoryError:
        raise ImageTooLargeError("There is not enough memory to convert the image.", "Scale it down.") from None
    except Exception:  # a lazily opened file may hold anything
        raise ImageDecodeError("The Pillow image cannot be loaded or converted.", "Load it first.") from None
    if frame is not None:
        warnings = (f"The image is animated; only the current frame, {frame}, is used.", *warnings)
    return picture, warnings


def convert(image: Image, orientation: int) -> tuple[Image, tuple[str, ...]]:
    """An upright RGB picture from a Pillow image of any mode, without metadata, and warnings.

    Transparent parts are laid on white. 16-bit values are divided by 256; other integers and floats are stretched to
    0..255 when they do not fit, with a warning. Colour profiles are not applied. ``orientation`` is the EXIF value.

    Raises:
        ImageDecodeError: a float pixel is not finite.
    """
    from PIL import Image as pillow

    warnings: tuple[str, ...] = ()
    if image.mode.startswith(("I", "F")):
        image, warnings = _to_grey(image)
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":  # premultiplied grey converts by way of LA only
            image = image.convert("LA")
        clear = image.convert("RGBA")
        image = pillow.new("RGB", clear.size, "white")
        image.paste(clear, mask=clear)
    image = image.convert("RGB")  # a copy, if it is already
    turn = pillow.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    if orientation in turns:
        image = image.transpose(turns[orientation])
    image.info = {}
    return image, warnings


def _to_grey(image: Image) -> tuple[Image, tuple[str, ...]]:
    """Integers and floats of any range as 8-bit grey."""
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L"), ()
    if image.mode == "F" and not math.isfinite(sum(array("f", image.tobytes()))):
        raise ImageDecodeError("The image has values that are not finite.", "Replace NaN and infinity by numbers.")
    low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
    if low >= 0 and high <= 1 and image.mode == "F":
        return image.point(lambda value: value * 255).convert("L"), ()
    if low >= 0 and high <= 255:
        return image.convert("L"), ()
    if low >= 0 and high <= 65535 and image.mode == "I":
        return image.point(lambda value: value * (1 / 256)).convert("L"), ()
    scale = 255 / (high - low) if high > low else 0
    grey = image.convert("F").point(lambda value: value * scale - low * scale).convert("L")
    return grey, (f"The pixel values {low:g} to {high:g} were stretched to 0 to 255.",)


def _opener(name: str) -> Callable[[io.BytesIO], ImageFile]:
    """The one Pillow reader of a format: no other reader is tried, and nothing is registered globally."""
    from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

    readers: dict[str, Callable[[io.BytesIO], ImageFile]] = {
        "PNG": PngImagePlugin.PngImageFile,
        "JPEG": JpegImagePlugin.JpegImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
        "GIF": GifImagePlugin.GifImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
    }
    return readers[name]


# Containers -------------------------------------------------------------------------------------------------------


def _recognise(data: bytes) -> str:
    """The format by its first bytes: never by a name or by what a server says."""
    if not data:
        raise ImageDecodeError("The image is empty: 0 bytes.", "Send the bytes of an image file.")
    for start, name in _MAGIC:
        if data.startswith(start):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return {b"avif": "AVIF", b"avis": "AVIF"}.get(data[8:12], "HEIC or video")
    if b"<svg" in data[:1000].lower():
        return "SVG"
    raise ImageDecodeError(
        "These bytes are not an image.", "Check that the source is an image, and not a text or a web page."
    )


_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"%PDF", "PDF"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\0\0\x01\0", "ICO"),
)


def _damaged(name: str, *, cut: bool = False) -> ImageDecodeError:
    what = "is cut short" if cut else "is damaged"
    return ImageDecodeError(f"The {name} image {what}.", "Save or download it again.")


def _exif_orientation(exif: object) -> int:
    """The orientation, 1 to 8, in an EXIF block; 1 when there is none. Reads the first directory only."""
    if not isinstance(exif, bytes):
        return 1
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for place in range(start + 2, start + 2 + 12 * min(entries, 1000), 12):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", exif, place)
            if (tag, kind, count) == (0x0112, 3, 1):
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _png(data: bytes) -> Header:
    kept, place, frames, orientation = [data[:8]], 8, 1, 1
    if data[12:16] != b"IHDR":
        raise _damaged("PNG")
    size = struct.unpack_from(">II", data, 16)
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            raise _damaged("PNG", cut=True)
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[place:end])
        elif kind == b"acTL" and length == 8:
            frames = max(1, struct.unpack_from(">I", data, place + 8)[0])
        elif kind == b"eXIf":
            orientation = _exif_orientation(data[place + 8 : end - 4])
        if kind == b"IEND":
            return Header("PNG", size, frames, orientation, b"".join(kept))
        place = end
    raise _too_many_parts("PNG")


# Whatever comes before a marker, then the marker itself; possessive, or many bytes 0xff would take quadratic time.
_JPEG_MARKER = re.compile(rb"(?:[^\xff]++|\xff++[\x00\xd0-\xd7])*+(\xff++[^\x00\xff\xd0-\xd7])", re.DOTALL)
_JPEG_FILL = re.compile(rb"\xff{16,}")  # may stand before a marker; Pillow reads long runs again and again
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _jpeg(data: bytes) -> Header:
    kept, place, scans, orientation = [b"\xff\xd8"], 2, 0, 1
    size: tuple[int, int] | None = None
    for _ in range(MAX_PARTS // 10):
        marker = _JPEG_MARKER.match(data, place)
        code = data[marker.end() - 1] if marker else 0xD9
        if marker is None or code == 0xD9:
            break
        if code in (0x01, 0xD8):  # markers without a length
            place = marker.end()
            continue
        place = marker.end() + struct.unpack_from(">H", data, marker.end())[0]
        if place < marker.end() + 2 or place > len(data):
            raise _damaged("JPEG", cut=True)
        body = data[marker.end() + 2 : place]
        if code == 0xE1 and body.startswith(b"Exif\0\0") and orientation == 1:
            orientation = _exif_orientation(body)
        if code == 0xDA:
            scans += 1
            after = _JPEG_MARKER.match(data, place)
            place = after.start(1) if after else len(data)
        if code in _JPEG_SIZES:
            if size is not None:
                raise _damaged("JPEG")
            height, width = struct.unpack_from(">HH", body, 1)
            size = width, height
        if not 0xE1 <= code <= 0xFE or code == 0xEE:  # of the application data, Adobe's says how colours are stored
            kept.append(_JPEG_FILL.sub(b"\xff", data[marker.end() - 2 : place]))
    else:
        raise _too_many_parts("JPEG")
    if scans > MAX_SCANS:
        raise _too_many_parts("JPEG")
    if size is None or not scans:
        raise _damaged("JPEG", cut=True)
    if marker is not None:
        kept.append(b"\xff\xd9")
    return Header("JPEG", size, 1, orientation, b"".join(kept))


def _gif(data: bytes) -> Header:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    kept, frames = [data[:place]], 0
    control = b""
    pieces = iter(range(MAX_PARTS + len(data) // 64))  # writers fill them: 255 bytes each
    for _ in range(MAX_PARTS):
        if place >= len(data):
            break
        start, kind = place, data[place]
        if kind == 0x21:  # extension
            place = _after_gif_pieces(data, place + 2, pieces)
            if data[start + 1] == 0xF9 and not frames:
                control = data[start:place]
        elif kind == 0x2C:  # frame
            left, top, wide, high, flags = struct.unpack_from("<HHHHB", data, place + 1)
            place += 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            place = _after_gif_pieces(data, place + 1, pieces)
            frames += 1
            if frames == 1:
                width, height = max(width, left + wide), max(height, top + high)
                kept += [control, data[start:place], b";"]
        else:
            break
    else:
        raise _too_many_parts("GIF")
    return Header("GIF", (width, height), frames, 1, b"".join(kept))


def _after_gif_pieces(data: bytes, place: int, pieces: Iterator[int]) -> int:
    """Where the block ends that consists of pieces from ``place`` on; ``pieces`` counts those of the whole file."""
    while place < len(data) and (length := data[place]):
        if next(pieces, None) is None:
            raise _too_many_parts("GIF")
        place += length + 1
    return place + 1


def _webp(data: bytes) -> Header:
    place, frames, orientation = 12, 0, 1
    size: tuple[int, int] | None = None
    for _ in range(MAX_PARTS):
        if place + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sI", data, place)
        body = place + 8
        if size is None:
            size = _webp_size(kind, data, body)
        if kind == b"ANMF":
            frames += 1
        elif kind == b"EXIF":
            orientation = _exif_orientation(data[body : body + length])
        place = body + length + length % 2
    else:
        raise _too_many_parts("WEBP")
    if size is None:
        raise _damaged("WEBP", cut=True)
    return Header("WEBP", size, max(frames, 1), orientation, data)


def _webp_size(kind: bytes, data: bytes, body: int) -> tuple[int, int]:
    if kind == b"VP8X":
        low, high = struct.unpack_from("<IH", data, body + 4)
        return (low & 0xFFFFFF) + 1, (low >> 24 | high << 8) + 1
    if kind == b"VP8 " and data[body + 3 : body + 6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, body + 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, body + 1)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise _damaged("WEBP")


def _bmp(data: bytes) -> Header:
    (header,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", data, 18)
    compression = 0 if header == 12 else struct.unpack_from("<I", data, 30)[0]
    if compression in (1, 2) and max(width * abs(height), len(data)) > MAX_RLE:
        raise ImageTooLargeError(
            f"The BMP image is run-length encoded and has more than {MAX_RLE} pixels or bytes.", "Save it as PNG."
        )
    return Header("BMP", (width, abs(height)), 1, 1, data)


_TIFF_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_SINGLE = {256, 257, 259, 262, 266, 277, 278, 284, 292, 293, 317, 322, 323, 512, 513, 514, 531, 274}
_TIFF_SEVERAL = {258, 273, 279, 320, 324, 325, 338, 339, 347, 519, 520, 521, 529, 530, 532}


def _tiff(data: bytes) -> Header:
    """TIFF lists its parts in directories: copy the tags that pixels need into a new one, and point the file to it."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    count, entry, offset = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    at = 8 if big else 4
    (first,) = struct.unpack_from(order + offset, data, at)
    (entries,) = struct.unpack_from(order + count, data, first)
    if entries > 4096:
        raise _too_many_parts("TIFF")
    step, inline = struct.calcsize(order + entry), struct.calcsize(order + offset)
    start = first + struct.calcsize(order + count)
    room = len(data)  # tags may not claim more than the file has, even where they share it
    values: dict[int, int] = {}
    kept: list[bytes] = []
    for place in range(start, start + entries * step, step):
        tag, kind, items, value = struct.unpack_from(order + entry, data, place)
        if tag not in _TIFF_SINGLE and tag not in _TIFF_SEVERAL:
            continue
        length = items * _TIFF_WIDTHS.get(kind, MAX_TAG_BYTES + 1)
        where = struct.unpack(order + offset, value)[0] if length > inline else place
        if length > inline:
            room -= length
        if tag in values or length > MAX_TAG_BYTES or where + length > len(data) or items < 1 or room < 0:
            raise _damaged("TIFF")
        values[tag] = 0
        if tag in _TIFF_SINGLE:
            if items != 1 or kind not in (1, 3, 4, 16):
                raise _damaged("TIFF")
            values[tag] = struct.unpack_from(order + {1: "B", 3: "H", 4: "I", 16: "Q"}[kind], value)[0]
        if tag != 274:
            kept.append(data[place : place + step])
    size = values.get(256, 0), values.get(257, 0)
    tile = values.get(322, 1), values.get(323, 1)
    if tile[0] * tile[1] > max(16 * size[0] * size[1], 1 << 20):
        raise _damaged("TIFF")
    directory = struct.pack(order + count, len(kept)) + b"".join(kept) + bytes(inline)
    padding = bytes(len(data) % 2)
    head = data[:at] + struct.pack(order + offset, len(data) + len(padding))
    pixels = head + data[len(head) :] + padding + directory
    orientation = values.get(274, 1)
    return Header("TIFF", size, _tiff_frames(data, order, first, big), orientation if orientation <= 8 else 1, pixels)


def _tiff_frames(data: bytes, order: str, place: int, big: bool) -> int:
    count, step, offset = ("Q", 20, "Q") if big else ("H", 12, "I")
    seen: set[int] = set()
    while place and place not in seen and len(seen) < MAX_PARTS:
        seen.add(place)
        try:
            (entries,) = struct.unpack_from(order + count, data, place)
            (place,) = struct.unpack_from(order + offset, data, place + struct.calcsize(order + count) + entries * step)
        except struct.error:
            break
    return len(seen)


def _too_many_parts(name: str) -> ImageDecodeError:
    return ImageDecodeError(f"The {name} image consists of too many parts.", "Save it again with an image editor.")


_WALKERS: dict[str, Callable[[bytes], Header]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "GIF": _gif,
    "WEBP": _webp,
    "BMP": _bmp,
    "TIFF": _tiff,
}
