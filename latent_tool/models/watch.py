"""Look at the clock inside a forward pass: a prefill may take seconds, and a deadline must hold there, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import Module, ModuleList

__all__ = ["watched"]


@contextmanager
def watched(model: Module, check: Callable[[], object] | None) -> Iterator[None]:
    """Call ``check`` before every layer that runs inside the ``with``; what it raises ends the forward pass.

    Nothing is left on the model afterwards.
    """

    def look(_module: Module, _arguments: Any) -> None:
        assert check is not None
        check()

    handles = [layer.register_forward_pre_hook(look) for layer in _layers(model)] if check is not None else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(module: Module) -> Iterator[Module]:
    """The members of the outermost lists of modules: the layers of vision tower and decoder."""
    for child in module.children():
        if isinstance(child, ModuleList):
            yield from child
        else:
            yield from _layers(child)
