"""Every error this package raises on purpose, drawn as a tree.

    LatentToolError
    ├── InputError                 the request is wrong: the caller can fix it
    │   ├── SettingsError          a budget, setting or option is out of its range
    │   ├── QuestionError          the question is empty, too long or not text
    │   ├── DatasetError           rows of a data set or of a run cannot be used
    │   ├── CalibrationError       a calibration cannot be made, read or used
    │   │   ├── CalibrationMismatchError   it was made for another configuration
    │   │   └── TooFewItemsError           there are not enough labelled items
    │   └── ImageError             the image cannot be used
    │       ├── ImageNotFoundError     nothing is there
    │       ├── ImageNotAllowedError   the image policy forbids this source
    │       ├── ImageTooLargeError     more bytes or pixels than the policy allows
    │       └── ImageDecodeError       these bytes are no image that can be opened
    ├── ModelError                 the model is wrong for this package
    │   ├── ModelNotFoundError         no such directory or hub id
    │   │   ├── ModelAccessError           the hub does not give it to this user
    │   │   └── HubUnreachableError        it is not here, and the hub cannot be reached
    │   ├── ModelLoadError             the checkpoint is broken or incomplete
    │   │   └── DiskFullError              there is no room to download it
    │   ├── ModelNotSupportedError     the architecture does not fit the method
    │   └── ContextLengthError         the prompt does not fit the model's context
    ├── DeadlineError              the deadline passed before anything was scored
    ├── CancelledError             the caller asked to stop
    ├── OverloadedError            too many questions are waiting already
    ├── NotEnoughMemoryError       one question alone does not fit into memory
    ├── NumericalError             the model returned values that are not finite
    ├── RungError                  a rung of a router failed, or answered with something unknown
    ├── ServiceError               a reasoner on the network gave no usable answer
    │   ├── AccessError                it wants a token, or another one
    │   └── ServiceUnavailableError    it cannot be reached, or went away while it answered
    ├── AnswerMismatchError        an answer does not fit the schema that is to be filled from it
    ├── UnsupportedError           something is asked of a chat model that this one cannot do
    └── MissingExtraError          an optional dependency is not installed

Each error says what is wrong, carries a ``hint`` that names the remedy, and knows whether trying the same
again can help (``retryable``). This module knows nothing of the rest of the package.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

__all__ = [
    "AccessError",
    "AnswerMismatchError",
    "CalibrationError",
    "CalibrationMismatchError",
    "CancelledError",
    "ContextLengthError",
    "DatasetError",
    "DeadlineError",
    "DiskFullError",
    "HubUnreachableError",
    "ImageDecodeError",
    "ImageError",
    "ImageNotAllowedError",
    "ImageNotFoundError",
    "ImageTooLargeError",
    "InputError",
    "LatentToolError",
    "MissingExtraError",
    "ModelAccessError",
    "ModelError",
    "ModelLoadError",
    "ModelNotFoundError",
    "ModelNotSupportedError",
    "NotEnoughMemoryError",
    "NumericalError",
    "OverloadedError",
    "QuestionError",
    "RungError",
    "ServiceError",
    "ServiceUnavailableError",
    "SettingsError",
    "TooFewItemsError",
    "UnsupportedError",
]


class LatentToolError(Exception):
    """Base of all errors of this package.

    Args:
        message: what is wrong, in one sentence.
        hint: what to do about it, in one sentence; may be empty.
    """

    retryable: bool = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class InputError(LatentToolError, ValueError):
    """The request is wrong; the caller can fix it."""


class SettingsError(InputError):
    """A budget, setting or option is out of its range, or not known."""


class QuestionError(InputError):
    """The question is empty, too long or not text."""


class DatasetError(InputError):
    """Rows of a data set, or of the file of a run, cannot be used.

    Args:
        message: what is wrong, in one sentence.
        hint: what to do about it.
        problems: one line for every row that cannot be used, naming the row.
    """

    def __init__(self, message: str, hint: str = "", problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint)
        self.problems = problems

    def __reduce__(self) -> tuple[type[DatasetError], tuple[str, str, tuple[str, ...]]]:
        return type(self), (self.message, self.hint, self.problems)


class CalibrationError(InputError):
    """A calibration cannot be made, read or used."""


class CalibrationMismatchError(CalibrationError):
    """The calibration was made for another model, prompt, budget, score or other settings."""


class TooFewItemsError(CalibrationError):
    """There are not enough labelled items to calibrate on; the message says how many are needed."""


class ImageError(InputError):
    """The image cannot be used."""


class ImageNotFoundError(ImageError):
    """There is nothing where the image should be."""


class ImageNotAllowedError(ImageError):
    """The image policy forbids this source."""


class ImageTooLargeError(ImageError):
    """The image has more bytes or pixels than the policy allows."""


class ImageDecodeError(ImageError):
    """The bytes are no image that can be opened."""


class ModelError(LatentToolError):
    """The model cannot be used with this package."""


class ModelNotFoundError(ModelError):
    """There is no such checkpoint directory or hub id."""


class ModelAccessError(ModelNotFoundError):
    """The hub does not give the model to this user: it is gated or private."""


class HubUnreachableError(ModelNotFoundError):
    """The model is not on this machine, and the hub cannot be reached."""

    retryable = True


class ModelLoadError(ModelError):
    """The checkpoint is broken or incomplete."""


class DiskFullError(ModelLoadError):
    """There is no room on the disk to download the model."""


class ModelNotSupportedError(ModelError):
    """The architecture does not fit the method."""


class ContextLengthError(ModelError, InputError):
    """Image, question and answer do not fit the model's context."""


