"""Write a file whole or not at all. Knows nothing of what is written."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from latent_tool.errors import SettingsError

__all__ = ["require_writable", "write_whole"]


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
    try:
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise SettingsError(
            f"{str(path)!r} cannot be written ({error.strerror or error}).",
            "Name a file in a folder that exists and can be written to.",
        ) from error
