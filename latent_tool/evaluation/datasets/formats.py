"""Take the rows out of a file: JSON lines, CSV, a list in JSON. What they mean is told in ``rows``.

A row is a mapping, or a text that says why it cannot be read. Its line is counted from 1.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from latent_tool.errors import DatasetError

__all__ = ["ALIASES", "FIELDS", "Rows", "csv_rows", "json_rows", "jsonl_rows", "long_cells", "problem_of"]


FIELDS = {"id", "image", "images", "question", "label", "answers", "type", "match", "options", "boxes", "reasoning"}
FIELDS |= {"group"}
# Other names under which fields are known: DMLR's, and what people write.
ALIASES = {
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
Rows = Iterator[tuple[int, "Mapping[str, Any] | str"]]


class _Object(dict[str, Any]):
    """A JSON object that remembers whether a name was given twice."""

    twice: str | None = None


class _NotJson:
    """Stands for a value that JSON does not have, or that no computer number holds."""

    def __init__(self, problem: str) -> None:
        self.problem = problem


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    whole = _Object(pairs)
    if len(whole) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        whole.twice = f"{name[:100]!r} is given twice"
    return whole


def _float(text: str) -> float | _NotJson:
    value = float(text)
    return value if math.isfinite(value) else _NotJson(f"the number {text[:40]} is too large")


def _int(text: str) -> int | _NotJson:
    # No label has so many digits, and Python reads no more than some thousands of them.
    return int(text) if len(text) < 300 else _NotJson(f"the number {text[:40]}... is too long")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_constant=lambda name: _NotJson(f"{name} is no JSON"),
    parse_float=_float,
    parse_int=_int,
)


def problem_of(row: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the values of a row, wherever they stand in it; ``None`` if nothing is."""
    waiting: list[Any] = [row]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _NotJson):
            return value.problem
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
            return "a text holds half of a surrogate pair"
        if isinstance(value, Mapping):
            if isinstance(value, _Object) and value.twice:
                return value.twice
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
    return None


def jsonl_rows(text: str, _name: str) -> Rows:
    """Return rows of JSON lines; empty lines are none."""
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
def long_cells(size: int) -> Iterator[None]:
    """Let a cell of a CSV file, such as an image as a data URI, be as long as the file."""
    before = csv.field_size_limit(max(size, csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def csv_rows(text: str, name: str) -> Rows:
    """Return rows of a CSV file whose first line names the columns."""
    with long_cells(len(text)):
        rows = list(_csv_rows_of(text, name))
    yield from rows


def _csv_rows_of(text: str, name: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    columns = [str(column) for column in reader.fieldnames or ()]
    if len(set(columns)) < len(columns):
        twice = sorted(column for column, count in Counter(columns).items() if count > 1)[:5]
        raise DatasetError(f"{name!r} has two columns of one name: {', '.join(twice)}.", "Name every column once.")
    if not {ALIASES.get(column, column) for column in columns} & {"image", "images"}:
        raise DatasetError(
            f"{name!r} has no column for the image.",
            f"Name the columns in the first line: {', '.join(sorted(FIELDS))}.",
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


def json_rows(text: str, name: str) -> Rows:
    """Return rows of a JSON list; a row's line is that on which its object begins."""
    place = 0

    def skip(signs: str) -> None:
        nonlocal place
        while place < len(text) and text[place] in signs:
            place += 1

    skip(" \t\r\n")
    if text[place : place + 1] != "[":
        raise DatasetError(f"{name!r} is no JSON list.", "Give a list of objects, one for each question.")
    place += 1
    line, counted = 1, 0
    while True:
        skip(" \t\r\n,")
        line, counted = line + text.count("\n", counted, place), place
        if text[place : place + 1] == "]":
            return
        try:
            row, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON from here on ({error})"
            return
        yield line, row if isinstance(row, dict) else "not a JSON object"
