"""What the columns of benchmark tables mean: VLMEvalKit's, those of data sets on the hub, and eight benchmarks by name.

A row of a table becomes a row of the names that ``rows`` knows. This module knows no file format, no model and no
method.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latent_tool.errors import DatasetError, SettingsError
from latent_tool.evaluation.datasets.items import Item, StoredImage
from latent_tool.evaluation.normalising import options_in

__all__ = ["PRESETS", "Preset", "Translator", "preset_named"]

_LETTER = "Answer with the letter of the right option."
_SHORT = "Answer with a number, a word or a short phrase."
_MOST_LIST = 200_000  # characters of a cell that is read as a list

# Our names, and the columns that they are taken from: the first that a row has.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("index", "id"),
    "question": ("question", "query", "text"),
    "answer": ("answer", "answers", "label", "labels", "correct_answer"),
    "options": ("choices", "options"),
    "type": ("category", "type", "task"),
    "image": ("decoded_image", "image", "images"),
    "image_path": ("image_path",),
    "hint": ("hint",),
}


@dataclass(frozen=True)
class Preset:
    """A benchmark by name.

    Args:
        match: the rule its authors score by; ``None``: the row says.
        asks: what stands after every question.
        columns: columns of its files, where they differ from everybody's.
        groups: ``"pairs"``: two rows that follow one another by index count together (MMVP); ``"cyclic"``: rows of the
            same question and picture with their options turned do (HR-Bench).
        picture: where the picture of a row without one is, with its index.
    """

    match: str | None
    asks: str
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: str | None = None
    picture: str | None = None


PRESETS: dict[str, Preset] = {
    "mmstar": Preset("choice", _LETTER),
    "mmvp": Preset("choice", _LETTER, groups="pairs", picture="MMVP Images/{}.jpg"),
    "pope": Preset("yes-no", "Answer yes or no."),
    "vstar": Preset("choice", _LETTER, {"question": ("text", "question"), "id": ("index",)}),
    "hrbench": Preset("choice", _LETTER, groups="cyclic"),
    "chartqa": Preset("relaxed:0.05", _SHORT, {"type": ("split", "human_or_machine", "type")}),
    "textvqa": Preset("vqa:averaged", _SHORT, {"id": ("index", "question_id")}),
    "mathvista": Preset(None, _SHORT, {"id": ("index", "pid"), "type": ("task", "question_type")}),
}


def preset_named(name: str) -> Preset:
    """Return the preset of a name. Raises ``SettingsError``."""
    found = PRESETS.get(name.strip().lower())
    if found is None:
        raise SettingsError(f"There is no preset {name[:40]!r}.", f"Use one of {', '.join(PRESETS)}.")
    return found


class RowProblem(Exception):
    """What is wrong with a row."""


class Translator:
    """Turns rows of one table into rows of our names.

    Args:
        preset: the benchmark; ``None``: any table.
        folder: of the table; paths of pictures are relative to it, or to ``images`` in it.
        images: another folder for them.
        most: bytes of one encoded picture at most.
    """

    def __init__(self, preset: Preset | None, folder: Path, images: Path | None, most: int) -> None:
        self.preset = preset or Preset(None, "")
        self.folders = [images] if images is not None else [folder, folder / "images"]
        self.most = most
        self._seen: dict[str, list[Any]] = {}  # pictures of the rows before, by index

    def row(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row in our names. Raises ``RowProblem``."""
        cells = {name.strip().lower().replace(" ", "_"): value for name, value in given.items()}
        names = {**_COLUMNS, **self.preset.columns}
        taken = {
            ours: next((cells[name] for name in columns if not _empty(cells.get(name))), None)
            for ours, columns in names.items()
        }
        index = None if taken["id"] is None else str(taken["id"])
        options = self._options(given, taken["options"], cells)
        pictures = self._pictures(taken, cells, index)
        if index is not None and pictures:
            self._seen[index] = pictures
        answers = _several(taken["answer"])
        found: dict[str, Any] = {
            "id": index,
            "question": self._question(taken, options),
            "images": pictures,
            "type": taken["type"] if isinstance(taken["type"], str | int) else None,
            "options": list(options) or None,
            "match": self._rule(cells, options),
        }
        if len(answers) > 1 or (answers and self.preset.match in ("vqa", "vqa:averaged")):
            found["answers"] = answers
        elif answers:
            found["label"] = answers[0]
        return {name: value for name, value in found.items() if value is not None}

    def _options(self, given: Mapping[str, Any], listed: Any, cells: Mapping[str, Any]) -> tuple[str, ...]:
        """Options of the columns A, B, ..., or of a column that lists them."""
        lettered = []
        for place in range(26):
            value = given.get(chr(ord("A") + place))
            if _empty(value):
                break
            lettered.append(str(value).strip())
        if len(lettered) > 1:
            return tuple(lettered)
        if _empty(listed) or str(cells.get("question_type", "multi_choice")) != "multi_choice":
            return ()
        if isinstance(listed, str) and not listed.strip().startswith("["):
            return options_in(f"Options: {listed}")
        several = _several(listed)
        return tuple(several) if len(several) > 1 else ()

    def _question(self, taken: Mapping[str, Any], options: Sequence[str]) -> str | None:
        asked = taken["question"]
        if not isinstance(asked, str):
            return None
        asked = asked.replace("<image>", " ").strip()
        parts = [taken["hint"] if isinstance(taken["hint"], str) else "", asked]
        own = options_in(asked)
        if options and not own:
            parts.append("Options:")
            parts += [f"{chr(ord('A') + place)}. {option}" for place, option in enumerate(options)]
        asks = self.preset.asks
        parts.append(_LETTER if options and asks != "Answer yes or no." else asks if asks not in asked else "")
        return "\n".join(part for part in parts if part)

    def _rule(self, cells: Mapping[str, Any], options: Sequence[str]) -> str | None:
        if self.preset is PRESETS["mathvista"]:
            kind = str(cells.get("answer_type") or "")
            if options:
                return "choice"
            if kind == "integer":
                return "rounded:0"
            precision = cells.get("precision")
            if kind == "float" and not _empty(precision):
                return f"rounded:{int(float(str(precision)))}"
            return "numeric" if kind == "float" else "exact"
        if options and self.preset.match is None:
            return "choice"
        return self.preset.match

    # ------------------------------------------------------------------ pictures

    def _pictures(self, taken: Mapping[str, Any], cells: Mapping[str, Any], index: str | None) -> list[Any]:
        given = taken["image"]
        listed = given if isinstance(given, list) else [] if given is None else [given]
        if len(listed) == 1 and isinstance(listed[0], str) and listed[0] in self._seen:
            return self._seen[listed[0]]
        if not listed:
            listed = _several(taken["image_path"])
        if not listed and self.preset.picture is not None and index is not None and index.isalnum():
            listed = [self.preset.picture.format(index)]
        return [self._picture(each) for each in listed]

    def _picture(self, given: Any) -> str | StoredImage:
        if isinstance(given, str):
            return self._file(given)
        if not hasattr(given, "digest"):
            raise RowProblem("there is no image")
        picture: StoredImage = given
        if picture.size > self.most:
            raise RowProblem(f"an image has {picture.size:,} bytes; at most {self.most:,} are allowed")
        return picture

    def _file(self, named: str) -> str:
        """A picture's file, which lies in the folder of the table or in that of its pictures."""
        if named.startswith(("http:", "https:", "data:", "file:")):
            raise RowProblem("an image is given by a URL, which is not opened")
        outside = False
        for folder in self.folders:
            try:
                path = Path(named) if Path(named).is_absolute() else folder / named
                if not path.resolve().is_relative_to(folder.resolve()):
                    outside = True
                    continue
                if path.is_file():
                    return os.path.abspath(path)
            except (OSError, ValueError, RuntimeError):  # no file can have this name
                continue
        if outside:
            raise RowProblem(f"the image {named[:200]} lies outside the folder of the images")
        raise RowProblem(f"there is no image {named[:200]}")

    def name_of(self, picture: str) -> str:
        """Return what a picture's file is called in its folder: a run is read where the folder is another one."""
        for folder in self.folders:
            for top in (os.path.abspath(folder), os.path.realpath(folder)):
                if Path(picture).is_relative_to(top):
                    return Path(picture).relative_to(top).as_posix()
        return picture

    # ------------------------------------------------------------------ groups

    def grouped(self, items: list[Item]) -> list[Item]:
        """Return the items with the groups that the benchmark counts together. Raises ``DatasetError``."""
        if self.preset.groups == "pairs":
            return _in_pairs(items)
        return _in_cycles(items) if self.preset.groups == "cyclic" else items


