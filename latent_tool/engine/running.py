"""Which engines run in this process, by the name of their model: for whoever asks how a server is.

Looking loads nothing. This module knows neither torch nor models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

__all__ = ["Running", "note", "running"]


class Loaded(Protocol):
    """What is looked at of an engine."""

    @property
    def vlm(self) -> Any: ...

    @property
    def attached(self) -> Mapping[str, Any]: ...


_engines: dict[str, Loaded] = {}


class Running(NamedTuple):
    """How an engine is at this moment."""

    device: str
    waiting: int  # questions that wait for their turn
    active: int  # questions under way in the scheduler


def note(model: str, engine: Loaded) -> None:
    """Write down that an engine of this model is there now."""
    _engines[model] = engine


def running(model: str) -> Running | None:
    """Tell how the engine of a model is; ``None`` while none is loaded."""
    engine = _engines.get(model)
    if engine is None:
        return None
    scheduler = engine.attached.get("scheduler")
    waiting, active = (0, 0) if scheduler is None else (scheduler.waiting, scheduler.active)
    return Running(str(engine.vlm.device), waiting, active)
