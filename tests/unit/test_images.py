"""Images from local references: every kind of reference, mode and orientation; limits; file policies."""

from __future__ import annotations

import base64
import copy
import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from image_samples import FORMATS, data_uri, encode, photo, png
from PIL import Image, ImageFile, ImageOps

from latent_tool.errors import (
    DeadlineError,
    ImageDecodeError,
    ImageError,
    ImageNotAllowedError,
    ImageNotFoundError,
    ImageTooLargeError,
    SettingsError,
)
from latent_tool.images.load import LoadedImage, load_image
from latent_tool.settings import ImagePolicy

LOCAL = ImagePolicy.local()
UNTRUSTED = ImagePolicy.untrusted()
PNG = encode(photo(), "PNG")
BASE64 = base64.b64encode(PNG).decode()


def corners(image: Image.Image) -> str:
    """The colours of the four corners as letters, row by row."""
    right, bottom = image.width - 2, image.height - 2
    letters = ""
    for x, y in ((1, 1), (right, 1), (1, bottom), (right, bottom)):
        red, green, blue = image.getpixel((x, y))
        letters += "W" if min(red, green, blue) > 200 else "RGB"[(red, green, blue).index(max(red, green, blue))]
    return letters


# References ------------------------------------------------------------------------------------------------------


def blocks() -> dict[str, Any]:
    uri = data_uri(PNG)
    return {
        "v1 url": {"type": "image", "url": uri},
        "v1 base64": {"type": "image", "base64": BASE64, "mime_type": "image/png"},
        "v1 base64 of bytes": {"type": "image", "base64": PNG, "mime_type": "image/png"},
        "v1 data": {"type": "image", "data": BASE64, "mime_type": "image/png"},
        "v0 base64": {"type": "image", "source_type": "base64", "data": BASE64, "mime_type": "image/png"},
        "v0 url": {"type": "image", "source_type": "url", "url": uri},
        "openai": {"type": "image_url", "image_url": {"url": uri, "detail": "high"}},
        "openai string": {"type": "image_url", "image_url": uri},
        "openai responses": {"type": "input_image", "image_url": uri, "detail": "auto"},
        "anthropic base64": {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": BASE64},
        },
        "anthropic url": {"type": "image", "source": {"type": "url", "url": uri}},
        "google": {"type": "media", "mime_type": "image/png", "data": BASE64},
        "google inline": {"inline_data": {"mime_type": "image/png", "data": BASE64}},
        "bedrock": {"image": {"format": "png", "source": {"bytes": PNG}}},
        "mcp": {"type": "image", "data": BASE64, "mimeType": "image/png"},
        "non-standard": {"type": "non_standard", "value": {"type": "input_image", "image_url": uri}},
        "transformers": {"type": "image", "image": photo()},
        "data uri in base64": {"type": "image", "base64": uri},
        "unused fields": {"type": "image", "base64": BASE64, "url": None, "id": "x", "index": 0},
    }


@pytest.mark.parametrize("name", blocks())
def test_content_blocks_of_every_form(name: str) -> None:
    block = blocks()[name]
    before = copy.deepcopy(block)
    loaded = load_image(block, UNTRUSTED)
    assert corners(loaded.image) == "RGBW" and loaded.image.size == (48, 32)
    assert before == block


def test_content_block_with_a_path(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(PNG)
    for block in ({"type": "image", "path": str(file)}, {"type": "image", "url": file.as_uri()}):
        assert corners(load_image(block, LOCAL).image) == "RGBW"
        with pytest.raises(ImageNotAllowedError):
            load_image(block, UNTRUSTED)


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"type": "text", "text": "hello"},
        {"type": "image"},
        {"type": "image", "file_id": "file-123"},
        {"type": "image", "source": {"type": "file", "file_id": "x"}},
        {"type": "image", "url": "https://example.org/a.png", "base64": BASE64},
        {"type": "image_url", "image_url": {}},
        {"type": "image_url", "image_url": "/etc/passwd"},
        {"type": "image", "url": "chart.png"},
        {"type": "image", "url": 7},
        {"type": "image", "base64": "!!!!"},
        {"type": "image", "base64": "A"},
        {"type": "image", "base64": ""},
        {"value": {"value": {"value": {"value": {"value": {"url": "data:,x"}}}}}},
    ],
    ids=str,
)
def test_content_blocks_without_a_usable_image(block: dict[str, Any]) -> None:
    with pytest.raises(ImageDecodeError) as caught:
        load_image(block, LOCAL)
    assert caught.value.hint


