"""Write a file whole or not at all. Knows nothing of what is written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latent_tool.errors import SettingsError

__all__ = ["expanded", "make_folder", "require_writable", "write_whole", "writing"]


def require_writable(path: Path, suffix: str) -> None:
    """Refuse, before any work is done, a file that could not be written or does not end in ``suffix``.

    Raises ``SettingsError``.
    """
    if path.suffix.lower() != suffix:
        raise SettingsError(f"{path.name!r} does not end in {suffix}.", f"Give a file name that ends in {suffix}.")
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise SettingsError(f"{str(path)!r} cannot be written.", "Give a file in a folder that exists.")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file: afterwards either all of ``data`` is there, or what was there before.

    Raises ``SettingsError`` when it cannot be written.
    """
    partial = path.absolute().parent / f".{secrets.token_hex(8)}.tmp"
    with writing(path):
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about a file that cannot be written into a ``SettingsError``."""
    try:
        yield
    except OSError as error:
        raise SettingsError(
            f"{str(path)!r} cannot be written ({error.strerror or error}).",
            "Name a file in a folder that exists, can be written to and has room.",
        ) from error


def expanded(path: str | Path) -> Path:
    """Put the home folder in place of ``~``. Raises ``SettingsError`` for a user who is not there."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise SettingsError(f"There is no home folder for {str(path)[:200]!r}.", "Write the path in full.") from None


def make_folder(path: str | Path) -> Path:
    """Make a folder and those above it; gives back its path. Raises ``SettingsError`` when it cannot be made."""
    folder = expanded(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"The folder {str(folder)[:200]!r} cannot be made ({getattr(error, 'strerror', None) or error}).",
            "Give a folder that can be written to.",
        ) from None
    return folder
