"""Make an upright RGB picture of any image reference, under an ``ImagePolicy``.

A reference is a path, a ``file:`` or ``http(s):`` URL, a data URI, bytes, a Pillow image, a NumPy array, a torch
tensor, or an image content block of LangChain, OpenAI or Anthropic. A plain string is a path unless it begins with a
scheme.

This module only decides who does the work: ``references`` tells what a reference is, ``files`` and ``download`` fetch
bytes, ``containers`` decodes them, ``apart`` does so in a process of its own, and ``pixels`` converts what is decoded
already. It knows nothing of models. Errors never repeat the caller's bytes, URLs or folders.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latent_tool.errors import (
    ImageDecodeError,
    ImageNotAllowedError,
    ImageNotFoundError,
    ImageTooLargeError,
)
from latent_tool.images.apart import decode_apart
from latent_tool.images.containers import decode
from latent_tool.images.download import download
from latent_tool.images.files import file_url_path, read_file
from latent_tool.images.limits import check_bytes, check_deadline, check_size, limits_of, seconds_left
from latent_tool.images.pixels import convert, convert_copy, from_array, is_array
from latent_tool.images.references import SCHEME, Base64, from_base64, from_data_uri, is_whole, unwrap

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
    """Open one image.

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
    check_deadline(deadline)
    value = unwrap(reference)
    if (picture := _from_object(value, policy)) is not None:
        loaded = picture
    else:
        data, source = _read(value, policy, deadline)
        check_deadline(deadline)
        image, warnings = _decode(data, policy, deadline)
        loaded = LoadedImage(image, warnings, source)
    check_deadline(deadline)
    return loaded


def portable_image(
    reference: object, policy: ImagePolicy, *, deadline: float | None = None
) -> tuple[str, tuple[str, ...]]:
    """Write the same image as text for another machine, and say what was changed, one sentence each.

    Files and bytes become a data URI without being decoded, a Pillow image and an array become a PNG. A URL stays one
    if the policy allows no downloads: whether to open it is then for the other machine to decide. Raises what
    ``load_image`` raises.
    """
    value = unwrap(reference)
    warnings: tuple[str, ...] = ()
    if (loaded := _from_object(value, policy)) is not None:
        stream = io.BytesIO()
        loaded.image.save(stream, format="PNG")
        data, warnings = stream.getvalue(), loaded.warnings
    elif isinstance(value, str) and not policy.hosts and value.strip().lower().startswith(("http:", "https:")):
        return value.strip(), ()
    else:
        data, _ = _read(value, policy, deadline)
    check_deadline(deadline)
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode(), warnings


def load_images(
    references: Sequence[object],
    policy: ImagePolicy,
    *,
    deadline: float | None = None,
    load: Callable[..., LoadedImage] = load_image,
) -> list[LoadedImage]:
    """Open all images of one request, which may be so many and have so many pixels together as the policy says.

    ``load`` opens one of them. Raises what ``load_image`` raises.
    """
    if len(references) > policy.max_images:
        raise ImageTooLargeError(
            f"The request has {len(references)} images; at most {policy.max_images} are allowed.",
            "Ask about fewer at a time, or raise max_images of the image policy.",
        )
    loaded: list[LoadedImage] = []
    left = policy.max_total_pixels
    for reference in references:
        picture = load(reference, policy, deadline=deadline)
        left -= picture.image.width * picture.image.height
        if left < 0:
            raise ImageTooLargeError(
                f"The images of the request have more than {policy.max_total_pixels} pixels together.",
                "Scale them down, ask about fewer at a time, or raise max_total_pixels of the image policy.",
            )
        loaded.append(picture)
    return loaded


def _decode(data: bytes, policy: ImagePolicy, deadline: float | None) -> tuple[Image, tuple[str, ...]]:
    if not policy.isolate:
        return decode(data, limits_of(policy))
    try:
        seconds = seconds_left(policy.decode_s, deadline)
        return decode_apart(data, limits_of(policy), seconds=seconds, memory=policy.decode_memory)
    except ImageTooLargeError:
        check_deadline(deadline)
        raise


def _read(value: object, policy: ImagePolicy, deadline: float | None) -> tuple[bytes, str]:
    """The bytes behind a reference, and where they came from."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        check_bytes(memoryview(value).nbytes, policy)
        return bytes(value), "bytes"
    if isinstance(value, Base64):
        return from_base64(value, policy), "base64"
    if isinstance(value, os.PathLike):
        return read_file(os.fsdecode(value), policy)
    if isinstance(value, str):
        text = value.strip()
        scheme = SCHEME.match(text)
        if scheme is None:
            return read_file(value, policy)
        name = scheme[0].rstrip(":/").lower()
        if name == "data":
            return from_data_uri(text, policy), "data URI"
        if name == "file":
            return read_file(file_url_path(text), policy)
        if name in ("http", "https"):
            return _download(text, policy, deadline)
        raise ImageNotAllowedError(
            "URLs of this scheme are not opened.", "Use a path, a data URI or an https URL of an allowed host."
        )
    raise ImageDecodeError(
        f"An image cannot be made from {type(value).__name__}.",
        "Pass a path, URL, data URI, bytes, Pillow image, array or image content block; of an open file: file.read().",
    )


def _download(url: str, policy: ImagePolicy, deadline: float | None) -> tuple[bytes, str]:
    if not policy.hosts:
        raise ImageNotAllowedError(
            "Downloads are not allowed.", "Pass the image's bytes, or add its host to hosts of the image policy."
        )
    try:
        return download(url, policy, seconds_left(policy.download_s, deadline))
    except ImageNotFoundError:
        check_deadline(deadline)
        raise


# Pictures that are decoded already --------------------------------------------------------------------------------


def _from_object(value: Any, policy: ImagePolicy) -> LoadedImage | None:
    """A Pillow image or an array; ``None`` for anything else, for which Pillow is not imported."""
    if value is None or isinstance(value, (str, bytes, bytearray, memoryview, os.PathLike, int, float)):
        return None
    from PIL.Image import Image

    if isinstance(value, Image):
        check_size(value.size, limits_of(policy))
        return LoadedImage(*convert_copy(value), "Pillow image")
    if is_array(value):
        return LoadedImage(*convert(from_array(value, limits_of(policy)), 1), "array")
    return None