def test_paths_bytes_and_pillow_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my chart.png"
    file.write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    spaced = memoryview(b"".join(bytes((byte, 0)) for byte in PNG))[::2]
    references = [str(file), file, "my chart.png", file.as_uri(), PNG, bytearray(PNG), memoryview(PNG), spaced, photo()]
    for reference in references:
        loaded = load_image(reference, LOCAL)
        assert isinstance(loaded, LoadedImage) and loaded.warnings == ()
        assert loaded.image.mode == "RGB" and corners(loaded.image) == "RGBW"
    assert load_image(file, LOCAL).source == "'my chart.png'"


@pytest.mark.parametrize(
    "uri",
    [
        data_uri(PNG),
        data_uri(PNG, ""),
        data_uri(PNG, "text/html;charset=utf-8"),  # the declared type is not believed
        data_uri(PNG).replace("data:", "DATA:").replace(";base64", ";BASE64"),
        data_uri(PNG).replace("+", "-").replace("/", "_").replace("image_png", "image/png"),
        data_uri(PNG).rstrip("="),
        data_uri(PNG).replace("=", "%3D").replace("+", "%2B"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
        "\n " + data_uri(PNG) + "\n",
        data_uri(PNG)[:60] + "\r\n" + data_uri(PNG)[60:],
    ],
    ids=range(10),
)
def test_data_uris(uri: str) -> None:
    assert corners(load_image(uri, UNTRUSTED).image) == "RGBW"


@pytest.mark.parametrize(
    "reference",
    [None, 3, 3.5, True, object(), [PNG], (PNG,), {1, 2}, io.BytesIO(PNG), b"", bytearray(), "data:", "data:,"],
    ids=range(13),
)
def test_what_is_no_image(reference: object) -> None:
    with pytest.raises(ImageDecodeError) as caught:
        load_image(reference, LOCAL)
    assert caught.value.hint


# Modes and orientation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_pillow_modes_become_rgb_and_stay_untouched(mode: str) -> None:
    picture = photo(mode=mode)
    before = picture.tobytes()
    loaded = load_image(picture, LOCAL)
    expected = picture.convert("RGB")
    assert loaded.image.mode == "RGB"
    difference = [abs(a - b) for a, b in zip(loaded.image.tobytes(), expected.tobytes(), strict=True)]
    assert max(difference) <= 1  # rounding
    loaded.image.putpixel((0, 0), (1, 2, 3))
    assert (picture.mode, picture.tobytes()) == (mode, before)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparent_parts_are_white(mode: str) -> None:
    grey = Image.new("LA", (4, 4), (0, 0))
    grey.putpixel((0, 0), (0, 255))
    picture = grey.convert(mode) if mode in ("La", "LA") else grey.convert("RGBA").convert(mode)
    image = load_image(picture, LOCAL).image
    assert (image.getpixel((0, 0)), image.getpixel((3, 3))) == ((0, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry_is_white(kind: str) -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([10, 20, 30, 200, 0, 0])
    picture.putpixel((0, 0), 0)
    image = load_image(encode(picture, kind, transparency=1), LOCAL).image
    assert (image.getpixel((0, 0)), image.getpixel((3, 3))) == ((10, 20, 30), (255, 255, 255))


def test_transparent_colour_of_rgb_png_is_white() -> None:
    image = load_image(encode(photo(), "PNG", transparency=(250, 10, 10)), LOCAL).image
    assert corners(image) == "WGBW"


def test_sixteen_bits_keep_their_scale() -> None:
    for value, grey in ((0, 0), (0x8000, 128), (0xFFFF, 255)):
        picture = Image.new("I", (3, 3), value).convert("I;16")
        for reference in (picture, encode(picture, "PNG"), encode(picture, "TIFF")):
            loaded = load_image(reference, LOCAL)
            assert loaded.image.getpixel((1, 1)) == (grey, grey, grey) and not loaded.warnings


@pytest.mark.parametrize(
    ("mode", "values", "expected", "warned"),
    [
        ("F", (0.0, 0.5, 1.0), (0, 127, 255), False),
        ("F", (0.0, 100.0, 255.0), (0, 100, 255), False),
        ("F", (-1.0, 0.0, 1.0), (0, 127, 255), True),
        ("F", (-3.0, -3.0, -3.0), (0, 0, 0), True),
        ("I", (0, 100, 255), (0, 100, 255), False),
        ("I", (0, 0x8000, 0xFFFF), (0, 128, 255), False),
        ("I", (-100_000, 0, 100_000), (0, 127, 255), True),
    ],
)
def test_wide_numbers(mode: str, values: tuple[float, ...], expected: tuple[int, ...], warned: bool) -> None:
    picture = Image.new(mode, (3, 1))
    picture.putdata(values)
    loaded = load_image(picture, LOCAL)
    assert tuple(loaded.image.getpixel((x, 0))[0] for x in range(3)) == expected
    assert bool(loaded.warnings) == warned


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_floats_that_are_not_finite(value: float) -> None:
    for place in ((0, 0), (1, 1)):
        picture = Image.new("F", (2, 2), 0.5)
        picture.putpixel(place, value)
        for reference in (picture, encode(picture, "TIFF")):
            with pytest.raises(ImageDecodeError, match="finite"):
                load_image(reference, LOCAL)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "PNG with alpha"])
@pytest.mark.parametrize("orientation", range(0, 11))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(mode="RGBA" if "alpha" in kind else "RGB"), kind.split()[0], exif=exif)
    with Image.open(io.BytesIO(data)) as picture:
        expected = ImageOps.exif_transpose(picture).convert("RGB")
    for reference in (data, Image.open(io.BytesIO(data))):
        image = load_image(reference, LOCAL).image
        assert image.size == expected.size and image.tobytes() == expected.tobytes()
        assert image.info == {} and not image.getexif()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_with_a_warning(kind: str) -> None:
    others = [photo().rotate(180), photo().rotate(90), photo().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    data = encode(photo(), kind, save_all=True, append_images=others)
    loaded = load_image(data, LOCAL)
    assert corners(loaded.image) == "RGBW"
    assert loaded.warnings == ("The image has 4 frames; only the first is used.",)
    with pytest.raises(ImageTooLargeError, match="4 frames"):
        load_image(data, LOCAL.but(max_frames=3))
    with Image.open(io.BytesIO(data)) as picture:
        picture.seek(1)
        current = load_image(picture, LOCAL)
        assert picture.tell() == 1
    assert corners(current.image) == "WBGR" and "current frame, 1" in current.warnings[0]


def test_metadata_however_large_is_left_out() -> None:
    noise = os.urandom(3_000_000)
    for kind, options in (
        ("PNG", {"icc_profile": noise}),
        ("JPEG", {"icc_profile": noise, "comment": b"x" * 60_000}),
        ("WEBP", {"icc_profile": noise, "xmp": noise}),
        ("TIFF", {"icc_profile": noise}),
    ):
        assert corners(load_image(encode(photo(), kind, **options), LOCAL).image) == "RGBW"


def test_nothing_global_changes(recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]) -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, dict(Image.OPEN)
    for kind in FORMATS:
        data = encode(photo(), kind)
        load_image(data, LOCAL)
        with pytest.raises(ImageError):
            load_image(data[: len(data) // 2], LOCAL)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, dict(Image.OPEN)) == before
    assert not recwarn.list and capfd.readouterr() == ("", "")


def test_importing_the_module_is_cheap() -> None:
    heavy = "('PIL', 'numpy', 'httpx', 'torch')"
    code = f"import sys, latent_tool.images.load; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# Limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (0, 0, ImageDecodeError),
        (0, 5, ImageDecodeError),
        (30_000, 1, ImageTooLargeError),
        (1, 30_000, ImageTooLargeError),
        (10_000, 10_000, ImageTooLargeError),
        (2**31 - 1, 2**31 - 1, ImageTooLargeError),
        (2**32 - 1, 1, ImageTooLargeError),
    ],
)
def test_sizes_that_are_refused_before_decoding(width: int, height: int, expected: type[ImageError]) -> None:
    with pytest.raises(expected) as caught:
        load_image(png(width, height), LOCAL)
    assert f"{width}x{height}" in str(caught.value) and caught.value.hint


