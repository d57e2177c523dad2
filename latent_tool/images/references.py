"""Tell what a reference is: a path, a URL, bytes, a Pillow image, an array, or a content block that holds one of these.

Text that holds bytes, base64 or a data URI, is decoded here. This module opens neither files nor connections.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from latent_tool.errors import ImageDecodeError
from latent_tool.images.limits import check_bytes

if TYPE_CHECKING:
    from latent_tool.settings import ImagePolicy

__all__ = ["SCHEME", "Base64", "from_base64", "from_data_uri", "is_whole", "unwrap"]

SCHEME = re.compile(r"(?:data|file|https?):|[a-z][a-z0-9+.-]+://", re.IGNORECASE | re.ASCII)


def is_whole(reference: object) -> bool:
    """Tell whether the text of a reference is the image itself: base64 or a data URI, not a path or a URL."""
    try:
        value = unwrap(reference)
    except ImageDecodeError:
        return False
    return isinstance(value, Base64) or (isinstance(value, str) and value.strip()[:5].lower() == "data:")


class Base64(str):
    """Text that a content block declares to be base64."""


def unwrap(reference: object, depth: int = 0) -> object:
    """Give what an image content block refers to; anything else as it is.

    Understood are LangChain's blocks (v1 ``url``, ``base64``; v0 ``source_type``), OpenAI's ``image_url`` and
    ``input_image``, Anthropic's ``source``, Google's ``media``, and ``image``, ``path`` or ``bytes`` in a mapping.
    """
    if not isinstance(reference, Mapping):
        return reference
    filled = [key for key in (*_NESTED, *_PLAIN) if not _is_empty(reference.get(key))]
    if len(filled) != 1 or depth > 3:
        count = "no image" if not filled else "more than one image"
        raise ImageDecodeError(
            f"The content block holds {count} that can be read.",
            "Give exactly one of: url, base64, data, image_url, source, path. File ids of a provider are not opened.",
        )
    key = filled[0]
    value: object = reference[key]
    if key in _NESTED and isinstance(value, Mapping):
        return unwrap(value, depth + 1)
    if not isinstance(value, str):
        return value
    if key in ("url", "image_url"):
        if SCHEME.match(value.strip()) is None:
            raise ImageDecodeError(
                "The url of the content block has no scheme.",
                "Begin it with https: or data:, or give a path as 'path' or base64 as 'base64'.",
            )
        return value
    return Base64(value) if key in ("base64", "data", "bytes") and not value.startswith("data:") else value


def _is_empty(value: object) -> bool:
    """Whether a field is there only because the writer's class has it."""
    return value is None or (isinstance(value, str) and not value.strip())


_NESTED = ("image_url", "source", "image", "value", "inline_data")
_PLAIN = ("url", "base64", "data", "bytes", "path")


# Text that holds bytes --------------------------------------------------------------------------------------------


def from_data_uri(uri: str, policy: ImagePolicy) -> bytes:
    """Return the bytes of ``data:[type][;parameters][;base64],data``; the declared type is not believed."""
    head, comma, payload = uri[5:].partition(",")
    if not comma:
        raise ImageDecodeError("The data URI has no comma.", "Write data:image/png;base64,<base64>.")
    check_bytes(len(payload) // 4, policy)  # base64 and percent-encoding take at most 4 characters for a byte
    if head.lower().replace(" ", "").endswith(";base64"):
        return from_base64(payload, policy)
    data = _unquote(payload.encode("utf-8", "replace"))
    check_bytes(len(data), policy)
    return data


_ESCAPES = re.compile(rb"(?:%[0-9a-fA-F]{2})+")


def _unquote(text: bytes) -> bytes:
    """Decode percent-escapes. In slices, because many single escapes take a hundred times the memory of their text."""
    data, place = bytearray(), 0
    while place < len(text):
        end = place + 65_536
        cut = text.find(b"%", end - 2, end)  # an escape that the end of the slice would cut in two
        end = end if cut < 0 else cut
        data += _ESCAPES.sub(lambda escapes: bytes.fromhex(escapes[0].replace(b"%", b"").decode()), text[place:end])
        place = end
    return bytes(data)


def from_base64(text: str, policy: ImagePolicy) -> bytes:
    """Decode base64, also URL-safe, percent-encoded, wrapped over lines or without padding."""
    check_bytes(len(text) // 4, policy)
    raw = text.encode("utf-8", "replace")
    raw = (_unquote(raw) if b"%" in raw else raw).translate(_URL_SAFE, b" \t\n\r\v\f").rstrip(b"=")
    try:
        data = base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ImageDecodeError("The base64 text is damaged.", "Encode the bytes of the image file again.") from None
    check_bytes(len(data), policy)
    return data


_URL_SAFE = bytes.maketrans(b"-_", b"+/")
