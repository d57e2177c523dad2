"""Who may import whom: package, integrations, recipe and benchmarks. And what a bare import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Collection
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A module imports only what stands above it, and within its own line.
LAYERS = [
    {"latent_tool.errors"},
    {"latent_tool.about", "latent_tool.cannot_tell", "latent_tool.files", "latent_tool.words"},
    {"latent_tool.validation"},
    {"latent_tool.settings"},
    {"latent_tool.request", "latent_tool.schema"},
    {"latent_tool.scores", "latent_tool.statistics"},
    {"latent_tool.images"},
    {"latent_tool.scenes"},
    {"latent_tool.method"},
    {"latent_tool.models"},
    {"latent_tool.engine"},
    {"latent_tool.checkup"},
    {"latent_tool.calibration"},
    {"latent_tool.views"},
    {"latent_tool.langchain"},
    # Documented addresses of what lives in a room above.
    {f"latent_tool.{name}" for name in ("messages", "overlay", "report", "scheduler", "tool_spec")}
    | {f"latent_tool.{name}" for name in ("chat_model", "reasoner", "remote", "router", "tool")},
    {"latent_tool"},
    {"latent_tool.testing"},
    {"latent_tool.evaluation"},
    {"latent_tool.integrations"},
    {"latent_tool.commands"},
    {"latent_tool.cli"},
    {"training"},
    {"benchmarks"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Who else may be imported, and where.
ONLY_IN = {
    "transformers": {"latent_tool.models", "training", "benchmarks"},
    "torch": {"latent_tool.method", "latent_tool.models", "latent_tool.engine", "latent_tool.checkup"}
    | {"training", "benchmarks"},
    "langchain_core": {"latent_tool.langchain", "latent_tool.testing", "latent_tool.integrations", "benchmarks"},
}
DOTTED = re.compile(r"(latent_tool|training)(\.[a-z_]+)+")


def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything that is checked."""
    folders = {
        "latent_tool": "latent_tool",
        "integrations": "latent_tool.integrations",
        "training": "training",
        "benchmarks": "benchmarks",
    }
    every = {}
    for folder, package in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            every[".".join((package, *parts)).removesuffix(".__init__")] = path
    return every


MODULES = modules()


def room_of(module: str) -> str:
    """The longest prefix of a module that has a place among the layers."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        room = ".".join(parts[:length])
        if room in RANK and (room != "latent_tool" or length == len(parts)):
            return room
    raise AssertionError(f"{module} has no place among the layers")


@cache
def imported(path: Path, *, when_run: bool = False) -> frozenset[str]:
    """Dotted names of everything a file imports, at whatever depth, by statement or by the name in a string.

    With ``when_run``, only what is imported when the module itself is: not inside functions or for type checkers.
    """
    names: set[str] = set()
    text = path.read_text()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            names.update(
                part.value
                for argument in node.args
                for part in ast.walk(argument)
                if isinstance(part, ast.Constant) and DOTTED.fullmatch(str(part.value))
            )
        if when_run and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if when_run and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(text))
    return frozenset(names)


def own(names: Collection[str]) -> set[str]:
    """Those of some imported names that are modules checked here."""
    return {name for name in names if name in MODULES}


def test_every_module_has_its_place() -> None:
    assert len(MODULES) > 100
    assert {room_of(name) for name in MODULES} <= set(RANK)
    assert set(RANK) - {room_of(name) for name in MODULES} <= {"benchmarks"}, "a layer without a module"


def test_modules_import_only_what_stands_above_them() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if module != "latent_tool"  # looks its public names up when they are first used
        for name in own(imported(path))
        if RANK[room_of(name)] > RANK[room_of(module)]
    ]
    assert not wrong


def test_there_is_no_circle() -> None:
    graph = {
        module: own(imported(path)) - {module, "latent_tool"}
        for module, path in MODULES.items()
        if module != "latent_tool" and path.name != "__init__.py"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def test_the_rooms_of_heavy_libraries() -> None:
    wrong = [
        f"{module} imports {library}"
        for module, path in MODULES.items()
        for library, rooms in ONLY_IN.items()
        if room_of(module) not in rooms and any(name.split(".")[0] == library for name in imported(path))
    ]
    assert not wrong


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after running some code."""
    script = f"{code}\nimport sys; print(' '.join(name for name in sys.modules if '.' not in name))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


def test_a_bare_import_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "langchain_core", "PIL", "numpy", "httpx"}
    assert not loaded_by("import latent_tool") & heavy
    assert not loaded_by("import latent_tool.cli") & heavy
    assert not loaded_by("from latent_tool import Budget, ReasoningRequest") & heavy
    assert not loaded_by("from latent_tool import LatentReasoner; LatentReasoner()") & {"torch", "transformers"}


TEST_ROOMS = ("unit", "models", "surfaces", "browser", "integrations")


def test_tests_do_not_import_one_another() -> None:
    """What tests share lives in tests/support, which imports none of them."""
    tests = {path.stem for room in TEST_ROOMS for path in (ROOT / "tests" / room).rglob("*.py")} - {"__init__"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for room in (*TEST_ROOMS, "support")
        for path in (ROOT / "tests" / room).rglob("*.py")
        for name in imported(path)
        if name.split(".")[-1] in tests and name.split(".")[0] in ("tests", *TEST_ROOMS, *tests)
    ]
    assert not wrong
