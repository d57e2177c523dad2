"""Read parquet shards row by row, as HuggingFace stores data sets; needs pyarrow. What columns mean is not known.

Pictures stay in the file: a row gets a ``ParquetPicture`` that knows where its bytes are.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from latent_tool.errors import DatasetError, MissingExtraError
from latent_tool.evaluation.datasets.formats import Rows
from latent_tool.evaluation.datasets.tables import PICTURES, is_base64

__all__ = ["ParquetPicture", "parquet_rows", "shards_of"]

_BATCH = 16
_MOST_COLUMN = 2**32  # bytes of one column in one row group, as the file declares them
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.parquet")


@dataclass(frozen=True)
class ParquetPicture:
    """A picture in a parquet file.

    Args:
        path, group, row: the file, the row group in it and the row in that, from 0.
        column: name of its column.
        number: place among the pictures of the cell, from 0.
        size: bytes of the encoded picture.
        digest: SHA-256 of what is stored.
    """

    path: str
    group: int
    row: int
    column: str
    number: int
    size: int
    digest: str

    def read(self) -> bytes:
        """Read the picture. Raises ``DatasetError`` if the file has changed since it was read."""
        try:
            cell = _cells(self.path, self.group, self.row // _BATCH, self.column)[self.row % _BATCH]
            stored = _stored(cell)[self.number]
            raw = stored.encode() if isinstance(stored, str) else bytes(stored)
        except (IndexError, OSError, AttributeError, TypeError):
            raw, stored = b"", b""
        if hashlib.sha256(raw).hexdigest() != self.digest:
            raise DatasetError(f"{Path(self.path).name!r} was changed while it was in use.", "Start again.")
        return base64.b64decode(stored) if isinstance(stored, str) else raw


@lru_cache(maxsize=4)
def _cells(path: str, group: int, batch: int, column: str) -> tuple[Any, ...]:
    """The cells of one batch of rows; questions about the pictures of a batch follow one another."""
    with _opened(Path(path)) as file:
        batches = file.iter_batches(batch_size=_BATCH, row_groups=[group], columns=[column])
        for number, each in enumerate(batches):
            if number == batch:
                return tuple(each.column(0).to_pylist())
    return ()


def shards_of(path: Path) -> list[Path]:
    """Return all shards of the split that a file, or the only split that a folder, holds.

    Raises ``DatasetError`` where a shard is missing, or a folder holds several splits.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    named = [_SHARD.fullmatch(file.name) for file in files]
    splits = {match[1] if match else file.stem for match, file in zip(named, files, strict=True)}
    if len(splits) > 1:
        raise DatasetError(
            f"The folder {path.name!r} holds several tables: {', '.join(sorted(splits)[:5])}.", "Name one of its files."
        )
    if not files or (first := named[0]) is None:
        return files
    folder, count = files[0].parent, int(first[3])
    whole = [folder / f"{first[1]}-{number:05}-of-{first[3]}.parquet" for number in range(count)]
    absent = [file.name for file in whole if not file.is_file()]
    if absent:
        raise DatasetError(f"{len(absent)} of {count} shards are missing, {absent[0]!r} first.", "Download them all.")
    return whole


def parquet_rows(paths: Sequence[Path]) -> Rows:
    """Return rows of parquet shards, counted from 1 over all of them.

    Raises ``DatasetError`` for a file that cannot be read, and ``MissingExtraError`` without pyarrow.
    """
    line = 0
    for path in paths:
        for row in _rows(path):
            line += 1
            yield line, row


def _opened(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError("Reading parquet files", "datasets") from error
    try:
        return ParquetFile(path)
    except (ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> DatasetError:
    said = str(error).partition("\n")[0][:200]
    return DatasetError(f"{path.name!r} cannot be read ({said}).", "Download it again.")


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with _opened(path) as file:
        from pyarrow import ArrowException

        for group in range(file.num_row_groups):
            facts = file.metadata.row_group(group)
            for column in range(facts.num_columns):
                if not 0 <= facts.column(column).total_uncompressed_size <= _MOST_COLUMN:
                    raise DatasetError(f"{path.name!r} has a column of more than 4 GB in one row group.", "Split it.")
            try:
                place = 0
                for batch in file.iter_batches(batch_size=_BATCH, row_groups=[group]):
                    for row in batch.to_pylist():
                        yield {
                            name: _located(value, str(path), group, place, name) if _may_hold(name, value) else value
                            for name, value in row.items()
                        }
                        place += 1
            except (ArrowException, OSError, ValueError) as error:
                raise _unreadable(path, error) from None


def _may_hold(name: str, value: Any) -> bool:
    """Whether a cell holds pictures, or what may be pictures in base64."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, bytes) or (isinstance(first, Mapping) and "bytes" in first) or name.lower() in PICTURES


def _stored(cell: Any) -> list[Any]:
    """What a cell stores of each picture: bytes, base64, or a path."""
    cells = cell if isinstance(cell, list) else [] if cell is None else [cell]
    return [(each.get("bytes") or each.get("path")) if isinstance(each, Mapping) else each for each in cells]


def _located(cell: Any, path: str, group: int, row: int, column: str) -> list[Any]:
    found: list[Any] = []
    for number, stored in enumerate(_stored(cell)):
        if isinstance(stored, bytes):
            digest, size = hashlib.sha256(stored).hexdigest(), len(stored)
        elif isinstance(stored, str) and is_base64(stored):
            digest, size = hashlib.sha256(stored.encode()).hexdigest(), len(stored) * 3 // 4
        else:
            found.append(stored)
            continue
        found.append(ParquetPicture(path, group, row, column, number, size, digest))
    return found