def test_one_pixel_is_an_image() -> None:
    for kind in FORMATS:
        assert load_image(encode(Image.new("RGB", (1, 1), "red"), kind), LOCAL).image.size == (1, 1)
    assert load_image(Image.new("RGB", (1, 1), "red"), LOCAL).image.getpixel((0, 0)) == (255, 0, 0)


def test_limits_hold_at_their_edge() -> None:
    for kind in FORMATS:
        data = encode(photo(48, 32), kind)
        exact = LOCAL.but(max_bytes=len(data), max_side=48, max_pixels=48 * 32, formats=(kind,))
        for reference in (data, data_uri(data), {"base64": base64.b64encode(data).decode()}):
            assert load_image(reference, exact).image.size == (48, 32)
            for change in ({"max_bytes": len(data) - 1}, {"max_side": 47}, {"max_pixels": 48 * 32 - 1}):
                with pytest.raises(ImageTooLargeError):
                    load_image(reference, exact.but(**change))
    for change in ({"max_side": 47}, {"max_pixels": 48 * 32 - 1}):
        with pytest.raises(ImageTooLargeError):
            load_image(photo(48, 32), LOCAL.but(**change))


@pytest.mark.parametrize("size", [(0, 0), (0, 4), (4, 0)])
def test_pillow_image_without_pixels(size: tuple[int, int]) -> None:
    with pytest.raises(ImageDecodeError):
        load_image(Image.new("RGB", size), LOCAL)


