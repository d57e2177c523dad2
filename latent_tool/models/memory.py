"""Whether memory ran out, on whatever device."""

from __future__ import annotations

import re

import torch

__all__ = ["out_of_memory"]

_NO_MEMORY = re.compile(r"out of memory|can(no|')t allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out; the CPU's allocator raises a bare ``RuntimeError``."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
