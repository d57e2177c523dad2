"""Signals that a question was given up: anything that says whether it is set.

Nobody waits for them; they are looked at before every forward pass. ``threading.Event`` is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["AnyOf", "Signal"]


class Signal(Protocol):
    """Something that is set once and for all."""

    def is_set(self) -> bool:
        """Return whether it is set."""


@dataclass(frozen=True)
class AnyOf:
    """Set as soon as one of some signals is; ``None`` never is."""

    signals: tuple[Signal | None, ...]

    def is_set(self) -> bool:
        return any(signal is not None and signal.is_set() for signal in self.signals)
