"""What benchmarks keep from run to run is answered anew when the model, the settings or the program has changed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def program(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_rows_with_another_key_are_answered_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = program("options", monkeypatch)
    items, dropped = options.questions("held-out scenes", 40)
    assert len(items) + len(dropped) == 40 and all(len(given) > 1 for _, given in items)
    told: list[str] = []

    def ask(some: Any) -> list[dict[str, Any]]:
        told.extend(item.id for item, _ in some)
        return [{"id": item.id} for item, _ in some]

    path = tmp_path / "rows.jsonl"
    names = [item.id for item, _ in items[:3]]
    for key, asked in (("a", names), ("a", []), ("b", names), ("a", [])):
        told.clear()
        rows = options.kept(path, key, items[:3], ask, float("inf"))
        assert told == asked and [row["id"] for row in rows] == names
    path.write_text("".join(json.dumps({"id": name}) + "\n" for name in names))  # of an older program
    options.kept(path, "a", items[:3], ask, float("inf"))
    assert told == names


def test_seeds_that_are_for_others_are_in_no_program_or_page() -> None:
    """Scenes from seed 5,900,000 on are kept for measurements that nobody here has seen."""
    import re

    root = BENCHMARKS.parent
    found = []
    for folder in ("benchmarks", "docs", "examples", "latent_tool", "tests", "integrations"):
        for path in (root / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".ipynb"):
                text = path.read_text(encoding="utf-8")
                for seeds in re.findall(r"scenes:[a-z_]+:(\d+)-(\d+)", text) + re.findall(
                    r"(?:FIRST|SEED)[A-Z_]*\s*=\s*(\d[\d_]*)()", text
                ):
                    numbers = [int(seed.replace("_", "")) for seed in seeds if seed]
                    found += [(path.name, seed) for seed in numbers if 5_900_000 <= seed < 10**9]
    assert not found
