"""Recognise what bytes are by their beginning, and name a way to open what is not opened here.

A name or a declared type is never believed. This module opens nothing.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

from latent_tool.errors import ImageDecodeError

__all__ = ["BASE64_IMAGE", "recognise"]

# Base64 of the beginnings of PNG, JPEG, GIF, RIFF, BMP and TIFF.
BASE64_IMAGE = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk|SUkq|TU0A)[A-Za-z0-9+/=_-]{40}")

_OPENED = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)

_PILLOW = "Open it yourself with PIL.Image.open(path) and pass that image, or save it as PNG."
_HEIF = "Install pillow-heif, call pillow_heif.register_heif_opener(), and pass PIL.Image.open(path)."
_JXL = "Convert it with 'djxl image.jxl image.png' of libjxl."
_SVG = (
    "Draw it first: cairosvg.svg2png(url='image.svg', write_to='image.png'), or 'rsvg-convert image.svg > image.png'."
)
_RAW = "Develop it first, for example with the package rawpy, and pass the array: rawpy.imread(path).postprocess()."
_ARRAY = "Load the array, bring its values to [0, 1] or to uint8, and pass that."
_VIDEO = "Take a frame out of it first: 'ffmpeg -i video -frames:v 1 image.png'."
_DICOM = "Read it with pydicom, stretch pixel_array to [0, 1] by the window a reader would choose, and pass that array."
_EXR = "Convert it with OpenImageIO: 'oiiotool image.exr --colorconvert linear sRGB -o image.png'."
_PAGE = "Take a page of it as a picture first: 'pdftoppm -png -r 150 document.pdf page' of poppler."
_POSTSCRIPT = "Convert it with Ghostscript: 'gs -dSAFER -sDEVICE=png16m -r150 -o image.png image.eps'."
_ARCHIVE = "Unpack it, and pass an image of it."
_TEXT = "Check that the source is an image, and not a text or a web page."

# (beginning, name, remedy)
_NOT_OPENED: tuple[tuple[bytes, str, str], ...] = (
    (b"\xff\x0a", "JPEG XL", _JXL),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", _JXL),
    (b"\0\0\0\x0cjP  ", "JPEG 2000", _PILLOW),
    (b"\xff\x4f\xff\x51", "JPEG 2000", _PILLOW),
    (b"II\xbc", "JPEG XR", "Convert it with 'JxrDecApp -i image.jxr -o image.bmp' of jxrlib."),
    (b"\0\0\x01\0", "ICO", _PILLOW),
    (b"icns", "ICNS", _PILLOW),
    (b"8BPS", "PSD", _PILLOW),
    (b"DDS ", "DDS", _PILLOW),
    (b"qoif", "QOI", _PILLOW),
    (b"\x01\xda", "SGI", _PILLOW),
    (b"SIMPLE  =", "FITS", _ARRAY),
    (b"gimp xcf", "XCF", "Export it from GIMP as PNG."),
    (b"v/1\x01", "OpenEXR", _EXR),
    (b"#?RADIANCE", "Radiance HDR", _EXR),
    (b"#?RGBE", "Radiance HDR", _EXR),
    (b"FLIF", "FLIF", "Convert it with 'flif -d image.flif image.png'."),
    (b"FUJIFILMCCD-RAW", "raw photo", _RAW),
    (b"IIU\0", "raw photo", _RAW),
    (b"IIRO", "raw photo", _RAW),
    (b"%PDF", "PDF", _PAGE),
    (b"%!PS", "PostScript", _POSTSCRIPT),
    (b"\xc5\xd0\xd3\xc6", "PostScript", _POSTSCRIPT),
    (b"\xd7\xcd\xc6\x9a", "WMF", "Convert it with LibreOffice: 'soffice --convert-to png image.wmf'."),
    (b"\x1a\x45\xdf\xa3", "Matroska or WebM video", _VIDEO),
    (b"\x93NUMPY", "NumPy array", "Load it and pass the array: numpy.load(path)."),
    (b"\x89HDF", "HDF5", _ARRAY),
    (b"PK\x03\x04", "archive or office document", _ARCHIVE),
    (b"7z\xbc\xaf'\x1c", "archive", _ARCHIVE),
    (b"Rar!", "archive", _ARCHIVE),
)
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), ("AVIF", _PILLOW)),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), ("HEIC", _HEIF)),
    b"crx ": ("raw photo", _RAW),
}
_PORTABLE = re.compile(rb"P([1-7]|[Ff])[ \t\r\n#]")  # PBM, PGM, PPM, PAM, PFM
_SPACE = b" \t\r\n\xef\xbb\xbf"
_COMMENT = re.compile(rb"<!--.{0,3000}?-->|<\?.{0,3000}?\?>", re.DOTALL)
_MAX_LOOK = 4096  # bytes at the beginning of a text


def recognise(data: bytes, formats: Sequence[str]) -> str:
    """Give the name of the format, one of ``formats``, by the first bytes.

    Raises:
        ImageDecodeError: it is something else; the error says what, and what to do.
    """
    if not data:
        raise ImageDecodeError("The image is empty: 0 bytes.", "Send the bytes of an image file.")
    name = next((name for start, name in _OPENED if data.startswith(start)), "")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        name = "WEBP"
    if name in formats:
        return name
    if name:
        raise ImageDecodeError(f"{name} images are not opened here.", f"Convert it to one of: {', '.join(formats)}.")
    if other := _other(data):
        raise ImageDecodeError(f"The data are {other[0]}, which is not opened here.", other[1])
    what = _text(data)
    if what:
        raise ImageDecodeError(*what)
    raise ImageDecodeError("These bytes are not an image.", _TEXT)


def _other(data: bytes) -> tuple[str, str] | None:
    """Name and remedy of what is known, but not opened."""
    for start, name, remedy in _NOT_OPENED:
        if data.startswith(start):
            return name, remedy
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], ("HEIC or video", f"Of a video: {_VIDEO} Of HEIC: {_HEIF}"))
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "AVI video", _VIDEO
    if data[128:132] == b"DICM":
        return "DICOM", _DICOM
    if match := _PORTABLE.match(data):
        kinds = {b"1": "PBM", b"4": "PBM", b"2": "PGM", b"5": "PGM", b"3": "PPM", b"6": "PPM", b"7": "PAM"}
        return kinds.get(match[1], "PFM"), _PILLOW if match[1] not in b"7F" else _EXR
    if data[-18:-2] == b"TRUEVISION-XFILE":
        return "TGA", _PILLOW
    if data[:2] == b"\x1f\x8b":
        inside = _unpacked(data)
        if _is_svg(inside):
            return "SVG in gzip (svgz)", f"Unpack it: 'gunzip -c image.svgz > image.svg'. {_SVG}"
        return "gzip", "Unpack it with 'gunzip' or gzip.decompress(data), and pass what is inside."
    if not _is_page(data) and _is_svg(data):
        return "SVG", _SVG
    return None


def _text(data: bytes) -> tuple[str, str] | None:
    """Message and remedy for text that was taken for an image."""
    start = data[:_MAX_LOOK].lstrip(_SPACE)
    if _is_page(data):
        drawing = b"<svg" in data[:_MAX_LOOK].lower()
        return (
            "These bytes are not an image: they are a web page" + (" with an SVG in it." if drawing else "."),
            "Save the drawing by itself and draw it as PNG, or take a screenshot."
            if drawing
            else "Give the address of the image itself; a page that asks to log in looks like this, too.",
        )
    text = start.decode("latin-1")
    if text[:5].lower() == "data:":
        return "These bytes are not an image: they are a data URI as text.", "Pass the text as str: data.decode()."
    if BASE64_IMAGE.match(re.sub(r"\s", "", text.strip("\"'"))):
        return (
            "These bytes are not an image: they are base64 as text.",
            "Decode them: base64.b64decode(data), or pass {'type': 'image', 'base64': data.decode()}.",
        )
    if start.startswith(b"version https://git-lfs"):
        return "These bytes are not an image: they are a pointer of Git LFS.", "Fetch the file: 'git lfs pull'."
    if start[:1] in (b"{", b"["):
        return "These bytes are not an image: they look like JSON.", "Take the image out of it, and pass that."
    return None


def _unpacked(data: bytes) -> bytes:
    """The beginning of what gzip packed."""
    try:
        return zlib.decompressobj(31).decompress(data[: 1 << 16], _MAX_LOOK)
    except zlib.error:
        return b""


def _is_page(data: bytes) -> bool:
    start = _COMMENT.sub(b"", data[:_MAX_LOOK]).lstrip(_SPACE).lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<body"))


def _is_svg(data: bytes) -> bool:
    return b"<svg" in data[:_MAX_LOOK].lower()
