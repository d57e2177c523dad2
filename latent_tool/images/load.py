"""Any image reference -> an upright RGB picture, under an ``ImagePolicy``.

A reference is a path, a ``file:`` or ``http(s):`` URL, a data URI, bytes, a Pillow image, or an image content block of
LangChain, OpenAI or Anthropic. A plain string is a path unless it begins with a scheme.

This module finds the bytes; ``image_bytes`` decodes them, ``image_process`` does so in a process of its own, and
``image_download`` fetches what is behind a URL. It knows nothing of models. Errors never repeat the caller's bytes,
URLs or folders.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from latent_tool.errors import (
    DeadlineError,
    ImageDecodeError,
    ImageError,
    ImageNotAllowedError,
    ImageNotFoundError,
    ImageTooLargeError,
)
from latent_tool.images.apart import decode_apart
from latent_tool.images.containers import Limits, check_size, convert_copy, decode
from latent_tool.images.download import download

if TYPE_CHECKING:
    from PIL.Image import Image

    from latent_tool.settings import ImagePolicy

__all__ = ["LoadedImage", "is_whole", "load_image", "load_images", "portable_image"]


@dataclass(frozen=True)
class LoadedImage:
    """A picture that is ready to be looked at.

    Attributes:
        image: upright, mode RGB, without metadata; the caller's own to change. Boxes are in its pixels.
        warnings: what was left out or changed, one sentence each.
        source: short and safe to print: a file name, a host, or the kind of reference.
    """

    image: Image
    warnings: tuple[str, ...] = ()
    source: str = ""


def load_image(reference: object, policy: ImagePolicy, *, deadline: float | None = None) -> LoadedImage:
    """Load one image.

    Args:
        reference: see the module's description. It is never changed.
        policy: which sources may be opened, and how large an image may be.
        deadline: instant of ``time.monotonic()``, in seconds, after which loading is given up.

    Raises:
        ImageNotFoundError: there is no such file, or the server does not deliver.
        ImageNotAllowedError: the policy forbids this source.
        ImageTooLargeError: more bytes, pixels or frames than the policy allows.
        ImageDecodeError: no image, a format that is not opened, or damaged data.
        DeadlineError: the deadline passed.
    """
    _check_deadline(deadline)
    value = _unwrap(reference)
    if _is_pillow(value):
        loaded = _from_pillow(value, policy)
    else:
        data, source = _read(value, policy, deadline)
        _check_deadline(deadline)
        image, warnings = _decode(data, policy, deadline)
        loaded = LoadedImage(image, warnings, source)
    _check_deadline(deadline)
    return loaded


def portable_image(
    reference: object, policy: ImagePolicy, *, deadline: float | None = None
) -> tuple[str, tuple[str, ...]]:
    """The same image as text for another machine, and what was changed, one sentence each.

    Files and bytes become a data URI without being decoded, a Pillow image becomes a PNG. A URL stays one if the policy
    allows no downloads: whether to open it is then for the other machine to decide. Raises what ``load_image`` raises.
    """
    value = _unwrap(reference)
    warnings: tuple[str, ...] = ()
    if _is_pillow(value):
        loaded = _from_pillow(value, policy)
        stream = io.BytesIO()
        loaded.image.save(stream, format="PNG")
        data, warnings = stream.getvalue(), loaded.warnings
    elif isinstance(value, str) and not policy.hosts and value.strip().lower().startswith(("http:", "https:")):
        return value.strip(), ()
    else:
        data, _ = _read(value, policy, deadline)
    _check_deadline(deadline)
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode(), warnings


def load_images(
    references: Sequence[object],
    policy: ImagePolicy,
    *,
    deadline: float | None = None,
    load: Callable[..., LoadedImage] = load_image,
) -> list[LoadedImage]:
    """Load all images of one request, which may be so many and have so many pixels together as the policy says.

    ``load`` loads one of them. Raises what ``load_image`` raises.
    """
    if len(references) > policy.max_images:
        raise ImageTooLargeError(
            f"The request has {len(references)} images; at most {policy.max_images} are allowed.",
            "Ask about fewer at a time, or raise max_images of the image policy.",
        )
    loaded: list[LoadedImage] = []
    left = policy.max_total_pixels
    for reference in references:
        each = load(reference, policy, deadline=deadline)
        left -= each.image.width * each.image.height
        if left < 0:
            raise ImageTooLargeError(
                f"The images of the request have more than {policy.max_total_pixels} pixels together.",
                "Scale them down, ask about fewer at a time, or raise max_total_pixels of the image policy.",
            )
        loaded.append(each)
    return loaded


def _decode(data: bytes, policy: ImagePolicy, deadline: float | None) -> tuple[Image, tuple[str, ...]]:
    if not policy.isolate:
        return decode(data, _limits(policy))
    try:
        seconds = _seconds(policy.decode_s, deadline)
        return decode_apart(data, _limits(policy), seconds=seconds, memory=policy.decode_memory)
    except ImageTooLargeError:
        _check_deadline(deadline)
        raise


def _read(value: object, policy: ImagePolicy, deadline: float | None) -> tuple[bytes, str]:
    """The bytes behind a reference, and where they came from."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        _check_bytes(memoryview(value).nbytes, policy)
        return bytes(value), "bytes"
    if isinstance(value, _Base64):
        return _from_base64(value, policy), "base64"
    if isinstance(value, os.PathLike):
        return _read_file(os.fsdecode(value), policy)
    if isinstance(value, str):
        text = value.strip()
        scheme = _SCHEME.match(text)
        if scheme is None:
            return _read_file(value, policy)
        name = scheme[0].rstrip(":/").lower()
        if name == "data":
            return _from_data_uri(text, policy), "data URI"
        if name == "file":
            return _read_file(_file_url_path(text), policy)
        if name in ("http", "https"):
            return _download(text, policy, deadline)
        raise ImageNotAllowedError(
            "URLs of this scheme are not opened.", "Use a path, a data URI or an https URL of an allowed host."
        )
    raise ImageDecodeError(
        f"An image cannot be made from {type(value).__name__}.",
        "Pass a path, URL, data URI, bytes, Pillow image or image content block; an array: PIL.Image.fromarray(array).",
    )


