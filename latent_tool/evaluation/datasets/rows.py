"""Turn rows into items: what the fields of a row mean, and everything that can be wrong with them.

What is wrong with a row becomes the ``problem`` of its item; no row ends the reading of the others. This module knows
no file format, no model and no method.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from latent_tool.errors import DatasetError, ImageNotAllowedError, LatentToolError
from latent_tool.evaluation.datasets.benchmarks import Preset, RowProblem, Translator
from latent_tool.evaluation.datasets.formats import ALIASES, Rows, csv_rows, json_rows, jsonl_rows, problem_of
from latent_tool.evaluation.datasets.items import Box, Item, StoredImage, broken_item, open_images, sound
from latent_tool.evaluation.datasets.parquet import parquet_rows, shards_of
from latent_tool.evaluation.datasets.tables import table_rows
from latent_tool.evaluation.matching import Match
from latent_tool.evaluation.normalising import is_letter, options_in, split_letter, unwrap
from latent_tool.files import reason
from latent_tool.settings import ImagePolicy
from latent_tool.words import shown_image

__all__ = ["Reader"]

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_LABEL_FILES = ("labels.jsonl", "labels.csv", "labels.json")
_ELSEWHERE = ("data:", "http://", "https://")


class Reader:
    """Turns rows of a file into items; see ``load_dataset`` for what it is told."""

    def __init__(
        self,
        policy: ImagePolicy,
        match: Match | None,
        question: str | None,
        unlabelled: bool,
        preset: Preset | None = None,
        images: Path | None = None,
    ) -> None:
        self.policy = policy
        self.preset = preset
        self.images = images
        self.match = match
        self.question = question
        self.unlabelled = unlabelled
        self.indices = False  # whether a label in text was an index for certain
        self.either: dict[str, str] = {}  # what is wrong with the items whose label is one, if others' are

    def read(self, path: Path) -> list[Item]:
        """Return all items of a file, or of a folder with a labels file."""
        try:
            there, folder = path.exists(), path.is_dir()
        except (OSError, ValueError):  # a name that no file can have
            there = folder = False
        if not there:
            raise DatasetError(
                f"There is no data set {str(path)[:200]!r}.",
                "Give a .jsonl, .csv, .tsv, .json or .parquet file, a folder of images with labels, easy-vqa or "
                "scenes.",
            )
        if folder:
            labels = next((path / name for name in _LABEL_FILES if (path / name).is_file()), None)
            if labels is not None:
                return self._unmentioned(path, self.read(labels))
            if not any(path.glob("*.parquet")):
                raise DatasetError(
                    f"The folder {path.name!r} has no labels.",
                    f"Put one of {', '.join(_LABEL_FILES)} or parquet files into it.",
                )
        rows, translator = self._rows(path, folder)
        items: list[Item] = []
        seen: dict[str, int] = {}
        for number, (line, row) in enumerate(rows):
            item = self._item(number, line, row, path.parent, translator)
            if item.id in seen:
                problem = f"the id {item.id[:100]!r} was used on line {seen[item.id]} already"
                name = f"{item.id} (line {line})"
                while name in seen:
                    name += "'"
                item = replace(item, id=name, problem=item.problem or problem)
            seen[item.id] = line
            items.append(item)
        items = self._without_ambiguity(items)
        return items if translator is None else translator.grouped(items)

    def _rows(self, path: Path, folder: bool) -> tuple[Rows, Translator | None]:
        """The rows of a file or of a folder of shards, and what their columns mean if those are a benchmark's."""
        suffix = ".parquet" if folder else path.suffix.lower()
        table = self.preset is not None or suffix in (".tsv", ".parquet")
        home = path if folder else path.parent
        translator = Translator(self.preset, home, self.images, self.policy.max_bytes) if table else None
        if suffix == ".parquet":
            return parquet_rows(shards_of(path)), translator
        if suffix == ".tsv" or (suffix == ".csv" and self.preset is not None):
            return table_rows(path, "," if suffix == ".csv" else "\t"), translator
        rows = {".jsonl": jsonl_rows, ".csv": csv_rows, ".json": json_rows}.get(suffix)
        if rows is None:
            raise DatasetError(
                f"{path.name!r} is no data set that can be read.", "Give a .jsonl, .csv, .json, .tsv or .parquet file."
            )
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(
                f"{path.name[:200]!r} cannot be read ({reason(error)}).",
                "Give a readable file in UTF-8.",
            ) from None
        return rows(text, path.name), translator

    def _without_ambiguity(self, items: list[Item]) -> list[Item]:
        """The items of one file, whose labels that are indices in text are not taken for the options' texts.

        Where some row's label can only be an index (``"2"`` among ``red``, ``blue`` and ``green``), the others' may be,
        too: ``"2"`` among ``4``, ``2`` and ``3`` then has two meanings.
        """
        if not self.indices:
            return items
        return [
            replace(item, problem=self.either[item.id]) if item.id in self.either and item.problem is None else item
            for item in items
        ]

    def _unmentioned(self, folder: Path, items: list[Item]) -> list[Item]:
        """The items, and one with a problem for every picture of the folder that no row names."""
        named = {part for item in items for part in item.content.split("|") if part}
        for picture in sorted(folder.iterdir()):
            if picture.suffix.lower() not in _IMAGE_SUFFIXES:
                continue
            try:
                known = _content(str(picture)) in named
            except _RowError:
                known = False
            if not known:
                name = sound(picture.name)
                items.append(broken_item(f"unlabelled: {name}", None, f"no row is about the picture {name}"))
        return items

    def _item(
        self, number: int, line: int, row: Mapping[str, Any] | str, folder: Path, translator: Translator | None
    ) -> Item:
        """One row as an item; what is wrong with it becomes its ``problem``.

        Without an id of its own, a row of a DMLR file is known by its place in the list, others by their line.
        """
        fallback = f"line {line}"
        if isinstance(row, str):
            return broken_item(fallback, line, row)
        if translator is not None:
            try:
                if said := problem_of(row):
                    return broken_item(fallback, line, said)
                row = translator.row(row)
            except Exception as error:  # whatever is wrong with a row is its own
                said = str(error) if isinstance(error, RowProblem) else f"{type(error).__name__}: {str(error)[:200]}"
                return broken_item(fallback, line, said)
            if self.match is not None:
                row.pop("match", None)
        dmlr = "prompt" in row and "solution" in row
        fields: dict[str, Any] = {}
        names: dict[str, str] = {}
        problem = problem_of(row)
        for given, value in row.items():
            if value in (None, ""):
                continue
            known = ALIASES.get(given, given)
            if (other := names.setdefault("image" if known == "images" else known, given)) != given:
                problem = f"{other!r} and {given!r} are two names of one field"
            fields[known] = value
        name = str(number) if dmlr else fallback
        try:
            name = sound(_scalar(fields, "id") or name)
            if problem:
                raise _RowError(problem)
            question = _text(fields.get("question", self.question), "question")
            answers = _answers(fields.get("answers"))
            label = max(answers, key=answers.count) if answers else None
            if fields.get("label") is not None:
                label = _label(fields["label"])
                answers = answers and (answers if label in answers else (label, *answers))
            if label is None and not self.unlabelled:
                raise _RowError("there is no label")
            match = self._match(fields, question, label, dmlr)
            if answers:
                match = replace(match, answers=answers)
            elif label is not None and match.kind == "choice" and match.options:
                label = self._indexed(name, fields, match, label)
            problem = None if label is None else match.problem(label)
            if problem:
                raise _RowError(problem)
            references = self._references(fields, folder)
            return Item(
                name,
                question.replace("<image>", "").strip() if dmlr else question,
                label,
                partial(open_images, tuple(references), self.policy),
                type=_scalar(fields, "type"),
                match=match,
                boxes=_boxes(fields.get("boxes")),
                reasoning=_scalar(fields, "reasoning"),
                line=line,
                content="|".join(_content(reference) for reference in references),
                images=tuple(
                    shown_image(reference if translator is None else translator.name_of(reference))
                    if isinstance(reference, str)
                    else f"<image of line {line}>"
                    for reference in _named_images(fields)
                ),
                group=_scalar(fields, "group"),
            )
        except LatentToolError as error:
            return broken_item(name, line, error.message.rstrip("."), fields)
        except Exception as error:  # whatever is wrong with a row is its own
            said = str(error) if isinstance(error, _RowError) else f"{type(error).__name__}: {str(error)[:200]}"
            return broken_item(name, line, said, fields)

    def _indexed(self, name: str, fields: Mapping[str, Any], match: Match, label: str) -> str:
        """The label, or the option that it is the index of; an index counts from 0.

        A whole number in JSON among options in text is an index. In text it is the option of that text, if there is
        one, else an index. Raises ``_RowError`` where a number may be both an option and another's index.
        """
        given = fields["label"]
        whole = isinstance(given, float) and given.is_integer()
        if isinstance(given, bool) or not (whole or isinstance(given, int) or (label.isascii() and label.isdigit())):
            return label
        place = int(given) if whole else int(label)
        named = match.chosen(label)
        inside = 0 <= place < len(match.options)
        if not inside:
            return label
        option = chr(ord("A") + place)
        if named is None:
            self.indices = self.indices or isinstance(given, str)
            return option
        if named == place:
            return label
        doubt = f"the label {label} is the text of one option and the index of another: give its letter or its text"
        if isinstance(given, str):
            self.either[name] = doubt
            return label
        listed = fields.get("options")
        if isinstance(listed, list) and all(isinstance(value, str) for value in listed):
            return option
        raise _RowError(doubt)

    def _match(self, fields: Mapping[str, Any], question: str, label: str | None, dmlr: bool) -> Match:
        options = _options(fields.get("options"))
        named = _scalar(fields, "match")
        given = self.match if named is None else Match.parse(named, options, custom=False)
        if given is not None:
            return replace(given, options=options or (options_in(question) if given.kind == "choice" else ()))
        if options:
            return Match("choice", options)
        if label is None:
            return Match()
        given_label = fields.get("label")
        number = isinstance(given_label, int | float) and not isinstance(given_label, bool)
        listed = Match("choice", options_in(question))
        if listed.options and (
            listed.problem(label) is None
            or split_letter(label)[0] is not None
            or (number and label.isdigit() and int(label) < len(listed.options))
        ):
            return listed
        if is_letter(label):
            return Match("choice")
        return Match("numeric") if number or (dmlr and _is_number(label)) else Match()

    def _references(self, fields: Mapping[str, Any], folder: Path) -> list[str | StoredImage]:
        """Image references, with paths made absolute from the file's folder; missing files are a problem."""
        references: list[str | StoredImage] = []
        for named in _named_images(fields):
            if not isinstance(named, str) or named.startswith(_ELSEWHERE):
                references.append(named)
                continue
            try:
                path = Path(named).expanduser()
                path = path if path.is_absolute() else folder / path
                self._check_policy(path)
                there = path.is_file()
            except LatentToolError:
                raise
            except (OSError, ValueError, RuntimeError):  # no file can have this name, or there is no such user
                there = False
            if not there:
                raise _RowError(f"there is no image {named[:200]}")
            references.append(os.path.abspath(path))  # other processes may be in another folder
        return references

    def _check_policy(self, path: Path) -> None:
        """Refuse files that the policy does not allow before anything about them is looked at."""
        if self.policy.files == "any":
            return
        folders = [folder.resolve() for folder in self.policy.folders]
        if not any(path.resolve().is_relative_to(folder) for folder in folders):
            raise ImageNotAllowedError(f"The image policy does not allow the file {path.name}.")