class DeadlineError(LatentToolError):
    """The deadline passed before anything was scored."""

    retryable = True


class CancelledError(LatentToolError):
    """The caller asked to stop."""

    retryable = True


class OverloadedError(LatentToolError):
    """Too many questions are waiting already, or the scheduler takes no more."""

    retryable = True


class NotEnoughMemoryError(LatentToolError):
    """One question alone does not fit into the device's memory."""


class NumericalError(LatentToolError):
    """The model returned values that are not finite."""


class RungError(LatentToolError):
    """A rung of a router failed, or answered with something that is no result."""


class ServiceError(LatentToolError):
    """A reasoner on the network gave no usable answer."""


class AccessError(ServiceError):
    """The service wants a token, or another one."""


class ServiceUnavailableError(ServiceError):
    """The service cannot be reached, or went away while it answered."""

    retryable = True


class AnswerMismatchError(LatentToolError, ValueError):
    """An answer does not fit the schema that is to be filled from it, or may not be used for it."""


class UnsupportedError(LatentToolError, NotImplementedError):
    """Something is asked of a chat model that this one cannot do."""


class MissingExtraError(LatentToolError):
    """An optional dependency is not installed.

    Args:
        feature: what the caller wanted, for example ``"the MCP server"``.
        extra: the extra of this package that brings the dependency.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs packages that are not installed.", f"Install them with: {_command(extra)}")
        self.feature = feature
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), (self.feature, self.extra)


def _command(extra: str) -> str:
    """The command that adds an extra to this installation, whatever that was made from."""
    try:
        own = distribution("latent-tool")
        origin = json.loads(own.read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, OSError, ValueError):
        origin = None
    if not isinstance(origin, dict):
        return f"pip install 'latent-tool[{extra}]'"
    url = urlsplit(str(origin.get("url", "")))
    if url.scheme != "file":
        return f"pip install 'latent-tool[{extra}]'" + (f" (from {url.geturl()})" if url.scheme else "")
    place = Path(url2pathname(url.path))
    if place.exists():
        editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
        return f"pip install {editable}'{place}[{extra}]'"
    return "pip install " + " ".join(f"'{each}'" for each in _needed(own.requires or [], extra))


def _needed(requires: list[str], extra: str) -> list[str]:
    """The requirements of an extra, with those of the extras that it names."""
    found: list[str] = []
    for each in requires:
        requirement, _, marker = each.partition(";")
        if f'extra == "{extra}"' in marker:
            inner = re.fullmatch(r"latent-tool\[([\w,-]+)\]", requirement.strip())
            if inner is None:
                found.append(requirement.strip())
            else:
                found += [part for name in inner[1].split(",") for part in _needed(requires, name)]
    return found
