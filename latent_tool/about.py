"""What the embedded model is, in one sentence, for every place where somebody meets it. Knows nothing else."""

from __future__ import annotations

__all__ = ["EMBEDDED", "what_it_is"]

EMBEDDED = "embedded"


def what_it_is(model: str, naming: str = "--model") -> str | None:
    """Say what the embedded model is, and how to name another; ``None`` for any other model.

    Args:
        model: name of the model that answers.
        naming: how a model is named where this is read: ``--model`` on the command line, ``model=`` in Python.
    """
    if model != EMBEDDED:
        return None
    return f"The embedded model is a small model of synthetic scenes; name a real one with {naming}."
