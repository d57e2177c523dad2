"""How many threads torch computes with while a small model works: one.

A small model's matrices are too small to share out. Several threads win little where nothing else runs, and where
something does they spin for each other: a pass takes many times longer. So while a small model works on the CPU, torch
has one thread; what it had before is restored. ``use_threads`` sets a number for good, which is left alone here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread", "use_threads"]


class _Threads:
    """How many passes with one thread are under way in the process, and what they will restore."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.chosen = False
        self.inside = 0
        self.before = 1


_process = _Threads()


def use_threads(number: int) -> None:
    """Let torch compute with so many threads from now on, in the whole process, whatever the size of the model."""
    with _process.lock:
        _process.chosen, _process.before = True, number
        torch.set_num_threads(number)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside the ``with``, unless a number was chosen; may be nested, and in many threads."""
    with _process.lock:
        if _process.chosen:
            changes = False
        else:
            if not _process.inside:
                _process.before = torch.get_num_threads()
            changes = _process.before > 1
            _process.inside += 1
            if changes:
                torch.set_num_threads(1)
        counted = not _process.chosen
    try:
        yield
    finally:
        if counted:
            with _process.lock:
                _process.inside -= 1
                # The number counts for the process and for the thread that sets it, so each thread sets it back; the
                # last one out leaves the process as it was.
                if changes or _process.chosen:
                    torch.set_num_threads(_process.before)