def test_only_the_formats_of_the_policy_are_opened() -> None:
    for kind in FORMATS:
        others = tuple(other for other in FORMATS if other != kind)
        with pytest.raises(ImageDecodeError, match=kind):
            load_image(encode(photo(), kind), LOCAL.but(formats=others))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (encode(photo(), "ICO"), "ICO"),
        (encode(photo(), "PPM"), "PPM"),
        (encode(photo(), "TGA"), "TGA"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\0\0\0\x18ftypheic....", "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"hello, I am a text", "not an image"),
        (b"<!doctype html><html></html>", "not an image"),
        (bytes(1000), "not an image"),
    ],
)
def test_other_formats_are_named_but_not_opened(data: bytes, named: str) -> None:
    with pytest.raises(ImageDecodeError, match=named) as caught:
        load_image(data, LOCAL)
    assert caught.value.hint


def test_deadline() -> None:
    now = time.monotonic()
    assert load_image(PNG, LOCAL, deadline=now + 600).image.size == (48, 32)
    with pytest.raises(DeadlineError):
        load_image(PNG, LOCAL, deadline=now)


# Files -----------------------------------------------------------------------------------------------------------


def make_tree(tmp_path: Path) -> None:
    """A folder ``open`` that is allowed, ``closed`` and ``open-too`` that are not, and many ways between them."""
    for folder in ("open/inner", "closed", "open-too"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").write_bytes(PNG)
    inside = tmp_path / "open"
    (inside / "b c.png").write_bytes(PNG)
    (inside / "ünï.png").write_bytes(PNG)
    (inside / "empty.png").write_bytes(b"")
    (inside / "text.png").write_text("hello")
    (inside / "cut.png").write_bytes(PNG[:-30])
    (inside / "big.png").write_bytes(PNG)
    os.truncate(inside / "big.png", LOCAL.max_bytes + 1)  # a hole, not written out
    (inside / "good-link.png").symlink_to(inside / "inner" / "a.png")
    (inside / "bad-link.png").symlink_to(tmp_path / "closed" / "a.png")
    (inside / "relative-link.png").symlink_to("../closed/a.png")
    (inside / "dangling.png").symlink_to(inside / "nothing.png")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "bad-folder").symlink_to(tmp_path / "closed")
    (inside / "passwd.png").symlink_to("/etc/passwd")
    (inside / "proc.png").symlink_to("/proc/self/environ")
    (inside / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(inside / "pipe.png")
    (tmp_path / "link-to-open").symlink_to(inside)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# (path, error with files="any", error with files="folders"); None is an image; {} is the temporary folder
PATHS: list[tuple[str, type[ImageError] | None, type[ImageError] | None]] = [
    ("{}/open/b c.png", None, None),
    ("{}/open/ünï.png", None, None),
    ("{}/open/inner/a.png", None, None),
    ("{}/open/inner/../inner/a.png", None, None),
    ("{}/open//inner/./a.png", None, None),
    ("{}/closed/../open/inner/a.png", None, None),
    ("{}/open/good-link.png", None, None),
    ("{}/link-to-open/inner/a.png", None, None),
    ("open/inner/a.png", None, None),
    ("./open/inner/a.png", None, None),
    ("inner/a.png", ImageNotFoundError, None),
    ("file://{}/open/inner/a.png", None, None),
    ("file://localhost{}/open/b%20c.png", None, None),
    ("file:{}/open/inner/a.png", None, None),
    ("FILE://{}/open/inner/a.png", None, None),
    ("{}/closed/a.png", None, ImageNotAllowedError),
    ("{}/closed/nothing.png", ImageNotFoundError, ImageNotAllowedError),
    ("{}/open-too/a.png", None, ImageNotAllowedError),
    ("{}/open/../closed/a.png", None, ImageNotAllowedError),
    ("open/../closed/a.png", None, ImageNotFoundError),  # no open/closed/a.png either
    ("./closed/a.png", None, ImageNotFoundError),
    ("../closed/a.png", ImageNotFoundError, ImageNotAllowedError),
    ("{}/open/inner/../../closed/a.png", None, ImageNotAllowedError),
    ("{}/open/bad-link.png", None, ImageNotAllowedError),
    ("{}/open/relative-link.png", None, ImageNotAllowedError),
    ("{}/open/bad-folder/a.png", None, ImageNotAllowedError),
    ("file://{}/open/../closed/a.png", None, ImageNotAllowedError),
    ("file://{}/open/%2e%2e/closed/a.png", None, ImageNotAllowedError),
    ("file://{}/open/..%2fclosed%2fa.png", None, ImageNotAllowedError),
    ("file://example.org{}/open/inner/a.png", ImageNotAllowedError, ImageNotAllowedError),
    ("file://{}/open/inner/a.png%00.txt", ImageNotFoundError, ImageNotFoundError),
    ("file://[", ImageNotAllowedError, ImageNotAllowedError),
    ("{}/open/dangling.png", ImageNotFoundError, ImageNotFoundError),
    ("{}/open/loop.png", ImageNotFoundError, ImageNotAllowedError),
    ("{}/open/passwd.png", ImageDecodeError, ImageNotAllowedError),
    ("{}/open/proc.png", ImageDecodeError, ImageNotAllowedError),
    ("{}/open/zero.png", ImageNotAllowedError, ImageNotAllowedError),
    ("{}/open/pipe.png", ImageNotAllowedError, ImageNotAllowedError),
    ("{}/open/socket.png", ImageNotAllowedError, ImageNotAllowedError),
    ("{}/open", ImageNotFoundError, ImageNotFoundError),
    ("{}/open/inner/", ImageNotFoundError, ImageNotFoundError),
    ("{}/open/nothing.png", ImageNotFoundError, ImageNotFoundError),
    ("{}/open/b c.png/x", ImageNotFoundError, ImageNotFoundError),
    ("{}/open/inner/a.png\0", ImageNotFoundError, ImageNotFoundError),
    ("{}/open/\udcff.png", ImageNotFoundError, ImageNotFoundError),
    ("{}/open/\ud800.png", ImageNotFoundError, ImageNotFoundError),
    ("{}/open/" + "x" * 5000, ImageNotFoundError, ImageNotFoundError),
    ("x" * 100_000, ImageNotFoundError, ImageNotFoundError),
    ("{}/open/" + "../" * 3000 + "etc/passwd", ImageNotFoundError, ImageNotAllowedError),
    ("{}/open/empty.png", ImageDecodeError, ImageDecodeError),
    ("{}/open/text.png", ImageDecodeError, ImageDecodeError),
    ("{}/open/cut.png", ImageDecodeError, ImageDecodeError),
    ("{}/open/big.png", ImageTooLargeError, ImageTooLargeError),
    ("", ImageNotFoundError, ImageNotFoundError),
    (" ", ImageNotFoundError, ImageNotFoundError),
    ("/", ImageNotFoundError, ImageNotAllowedError),
    ("~", ImageNotFoundError, ImageNotFoundError),
    ("/proc/self/environ", ImageDecodeError, ImageNotAllowedError),
    ("/proc/self/fd/0", ImageError, ImageNotAllowedError),
    ("/proc/self/cwd/open/inner/a.png", None, None),  # a link to the allowed folder
    ("/dev/zero", ImageNotAllowedError, ImageNotAllowedError),
    ("/dev/tty", ImageNotAllowedError, ImageNotAllowedError),
    ("/etc/passwd", ImageDecodeError, ImageNotAllowedError),
    ("ftp://example.org/a.png", ImageNotAllowedError, ImageNotAllowedError),
    ("\\\\server\\share\\a.png", ImageNotFoundError, ImageNotFoundError),
    (BASE64, ImageNotFoundError, ImageNotFoundError),
]


@pytest.mark.parametrize("place", range(len(PATHS)), ids=[path[:40].encode("ascii", "replace") for path, *_ in PATHS])
def test_path_forms(tree: Path, place: int) -> None:
    path, with_any, with_folders = PATHS[place]
    path = path.replace("{}", str(tree))
    policies = [
        (LOCAL, with_any),
        (ImagePolicy.untrusted(folders=[tree / "open"]), with_folders),
        (ImagePolicy.untrusted(folders=[tree / "nowhere", tree / "link-to-open"]), with_folders),
        (UNTRUSTED, ImageNotAllowedError),
    ]
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("open/socket.png")
        for policy, expected in policies:
            if expected is None:
                assert corners(load_image(path, policy).image) == "RGBW"
                continue
            with pytest.raises(expected) as caught:
                load_image(path, policy)
            assert caught.value.hint
            assert str(tree) not in str(caught.value) and BASE64[:20] not in str(caught.value)


def test_a_file_outside_is_refused_alike_whether_it_exists_or_not(tree: Path) -> None:
    policy = ImagePolicy.untrusted(folders=[tree / "open"])
    messages = set()
    for name in ("a.png", "b.png"):
        with pytest.raises(ImageNotAllowedError) as caught:
            load_image(tree / "closed" / name, policy)
        messages.add(str(caught.value).replace(name, "NAME"))
    assert len(messages) == 1


def test_a_folder_exchanged_for_a_link_after_the_check_opens_nothing(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = ImagePolicy.untrusted(folders=[tree / "open"])
    real = os.path.realpath

    def exchange(path: Any, **options: Any) -> str:
        resolved = real(path, **options)
        if resolved.endswith("inner/a.png"):
            (tree / "open" / "inner").rename(tree / "open" / "was")
            (tree / "open" / "inner").symlink_to(tree / "closed")
        return resolved

    monkeypatch.setattr(os.path, "realpath", exchange)
    with pytest.raises(ImageError):
        load_image(tree / "open" / "inner" / "a.png", policy)


def test_an_unreadable_file(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> int:
        raise PermissionError(13, "Permission denied", "/secret/folder")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ImageNotFoundError, match="may not be read") as caught:
        load_image(tree / "open" / "b c.png", LOCAL)
    assert "secret" not in str(caught.value)


def test_base64_taken_for_a_path_is_explained() -> None:
    with pytest.raises(ImageNotFoundError, match="looks like base64"):
        load_image(BASE64, LOCAL)


# The policy ------------------------------------------------------------------------------------------------------


WRONG_HOSTS = ["*", "*.example.org", "https://example.org", "example.org/", "example.org.", "", ".", "a..b", "a b"]
WRONG_HOSTS += ["user@host", "bücher.example", "127.1", "0x7f.1", "2130706433", "0177.0.0.1", "fe80::1%eth0", "[::1"]
WRONG_HOSTS += ["host:", "host:0", "host:65536"]


@pytest.mark.parametrize(
    "values",
    [
        {"max_bytes": 0},
        {"max_bytes": float("nan")},
        {"max_pixels": float("inf")},
        {"max_side": -1},
        {"max_frames": 0},
        {"formats": ()},
        {"formats": ("EPS",)},
        {"formats": "PNG"},
        {"files": "all"},
        {"files": "folders"},
        {"files": "any", "folders": ("x",)},
        {"folders": ("x",)},
        {"download_s": 0},
        {"stall_s": float("nan")},
        {"decode_memory": 5},
        {"surprise": 1},
        *({"hosts": (host,)} for host in WRONG_HOSTS),
    ],
    ids=str,
)
def test_policies_that_are_not_valid(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        ImagePolicy(**values)


def test_policies_that_are_valid() -> None:
    hosts = (
        "Example.ORG",
        "a.b-c.example:8443",
        "xn--bcher-kva.example",
        "192.0.2.1",
        "192.0.2.1:80",
        "[2001:DB8::0:1]:99",
    )
    assert ImagePolicy(hosts=hosts).hosts == (
        "example.org",
        "a.b-c.example:8443",
        "xn--bcher-kva.example",
        "192.0.2.1",
        "192.0.2.1:80",
        "[2001:db8::1]:99",
    )
    assert ImagePolicy(hosts=("2001:db8::1",)).hosts == ("[2001:db8::1]",)
    assert ImagePolicy.untrusted(folders=["x"]).files == "folders"
    assert (ImagePolicy.local().files, ImagePolicy.untrusted().files, ImagePolicy().files) == ("any", "none", "none")
    assert not ImagePolicy.local().hosts
