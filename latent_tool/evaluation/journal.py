"""Keep answers as they come: JSON lines that are only ever appended, by one process at a time, and survive a kill.

A process that was killed may leave a torn last line, which is not read and is cut off before the next one is written.
This module knows nothing of what the lines say.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latent_tool.errors import SettingsError
from latent_tool.files import writing

__all__ = ["Journal", "locked"]


class Journal:
    """Read and extend one file.

    Args:
        path: the file, which need not be there yet.

    ``lines`` are those that it held whole when it was opened. Raises ``SettingsError`` when it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        except OSError as error:
            raise SettingsError(
                f"{str(path)!r} cannot be read ({error.strerror}).", "Give a folder that can be read and written to."
            ) from None
        self._size = data.rfind(b"\n") + 1
        self.lines = data[: self._size].split(b"\n")[:-1]

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records, one a line, and wait until they are on the disk.

        Raises ``SettingsError`` when they cannot be written, as on a full disk; what was there before stays whole.
        """
        data = b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)
        with writing(self.path), self.path.open("ab") as file:
            file.truncate(self._size)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(data)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time write to a folder. Raises ``SettingsError`` while another one does."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    path = folder / ".lock"
    with writing(path):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingsError(
                f"Another process is writing to {str(folder)!r}.", "Wait for it, or give another folder."
            ) from None
        yield
