"""The pages at the top and in docs: what they name exists, and pages that programs wrote stay where they belong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = [ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG", "SECURITY")]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
MEASURED = sorted((ROOT / "docs" / "measured").glob("*.md"))
PAPER = "arxiv.org/abs/2512.12623"


def tree() -> list[str]:
    """Paths that the tree in ARCHITECTURE.md names, folders with a slash at the end."""
    block = re.search(r"## The tree\n\n```\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    assert block is not None
    paths: list[str] = []
    above: list[str] = []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r" {2,}", line.strip())[0].split()
        assert len(re.split(r" {2,}", line.strip())) == 2, f"no description: {line}"
        above = above[:depth]
        paths += ["".join([*above, name]) for name in names]
        above.append(names[0] if names[0].endswith("/") else "")
    return paths


def test_the_tree_names_what_exists() -> None:
    for path in tree():
        place = ROOT / path
        assert place.is_dir() if path.endswith("/") else place.is_file(), path


def test_the_tree_names_every_room() -> None:
    package = ROOT / "latent_tool"
    rooms = {f"latent_tool/{place.parent.name}/" for place in package.glob("*/__init__.py")}
    modules = {f"latent_tool/{place.name}" for place in package.glob("*.py")} - {"latent_tool/__init__.py"}
    folders = {f"{place.parent.name}/" for place in ROOT.glob("*/__init__.py")}
    missing = (rooms | modules | folders) - set(tree())
    assert not missing, "give each a line in the tree of ARCHITECTURE.md"


def anchors(text: str) -> set[str]:
    """What the headings of a page can be linked by."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*TOP, *GUIDES, *MEASURED], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_exist(page: Path) -> None:
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if target.startswith(("https://", "http://")):
            continue
        place = page.parent / target if target else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place.read_text()), f"{target}#{anchor}"
    for target in re.findall(r"`((?:latent_tool|integrations|tests|benchmarks|docs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / target).exists(), target


def test_measured_pages_are_text_and_name_their_command() -> None:
    assert len(MEASURED) >= 7
    for page in MEASURED:
        text = page.read_bytes().decode()
        assert "\0" not in text
        assert re.search(r"`?(?:make [a-z]+|python benchmarks/\w+\.py|latent-tool (?:study|eval))", text), page


def test_guides_stay_short() -> None:
    generated = re.compile(r"<!-- families:.*?<!-- end of families -->", re.DOTALL)
    assert sum(len(generated.sub("", page.read_text()).split()) for page in GUIDES) <= 12_000
    assert all(
        len(page.read_text().split()) < 3_000 for page in [*GUIDES, *TOP, *MEASURED] if page.stem != "evaluation"
    )


def test_the_paper_is_cited() -> None:
    for name in ("README.md", "ARCHITECTURE.md", "CITATION.cff"):
        assert PAPER in (ROOT / name).read_text(), name
