"""The pictures that a view draws on: opened as a request's are, upright, and those that the result is about."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from latent_tool.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from latent_tool.schema import ReasoningResult

__all__ = ["as_list", "upright_image"]


def as_list(images: object) -> list[Any]:
    """Make a list of one image or of several; a text, bytes or a content block is one."""
    several = isinstance(images, list | tuple) and not isinstance(images, str | bytes | os.PathLike | Mapping)
    return list(images) if several else [images]  # type: ignore[call-overload]


def upright_image(result: ReasoningResult, image: object, index: int) -> Image.Image:
    """Open the caller's image, upright and RGB, and check that it is the one the result is about.

    Args:
        result: what a reasoner returned.
        image: what ``invoke`` takes; references are opened under ``ImagePolicy.local()``. ``None``: the one the result
            remembers, if it was made in this process.
        index: which of the request's images it is, from 0.

    Raises:
        InputError: the image is not the one the result is about, or is no image.
        ImageError: it cannot be opened.
    """
    from PIL import Image, ImageOps

    count = len(result.image_sizes)
    if index < 0 or (count and index >= count):
        raise InputError(f"There is no image {index}: the result is about {count}.", "Images count from 0.")
    if image is None:
        if result._seen is None:
            raise InputError("The result has no picture at hand.", "Pass the image that was asked about.")
        image = result._seen.image(index)
    upright = ImageOps.exif_transpose(image) if isinstance(image, Image.Image) else _opened(image)
    if count and upright.size != tuple(result.image_sizes[index]):
        width, height = result.image_sizes[index]
        raise InputError(
            f"The image is {upright.width} x {upright.height} pixels, image {index} of the result was "
            f"{width} x {height}.",
            "Pass the image that was asked about, not resized or cropped.",
        )
    if upright.has_transparency_data:
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
    return upright.convert("RGB")


def _opened(reference: object) -> Image.Image:
    from latent_tool.images.load import load_image
    from latent_tool.images.picture import Picture
    from latent_tool.settings import ImagePolicy

    policy = ImagePolicy.local()
    opened = reference.load(policy) if isinstance(reference, Picture) else load_image(reference, policy)
    return opened.image
