"""What may be shown of an image reference: enough to recognise it, never its bytes, credentials or query.

Used by the ``repr`` of requests and by what is recorded of a run. This module knows nothing of the rest of the package.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

__all__ = ["redact", "shown_image"]

_LONGEST = 200  # characters of a path; what is longer is hardly one
_URL = re.compile(r"(https?)://(?:[^/?#\\]*@)?([^/?#\\@]*)", re.IGNORECASE | re.ASCII)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE | re.ASCII)
_DATA_URI = re.compile(r"data:[^\s,]{0,200},[^\s\"'<>)]*", re.IGNORECASE | re.ASCII)
_USER = re.compile(r"(?<=://)[^/\s?#\\@]*@", re.ASCII)
_IMAGE_KEYS = ("image", "images", "url", "image_url", "source", "base64", "data", "bytes", "path", "value")


def shown_image(reference: object) -> str:
    """An image reference in a few words: its kind and size, the host of a URL, a path as it is."""
    if isinstance(reference, str):
        text = reference.strip()
        scheme = _SCHEME.match(text)
        if url := _URL.match(text):
            return f"<{url[1].lower()} URL of {url[2][:_LONGEST]}>"
        if scheme is not None and scheme[1].lower() == "data":
            return f"<data URI of {len(text)} characters>"
        if len(text) > _LONGEST or scheme is not None:
            return f"<text of {len(text)} characters>"
        return text
    if isinstance(reference, bytes | bytearray | memoryview):
        return f"<{memoryview(reference).nbytes} bytes>"
    if isinstance(reference, os.PathLike):
        return str(reference)
    if isinstance(reference, Mapping):
        return f"<content block of type {str(reference.get('type'))[:20]}>"
    if callable(shown := getattr(reference, "shown", None)):  # a reference that knows what may be shown of it
        return str(shown())
    size = getattr(reference, "size", None)
    if isinstance(size, tuple) and len(size) == 2:
        return f"<picture of {size[0]}x{size[1]}>"
    return f"<{type(reference).__name__}>"


def redact(value: object) -> object:
    """A copy of nested plain values with every image replaced by ``shown_image``, and without credentials in URLs."""
    if isinstance(value, str):
        return _USER.sub("***@", _DATA_URI.sub("<data URI>", value))
    if isinstance(value, Mapping):
        return {key: _redact_image(item) if key in _IMAGE_KEYS else redact(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [redact(item) for item in value]
    return value if value is None or isinstance(value, int | float) else shown_image(value)


def _redact_image(value: object) -> object:
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redact_image(item) for item in value]
    return None if value is None else shown_image(value)
