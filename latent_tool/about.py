"""What the embedded model is, in one sentence, and what any model is called where others read it."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Literal

__all__ = ["EMBEDDED", "Surface", "model_name", "what_it_is"]

EMBEDDED = "embedded"

_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")

Surface = Literal["command", "python", "agent"]
_REMEDIES: dict[Surface, str] = {
    "command": "name a real one with --model",
    "python": "name a real one with model=",
    "agent": "for other pictures the developer should name a real one",
}


def what_it_is(model: str, surface: Surface = "command") -> str | None:
    """Say in a sentence what the embedded model is and what to do about it; ``None`` for any other model.

    Args:
        model: name of the model that answers.
        surface: where the sentence is read, which decides how it says that a model is named.
    """
    if model != EMBEDDED:
        return None
    return f"The embedded model is a small model of synthetic scenes; {_REMEDIES[surface]}."


def model_name(model: str) -> str:
    """Return what a model is called where others read it: a hub id, or of a folder on this machine its own name
    alone.
    """
    if _WINDOWS.match(model):
        name = PureWindowsPath(model).name
    elif model.startswith(("/", "~", ".")):
        name = PurePosixPath(model).name
    else:
        return model
    return f"{name} (a folder)" if name in (EMBEDDED, "") else name
