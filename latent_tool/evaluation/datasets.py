"""Labelled questions about images, from files, from easy-VQA and from the embedded model's own scenes.

``load_dataset`` reads everything but the pixels, which ``Item.load`` opens when a question is asked. A row that cannot
be used is named by its line: it raises ``DatasetError``, or becomes an item that carries its ``problem``; none is
dropped. This module knows nothing of models or of methods.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from latent_tool.errors import DatasetError, ImageNotAllowedError, LatentToolError, MissingExtraError, SettingsError
from latent_tool.evaluation.matching import Match, is_letter, options_in, split_letter
from latent_tool.settings import ImagePolicy

if TYPE_CHECKING:
    from PIL.Image import Image

    from latent_tool.scenes import Scene

__all__ = ["Box", "Item", "dataset_fingerprint", "load_dataset", "sample"]

Box = tuple[float, float, float, float]
Loader = Callable[[], "tuple[Image, ...]"]

SCENE_SEEDS = range(5_000_000, 5_000_100)
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_LABEL_FILES = ("labels.jsonl", "labels.csv", "labels.json")
_FIELDS = {"id", "image", "images", "question", "label", "type", "match", "options", "boxes", "reasoning"}
# Other names under which fields are known: DMLR's, and what people write.
_ALIASES = {
    "idx": "id",
    "image_path": "image",
    "image_paths": "images",
    "file": "image",
    "file_name": "image",
    "prompt": "question",
    "solution": "label",
    "answer": "label",
    "category": "type",
    "choices": "options",
}
_RANGE = re.compile(r"(\d+)-(\d+)")
_BOXED = re.compile(r"\\boxed\s*\{")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
# As Markdown has it: no space inside next to the signs, no digit after them, so that prices are left alone.
_FORMULA = re.compile(r"\$(?=\S)([^$]*?)(?<=\S)\$(?!\d)")


@dataclass(frozen=True)
class Item:
    """One question with what is known about it.

    Args:
        id: its name, unique in the data set.
        question: what is asked.
        label: the right answer; ``None`` if there is none.
        loader: opens the images; may raise an ``ImageError``.
        type: kind of question, for tables by kind.
        match: when an answer is right.
        boxes: what the answer rests on, in pixels of the first image; ``None`` if not known.
        reasoning: a true reasoning that leads to the answer; ``None`` if not known.
        line: line of the data set's file, from 1.
        problem: why the row cannot be used; such an item is never asked.
        content: identifies the images in the data set's fingerprint.
    """

    id: str
    question: str
    label: str | None
    loader: Loader
    type: str | None = None
    match: Match = field(default_factory=Match)
    boxes: tuple[Box, ...] | None = None
    reasoning: str | None = None
    line: int | None = None
    problem: str | None = None
    content: str = ""

    def load(self) -> tuple[Image, ...]:
        """The images, upright RGB."""
        return self.loader()


def load_dataset(
    spec: str | Path,
    *,
    match: str | None = None,
    question: str | None = None,
    policy: ImagePolicy | None = None,
    keep_going: bool = False,
    unlabelled: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> list[Item]:
    """The questions of a data set.

    Args:
        spec: a ``.jsonl``, ``.csv`` or ``.json`` file, a folder of images with a file ``labels.jsonl``, ``.csv`` or
            ``.json`` in it, ``easy-vqa[:test|train]`` or ``scenes[:split[:first-last]]`` (seeds, both included; one
            question about each scene).
        match: rule for rows that name none (``Match.parse``). By default multiple choice where a row or its question
            lists options that the label is one of, or where the label is a marked letter; numeric for numbers in JSON
            and in DMLR files; else exact. Rows may name exact, choice and numeric, never a function.
        question: asked where a row has none.
        policy: which images may be opened; by default any readable file.
        keep_going: rows that cannot be used become items with a ``problem`` instead of an error.
        unlabelled: rows need no label.
        limit: at most so many items, drawn with ``seed``; they keep their order.

    Raises ``DatasetError`` (with the lines in ``problems``), ``SettingsError`` and ``MissingExtraError``.
    """
    text = str(spec)
    name, _, rest = text.partition(":")
    default = None if match is None else Match.parse(match)
    if name == "scenes":
        items = _scenes(rest)
    elif name == "easy-vqa":
        items = _easy_vqa(rest or "test")
    else:
        reader = _Reader(policy or ImagePolicy.local(), default, question, unlabelled)
        items = reader.read(Path(text).expanduser())
    if not items:
        raise DatasetError(f"The data set {text!r} has no questions.", "Check the file, or the range of scenes.")
    problems = tuple(_named(item) for item in items if item.problem)
    if problems and not keep_going:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise DatasetError(
            f"{len(problems)} of {len(items)} rows cannot be used: {shown}.",
            "Mend them, or go on with the others (keep_going, --keep-going): they are then recorded as errors.",
            problems,
        )
    return items if limit is None else sample(items, limit, seed)


def sample(items: Sequence[Item], number: int, seed: int = 0) -> list[Item]:
    """At most ``number`` items drawn without replacement, in their own order."""
    if number < 1:
        raise SettingsError("A sample has at least one item.", "Use a number of 1 or more.")
    if number >= len(items):
        return list(items)
    return [items[place] for place in sorted(random.Random(seed).sample(range(len(items)), number))]


def dataset_fingerprint(items: Sequence[Item]) -> str:
    """SHA-256 of everything about the items that a result depends on, the content of the images included."""
    whole = hashlib.sha256()
    for item in items:
        facts = [item.id, item.question, item.label, item.type, str(item.match), item.match.options, item.problem]
        whole.update(json.dumps([*facts, item.content], ensure_ascii=True).encode() + b"\n")
    return whole.hexdigest()


def _named(item: Item) -> str:
    return f"line {item.line}: {item.problem}" if item.line is not None else f"{item.id}: {item.problem}"


# --- files -------------------------------------------------------------------------------------------------------


class _Reader:
    """Turns rows of a file into items."""

    def __init__(self, policy: ImagePolicy, match: Match | None, question: str | None, unlabelled: bool) -> None:
        self.policy = policy
        self.match = match
        self.question = question
        self.unlabelled = unlabelled

    def read(self, path: Path) -> list[Item]:
        """All items of a file, or of a folder with a labels file."""
        if not path.exists():
            raise DatasetError(
                f"There is no data set {str(path)!r}.",
                "Give a .jsonl, .csv or .json file, a folder with a labels file, easy-vqa or scenes.",
            )
        if path.is_dir():
            found = next((path / name for name in _LABEL_FILES if (path / name).is_file()), None)
            if found is None:
                raise DatasetError(
                    f"The folder {path.name!r} has no labels.", f"Put one of {', '.join(_LABEL_FILES)} into it."
                )
            return self._unmentioned(path, self.read(found))
        rows = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".json": _json_rows}.get(path.suffix.lower())
        if rows is None:
            raise DatasetError(f"{path.name!r} is no data set that can be read.", "Give a .jsonl, .csv or .json file.")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path.name!r} cannot be read ({error}).", "Give a readable file in UTF-8.") from None
        items: list[Item] = []
        seen: dict[str, int] = {}
        for number, (line, row) in enumerate(rows(text, path.name)):
            item = self._item(number, line, row, path.parent)
            if item.id in seen:
                problem = f"the id {item.id!r} was used on line {seen[item.id]} already"
                item = replace(item, id=f"{item.id} (line {line})", problem=item.problem or problem)
            seen[item.id] = line
            items.append(item)
        return items

    def _unmentioned(self, folder: Path, items: list[Item]) -> list[Item]:
        """The items, and one with a problem for every picture of the folder that no row names."""
        named = {part for item in items for part in item.content.split("|") if part}
        for picture in sorted(folder.iterdir()):
            if picture.suffix.lower() in _IMAGE_SUFFIXES and _file_hash(picture) not in named:
                items.append(
                    _broken(f"unlabelled: {picture.name}", None, f"no row is about the picture {picture.name}")
                )
        return items

    def _item(self, number: int, line: int, row: Mapping[str, Any] | str, folder: Path) -> Item:
        """One row as an item; what is wrong with it becomes its ``problem``.

        Without an id of its own, a row of a DMLR file is known by its place in the list, others by their line.
        """
        fallback = f"line {line}"
        if isinstance(row, str):
            return _broken(fallback, line, row)
        dmlr = "prompt" in row and "solution" in row
        fields: dict[str, Any] = {}
        names: dict[str, str] = {}
        twice = row.twice if isinstance(row, _Object) else None
        for given, value in row.items():
            if value in (None, ""):
                continue
            known = _ALIASES.get(given, given)
            if (other := names.setdefault("image" if known == "images" else known, given)) != given:
                twice = f"{other!r} and {given!r} are two names of one field"
            fields[known] = value
        name = str(fields.get("id", number if dmlr else fallback))
        try:
            if twice:
                raise _RowError(twice)
            question = _text(fields.get("question", self.question), "question")
            label = None if fields.get("label") is None else _label(fields["label"])
            if label is None and not self.unlabelled:
                raise _RowError("there is no label")
            match = self._match(fields, question, label, dmlr)
            problem = None if label is None else match.problem(label)
            if problem:
                raise _RowError(problem)
            references = self._references(fields, folder)
            return Item(
                name,
                question.replace("<image>", "").strip() if dmlr else question,
                label,
                partial(_open, tuple(references), self.policy),
                type=None if fields.get("type") is None else str(fields["type"]),
                match=match,
                boxes=_boxes(fields.get("boxes")),
                reasoning=None if fields.get("reasoning") is None else str(fields["reasoning"]),
                line=line,
                content="|".join(_content(reference) for reference in references),
            )
        except _RowError as error:
            return _broken(name, line, str(error), fields)
        except LatentToolError as error:
            return _broken(name, line, error.message.rstrip("."), fields)

    def _match(self, fields: Mapping[str, Any], question: str, label: str | None, dmlr: bool) -> Match:
        options = _options(fields.get("options"))
        given = Match.parse(str(fields["match"]), options, custom=False) if "match" in fields else self.match
        if given is not None:
            return replace(given, options=options or (options_in(question) if given.kind == "choice" else ()))
        if options:
            return Match("choice", options)
        if label is None:
            return Match()
        listed = Match("choice", options_in(question))
        if listed.options and (listed.problem(label) is None or split_letter(label)[0] is not None):
            return listed
        if is_letter(label):
            return Match("choice")
        number = isinstance(fields["label"], int | float) and not isinstance(fields["label"], bool)
        return Match("numeric") if number or (dmlr and _is_number(label)) else Match()

    def _references(self, fields: Mapping[str, Any], folder: Path) -> list[str]:
        """Image references, with paths made absolute from the file's folder; missing files are a problem."""
        given = fields.get("images", fields.get("image"))
        listed = given if isinstance(given, list) else [given]
        if not listed or not all(isinstance(each, str) and each.strip() for each in listed):
            raise _RowError("there is no image")
        references = []
        for each in listed:
            if each.startswith(("data:", "http://", "https://")):
                references.append(each)
                continue
            path = Path(each).expanduser()
            path = path if path.is_absolute() else folder / path
            self._check_policy(path)
            if not path.is_file():
                raise _RowError(f"there is no image {each}")
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


