"""A short soak: mixed requests from threads and asyncio, deadlines by a clock that counts how often it is looked at."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from latent_tool import LatentReasoner
from latent_tool.engine.engine import Engine

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.fixture
def soak(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's module, its requests answered by an engine whose clock moves 0.1 ms per look."""
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", module)
    spec.loader.exec_module(module)
    ticks = itertools.count()
    timed = Engine(engine.vlm, clock=lambda: next(ticks) / 10_000)
    for module_with_a_clock in ("langchain.reasoner", "images.limits"):
        monkeypatch.setattr(f"latent_tool.{module_with_a_clock}.time", SimpleNamespace(monotonic=timed.clock))
    monkeypatch.setattr(LatentReasoner, "engine", lambda self: timed)
    return module


@pytest.mark.slow
def test_a_soak(soak: ModuleType) -> None:
    """Every request has one verdict, the right one; nothing is left behind."""
    found = soak.soak(requests=80, warm_up=20)
    assert found["problems"] == []
    assert (found["lost"], found["swapped"], found["crashed"]) == (0, 0, 0)
    assert (found["threads_left"], found["files_left"]) == (0, 0)
    assert sum(found["verdicts"].values()) == 80
    assert found["verdicts"].get("near-tie", 0) <= 2
    assert found["verdicts"]["equal"] >= 30
    assert {"equal", "invalid", "cancelled", "deadline", "cut"} <= set(found["verdicts"])


def test_the_soak_would_notice(soak: ModuleType) -> None:
    """Swapped, wrong and lost answers are told apart from good ones."""
    work, tally = soak.Soak(), soak.Tally()
    first, second = work.expected[:2]
    valid, gone = (soak.Case(0, kind, "invoke", 0, 0.0) for kind in ("valid", "cancelled"))
    assert work.judge(valid, first) == "equal"
    assert work.judge(valid, second) == "swapped"
    assert work.judge(valid, first.model_copy(update={"answer": "?"})) == "near-tie"
    assert work.judge(valid, RuntimeError("x")).startswith("crashed")
    assert work.judge(gone, first).startswith("crashed")
    tally.note(valid, "equal")
    tally.note(valid, "equal")
    assert len(tally.problems) == 1
    kinds = Counter(case.kind for case in work.cases(0, 1000, 0))
    assert set(kinds) == set(soak.SHARES)