_SCHEME = re.compile(r"(?:data|file|https?):|[a-z][a-z0-9+.-]+://", re.IGNORECASE | re.ASCII)


def _download(url: str, policy: ImagePolicy, deadline: float | None) -> tuple[bytes, str]:
    if not policy.hosts:
        raise ImageNotAllowedError(
            "Downloads are not allowed.", "Pass the image's bytes, or add its host to hosts of the image policy."
        )
    try:
        return download(url, policy, _seconds(policy.download_s, deadline))
    except ImageNotFoundError:
        _check_deadline(deadline)
        raise


def _limits(policy: ImagePolicy) -> Limits:
    return Limits(policy.max_pixels, policy.max_side, policy.max_frames, policy.formats)


def _check_bytes(size: int, policy: ImagePolicy) -> None:
    if size > policy.max_bytes:
        raise ImageTooLargeError(
            f"The image has more than {policy.max_bytes} bytes.",
            "Scale it down or compress it, or raise max_bytes of the image policy.",
        )


def _check_deadline(deadline: float | None) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise DeadlineError("The deadline passed while the image was loaded.", "Allow more time, or send it as bytes.")


def _seconds(limit: float, deadline: float | None) -> float:
    """What remains of a limit in seconds before the deadline."""
    return limit if deadline is None else max(0.001, min(limit, deadline - time.monotonic()))


# Pillow images ----------------------------------------------------------------------------------------------------


def _is_pillow(value: object) -> bool:
    """Whether this is a Pillow image, without importing Pillow for what cannot be one."""
    if isinstance(value, (str, bytes, bytearray, memoryview, os.PathLike)) or value is None:
        return False
    from PIL.Image import Image

    return isinstance(value, Image)


def _from_pillow(value: Any, policy: ImagePolicy) -> LoadedImage:
    check_size(value.size, _limits(policy))
    image, warnings = convert_copy(value)
    return LoadedImage(image, warnings, "Pillow image")


# Content blocks ---------------------------------------------------------------------------------------------------


def is_whole(reference: object) -> bool:
    """Whether the text of a reference is the image itself: base64 or a data URI, not a path or a URL."""
    try:
        value = _unwrap(reference)
    except ImageDecodeError:
        return False
    return isinstance(value, _Base64) or (isinstance(value, str) and value.strip()[:5].lower() == "data:")