def _broken(name: str, line: int | None, problem: str, fields: Mapping[str, Any] | None = None) -> Item:
    """An item that stands for a row that cannot be used."""
    known = fields or {}
    return Item(
        name,
        str(known.get("question", "")),
        None if known.get("label") is None else str(known["label"]),
        partial(_refuse, problem),
        type=None if known.get("type") is None else str(known["type"]),
        line=line,
        problem=problem,
    )


def _refuse(problem: str) -> tuple[Image, ...]:
    raise DatasetError(f"The row cannot be used: {problem}.")


def _open(references: tuple[str, ...], policy: ImagePolicy) -> tuple[Image, ...]:
    from latent_tool.images.load import load_image

    return tuple(load_image(reference, policy).image for reference in references)


class _Object(dict[str, Any]):
    """A JSON object that remembers whether a name was given twice."""

    twice: str | None = None


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    found = _Object(pairs)
    names = [name for name, _ in pairs]
    found.twice = next((f"{name!r} is given twice" for name in names if names.count(name) > 1), None)
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def _jsonl_rows(text: str, _name: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                row = _DECODER.decode(content)
            except ValueError as error:
                yield line, f"not JSON ({error})"
            except RecursionError:
                yield line, "not JSON (it is nested too deeply)"
            else:
                yield line, row if isinstance(row, dict) else "not a JSON object"


@contextmanager
def _long_cells(size: int) -> Iterator[None]:
    """Let a cell of a CSV file, such as an image as a data URI, be as long as the file."""
    before = csv.field_size_limit(max(size, csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    with _long_cells(len(text)):
        rows = list(_csv_rows_of(text, name))
    yield from rows


def _csv_rows_of(text: str, name: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    columns = [str(column) for column in reader.fieldnames or ()]
    if len(set(columns)) < len(columns):
        twice = sorted({column for column in columns if columns.count(column) > 1})
        raise DatasetError(f"{name!r} has two columns of one name: {', '.join(twice)}.", "Name every column once.")
    known = {_ALIASES.get(column, column) for column in columns}
    if not known & {"image", "images"}:
        raise DatasetError(
            f"{name!r} has no column for the image.",
            f"Name the columns in the first line: {', '.join(sorted(_FIELDS))}.",
        )
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # What follows a broken quotation cannot be told apart any more.
            yield reader.line_num, f"not CSV from here on ({error})"
            return
        if None in row:
            yield reader.line_num, f"{len(columns)} columns are named, but there are more"
        elif any(value is None for value in row.values()):
            yield reader.line_num, f"{len(columns)} columns are named, but there are fewer"
        else:
            yield reader.line_num, row


def _json_rows(text: str, name: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Rows of a JSON list; a row's line is that on which its object begins."""
    place = 0

    def skip(signs: str) -> None:
        nonlocal place
        while place < len(text) and text[place] in signs:
            place += 1

    skip(" \t\r\n")
    if text[place : place + 1] != "[":
        raise DatasetError(f"{name!r} is no JSON list.", "Give a list of objects, one for each question.")
    place += 1
    while True:
        skip(" \t\r\n,")
        line = text.count("\n", 0, place) + 1
        if text[place : place + 1] == "]":
            return
        try:
            row, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON from here on ({error})"
            return
        yield line, row if isinstance(row, dict) else "not a JSON object"


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _RowError(f"there is no {field}")
    return value


def _label(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str | int | float):
        raise _RowError("the label is neither a text nor a number")
    label = str(value)
    if found := _ANSWER.search(label):
        label = found[1]
    if (boxed := _boxed(label)) is not None:
        label = boxed
    return _FORMULA.sub(r"\1", label).strip()


def _boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}`` of a text, whose braces are balanced; ``None`` without one."""
    found = None
    for mark in _BOXED.finditer(text):
        depth = 1
        for place in range(mark.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                found = text[mark.end() : place]
                break
    return found


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True


def _options(value: Any) -> tuple[str, ...]:
    """Options as a list, or as a text with ``|`` between them."""
    if value is None:
        return ()
    listed = value.split("|") if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(each, str | int | float) for each in listed):
        raise _RowError("the options are neither a list of texts nor a text with | between them")
    options = tuple(str(each).strip() for each in listed)
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
    except (TypeError, ValueError):
        raise _RowError("boxes are no list of [left, top, right, bottom]") from None
    return tuple(boxes)


@lru_cache(maxsize=100_000)
def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(reference: str) -> str:
    """What identifies an image: the hash of a file, or of the reference itself."""
    if reference.startswith(("data:", "http://", "https://")):
        return hashlib.sha256(reference.encode()).hexdigest()
    try:
        return _file_hash(Path(reference))
    except OSError as error:
        raise _RowError(f"the image cannot be read ({error.strerror})") from None


# --- what comes with packages ------------------------------------------------------------------------------------


def _scenes(rest: str) -> list[Item]:
    """One question about each scene; scenes without any but a description have none."""
    from latent_tool.scenes import SEEDS_PER_SPLIT, Split

    name, _, seeds = rest.partition(":")
    split = name or "held_out"
    if split not in get_args(Split):
        raise SettingsError(f"There is no split {split!r}.", f"Use one of {', '.join(get_args(Split))}.")
    chosen = SCENE_SEEDS
    if seeds:
        found = _RANGE.fullmatch(seeds)
        chosen = range(int(found[1]), int(found[2]) + 1) if found else range(0)
        if not chosen or chosen.stop > SEEDS_PER_SPLIT:
            raise SettingsError(
                f"{seeds!r} is no range of seeds.", f"Use first-last, both included, below {SEEDS_PER_SPLIT}."
            )
    items = []
    for seed in chosen:
        asked = [question for question in _scene(seed, split).questions if question.type != "describe"]
        if asked:
            first = asked[0]
            items.append(
                Item(
                    f"{split}-{seed}",
                    first.text,
                    first.answer,
                    partial(_scene_image, seed, split),
                    type=first.type,
                    boxes=first.boxes,
                    reasoning=first.reasoning,
                    content=f"scene:{split}:{seed}",
                )
            )
    return items


@lru_cache(maxsize=64)
def _scene(seed: int, split: str) -> Scene:
    from latent_tool.scenes import generate

    return generate(seed, split)  # type: ignore[arg-type]  # checked by the caller


def _scene_image(seed: int, split: str) -> tuple[Image, ...]:
    return (_scene(seed, split).image,)


def _easy_vqa(split: str) -> list[Item]:
    """Questions of the easy-VQA package."""
    if split not in ("test", "train"):
        raise SettingsError(f"easy-VQA has no split {split!r}.", "Use easy-vqa:test or easy-vqa:train.")
    try:
        import easy_vqa
    except ImportError as error:
        raise MissingExtraError("The easy-VQA data set", "evaluation") from error
    from latent_tool.scenes import COLORS

    folder = Path(easy_vqa.__file__).parent / "data" / split
    items = []
    for number, (text, answer, index) in enumerate(json.loads((folder / "questions.json").read_text())):
        kind = "exist" if answer in ("yes", "no") else "color" if answer in COLORS else "shape"
        path = folder / "images" / f"{index}.png"
        items.append(
            Item(
                f"easy-vqa-{split}-{number}",
                text,
                answer,
                partial(_open, (str(path),), ImagePolicy.local()),
                type=kind,
                content=f"easy-vqa:{split}:{index}",
            )
        )
    return items
