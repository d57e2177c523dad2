"""Who may import whom, and what a bare import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import latent_tool

PACKAGE = Path(latent_tool.__file__).parent

# A module imports only what stands above it (and within its own line).
LAYERS = [
    {"errors"},
    {"files", "redact"},
    {"settings"},
    {"schema"},
    {"image_bytes", "image_process", "image_download", "images"},
    {"scenes"},
    {"method"},
    {"models"},
    {"engine"},
    {"scheduler"},
    {"calibration", "calibration_fit"},
    {"overlay"},
    {"report"},
    {"terminal"},
    {"messages"},
    {"reasoner"},
    {"remote"},
    {"tool_spec"},
    {"tool"},
    {"chat_model"},
    {"router"},
    {"evaluation"},
    {"integrations"},
    {"commands"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Who else may be imported, and where.
ONLY_IN = {
    "transformers": {"models"},
    "torch": {"method", "models", "engine"},
    "langchain_core": {"messages", "reasoner", "remote", "tool", "chat_model", "router"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at whatever depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            names |= {node.module}
            if node.module == "latent_tool":
                names |= {f"latent_tool.{alias.name}" for alias in node.names}
    return names


def files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE]


def test_every_module_has_its_place() -> None:
    assert {room_of(path) for path in files()} <= set(RANK)


def test_modules_import_only_what_stands_above_them() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files()
        for name in imported(path)
        if name.startswith("latent_tool.") and RANK[name.split(".")[1]] > RANK[room_of(path)]
    ]
    assert not wrong


def test_the_rooms_of_heavy_libraries() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {library}"
        for path in files()
        for library, rooms in ONLY_IN.items()
        if room_of(path) not in rooms and any(name.split(".")[0] == library for name in imported(path))
    ]
    assert not wrong


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after running some code."""
    script = f"{code}\nimport sys; print(' '.join(name for name in sys.modules if '.' not in name))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_a_bare_import_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "langchain_core", "PIL", "numpy", "httpx"}
    assert not loaded_by("import latent_tool") & heavy
    assert not loaded_by("import latent_tool.cli") & heavy
    assert not loaded_by("from latent_tool import Budget, ReasoningRequest") & heavy
    assert not loaded_by("from latent_tool import LatentReasoner; LatentReasoner()") & {"torch", "transformers"}
