"""A clock for deadlines that come after so many looks at it, on any machine."""

from __future__ import annotations


class Ticking:
    """A clock that moves one second whenever it is looked at."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        self.time += 1.0
        return self.time