class _Base64(str):
    """Text that a content block declares to be base64."""


def _unwrap(reference: object, depth: int = 0) -> object:
    """What an image content block refers to; anything else as it is.

    Understood are LangChain's blocks (v1 ``url``, ``base64``; v0 ``source_type``), OpenAI's ``image_url`` and
    ``input_image``, Anthropic's ``source``, Google's ``media``, and ``image``, ``path`` or ``bytes`` in a mapping.
    """
    if not isinstance(reference, Mapping):
        return reference
    filled = [key for key in (*_NESTED, *_PLAIN) if reference.get(key) is not None]
    if len(filled) != 1 or depth > 3:
        found = "no image" if not filled else "more than one image"
        raise ImageDecodeError(
            f"The content block holds {found} that can be read.",
            "Give exactly one of: url, base64, data, image_url, source, path. File ids of a provider are not opened.",
        )
    key = filled[0]
    value: object = reference[key]
    if key in _NESTED and isinstance(value, Mapping):
        return _unwrap(value, depth + 1)
    if not isinstance(value, str):
        return value
    if key in ("url", "image_url"):
        if _SCHEME.match(value.strip()) is None:
            raise ImageDecodeError(
                "The url of the content block has no scheme.",
                "Begin it with https: or data:, or give a path as 'path' or base64 as 'base64'.",
            )
        return value
    return _Base64(value) if key in ("base64", "data", "bytes") and not value.startswith("data:") else value


_NESTED = ("image_url", "source", "image", "value", "inline_data")
_PLAIN = ("url", "base64", "data", "bytes", "path")


# Text that holds bytes --------------------------------------------------------------------------------------------


