"""What the embedded model is, in one sentence, for every place where somebody meets it. Knows nothing else."""

from __future__ import annotations

from typing import Literal

__all__ = ["EMBEDDED", "Surface", "what_it_is"]

EMBEDDED = "embedded"

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
