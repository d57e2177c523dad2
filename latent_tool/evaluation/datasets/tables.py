"""Read benchmark tables of any size row by row: TSV and CSV as VLMEvalKit writes them. What columns mean is not known.

Pictures in base64 stay in the file: a row gets a ``TablePicture`` that knows where its bytes are. What a row may take
in memory is bounded, and a broken row is named by its line.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from latent_tool.errors import DatasetError
from latent_tool.evaluation.datasets.formats import Rows, long_cells

__all__ = ["MOST_ROW", "TablePicture", "is_base64", "listed", "table_rows"]

MOST_ROW = 2**27  # bytes of one row, pictures included
PICTURES = ("image", "images", "decoded_image")
# Shorter texts are paths, or the index of a row whose picture is meant.
SHORTEST_PICTURE = 65
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_LIST_PART = re.compile(r"'([^']*)'|\"([^\"]*)\"")


@dataclass(frozen=True)
class TablePicture:
    """A picture in base64 in a cell of a table.

    Args:
        path: the table.
        start, stop: bytes of the table that its row takes.
        column: place of its cell, from 0.
        number: place among the pictures of the cell, from 0.
        delimiter: between two cells.
        size: bytes of the encoded picture.
        digest: SHA-256 of its base64.
    """

    path: str
    start: int
    stop: int
    column: int
    number: int
    delimiter: str
    size: int
    digest: str

    def read(self) -> bytes:
        """Read the picture. Raises ``DatasetError`` if the table has changed since it was read."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                written = file.read(self.stop - self.start)
            with long_cells(MOST_ROW):
                row = next(csv.reader(_split(written.decode("utf-8-sig")), delimiter=self.delimiter, strict=True))
            text = listed(row[self.column])[self.number]
        except (OSError, UnicodeDecodeError, csv.Error, StopIteration, IndexError):
            text = ""
        if _digest(text) != self.digest:
            raise DatasetError(f"{Path(self.path).name!r} was changed while it was in use.", "Start again.")
        return base64.b64decode(text)


class _TooLong(Exception):
    """A row takes more than may be held."""


class _Lines:
    """The lines of a file with their place in it; raises ``_TooLong`` once those of one row are too long together."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.offset = 0
        self.line = 0
        self.first = 0  # where the row begins

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        room = MOST_ROW - (self.offset - self.first)
        written = self.file.readline(room + 1)
        if not written:
            raise StopIteration
        self.line += 1
        self.offset += len(written)
        if len(written) > room:
            raise _TooLong
        return written.decode("utf-8-sig" if self.line == 1 else "utf-8", "surrogateescape")

    def skip_line(self) -> None:
        """Go on to the next line."""
        while written := self.file.readline(2**20):
            self.offset += len(written)
            if written.endswith(b"\n"):
                return


def table_rows(path: Path, delimiter: str = "\t") -> Rows:
    """Return rows of a table whose first line names the columns.

    Raises ``DatasetError`` for a file that cannot be read or has no column for pictures or questions.
    """
    try:
        with path.open("rb") as file:
            yield from _rows(_Lines(file), path, delimiter)
    except OSError as error:
        raise DatasetError(f"{path.name!r} cannot be read ({error.strerror}).", "Give a readable file.") from None


def _rows(lines: _Lines, path: Path, delimiter: str) -> Rows:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        columns = [name.strip() for name in _next(reader)]
    except (StopIteration, _TooLong, csv.Error):
        columns = []
    twice = sorted({name for name in columns if columns.count(name) > 1})[:5] if len(columns) < 10_000 else columns[:1]
    if twice or not columns:
        said = f"has two columns of one name: {', '.join(twice)}" if twice else "names no columns in its first line"
        raise DatasetError(f"{path.name!r} {said}.", "Name every column once, in the first line.")
    while True:
        lines.first, before = lines.offset, lines.line
        try:
            cells = _next(reader)
        except StopIteration:
            return
        except _TooLong:
            yield before + 1, f"the row takes more than {MOST_ROW // 2**20} MB"
            if lines.line > before + 1:  # an open quotation: where it ends cannot be told
                return
            lines.skip_line()
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            continue
        except csv.Error as error:
            yield lines.line, f"not a table from here on ({error})"
            return
        if not cells:
            continue
        if len(cells) != len(columns):
            yield before + 1, f"{len(columns)} columns are named, but there are {len(cells)}"
            continue
        place = (str(path), lines.first, lines.offset)
        row: dict[str, Any] = {}
        for column, (name, cell) in enumerate(zip(columns, cells, strict=True)):
            row[name] = _pictures(cell, place, column, delimiter) if name.lower() in PICTURES else cell
        yield before + 1, row


def _next(reader: Any) -> list[str]:
    with long_cells(MOST_ROW):
        cells: list[str] = next(reader)
    return cells


def _pictures(cell: str, place: tuple[str, int, int], column: int, delimiter: str) -> Any:
    """A cell of pictures: each in base64 as a ``TablePicture``, anything else as it is."""
    found: list[Any] = []
    for number, text in enumerate(listed(cell)):
        if is_base64(text):
            found.append(TablePicture(*place, column, number, delimiter, len(text) * 3 // 4, _digest(text)))
        else:
            found.append(text)
    return found


def is_base64(text: str) -> bool:
    """Tell whether a text is long enough, and written, to be a picture in base64."""
    if len(text) < SHORTEST_PICTURE or _BASE64.fullmatch(text) is None:
        return False
    try:
        base64.b64decode(text[:64])
    except binascii.Error:
        return False
    return True


def listed(cell: str) -> list[str]:
    """Return the texts of a cell that is written as a Python or JSON list of them, or the cell alone."""
    stripped = cell.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return [cell] if stripped else []
    return [one or other for one, other in _LIST_PART.findall(stripped)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _split(text: str) -> list[str]:
    """Lines with their ends, as a file has them."""
    return [line for line in re.split(r"(?<=\n)", text) if line]