def _in_pairs(items: list[Item]) -> list[Item]:
    """Rows that follow one another by index, two by two; rows of no use stand where they stood in a sorted file."""
    numbers = [
        int(item.id) if item.id.isascii() and item.id.isdigit() and len(item.id) < 19 else None for item in items
    ]
    known = [number for number in numbers if number is not None]
    unsound = any(number is None and item.problem is None for number, item in zip(numbers, items, strict=True))
    if len(items) % 2 or unsound or (len(known) < len(items) and known != sorted(known)):
        raise DatasetError("The rows do not come in pairs by their index.", "Give the whole file.")
    order = list(items)
    if len(known) == len(items):
        order.sort(key=lambda item: int(item.id))
    group = {item.id: str(place // 2 + 1) for place, item in enumerate(order)}
    return [replace(item, group=group[item.id]) for item in items]


def _in_cycles(items: list[Item]) -> list[Item]:
    """Rows of one question and one picture whose options are the same up to their order."""
    groups: dict[tuple[object, ...], str] = {}
    found = []
    for item in items:
        asked = item.question.partition("\nOptions:")[0]
        key = (asked, item.content, tuple(sorted(item.match.options)))
        group = groups.setdefault(key, item.id)
        found.append(item if item.problem else replace(item, group=group))
    return found


def _empty(value: Any) -> bool:
    return value is None or value == "" or value == [] or (isinstance(value, float) and value != value)


def _several(value: Any) -> list[Any]:
    """The values of a cell that is a list, or written as one; else the value alone."""
    if _empty(value):
        return []
    if isinstance(value, list):
        return [each for each in value if not _empty(each)]
    if isinstance(value, str) and value.strip().startswith("[") and len(value) <= _MOST_LIST:
        try:
            read = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value]
        if isinstance(read, list) and all(isinstance(each, str | int | float) for each in read):
            return [each for each in read if not _empty(each)]
    return [value]