def _from_data_uri(uri: str, policy: ImagePolicy) -> bytes:
    """The bytes of ``data:[type][;parameters][;base64],data``; the declared type is not believed."""
    head, comma, payload = uri[5:].partition(",")
    if not comma:
        raise ImageDecodeError("The data URI has no comma.", "Write data:image/png;base64,<base64>.")
    _check_bytes(len(payload) // 4, policy)  # base64 and percent-encoding take at most 4 characters for a byte
    if head.lower().replace(" ", "").endswith(";base64"):
        return _from_base64(payload, policy)
    data = _unquote(payload.encode("utf-8", "replace"))
    _check_bytes(len(data), policy)
    return data


_ESCAPES = re.compile(rb"(?:%[0-9a-fA-F]{2})+")


def _unquote(text: bytes) -> bytes:
    """Decode percent-escapes. In slices, because many single escapes take a hundred times the memory of their text."""
    data, place = bytearray(), 0
    while place < len(text):
        end = place + 65_536
        cut = text.find(b"%", end - 2, end)  # an escape that the end of the slice would cut in two
        end = end if cut < 0 else cut
        data += _ESCAPES.sub(lambda found: bytes.fromhex(found[0].replace(b"%", b"").decode()), text[place:end])
        place = end
    return bytes(data)


def _from_base64(text: str, policy: ImagePolicy) -> bytes:
    """Decode base64, also URL-safe, percent-encoded, wrapped over lines or without padding."""
    _check_bytes(len(text) // 4, policy)
    raw = text.encode("utf-8", "replace")
    raw = (_unquote(raw) if b"%" in raw else raw).translate(_URL_SAFE, b" \t\n\r\v\f").rstrip(b"=")
    try:
        data = base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ImageDecodeError("The base64 text is damaged.", "Encode the bytes of the image file again.") from None
    _check_bytes(len(data), policy)
    return data


_URL_SAFE = bytes.maketrans(b"-_", b"+/")


# Files ------------------------------------------------------------------------------------------------------------


def _file_url_path(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ImageNotAllowedError("The file URL is not valid.", "Write file:///folder/name.png.") from None
    if parts.netloc.lower() not in ("", "localhost"):
        raise ImageNotAllowedError("The file URL names another machine.", "Write file:///folder/name.png.")
    return url2pathname(parts.path)


def _read_file(path: str, policy: ImagePolicy) -> tuple[bytes, str]:
    """The bytes of a regular file that the policy allows.

    It is examined before it is opened, because opening a device can have effects, and again through its descriptor,
    because it may have been exchanged in between.
    """
    name = _safe_name(path)
    if policy.files == "none":
        raise ImageNotAllowedError(
            "Files may not be opened here.", "Send the image itself, or allow folders in the image policy."
        )
    try:
        descriptor = _open_inside(path, policy.folders) if policy.files == "folders" else _open(path)
        with os.fdopen(descriptor, "rb") as file:
            size = _check_regular(os.fstat(descriptor))
            if not size:  # also what pseudo files say of themselves
                raise ImageDecodeError(f"{name} is empty: 0 bytes.", "Save or download the image again.")
            _check_bytes(size, policy)
            data = file.read(policy.max_bytes + 1)
    except ImageError:
        raise
    except _OutsideError:
        raise ImageNotAllowedError(
            f"{name} is outside the allowed folders.", "Put it into an allowed folder, or allow its folder."
        ) from None
    except _NotRegularError:
        raise ImageNotAllowedError(
            f"{name} is not a regular file.", "Devices, pipes and sockets are not opened."
        ) from None
    except IsADirectoryError:
        raise ImageNotFoundError(f"{name} is a folder.", "Name an image file in it.") from None
    except PermissionError:
        raise ImageNotFoundError(f"{name} may not be read by this user.", "Change its permissions.") from None
    except (OSError, ValueError):  # ValueError: a name that no file system can hold
        hint = "Check the path; a relative one starts at the current folder."
        if _BASE64_IMAGE.match(path):
            hint = "This looks like base64: write data:image/png;base64, before it."
        raise ImageNotFoundError(f"There is no file {name}.", hint) from None
    _check_bytes(len(data), policy)
    return data, name


class _OutsideError(Exception):
    """A path that is in none of the allowed folders."""


class _NotRegularError(Exception):
    """A device, a pipe or a socket."""


_FLAGS = ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")  # non-blocking: a pipe would wait for its writer
_OPEN_FLAGS = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in _FLAGS)
_PSEUDO = ("/proc/", "/sys/", "/dev/")
_BASE64_IMAGE = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk|SUkq|TU0A)[A-Za-z0-9+/=_-]{40}")


def _check_regular(status: os.stat_result) -> int:
    """The size in bytes of what must be a regular file."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError
    if not stat.S_ISREG(status.st_mode):
        raise _NotRegularError
    return status.st_size


def _open(path: str, folder: int | None = None) -> int:
    """A descriptor of a file; below an open folder no link is followed."""
    if folder is None:
        _check_regular(os.stat(path))
        return os.open(path, _OPEN_FLAGS)
    _check_regular(os.stat(path, dir_fd=folder, follow_symlinks=False))
    return os.open(path, _OPEN_FLAGS | os.O_NOFOLLOW, dir_fd=folder)


def _open_inside(path: str, folders: tuple[Path, ...]) -> int:
    """A descriptor of a file that is in one of the folders once all links are resolved.

    A relative path is looked up in every folder and then in the current one.
    """
    roots = [os.path.realpath(folder) for folder in folders]
    inside = False
    for start in (*roots, os.getcwd()):
        target = Path(os.path.realpath(os.path.join(start, path)))
        root = next((root for root in roots if target.is_relative_to(root)), None)
        if root is None or str(target).startswith(_PSEUDO):
            continue
        inside = True
        try:
            return _open_steps(root, target.relative_to(root).parts)
        except FileNotFoundError:
            continue
    raise FileNotFoundError if inside else _OutsideError


def _open_steps(root: str, steps: tuple[str, ...]) -> int:
    """Open step by step without following links: after resolving there are none, unless something was exchanged."""
    if os.open not in os.supports_dir_fd or not steps:
        return _open(os.path.join(root, *steps))
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for step in steps[:-1]:
            inner = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        return _open(steps[-1], folder)
    finally:
        os.close(folder)


def _safe_name(path: str) -> str:
    """A file's own name, if it is one that can be printed; never its folders, never text posing as a path."""
    name = os.path.basename(path.rstrip("/"))
    return f"'{name}'" if _PRINTABLE.fullmatch(name) else "of that name"


_PRINTABLE = re.compile(r"[\w][\w .()+-]{0,79}", re.ASCII)
