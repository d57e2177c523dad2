"""Read which side of a picture is up, from EXIF, XMP and PNG's texts, as Pillow's ``exif_transpose`` does.

Only the one value is looked for, in a bounded part of the data. Whatever is malformed says nothing: the picture is then
taken as it is stored. This module knows nothing of containers or of pixels.
"""

from __future__ import annotations

import re
import struct
import zlib

__all__ = ["RAW_PROFILE", "XMP_KEY", "exif_orientation", "orientation_of", "png_text", "raw_profile"]

RAW_PROFILE = b"Raw profile type exif"  # where ImageMagick keeps EXIF in a PNG
XMP_KEY = b"XML:com.adobe.xmp"
MAX_TEXT = 1 << 20  # bytes of a text once unpacked, and of XMP that is searched; Pillow's own limit

# EXIF's types of numbers, as struct writes them: a careless writer stores the orientation as any of them.
_NUMBERS = {3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_MAX_ENTRIES = 1000


def orientation_of(exif: bytes | None, xmp: bytes | None) -> int:
    """Give the orientation, 1 (upright) to 8: EXIF's word if it has one, then that of XMP."""
    value = exif_orientation(exif) if exif else None
    if value is None and xmp and (match := _XMP.search(xmp[:MAX_TEXT])):
        value = int(match[1])
    return value if value is not None and 1 <= value <= 8 else 1


def exif_orientation(exif: bytes) -> int | None:
    """Give the orientation as an EXIF block states it, valid or not; ``None`` where it does not.

    Reads the first directory only. Of several entries the last one counts.
    """
    exif = exif[:12].replace(b"Exif\0\0", b"") + exif[12:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    value: int | None = None
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for place in range(start + 2, start + 2 + 12 * min(entries, _MAX_ENTRIES), 12):
            tag, kind, count = struct.unpack_from(order + "HHI", exif, place)
            if tag == 0x0112:
                stored: int = struct.unpack_from(order + _NUMBERS.get(kind, "I"), exif, place + 8)[0]
                value = stored if kind in _NUMBERS and count == 1 else 0
    except struct.error:
        pass
    return value


def raw_profile(text: bytes) -> bytes | None:
    """Give the EXIF block that a PNG's raw profile spells: a line of name, one of length, lines of hexadecimal."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return None


def png_text(kind: bytes, body: bytes) -> bytes | None:
    """Give the text of a tEXt, zTXt or iTXt chunk; ``None`` if it is malformed or too long."""
    _, zero, rest = body.partition(b"\0")
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed = rest[:1] != b"\0"
        parts = rest[2:].split(b"\0", 2)
        zero, rest = (b"\0", parts[2]) if len(parts) == 3 and rest[1:2] == b"\0" else (b"", b"")
    elif packed:
        zero, rest = rest[:1], rest[1:]  # the method of packing: 0 is the only one
    if zero != b"\0":
        return None
    if packed:
        unpack = zlib.decompressobj()
        try:
            rest = unpack.decompress(rest, MAX_TEXT)
        except zlib.error:
            return None
        if unpack.unconsumed_tail:
            return None
    return rest
