"""A table of broken, lying and bloated images: mutations of files that Pillow writes, and files put together by hand.

``cases()`` gives ``name -> (bytes, must_fail)``; without ``must_fail`` a picture and a typed error are both right.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator

from image_samples import chunk, encode, photo, png
from PIL import Image

EXIF_SIX = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


def originals() -> dict[str, bytes]:
    """Good files of every format and of their main variants."""
    picture = photo(40, 30)
    others = [photo(40, 30).rotate(180)] * 3
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    return {
        "png-rgb": encode(picture, "PNG"),
        "png-palette": encode(photo(40, 30, "P"), "PNG", transparency=0),
        "png-16-bit": encode(photo(40, 30, "I;16"), "PNG"),
        "png-grey-alpha": encode(photo(40, 30, "LA"), "PNG"),
        "png-animated": encode(picture, "PNG", save_all=True, append_images=others),
        "jpeg": encode(picture, "JPEG", exif=exif),
        "jpeg-progressive": encode(picture, "JPEG", progressive=True, icc_profile=bytes(1000)),
        "jpeg-cmyk": encode(photo(40, 30, "CMYK"), "JPEG"),
        "webp": encode(picture, "WEBP", exif=exif),
        "webp-lossless": encode(photo(40, 30, "RGBA"), "WEBP", lossless=True),
        "webp-animated": encode(picture, "WEBP", save_all=True, append_images=others),
        "gif": encode(picture, "GIF", comment=b"hello"),
        "gif-animated": encode(picture, "GIF", save_all=True, append_images=others),
        "bmp": encode(picture, "BMP"),
        "bmp-palette": encode(photo(40, 30, "P"), "BMP"),
        "tiff": encode(picture, "TIFF", exif=exif),
        "tiff-lzw": encode(picture, "TIFF", compression="tiff_lzw"),
        "tiff-jpeg": encode(picture, "TIFF", compression="jpeg"),
        "tiff-pages": encode(picture, "TIFF", save_all=True, append_images=others, big_tiff=True),
    }


def cases() -> dict[str, tuple[bytes, bool]]:
    table: dict[str, tuple[bytes, bool]] = {}
    for source in (mutations, png_cases, jpeg_cases, gif_cases, webp_cases, bmp_cases, tiff_cases, other_cases):
        for name, data, must_fail in source():
            assert name not in table, name
            table[name] = data, must_fail
    return table


def mutations() -> Iterator[tuple[str, bytes, bool]]:
    for name, data in originals().items():
        luck = random.Random(name)
        for share in (0.02, 0.25, 0.5, 0.9):
            yield (
                f"{name}: cut at {share:.0%}",
                data[: max(3, int(len(data) * share))],
                share < 0.5 and "pages" not in name,
            )
        yield f"{name}: last byte missing", data[:-1], False
        for flips in (1, 5, 50):
            spoilt = bytearray(data)
            for _ in range(flips):
                spoilt[luck.randrange(len(spoilt))] ^= 1 << luck.randrange(8)
            yield f"{name}: {flips} bits flipped", bytes(spoilt), False
        for number in range(4):
            spoilt = bytearray(data)
            for _ in range(3):
                spoilt[luck.randrange(8, min(80, len(spoilt)))] = luck.choice(
                    (0, 1, 0x7F, 0x80, 0xFF, luck.randrange(256))
                )
            yield f"{name}: header spoilt, {number}", bytes(spoilt), False
        middle = len(data) // 2
        yield f"{name}: middle zeroed", data[: middle - 50] + bytes(100) + data[middle + 50 :], False
        yield f"{name}: rest 0xff", data[:middle] + b"\xff" * middle, False
        yield f"{name}: middle taken out", data[: middle - 20] + data[middle + 20 :], False
        yield f"{name}: middle doubled", data[:middle] + data[middle - 40 :], False
        yield f"{name}: rubbish behind", data + luck.randbytes(1000), False
        yield f"{name}: begins late", b"\n" + data, True
        yield f"{name}: backwards", data[::-1], True


def png_cases() -> Iterator[tuple[str, bytes, bool]]:
    def row_bytes(width: int, height: int) -> bytes:
        return zlib.compress(bytes((width + 1) * height))

    fine = row_bytes(4, 4)
    overlap = exif_overlapping(2_000, 200_000)
    yield "png: more pixels promised than there are", png(5000, 5000), True
    yield "png: as large as a bomb", png(60_000, 60_000, pixels=fine), True
    yield "png: as wide as an integer", png(2**31 - 1, 1, pixels=fine), True
    yield "png: wider than an integer", png(2**32 - 1, 2**32 - 1, pixels=fine), True
    yield "png: no width", png(0, 4, pixels=fine), True
    for name, body in (("iCCP", b"x\0\0"), ("zTXt", b"Comment\0\0"), ("iTXt", b"Comment\0\1\0\0\0")):
        bomb = body + zlib.compress(bytes(50_000_000), 1)
        yield f"png: {name} that unpacks to 50 MB", png(4, 4, chunk(name.encode(), bomb), pixels=fine), False
    yield "png: text of 8 MB", png(4, 4, chunk(b"tEXt", b"Comment\0" + b"a" * 8_000_000), pixels=fine), False
    yield "png: 30,000 texts", png(4, 4, chunk(b"tEXt", b"Comment\0hello") * 30_000, pixels=fine), False
    yield "png: 120,000 chunks", png(4, 4, chunk(b"teXt", b"") * 120_000, pixels=fine), True
    yield "png: EXIF whose tags overlap", png(4, 4, chunk(b"eXIf", overlap), pixels=fine), False
    yield "png: pixels of 60 MB for four", png(2, 2, pixels=zlib.compress(bytes(60_000_000), 1)), False
    yield "png: pixels are no zlib", png(4, 4, pixels=b"\xff" * 50), True
    yield "png: pixels are empty", png(4, 4, pixels=b""), True
    yield "png: depth 3", png(4, 4, depth=3, pixels=fine), True
    yield "png: colour type 5", png(4, 4, colour=5, pixels=fine), True
    yield "png: palette missing", png(4, 4, colour=3, pixels=fine), False
    yield "png: palette of 1 byte", png(4, 4, chunk(b"PLTE", b"\1"), colour=3, pixels=fine), False
    yield "png: palette of 1 MB", png(4, 4, chunk(b"PLTE", bytes(1_000_000)), colour=3, pixels=fine), False
    yield "png: transparency of 1 MB", png(4, 4, chunk(b"tRNS", bytes(1_000_000)), pixels=fine), False
    yield "png: transparency of 0 bytes", png(4, 4, chunk(b"tRNS", b""), pixels=fine), False
    yield "png: billions of frames", png(4, 4, chunk(b"acTL", b"\xff" * 8), pixels=fine), True
    yield "png: no frames", png(4, 4, chunk(b"acTL", bytes(8)), pixels=fine), False
    yield "png: two headers", png(4, 4, png(9000, 9000)[8:33], pixels=fine), False
    yield "png: empty pixel chunks", png(4, 4, chunk(b"IDAT", b"") * 20_000, pixels=fine), False
    good = png(4, 4, pixels=fine)
    yield "png: header only", good[:33], True
    yield "png: end first", good[:8] + chunk(b"IEND", b"") + good[8:], True
    yield "png: no pixels", good[:33] + chunk(b"IEND", b""), True
    yield "png: length 2**31", good[:33] + b"\x80\0\0\0IDAT" + good[41:], True
    yield "png: length 2**32 - 1", good[:8] + b"\xff\xff\xff\xff" + good[12:], True
    yield "png: wrong checksum of the header", good[:29] + b"\0\0\0\0" + good[33:], True
    yield "png: wrong checksum of the pixels", good[:-16] + b"\0\0\0\0" + good[-12:], False
    yield "png: signature and a JPEG", good[:8] + encode(photo(), "JPEG"), True
    yield "png: signature and zeros", good[:8] + bytes(10_000), True


def segment(code: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(body) + 2) + body


def jpeg_cases() -> Iterator[tuple[str, bytes, bool]]:
    good = encode(photo(), "JPEG")
    frame = good.index(b"\xff\xc0")
    scan = good.index(b"\xff\xda")

    def sized(width: int, height: int) -> bytes:
        return good[: frame + 5] + struct.pack(">HH", height, width) + good[frame + 9 :]

    yield "jpeg: 65535 x 65535", sized(65_535, 65_535), True
    yield "jpeg: 3000 x 3000 of nothing", sized(3000, 3000), False
    yield "jpeg: no height", sized(48, 0), True
    yield "jpeg: no width", sized(0, 32), True
    yield "jpeg: two frames", good[:frame] + good[frame : frame + 19] + good[frame:], True
    yield "jpeg: no frame", good[:frame] + good[frame + 19 :], True
    yield "jpeg: no scan", good[:scan] + b"\xff\xd9", True
    yield "jpeg: start only", b"\xff\xd8\xff", True
    yield "jpeg: start and end", b"\xff\xd8\xff\xd9", True
    yield "jpeg: 300 scans", good[:scan] + good[scan:-2] * 300, True
    progressive = encode(photo(1000, 1000), "JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xda")
    yield "jpeg: 90 scans more", progressive[:last] + progressive[last:-2] * 90 + b"\xff\xd9", False
    yield "jpeg: 4,000 comments", good[:2] + segment(0xFE, b"hello") * 4_000 + good[2:], False
    yield "jpeg: 1,000,000 comments", good[:2] + segment(0xFE, b"") * 1_000_000 + good[2:], True
    yield (
        "jpeg: profile of 15 MB",
        good[:2]
        + b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes((number, 255)) + bytes(60_000)) for number in range(250))
        + good[2:],
        False,
    )
    exif = b"Exif\0\0" + exif_overlapping(4_000, 10_000)
    yield "jpeg: EXIF whose tags overlap", good[:2] + segment(0xE1, exif[:65_000]) * 50 + good[2:], False
    loop = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0"
    yield "jpeg: EXIF that leads to itself", good[:2] + segment(0xE1, loop) + good[2:], False
    for name, body in (
        ("nothing", b""),
        ("no order", b"XX*\0"),
        ("offset beyond", b"II*\0\xff\xff\xff\xff"),
        ("65,535 entries", b"II*\0\x08\0\0\0\xff\xff"),
        ("orientation 0", EXIF_SIX[6:].replace(b"\x06", b"\x00")),
        ("orientation 255", EXIF_SIX[6:].replace(b"\x06", b"\xff")),
    ):
        yield f"jpeg: EXIF, {name}", good[:2] + segment(0xE1, b"Exif\0\0" + body) + good[2:], False
    yield "jpeg: segment of length 0", good[:2] + b"\xff\xe1\0\0" + good[2:], True
    yield "jpeg: segment of length 1", good[:2] + b"\xff\xe1\0\1" + good[2:], True
    yield "jpeg: segment longer than the file", good[:2] + b"\xff\xdb\xff\xff" + good[2:], True
    yield "jpeg: 255 components", good[: frame + 9] + b"\xff" + good[frame + 10 :], True
    for code in (0xC1, 0xC3, 0xC5, 0xC9, 0xCB, 0xCF):
        yield f"jpeg: frame kind {code:x}", good[: frame + 1] + bytes((code,)) + good[frame + 2 :], False
    yield "jpeg: 12 bits", good[: frame + 4] + b"\x0c" + good[frame + 5 :], True
    yield "jpeg: 8 MB of fill bytes", good[:2] + b"\xff" * 8_000_000 + good[2:], False
    yield "jpeg: 20 MB of 0xff and no end", good[:2] + b"\xff" * 19_000_000, True
    yield "jpeg: 20 MB of 0xff behind the scan", good[:-2] + b"\xff" * 19_000_000, False
    yield "jpeg: 20 MB of 0xff in the scan", good[:-2] + b"\xff" * 19_000_000 + b"\0\xff\xd9", False
    yield "jpeg: 20 MB of stuffed bytes", good[:-2] + b"\xff\0" * 9_500_000, False
    yield "jpeg: 20 MB of restart markers", good[:-2] + b"\xff\xd0" * 9_500_000, False
    yield "jpeg: quantisation missing", good.replace(b"\xff\xdb", b"\xff\xfe"), False
    yield "jpeg: codes missing", good.replace(b"\xff\xc4", b"\xff\xfe"), False
    yield "jpeg: restart interval 1", good[:scan] + segment(0xDD, b"\0\1") + good[scan:], False
    yield "jpeg: an Adobe segment that lies", good[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0\xff") + good[2:], False


def gif_cases() -> Iterator[tuple[str, bytes, bool]]:
    good = encode(photo(), "GIF")
    palette = 3 << (good[10] & 7) + 1
    body = 13 + palette

    def screen(width: int, height: int) -> bytes:
        return good[:6] + struct.pack("<HH", width, height) + good[10:]

    def blocks(size: int, count: int) -> bytes:
        return (bytes((size,)) + b"a" * size) * count + b"\0"

    frame = good[good.index(b",", body) :]
    yield "gif: 65535 x 65535", screen(65_535, 65_535), True
    yield "gif: 10000 x 1000", screen(10_000, 1_000), False
    yield "gif: screen of 0 x 0", screen(0, 0), False
    far = struct.pack("<HHHH", 65_000, 65_000, 500, 500)
    yield "gif: frame far outside", good[:body] + b"," + far + frame[9:], True
    nothing = struct.pack("<HHHH", 0, 0, 0, 0)
    yield "gif: frame of 0 x 0", good[:body] + b"," + nothing + frame[9:], False
    yield "gif: comment of 3 MB in blocks of 1", good[:body] + b"!\xfe" + blocks(1, 1_500_000) + good[body:], False
    yield "gif: comment of 15 MB", good[:body] + b"!\xfe" + blocks(255, 60_000) + good[body:], False
    yield "gif: 30,000 comments", good[:body] + (b"!\xfe" + blocks(5, 1)) * 30_000 + good[body:], False
    yield "gif: 6.3 million empty comments", good[:body] + b"!\xfe\0" * 6_300_000 + good[body:], True
    yield "gif: comment of 18 MB in blocks of 1", good[:body] + b"!\xfe" + blocks(1, 9_000_000) + good[body:], True
    yield "gif: comment without end", good[:body] + b"!\xfe" + b"\xff" * 100_000, True
    for bits in (0, 1, 12, 13, 255):
        yield f"gif: codes of {bits} bits", good[:body] + frame[:10] + bytes((bits,)) + frame[11:], False
    tiny = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0"
    yield "gif: 9,000 frames more", good[:-1] + tiny * 9_000 + b";", False
    yield "gif: 20,000 frames", good[:-1] + tiny * 20_000 + b";", True
    yield "gif: no palette", good[:10] + b"\0\0\0" + good[body:], False
    yield "gif: palette cut", good[: 13 + palette // 2], True
    yield "gif: no frames", good[:body] + b";", True
    yield "gif: rubbish between", good[:body] + b"\x99" * 1000 + good[body:], True
    yield "gif: pixels of 0x00", good[:body] + frame[:11] + blocks(255, 20), False
    yield "gif: unpacks to more than it holds", good[:body] + frame[:11] + b"\xff" + b"\x00" * 255 + b"\0;", False


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def part(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def webp_cases() -> Iterator[tuple[str, bytes, bool]]:
    lossy = encode(photo(), "WEBP")[12:]
    lossless = encode(photo(), "WEBP", lossless=True)[12:]

    def extended(width: int, height: int, flags: int = 0) -> bytes:
        sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
        return part(b"VP8X", struct.pack("<I", flags) + sides)

    yield "webp: canvas 16777216 x 16777216", riff(extended(2**24, 2**24), lossy), True
    yield "webp: canvas 16383 x 16383", riff(extended(16_383, 16_383, 2), lossy), True
    yield "webp: canvas not the picture's", riff(extended(50, 50), lossy), True
    yield "webp: animation without frames", riff(extended(48, 32, 2)), True
    yield "webp: canvas without pixels", riff(extended(48, 32)), True
    yield "webp: size 0", riff(lossy, size=0), False
    yield "webp: size 2**32 - 1", riff(lossy, size=2**32 - 1), False
    yield "webp: size too small", riff(lossy, size=20), True
    yield "webp: 50,000 chunks", riff(extended(48, 32), lossy, part(b"JUNK", b"") * 50_000), False
    yield "webp: 120,000 chunks", riff(extended(48, 32), lossy, part(b"JUNK", b"") * 120_000), True
    overlap = exif_overlapping(4_000, 500_000)
    yield "webp: EXIF whose tags overlap", riff(extended(48, 32, 8), lossy, part(b"EXIF", overlap)), False
    yield "webp: EXIF with a turn", riff(extended(48, 32, 8), lossy, part(b"EXIF", EXIF_SIX)), False
    yield "webp: profile of 8 MB", riff(extended(48, 32, 32), part(b"ICCP", bytes(8_000_000)), lossy), False
    yield "webp: text of 8 MB", riff(extended(48, 32, 4), lossy, part(b"XMP ", b"<" * 8_000_000)), False
    outside = struct.pack("<I", 9_000)[:3] * 2 + struct.pack("<I", 47)[:3] + struct.pack("<I", 31)[:3] + bytes(4)
    animated = riff(extended(48, 32, 2), part(b"ANIM", bytes(6)), part(b"ANMF", outside + lossy))
    yield "webp: frame outside", animated, True
    inside = bytes(6) + struct.pack("<I", 47)[:3] + struct.pack("<I", 31)[:3] + bytes(4)
    many = part(b"ANMF", inside + lossy[: len(lossy) // 2 * 2]) * 11_000
    yield "webp: 11,000 frames", riff(extended(48, 32, 2), part(b"ANIM", bytes(6)), many), True
    start = lossy.index(b"\x9d\x01\x2a")
    for width, height in ((0, 0), (16_383, 16_383), (16_383, 1), (49, 32)):
        sides = struct.pack("<HH", width, height)
        yield f"webp: lossy {width} x {height}", riff(lossy[: start + 3] + sides + lossy[start + 7 :]), width != 49
    yield "webp: start code wrong", riff(lossy[:start] + b"\0\0\0" + lossy[start + 3 :]), True
    yield "webp: lossless 16384 x 16384", riff(lossless[:9] + b"\xff\xff\xff\x0f" + lossless[13:]), True
    yield "webp: lossless mark wrong", riff(lossless[:8] + b"\0" + lossless[9:]), True
    yield "webp: no chunks", riff(), True
    yield "webp: unknown chunk first", riff(part(b"JUNK", b"x"), lossy), True
    yield "webp: chunk longer than the file", riff(b"VP8 \xff\xff\xff\xff" + lossy[8:]), False
    yield "webp: name only", b"RIFF\0\0\0\0WEBP", True


def bmp(width: int, height: int, pixels: bytes, *, bits: int = 24, packing: int = 0, colours: int = 0) -> bytes:
    start = 54 + 4 * min(colours or (256 if bits == 8 else 0), 256)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, packing, len(pixels), 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + info + bytes(start - 54) + pixels


def bmp_cases() -> Iterator[tuple[str, bytes, bool]]:
    top = 2**31 - 1
    sizes = [
        (top, top),
        (-top - 1, 1),
        (1, -top - 1),
        (top, 1),
        (0, 5),
        (5, 0),
        (-5, 5),
        (5, -5),
        (30_000, 1),
        (9000, 9000),
    ]
    for width, height in sizes:
        fails = (abs(width), abs(height)) != (5, 5) or width < 0
        yield f"bmp: {width} x {height}", bmp(width, height, bytes(80)), fails
    for bits in (0, 2, 3, 15, 48, 64, 65_535):
        yield f"bmp: {bits} bits", bmp(5, 5, bytes(400), bits=bits), True
    for packing in (3, 4, 5, 6, 255, 2**32 - 1):
        yield f"bmp: packing {packing}", bmp(5, 5, bytes(400), packing=packing), True
    for packing, bits in ((1, 8), (2, 4)):
        runs = {"packing": packing, "bits": bits, "colours": 2}
        yield (
            f"bmp: runs, 40 million pixels in 8 kB, {bits} bits",
            bmp(20_000, 2_000, b"\1\1\0\0" * 2_000, **runs),
            True,
        )
        yield f"bmp: runs of nothing, 16 MB, {bits} bits", bmp(100, 100, b"\0\0" * 8_000_000, **runs), True
        yield f"bmp: runs, 1.9 million pixels, {bits} bits", bmp(1_900, 1_000, b"\1\1\0\0" * 1_000, **runs), False
    yield "bmp: billions of colours", bmp(5, 5, bytes(80), bits=8, colours=2**32 - 1), True
    yield "bmp: 70,000 colours", bmp(5, 5, bytes(80), bits=8, colours=70_000), True
    yield "bmp: runs that never end", bmp(3000, 3000, b"\xff\1" * 50_000, bits=8, packing=1), False
    yield "bmp: jumps that never end", bmp(3000, 3000, b"\0\2\xff\xff" * 100_000, bits=8, packing=1), False
    yield "bmp: ends of lines", bmp(3000, 3000, b"\0\0" * 10_000, bits=8, packing=1), False
    yield "bmp: copies past the end", bmp(30, 30, b"\0\xff" * 100, bits=8, packing=1), False
    yield "bmp: runs of half bytes", bmp(300, 300, b"\xff\x12" * 500, bits=4, packing=2, colours=16), False
    good = bmp(5, 5, bytes(80))
    for header in (0, 1, 11, 39, 41, 10_000, 2**32 - 1):
        yield f"bmp: header of {header}", good[:14] + struct.pack("<I", header) + good[18:], True
    for offset in (0, 10, 2**31, 2**32 - 1):
        yield f"bmp: pixels at {offset}", good[:10] + struct.pack("<I", offset) + good[14:], False
    yield "bmp: masks missing", bmp(5, 5, b"", bits=32, packing=3), True
    yield "bmp: name only", b"BM", True
    yield "bmp: an old header", b"BM" + bytes(12) + struct.pack("<IHHHH", 12, 5, 5, 1, 24) + bytes(80), False


def tiff(tags: dict[int, tuple[int, int, int]], *, tail: bytes = b"", following: int = 0, repeat: int = 1) -> bytes:
    """One directory of ``tag: (type, count, value or offset)``; ``tail`` begins at offset 1024 * 64."""
    entries = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in tags.items()) * repeat
    directory = struct.pack("<H", len(tags) * repeat) + entries + struct.pack("<I", following)
    return (b"II*\0\x08\0\0\0" + directory).ljust(65_536, b"\0") + tail


GREY: dict[int, tuple[int, int, int]] = {
    256: (3, 1, 8),
    257: (3, 1, 8),
    258: (3, 1, 8),
    259: (3, 1, 1),
    262: (3, 1, 1),
    273: (4, 1, 65_536),
    277: (3, 1, 1),
    278: (3, 1, 8),
    279: (4, 1, 64),
}


def tiff_cases() -> Iterator[tuple[str, bytes, bool]]:
    pixels = bytes(range(64))
    changes: dict[str, tuple[dict[int, tuple[int, int, int]], bool]] = {
        "as it should be": ({}, False),
        "65535 x 65535": ({256: (3, 1, 65_535), 257: (3, 1, 65_535)}, True),
        "width 2**32 - 1": ({256: (4, 1, 2**32 - 1)}, True),
        "no width": ({256: (3, 1, 0)}, True),
        "several widths": ({256: (3, 2, 8)}, True),
        "width as text": ({256: (2, 4, 8)}, True),
        "width elsewhere": ({256: (4, 2**30, 0)}, True),
        "2**32 - 1 strips": ({273: (4, 2**32 - 1, 0), 279: (4, 2**32 - 1, 0)}, True),
        "15,000 strips at one place": ({273: (4, 15_000, 8), 279: (4, 15_000, 8)}, False),
        "strip beyond the file": ({273: (4, 1, 2**31)}, True),
        "strip of 2**32 - 1 bytes": ({279: (4, 1, 2**32 - 1)}, False),
        "rows per strip 0": ({278: (3, 1, 0)}, False),
        "rows per strip 2**32 - 1": ({278: (4, 1, 2**32 - 1)}, False),
        "65,535 samples": ({277: (3, 1, 65_535)}, True),
        "0 samples": ({277: (3, 1, 0)}, True),
        "0 bits": ({258: (3, 1, 0)}, True),
        "64 bits": ({258: (3, 1, 64)}, True),
        "planes apart": ({284: (3, 1, 2)}, False),
        "fill order 9": ({266: (3, 1, 9)}, True),
        "photometric 99": ({262: (3, 1, 99)}, True),
        "palette missing": ({262: (3, 1, 3)}, True),
        "palette too short": ({262: (3, 1, 3), 320: (3, 6, 65_536)}, False),
        "palette of 2 MB": ({262: (3, 1, 3), 320: (3, 1_000_000, 0)}, True),
        "orientation 0": ({274: (3, 1, 0)}, False),
        "orientation 6": ({274: (3, 1, 6)}, False),
        "orientation 60000": ({274: (3, 1, 60_000)}, False),
        "orientation as text": ({274: (2, 1, 6)}, True),
        "a directory inside that leads back": ({34665: (4, 1, 8), 34853: (4, 1, 8), 330: (4, 1, 8)}, False),
        "profile beyond the file": ({34675: (7, 2**31, 2**31)}, False),
        "tiles of 2**31": ({322: (4, 1, 2**31), 323: (4, 1, 2**31), 324: (4, 1, 0), 325: (4, 1, 64)}, True),
        "tiles of 0": ({322: (4, 1, 0), 323: (4, 1, 0), 324: (4, 1, 0), 325: (4, 1, 64)}, False),
        "an unknown type": ({256: (99, 1, 8)}, True),
        "predictor 7": ({259: (3, 1, 5), 317: (3, 1, 7)}, True),
        "floats": ({258: (3, 1, 32), 339: (3, 1, 3)}, True),
    }
    for name, (change, must_fail) in changes.items():
        yield f"tiff: {name}", tiff({**GREY, **change}, tail=pixels), must_fail
    for packing in (2, 3, 4, 5, 6, 7, 8, 32_773, 32_946, 34_661, 34_712, 34_887, 34_925, 50_000, 50_001, 65_535):
        yield (
            f"tiff: rubbish packed as {packing}",
            tiff({**GREY, 259: (3, 1, packing)}, tail=pixels * 20),
            packing != 32_773,
        )
    overlapping = {40_000 + number: (7, 10_000_000, 0) for number in range(4_000)}
    yield "tiff: 4,000 tags of 10 MB each", tiff({**GREY, **overlapping}, tail=bytes(10_000_000)), False
    yield (
        "tiff: 5,000 tags",
        tiff({**GREY, **{40_000 + number: (3, 1, 1) for number in range(5_000)}}, tail=pixels),
        True,
    )
    yield "tiff: every tag twice", tiff(GREY, tail=pixels, repeat=2), True
    yield "tiff: leads to itself", tiff(GREY, tail=pixels, following=8), False
    yield "tiff: next beyond the file", tiff(GREY, tail=pixels, following=2**32 - 1), False
    pages = b"".join(struct.pack("<HI", 0, 65_600 + 6 * number) for number in range(1, 20_000))
    yield "tiff: 20,000 empty pages", tiff(GREY, tail=pixels + pages, following=65_600), True
    yield "tiff: directory beyond the file", b"II*\0\xff\xff\xff\xff" + bytes(100), True
    yield "tiff: directory at 0", b"II*\0\0\0\0\0" + bytes(100), True
    yield "tiff: empty directory", b"MM\0*\0\0\0\x08\0\0\0\0\0\0", True
    yield "tiff: 65,535 entries, none there", b"II*\0\x08\0\0\0\xff\xff" + bytes(100), True
    yield "tiff: big, directory at 2**63", b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**63) + bytes(100), True
    yield "tiff: big, directory at 2**64 - 1", b"II+\0\x08\0\0\0" + b"\xff" * 8 + bytes(100), True
    yield "tiff: big, 2**64 - 1 entries", b"II+\0\x08\0\0\0\x10" + bytes(7) + b"\xff" * 8 + bytes(100), True
    yield "tiff: big, offsets of 4 bytes", b"II+\0\x04\0\0\0" + bytes(100), True
    nan = Image.new("F", (4, 4), float("nan"))
    yield "tiff: not a number", encode(nan, "TIFF"), True
    yield "tiff: huge numbers", encode(Image.new("F", (4, 4), 3e38), "TIFF"), False


def other_cases() -> Iterator[tuple[str, bytes, bool]]:
    picture = photo()
    for kind in ("ICO", "PPM", "TGA", "PCX", "SGI", "DDS", "ICNS", "JPEG2000", "EPS", "PDF", "XBM", "MSP", "DIB"):
        mode = "1" if kind in ("XBM", "MSP") else "RGB"
        yield f"other: {kind}", encode(picture.convert(mode), kind), True
    yield "other: MPO", encode(picture, "MPO", save_all=True, append_images=[picture]), False
    yield "other: text", b"hello, I am a text file" * 100, True
    yield "other: web page", b"<!doctype html><title>404</title>", True
    yield "other: SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', True
    yield "other: XML entities", b'<!DOCTYPE x [<!ENTITY a "aaaa">]><svg>&a;</svg>', True
    yield "other: archive", b"PK\x03\x04" + bytes(1000), True
    yield "other: program", b"\x7fELF" + bytes(1000), True
    yield "other: PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n", True
    yield "other: MVG", b"push graphic-context\nimage over 0,0 0,0 'https://example.org/x'\n", True
    yield "other: zeros", bytes(100_000), True
    yield "other: ones", b"\xff" * 100_000, True
    yield "other: one byte", b"\x89", True
    yield "other: nothing", b"", True
    yield "other: GIF and script", b"GIF89a/*" + bytes(20) + b"*/=1;alert(1)", True
    yield "other: HEIC", b"\0\0\0\x18ftypheic" + bytes(100), True
    yield "other: AVIF", encode(picture, "AVIF"), True
    yield "other: pickle", b"\x80\x04\x95" + bytes(100), True


def exif_overlapping(tags: int, size: int) -> bytes:
    """EXIF of little more than ``size`` bytes whose tags all claim ``size`` bytes."""
    directory = b"".join(struct.pack("<HHII", 40_000 + number, 7, size, 8) for number in range(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", tags) + directory + bytes(4 + size)


def as_image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))
