"""What benchmarks keep from run to run is answered anew when the model, the settings or the program has changed."""

from __future__ import annotations

import importlib.util
import json
import re
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


# Wherever seeds are named: of scenes, of a range, of a keyword or a constant, as an option's default.
NAMED = re.compile(
    r"scenes:[a-z_]+:(\d[\d_]*)(?:-(\d[\d_]*))?"
    r"|(?:first|seeds?)\w*[\"']?\s*[=:]\s*(\d[\d_]*)|default=(\d[\d_]*)|(?:generate|range)\(\s*(\d[\d_]*)",
    re.IGNORECASE,
)
MILLIONS = re.compile(r"(?<![\w.])(?<!\d,)(\d[_,]?\d{3}[_,]?\d{3})(?![\w]|[.,]\d)")


def kept_seeds(text: str, *, named: bool) -> list[str]:
    """The numbers of a text that are seeds kept for others; ``named``: only where they are said to be seeds."""
    found = [number for match in (NAMED if named else MILLIONS).finditer(text) for number in match.groups() if number]
    return [seed for seed in found if 5_900_000 <= int(re.sub("[_,]", "", seed)) < 10**7]


def test_seeds_that_are_for_others_are_in_no_program_or_page() -> None:
    """Scenes from seed 5,900,000 on are kept for measurements that nobody here has seen.

    What measures or is read holds no such number at all. The package and its tests have other numbers of that size,
    such as bytes. Training draws from seeds of a split of its own, "train", which nothing is measured on.
    """
    root = BENCHMARKS.parent
    found = []
    for folder, named in {
        **dict.fromkeys(("benchmarks", "docs", "examples", ".ci", "Makefile", "README.md"), False),
        **dict.fromkeys(("latent_tool", "tests", "integrations"), True),
    }.items():
        top = root / folder
        for path in [top] if top.is_file() else top.rglob("*"):
            if path.is_file() and path.suffix in (".py", ".md", ".ipynb", "") and path != Path(__file__):
                text = path.read_text(encoding="utf-8")
                found += [(path.name, seed) for seed in kept_seeds(text, named=named)]
    assert not found


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("first_seed=5_900_000", True),
        ("FIRST = 5_900_000", True),
        ('parser.add_argument("--start", default=5_900_000)', True),
        ("scenes:hard:5899999-5900000", True),
        ("scenes:hard:5899999-5_900_000", True),
        ('generate(5_910_000 + number, "held_out")', True),
        ("from 5,900,000 on", False),
        ("START ?= 5900000", False),
        ("seeds 5_900_000, 3", False),
        ("scenes:hard:5900000-9999999", False),
    ],
)
def test_seeds_that_are_for_others_are_found(text: str, named: bool) -> None:
    assert kept_seeds(text, named=named)
    below = text.replace("9999999", "5800000")
    for nine, eight in (("59", "58"), ("5,9", "5,8"), ("5_9", "5_8")):
        below = below.replace(nine, eight)
    assert not kept_seeds(below, named=named)


def test_other_numbers_are_no_seeds() -> None:
    for text in ("0.5912345", "5,899,999", "a5912345", "15,900,000", "5.9 million", "59123456", "1e5912345"):
        assert not kept_seeds(text, named=False)
