"""From the bytes of a picture to an upright RGB picture, however hostile the bytes are.

The order matters. First the format is recognised by its first bytes. Then this module walks the container itself: it
reads size, frames and orientation, checks them against the limits, and copies only the parts that hold pixels. Pillow
sees that copy, so colour profiles, EXIF, text and later frames never reach a parser that might choke on them. Pixels
are decoded last.

This module knows nothing of files, of networks or of policies. Pillow is imported when a picture is decoded.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from latent_tool.errors import ImageDecodeError, ImageError, ImageTooLargeError
from latent_tool.images.kinds import recognise
from latent_tool.images.limits import Limits, check_size
from latent_tool.images.orientation import MAX_TEXT, RAW_PROFILE, XMP_KEY, orientation_of, png_text, raw_profile
from latent_tool.images.pixels import convert

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

__all__ = ["Header", "decode", "read_header"]

MAX_PARTS = 100_000  # chunks, segments or directory entries in one file
MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten
MAX_RLE = 2_000_000  # pixels, and bytes, of a run-length encoded BMP: Pillow decodes these in Python
MAX_TAG_BYTES = 2_000_000  # of one TIFF tag; strip offsets and colour maps are the largest
DARK = 64  # where all upper bytes of 16 bits are below it, the lower ones are looked at, too


class Header(NamedTuple):
    """What the container says, and a copy of it without metadata.

    ``size`` is (width, height) in pixels as stored, ``orientation`` the EXIF value 1 to 8 (1: already upright),
    ``clear`` the grey value or colour that is transparent: as Pillow gives it, or in all its 16 bits.
    """

    format: str
    size: tuple[int, int]
    frames: int
    orientation: int
    pixels: bytes
    clear: tuple[int, ...] = ()


def decode(data: bytes, limits: Limits) -> tuple[Image, tuple[str, ...]]:
    """Return the upright RGB picture in ``data``, and warnings about what was left out.

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
            swapped = _swapped(image)
            image.load()
            low = None
            if swapped and (header.clear or max(high for _, high in image.getextrema()[:3]) < DARK):  # type: ignore[misc]
                low = _lower_bytes(header, swapped)
            return convert(image, header.orientation, low=low, clear=header.clear)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise _damaged(header.format, cut="truncated" in str(error)) from None


_SWAPPED = {"RGB;16B": "RGB;16L", "RGB;16L": "RGB;16B", "RGBA;16B": "RGBA;16L", "RGBA;16L": "RGBA;16B"}


def _swapped(image: ImageFile) -> str:
    """The reading by which Pillow, which keeps the upper byte of 16-bit colours, keeps the lower one instead."""
    if len(image.tile) != 1:
        return ""
    arguments = image.tile[0][3]
    return _SWAPPED.get(arguments, "") if isinstance(arguments, str) else ""


def _lower_bytes(header: Header, reading: str) -> Image:
    with _opener(header.format)(io.BytesIO(header.pixels)) as image:
        image.tile = [image.tile[0]._replace(args=reading)]
        image.load()
        return image.copy()


def read_header(data: bytes, limits: Limits) -> Header:
    """Return size, frames and orientation of the picture, checked against ``limits``, without decoding a pixel.

    Raises:
        ImageTooLargeError: more pixels, a longer side or more frames than ``limits`` allow.
        ImageDecodeError: not an image, not one of the formats, damaged or cut short.
    """
    name = recognise(data, limits.formats)
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


def _damaged(name: str, *, cut: bool = False) -> ImageDecodeError:
    what = "is cut short" if cut else "is damaged"
    return ImageDecodeError(f"The {name} image {what}.", "Save or download it again.")


def _png(data: bytes) -> Header:
    kept, place, frames = [data[:8]], 8, 1
    exif: bytes | None = None
    clear: tuple[int, ...] = ()
    texts: dict[bytes, tuple[bytes, bytes]] = {}
    if data[12:16] != b"IHDR":
        raise _damaged("PNG")
    width, height, depth, colours = struct.unpack_from(">IIBB", data, 16)
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            raise _damaged("PNG", cut=True)
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (kind == b"tRNS" and colours == 3):
            kept.append(data[place:end])
        elif kind == b"tRNS" and colours in (0, 2):
            clear = _png_clear(data, place + 8, length, depth, colours)
        elif kind == b"acTL" and length == 8:
            frames = max(1, struct.unpack_from(">I", data, place + 8)[0])
        elif kind == b"eXIf":
            exif = data[place + 8 : end - 4]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            key = data[place + 8 : min(end - 4, place + 88)].partition(b"\0")[0]
            if key in (RAW_PROFILE, XMP_KEY):
                texts[key] = kind, data[place + 8 : end - 4]
        if kind == b"IEND":
            break
        place = end
    else:
        raise _too_many_parts("PNG")
    if exif is None and RAW_PROFILE in texts and (text := png_text(*texts[RAW_PROFILE])):
        exif = raw_profile(text)
    xmp = png_text(*texts[XMP_KEY]) if XMP_KEY in texts else None
    return Header("PNG", (width, height), frames, orientation_of(exif, xmp), b"".join(kept), clear)


def _png_clear(data: bytes, place: int, length: int, depth: int, colours: int) -> tuple[int, ...]:
    """The transparent grey or colour. Pillow scales grey of fewer than eight bits; the value has to follow."""
    if length < (2 if colours == 0 else 6):
        raise _damaged("PNG")
    most = (1 << min(depth, 16)) - 1
    values = struct.unpack_from(">H" if colours == 0 else ">HHH", data, place)
    return tuple((value & most) * (255 // most if depth < 8 else 1) for value in values)


# Whatever comes before a marker, then the marker itself; possessive, or many bytes 0xff would take quadratic time.
_JPEG_MARKER = re.compile(rb"(?:[^\xff]++|\xff++[\x00\xd0-\xd7])*+(\xff++[^\x00\xff\xd0-\xd7])", re.DOTALL)
_JPEG_FILL = re.compile(rb"\xff{16,}")  # may stand before a marker; Pillow reads long runs again and again
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _jpeg(data: bytes) -> Header:
    kept, place, scans = [b"\xff\xd8"], 2, 0
    exif: list[bytes] = []
    xmp: bytes | None = None
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
        if code == 0xE1 and body.startswith(b"Exif\0\0"):
            exif.append(body[6:])
        elif code == 0xE1 and body.startswith(_JPEG_XMP):
            xmp = body[len(_JPEG_XMP) :]
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
    return Header("JPEG", size, 1, orientation_of(b"".join(exif), xmp), b"".join(kept))


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
    place, frames = 12, 0
    exif: bytes | None = None
    xmp: bytes | None = None
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
            exif = data[body : body + length]
        elif kind == b"XMP ":
            xmp = data[body : body + min(length, MAX_TEXT)]
        place = body + length + length % 2
    else:
        raise _too_many_parts("WEBP")
    if size is None:
        raise _damaged("WEBP", cut=True)
    return Header("WEBP", size, max(frames, 1), orientation_of(exif, xmp), data)


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


TIFF_XMP = 700
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
    xmp: bytes | None = None
    for place in range(start, start + entries * step, step):
        tag, kind, items, value = struct.unpack_from(order + entry, data, place)
        if tag == TIFF_XMP and kind in (1, 7) and items > inline:
            (where,) = struct.unpack(order + offset, value)
            xmp = data[where : where + min(items, MAX_TEXT)]
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
    orientation = values[274] if 274 in values else orientation_of(None, xmp)
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