class _RowError(Exception):
    """What is wrong with a row."""


def _named_images(fields: Mapping[str, Any]) -> list[str | StoredImage]:
    """The image references as a row has them."""
    given = fields.get("images", fields.get("image"))
    listed = given if isinstance(given, list) else [given]
    if not listed or not all(
        reference.strip() if isinstance(reference, str) else hasattr(reference, "digest") for reference in listed
    ):
        raise _RowError("there is no image")
    return listed


def _scalar(fields: Mapping[str, Any], field: str) -> str | None:
    """A field as text; ``None`` where it is not given."""
    value = fields.get(field)
    if value is None:
        return None
    if not isinstance(value, str | int | float):
        raise _RowError(f"the {field} is neither a text nor a number")
    return str(value)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _RowError(f"there is no {field}")
    return value


def _label(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str | int | float):
        raise _RowError("the label is neither a text nor a number")
    return unwrap(str(value))


def _answers(value: Any) -> tuple[str, ...]:
    """Accepted answers as a list; each as often as it was given."""
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise _RowError("the answers are no list of texts")
    return tuple(_label(each) for each in value)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text.replace(",", "")))
    except ValueError:
        return False


def _options(value: Any) -> tuple[str, ...]:
    """Options as a list, or as a text with ``|`` between them."""
    if value is None:
        return ()
    listed = value.split("|") if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(option, str | int | float) for option in listed):
        raise _RowError("the options are neither a list of texts nor a text with | between them")
    options = tuple(str(option).strip() for option in listed)
    if not all(options) or len(options) < 2:
        raise _RowError("there are fewer than two options, or an empty one")
    return options


def _boxes(value: Any) -> tuple[Box, ...] | None:
    """Boxes as a list of four numbers each (as JSON text in CSV)."""
    if value is None:
        return None
    try:
        listed = json.loads(value) if isinstance(value, str) else value
        boxes = [(float(left), float(top), float(right), float(bottom)) for left, top, right, bottom in listed]
        finite = all(math.isfinite(side) for box in boxes for side in box)
    except (TypeError, ValueError, OverflowError, RecursionError):
        finite = False
    if not finite:
        raise _RowError("boxes are no list of [left, top, right, bottom]")
    return tuple(boxes)


@lru_cache(maxsize=100_000)
def _file_hash(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(reference: str | StoredImage) -> str:
    """What identifies an image: the hash of a file, or of the reference itself."""
    if not isinstance(reference, str):
        return reference.digest
    if reference.startswith(_ELSEWHERE):
        return hashlib.sha256(reference.encode()).hexdigest()
    try:
        facts = os.stat(reference)  # a file that was written over is another one
        return _file_hash(Path(reference), facts.st_mtime_ns, facts.st_size)
    except OSError as error:
        raise _RowError(f"the image cannot be read ({error.strerror})") from None
