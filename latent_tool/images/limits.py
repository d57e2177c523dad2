"""Check a picture against what its policy allows: bytes, pixels, sides, frames and time. Knows nothing of formats."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latent_tool.errors import DeadlineError, ImageDecodeError, ImageTooLargeError

if TYPE_CHECKING:
    from latent_tool.settings import ImagePolicy

__all__ = ["Limits", "check_bytes", "check_deadline", "check_size", "limits_of", "seconds_left"]


@dataclass(frozen=True)
class Limits:
    """What a picture may be at most: ``max_pixels`` in all, ``max_side`` pixels, ``max_frames``, and its formats."""

    max_pixels: int
    max_side: int
    max_frames: int
    formats: tuple[str, ...]


def limits_of(policy: ImagePolicy) -> Limits:
    """Give the limits that hold for a picture once its bytes are there."""
    return Limits(policy.max_pixels, policy.max_side, policy.max_frames, policy.formats)


def check_size(size: tuple[int, int], limits: Limits) -> None:
    """Raise ``ImageTooLargeError`` or, for a picture without pixels, ``ImageDecodeError``."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageDecodeError(f"The image is {width}x{height} pixels: there is nothing to see.", "Send another image.")
    if max(width, height) > limits.max_side:
        raise ImageTooLargeError(
            f"The image is {width}x{height} pixels; a side may have at most {limits.max_side}.",
            "Scale or cut it down, or raise max_side of the image policy.",
        )
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"The image is {width}x{height} pixels; at most {limits.max_pixels} pixels in all are allowed.",
            "Scale it down, or raise max_pixels of the image policy.",
        )


def check_bytes(size: int, policy: ImagePolicy) -> None:
    """Raise ``ImageTooLargeError`` for more than ``policy.max_bytes``."""
    if size > policy.max_bytes:
        raise ImageTooLargeError(
            f"The image has more than {policy.max_bytes} bytes.",
            "Scale it down or compress it, or raise max_bytes of the image policy.",
        )


def check_deadline(deadline: float | None) -> None:
    """Raise ``DeadlineError`` once ``deadline``, an instant of ``time.monotonic()``, has passed."""
    if deadline is not None and time.monotonic() >= deadline:
        raise DeadlineError("The deadline passed while the image was loaded.", "Allow more time, or send it as bytes.")


def seconds_left(limit: float, deadline: float | None) -> float:
    """Give what remains of a limit in seconds before the deadline."""
    return limit if deadline is None else max(0.001, min(limit, deadline - time.monotonic()))
