"""Pictures from other programs: odd bit depths, orientation in odd places, arrays, and what is no picture at all."""

from __future__ import annotations

import base64
import gzip
import io
import os
import random
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_samples import FORMATS, chunk, encode, photo, png
from PIL import Image, ImageOps

from latent_tool.errors import (
    ImageDecodeError,
    ImageError,
    ImageNotAllowedError,
    ImageNotFoundError,
    ImageTooLargeError,
)
from latent_tool.images import load_image, load_images, portable_image
from latent_tool.settings import ImagePolicy

LOCAL = ImagePolicy.local()
PNG = encode(photo(), "PNG")
fuzz = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def values(reference: object) -> tuple[np.ndarray[Any, Any], tuple[str, ...]]:
    loaded = load_image(reference, LOCAL)
    return np.asarray(loaded.image), loaded.warnings


# Sixteen bits -----------------------------------------------------------------------------------------------------


def deep_png(pixels: np.ndarray[Any, Any], *extra: bytes) -> bytes:
    """A PNG of 16 bits from (H, W) or (H, W, C) values."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return png(width, height, *extra, depth=16, colour=colour, pixels=zlib.compress(rows))


@pytest.mark.parametrize("bits", [8, 9, 10, 11, 12, 13, 14])
@pytest.mark.parametrize("kind", ["png", "tiff", "I;16", "I", "colour png", "alpha png"])
def test_few_of_sixteen_bits_are_stretched_with_a_warning(bits: int, kind: str) -> None:
    most = (1 << bits) - 1
    ramp = np.linspace(0, most, 64).round().astype(np.uint16).reshape(8, 8)
    reference: Any
    if kind.endswith(" png"):
        colours = np.stack([ramp, ramp[::-1], ramp.T] + [np.full_like(ramp, 65_535)] * (kind == "alpha png"), axis=-1)
        reference, expected = deep_png(colours), colours[..., :3]
    else:
        picture = Image.fromarray(ramp)
        reference = {"png": deep_png(ramp), "tiff": encode(picture, "TIFF"), "I;16": picture}.get(
            kind
        ) or picture.convert("I")
        expected = np.stack([ramp] * 3, axis=-1)
    seen, warnings = values(reference)
    assert np.abs(seen.astype(float) - expected.astype(float) * 255 / most).max() <= 1
    assert bool(warnings) == (kind != "I" or bits > 8)
    assert all(f"{bits} of 16 bits" in text for text in warnings)


@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_all_sixteen_bits_keep_their_scale(kind: str) -> None:
    ramp = np.linspace(0, 65_535, 64).round().astype(np.uint16).reshape(8, 8)
    pixels = ramp if kind == "grey" else np.stack([ramp, ramp[::-1], ramp.T], axis=-1)
    seen, warnings = values(deep_png(pixels))
    assert not warnings
    assert np.array_equal(seen, (pixels >> 8).astype(np.uint8) if kind == "colour" else np.stack([ramp >> 8] * 3, -1))


def test_black_stays_black_without_a_warning() -> None:
    for shape in ((4, 4), (4, 4, 3)):
        seen, warnings = values(deep_png(np.zeros(shape, np.uint16)))
        assert seen.max() == 0 and not warnings


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_is_compared_in_all_its_bits(depth: int) -> None:
    levels = [0, 1] if depth == 1 else [0, 1, 2, 3] if depth == 2 else [0, 1, 9, 15] if depth == 4 else [0, 1, 200, 255]
    levels = [0x1234, 0x1235, 0x8000, 0xFFFF] if depth == 16 else levels
    packed = "".join(f"{level:0{depth}b}" for level in levels).ljust(-(-len(levels) * depth // 8) * 8, "0")
    row = b"\0" + bytes(int(packed[at : at + 8], 2) for at in range(0, len(packed), 8))
    for clear in levels:
        data = png(len(levels), 1, chunk(b"tRNS", struct.pack(">H", clear)), depth=depth, pixels=zlib.compress(row))
        seen, _ = values(data)
        opaque, _ = values(png(len(levels), 1, depth=depth, pixels=zlib.compress(row)))
        for place, level in enumerate(levels):
            assert tuple(seen[0, place]) == ((255,) * 3 if level == clear else tuple(opaque[0, place]))


def test_the_transparent_colour_is_compared_in_all_its_bits() -> None:
    colours = np.array([[[0x1234, 0x5678, 0x9ABC], [0x1234, 0x5678, 0x9ABD], [0x1134, 0x5678, 0x9ABC]]], np.uint16)
    seen, _ = values(deep_png(colours, chunk(b"tRNS", colours[0, 0].astype(">u2").tobytes())))
    assert seen[0].tolist() == [[255, 255, 255], [0x12, 0x56, 0x9A], [0x11, 0x56, 0x9A]]
    with Image.open(io.BytesIO(deep_png(colours[..., 2], chunk(b"tRNS", b"\x9a\xbc")))) as lazy:
        assert values(lazy)[0][0].tolist() == [[255] * 3, [0x9A] * 3, [255] * 3]


# Which side is up -------------------------------------------------------------------------------------------------


def exif_block(kind: int, stored: bytes, order: str = "<", count: int = 1) -> bytes:
    start = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    entry = struct.pack(order + "HHI", 0x0112, kind, count) + stored.ljust(4, b"\0")
    return start + struct.pack(order + "H", 1) + entry + bytes(4)


def xmp(text: str) -> bytes:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description {text}</x:xmpmeta>'.encode()


def itxt(key: bytes, text: bytes, packed: bool) -> bytes:
    return chunk(b"iTXt", key + b"\0" + bytes((packed, 0)) + b"\0\0" + (zlib.compress(text) if packed else text))


def with_chunks(*chunks: bytes, before: bool = True) -> bytes:
    at = 33 if before else len(PNG) - 12
    return PNG[:at] + b"".join(chunks) + PNG[at:]


def profile(exif: bytes) -> bytes:
    text = exif.hex()
    lines = "\n".join(text[at : at + 72] for at in range(0, len(text), 72))
    return f"\nexif\n{len(exif):8}\n{lines}\n".encode()


def turned(value: int) -> dict[str, bytes]:
    """Pictures that say in many ways how they are to be turned."""
    attribute, element = xmp(f'tiff:Orientation="{value}"/>'), xmp(f"><tiff:Orientation>{value}</tiff:Orientation>")
    number = exif_block(3, struct.pack("<H", value))

    raw = profile(b"Exif\0\0" + number)
    made = {
        "png itxt": with_chunks(itxt(b"XML:com.adobe.xmp", attribute, False)),
        "png itxt packed": with_chunks(itxt(b"XML:com.adobe.xmp", element, True)),
        "png itxt at the end": with_chunks(itxt(b"XML:com.adobe.xmp", element, False), before=False),
        "png text": with_chunks(chunk(b"tEXt", b"XML:com.adobe.xmp\0" + attribute)),
        "png raw profile": with_chunks(chunk(b"tEXt", b"Raw profile type exif\0" + raw)),
        "png raw profile packed": with_chunks(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw))),
        "png raw profile damaged": with_chunks(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  8\nzz")),
        "png both": with_chunks(
            chunk(b"eXIf", number), itxt(b"XML:com.adobe.xmp", xmp('tiff:Orientation="3"/>'), False)
        ),
        "jpeg xmp": encode(photo(), "JPEG", xmp=attribute),
        "webp xmp": encode(photo(), "WEBP", xmp=element, lossless=True),
        "tiff xmp": encode(photo(), "TIFF", tiffinfo={700: element}),
    }
    for order in "<>":
        for kind, code in ((1, "B"), (3, "H"), (4, "I"), (6, "b"), (8, "h"), (9, "i")):
            block = exif_block(kind, struct.pack(order + code, value), order)
            made[f"jpeg type {kind} {order}"] = encode(photo(), "JPEG", exif=b"Exif\0\0" + block)
            made[f"png type {kind} {order}"] = with_chunks(chunk(b"eXIf", block))
    return made


@pytest.mark.parametrize("value", range(10))
@pytest.mark.parametrize("name", turned(6))
def test_orientation_is_that_of_pillow(name: str, value: int) -> None:
    data = turned(value)[name]
    with Image.open(io.BytesIO(data)) as picture:
        try:
            expected = ImageOps.exif_transpose(picture).convert("RGB")
        except ValueError:  # Pillow refuses a damaged profile; here it says nothing
            expected = photo()
    loaded = load_image(data, LOCAL)
    assert loaded.image.size == expected.size and loaded.image.tobytes() == expected.tobytes()


def test_a_picture_whose_owner_has_cleared_or_set_its_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (encode(photo(), "JPEG", exif=exif), encode(photo(), "PNG", exif=exif), turned(6)["jpeg xmp"]):
        with Image.open(io.BytesIO(data)) as picture:
            assert load_image(picture, LOCAL).image.size == (32, 48)
            del picture.getexif()[0x0112]
            assert load_image(picture, LOCAL).image.size == (48, 32)
            picture.getexif()[0x0112] = 8
            assert load_image(picture, LOCAL).image.size == (32, 48)
        with Image.open(io.BytesIO(data)) as picture:
            upright = ImageOps.exif_transpose(picture)
            assert load_image(upright, LOCAL).image.tobytes() == upright.tobytes()
    made = photo()
    made.getexif()[0x0112] = 3
    assert load_image(made, LOCAL).image.tobytes() == photo().rotate(180).tobytes()


@fuzz
@given(st.binary(max_size=80), st.sampled_from([b"", b"II*\0\x08\0\0\0", b"\nexif\n 9\n", b'tiff:Orientation="9']))
def test_whatever_stands_where_orientation_could(data: bytes, start: bytes) -> None:
    text = start + data
    for kind, body in (
        (b"eXIf", text),
        (b"tEXt", b"Raw profile type exif\0" + text),
        (b"zTXt", b"Raw profile type exif\0" + text),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
        (b"iTXt", b"XML:com.adobe.xmp" + text),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + text),
    ):
        assert set(load_image(with_chunks(chunk(kind, body)), LOCAL).image.size) == {48, 32}


def test_a_text_that_unpacks_to_too_much_says_nothing() -> None:
    bomb = zlib.compress(b"x" * 50_000_000 + xmp('tiff:Orientation="6"/>'), 9)
    data = with_chunks(*[chunk(b"zTXt", b"XML:com.adobe.xmp\0\0" + bomb)] * 20)
    assert load_image(data, LOCAL).image.size == (48, 32)


# What is no picture -----------------------------------------------------------------------------------------------

SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
OTHERS: dict[str, tuple[bytes, str, str]] = {
    "jxl": (b"\xff\x0a" + bytes(50), "JPEG XL", "djxl"),
    "jxl in a box": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL", "djxl"),
    "jp2": (encode(photo(), "JPEG2000"), "JPEG 2000", "PIL.Image.open"),
    "ppm": (encode(photo(), "PPM"), "PPM", "PIL.Image.open"),
    "pgm": (encode(photo(mode="L"), "PPM"), "PGM", "PIL.Image.open"),
    "pgm as text": (b"P2\n# by hand\n2 1\n255\n0 255\n", "PGM", "PIL.Image.open"),
    "pfm": (b"Pf\n2 1\n-1.0\n" + bytes(8), "PFM", "PIL.Image.open"),
    "pfm in colour": (b"PF\n2 1\n-1.0\n" + bytes(24), "PFM", "oiiotool"),
    "tga": (encode(photo(), "TGA"), "TGA", "PIL.Image.open"),
    "psd": (b"8BPS\0\1" + bytes(50), "PSD", "PIL.Image.open"),
    "dds": (encode(photo(), "DDS"), "DDS", "PIL.Image.open"),
    "ico": (encode(photo(), "ICO"), "ICO", "PIL.Image.open"),
    "avif": (b"\0\0\0\x1cftypavif" + bytes(50), "AVIF", "PIL.Image.open"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(50), "HEIC", "pillow_heif"),
    "mp4": (b"\0\0\0\x18ftypisom" + bytes(50), "video", "ffmpeg"),
    "webm": (b"\x1a\x45\xdf\xa3" + bytes(50), "video", "ffmpeg"),
    "dicom": (bytes(128) + b"DICM" + bytes(50), "DICOM", "pydicom"),
    "exr": (b"v/1\x01\x02\0\0\0" + bytes(50), "OpenEXR", "oiiotool"),
    "hdr": (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n", "Radiance HDR", "oiiotool"),
    "svg": (SVG, "SVG", "cairosvg"),
    "svg with a long head": (b"<?xml version='1.0'?>\n<!-- " + b"licence " * 200 + b"-->\n" + SVG, "SVG", "cairosvg"),
    "svgz": (gzip.compress(b"<?xml version='1.0'?>" + SVG), "svgz", "gunzip"),
    "gzip": (gzip.compress(PNG), "gzip", "gzip.decompress"),
    "pdf": (b"%PDF-1.7 ...", "PDF", "pdftoppm"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript", "gs "),
    "npy": (b"\x93NUMPY\1\0", "NumPy", "numpy.load"),
    "docx": (b"PK\x03\x04" + bytes(50), "archive", "Unpack"),
    "web page": (b"<!doctype html><title>404</title>", "web page", "address"),
    "web page with a drawing": (
        b"\n<!-- x --><html><body>" + SVG + b"</body></html>",
        "web page with an SVG",
        "screenshot",
    ),
    "base64": (base64.b64encode(PNG), "base64", "b64decode"),
    "base64 in lines": (base64.encodebytes(PNG), "base64", "b64decode"),
    "base64 in quotes": (b'"' + base64.b64encode(encode(photo(), "JPEG")) + b'"', "base64", "b64decode"),
    "data uri": (b"data:image/png;base64," + base64.b64encode(PNG), "data URI", "decode()"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS", "git lfs pull"),
    "json": (b'{"error": "not found"}', "JSON", "Take the image out"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_opened_is_named_with_a_remedy(name: str, tmp_path: Path) -> None:
    data, what, remedy = OTHERS[name]
    file = tmp_path / "a.png"
    file.write_bytes(data)
    for reference in (data, file, {"type": "image", "base64": base64.b64encode(data).decode()}):
        for policy in (LOCAL, LOCAL.but(isolate=True)):
            with pytest.raises(ImageDecodeError, match=what) as caught:
                load_image(reference, policy)
            assert remedy in caught.value.hint and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["jp2", "ppm", "pgm", "pgm as text", "pfm", "dds", "ico", "tga"])
def test_the_remedy_that_says_pillow_works(name: str, tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(OTHERS[name][0])
    with Image.open(file) as picture:
        assert load_image(picture, LOCAL).image.mode == "RGB"


def test_the_remedies_for_text_work() -> None:
    data = base64.b64encode(PNG)
    assert load_image({"type": "image", "base64": data.decode()}, LOCAL).image.size == (48, 32)
    assert load_image((b"data:image/png;base64," + data).decode(), LOCAL).image.size == (48, 32)


def test_pictures_of_all_formats_are_still_known() -> None:
    for kind in FORMATS:
        assert load_image(encode(photo(), kind), LOCAL).image.size == (48, 32)


# Arrays -----------------------------------------------------------------------------------------------------------

COLOURS = np.asarray(photo(6, 5))
GREY = COLOURS[..., 0].copy()


def arrays() -> dict[str, tuple[Any, np.ndarray[Any, Any]]]:
    tensor = torch.from_numpy(COLOURS.copy())
    grey, clear = np.stack([GREY] * 3, -1), np.dstack([COLOURS, np.full((5, 6), 255, np.uint8)])
    return {
        "numpy HWC": (COLOURS, COLOURS),
        "numpy HW": (GREY, grey),
        "numpy HW1": (GREY[..., None], grey),
        "numpy RGBA": (clear, COLOURS),
        "numpy float": (COLOURS / 255, COLOURS),
        "numpy float32": ((COLOURS / 255).astype(np.float32), COLOURS),
        "numpy backwards": (COLOURS[::-1, ::-1], COLOURS[::-1, ::-1]),
        "numpy bool": (GREY > 100, np.stack([(GREY > 100) * np.uint8(255)] * 3, -1)),
        "torch HWC": (tensor, COLOURS),
        "torch CHW": (tensor.permute(2, 0, 1), COLOURS),
        "torch CHW float": (tensor.permute(2, 0, 1) / 255, COLOURS),
        "torch with a gradient": ((tensor.permute(2, 0, 1) / 255).requires_grad_(), COLOURS),
        "torch HW": (torch.from_numpy(GREY), grey),
        "torch 1HW": (torch.from_numpy(GREY)[None], grey),
        "torch double": (tensor.double() / 255, COLOURS),
    }


@pytest.mark.parametrize("name", arrays())
def test_arrays(name: str) -> None:
    array, expected = arrays()[name]
    before = (array.detach().numpy() if hasattr(array, "detach") else array).copy()
    for reference in (array, {"type": "image", "image": array}):
        loaded = load_image(reference, ImagePolicy.server())
        assert np.array_equal(np.asarray(loaded.image), expected) and not loaded.warnings
    assert np.array_equal(before, array.detach().numpy() if hasattr(array, "detach") else array)
    text, _ = portable_image(array, LOCAL)
    assert np.array_equal(np.asarray(load_image(text, LOCAL).image), expected)


def test_half_precision() -> None:
    for kind in (torch.float16, torch.bfloat16):
        seen, _ = values((torch.from_numpy(COLOURS.copy()) / 255).to(kind))
        assert np.abs(seen.astype(int) - COLOURS).max() <= 1


WRONG: dict[str, Any] = {
    "batch": np.stack([COLOURS, COLOURS]),
    "batch of one": torch.rand(1, 3, 5, 6),
    "numpy CHW": COLOURS.transpose(2, 0, 1),
    "torch of two readings": torch.rand(3, 7, 4),
    "0 to 255 as floats": COLOURS.astype(float),
    "0 to 255 as torch floats": torch.from_numpy(COLOURS.copy()).float(),
    "normalised": (torch.from_numpy(COLOURS.copy()).permute(2, 0, 1) / 255 - 0.45) / 0.225,
    "a little outside": COLOURS / 255 * 1.2 - 0.1,
    "int64": COLOURS.astype(np.int64),
    "torch int64": torch.from_numpy(COLOURS.astype(np.int64)),
    "int8": (COLOURS.astype(int) - 128).astype(np.int8),
    "uint16": COLOURS.astype(np.uint16) * 257,
    "not finite": np.where(COLOURS > 100, np.nan, COLOURS / 255),
    "not finite in torch": torch.tensor([[0.0, float("inf")], [0.5, -float("inf")]]),
    "two channels": COLOURS[..., :2],
    "nine channels": np.random.default_rng(0).random((5, 6, 9)),
}


def followed(hint: str, array: Any) -> Any:
    """What the line in a hint makes of the array."""
    line = re.sub(r"^.*?\b[Pp]ass (?:one of the batch, |its grey values, )?", "", hint.replace("channels: ", "pass "))
    code = re.split(r", if |, or | or ", line)[0].rstrip(".")
    return eval(code, {"array": array, "numpy": np})


@pytest.mark.parametrize("name", WRONG)
def test_the_line_in_the_hint_works(name: str) -> None:
    array = WRONG[name]
    with pytest.raises(ImageDecodeError) as caught:
        load_image(array, LOCAL)
    assert load_image(followed(caught.value.hint, array), LOCAL).image.mode == "RGB"


def test_a_batch_as_a_list() -> None:
    assert [loaded.image.size for loaded in load_images(list(WRONG["batch"]), LOCAL)] == [(6, 5), (6, 5)]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(5, np.uint8),
        np.zeros((), np.uint8),
        np.float64(0.5),
        np.zeros((2, 2, 2, 2, 3), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 0), np.float32),
        np.zeros((4, 4), complex),
        np.full((4, 4), None),
        np.full((4, 4), "a"),
        np.zeros((4, 4), "datetime64[s]"),
        torch.zeros(3, 4, 5).to_sparse(),
        torch.zeros(3, 4, 5, device="meta"),
        torch.zeros(3, 4, 5, dtype=torch.complex64),
    ],
    ids=range(13),
)
def test_arrays_that_are_no_picture(array: Any) -> None:
    with pytest.raises(ImageDecodeError) as caught:
        load_image(array, LOCAL)
    assert caught.value.hint


def test_arrays_have_limits() -> None:
    with pytest.raises(ImageTooLargeError):
        load_image(np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), LOCAL)
    with pytest.raises(ImageTooLargeError):
        load_image(torch.zeros(1).expand(3, 10, 30_000), LOCAL)


# Paths that are nearly right --------------------------------------------------------------------------------------

HINTS = {
    "~/a.png": "expanduser",
    "~someone/a.png": "expanduser",
    '"a.png"': "quotes",
    "'a.png'": "quotes",
    "“a.png”": "quotes",
    "a.png\n": "line break",
    " a.png": "space",
    "$HOME/a.png": "expandvars",
    "C:\\pictures\\a.png": "Windows",
    "pictures\\a.png": "Windows",
    "example.org/a.png": "https://",
    "www.example.de/a.png": "https://",
    "*.png": "one file",
    "a%20b.png": "%20",
    "": "filler",
    "  ": "filler",
    "null": "filler",
    "None": "filler",
    "undefined": "filler",
    base64.b64encode(PNG).decode(): "base64",
}


@pytest.mark.parametrize("path", HINTS)
def test_the_hint_fits_the_mistake(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    hints = {}
    for policy in (LOCAL, ImagePolicy.untrusted(folders=[tmp_path])):
        with pytest.raises(ImageNotFoundError) as caught:
            load_image(path, policy)
        assert HINTS[path] in caught.value.hint and str(tmp_path) not in str(caught.value)
        hints[caught.value.hint] = policy
    assert len(hints) == 1


def test_a_missing_file_where_folders_are_allowed(tmp_path: Path) -> None:
    for path in ("b.png", tmp_path / "b.png"):
        with pytest.raises(ImageNotFoundError) as caught:
            load_image(path, ImagePolicy.untrusted(folders=[tmp_path]))
        assert "allowed folders" in caught.value.hint
        with pytest.raises(ImageNotFoundError) as caught:
            load_image(path, LOCAL)
        assert "current folder" in caught.value.hint


def test_a_filler_where_no_file_may_be_opened() -> None:
    for filler in ("", "null", "None"):
        with pytest.raises(ImageNotAllowedError) as caught:
            load_image(filler, ImagePolicy.untrusted())
        assert "leave the image out" in caught.value.hint


def test_fields_that_are_empty_are_not_there() -> None:
    text = base64.b64encode(PNG).decode()
    for block in (
        {"type": "image", "base64": text, "url": "", "path": " "},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + text}, "source": ""},
    ):
        assert load_image(block, LOCAL).image.size == (48, 32)
    for block in ({"type": "image", "url": ""}, {"path": ""}, {"image": None}, {"image_url": {"url": " "}}):
        with pytest.raises(ImageDecodeError, match="no image"):
            load_image(block, LOCAL)


@pytest.mark.slow
def test_twenty_thousand_folders_are_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: every folder is resolved once, and a path at most once for each."""
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "a.png").write_bytes(PNG)
    policy = ImagePolicy.untrusted(folders=[*(tmp_path / f"f{number}" for number in range(20_000)), tmp_path / "last"])
    calls = 0
    real = os.path.realpath

    def count(path: Any, **options: Any) -> str:
        nonlocal calls
        calls += 1
        return real(path, **options)

    monkeypatch.setattr(os.path, "realpath", count)
    assert load_image("a.png", policy).image.size == (48, 32)
    assert load_image(tmp_path / "last" / "a.png", policy).image.size == (48, 32)
    with pytest.raises(ImageNotFoundError):
        load_image("d/" * 1_000 + "a.png", policy)
    with pytest.raises(ImageError):
        load_image("/etc/passwd", policy)
    assert calls <= 4 * 20_001 + 40


@fuzz
@given(st.randoms(use_true_random=False), st.integers(1, 40))
def test_folders_in_any_order_allow_the_same(luck: random.Random, count: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        base = Path(name).resolve()
        folders = [base / "/".join(luck.choices("abc", k=luck.randint(1, 4))) for _ in range(count)]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        place = base / "/".join(luck.choices("abc", k=luck.randint(1, 4)))
        place.mkdir(parents=True, exist_ok=True)
        (place / "x.png").write_bytes(PNG)
        naive = any((place / "x.png").is_relative_to(folder) for folder in folders)
        policy = ImagePolicy.untrusted(folders=folders)
        if naive:
            assert load_image(place / "x.png", policy).image.size == (48, 32)
        else:
            with pytest.raises(ImageNotAllowedError):
                load_image(place / "x.png", policy)
