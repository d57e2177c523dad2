"""Write a file whole or not at all. Knows nothing of what is written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from latent_tool.errors import SettingsError

__all__ = ["expanded", "make_folder", "reason", "require_apart", "require_writable", "write_whole", "writing"]


def require_apart(outputs: Sequence[tuple[str, Path]], inputs: Sequence[Path]) -> None:
    """Refuse, before any work is done, an output that is one of the inputs, or two outputs that are one file.

    Links of both kinds and other spellings of a path are seen through.

    Args:
        outputs: what is going to be written, each with the option that names it.
        inputs: what is read; a name that is no file is ignored.

    Raises ``SettingsError``.
    """
    read = {key: path for path in inputs for key in _identities(path)}
    written: dict[object, tuple[str, Path]] = {}
    for option, path in outputs:
        for key in _identities(path):
            if key in read:
                raise SettingsError(
                    f"{option} would write over {read[key].name[:200]!r}, which is read.", "Name another file."
                )
            if key in written:
                raise SettingsError(
                    f"{option} and {written[key][0]} would both write {path.name[:200]!r}.", "Name different files."
                )
        written.update(dict.fromkeys(_identities(path), (option, path)))


def _identities(path: Path) -> list[object]:
    """What two names of one file have in common: its place, or, with hard links, the file itself."""
    keys: list[object] = []
    with suppress(OSError, ValueError):  # it does not exist yet, or is no path
        real = os.path.realpath(path)
        keys.append(os.path.normcase(real))
        status = os.stat(real)
        keys.append((status.st_dev, status.st_ino))
    return keys


def require_writable(path: Path, suffix: str) -> None:
    """Refuse, before any work is done, a file that could not be written or does not end in ``suffix``.

    Raises ``SettingsError``.
    """
    path = expanded(path)
    if path.suffix.lower() != suffix:
        raise SettingsError(
            f"{path.name[:200]!r} does not end in {suffix}.", f"Give a file name that ends in {suffix}."
        )
    folder = path.absolute().parent
    # os.path, which takes a name that is too long for one that is not there.
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK) or _too_long(path):
        raise SettingsError(f"{str(path)[:200]!r} cannot be written.", "Give a file in a folder that exists.")


def _too_long(path: Path) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def write_whole(path: Path, data: bytes) -> None:
    """Write a file: afterwards either all of ``data`` is there, or what was there before.

    Raises ``SettingsError`` when it cannot be written.
    """
    path = expanded(path)
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
            f"{str(path)[:200]!r} cannot be written ({reason(error)}).",
            "Name a file in a folder that exists, can be written to and has room.",
        ) from error


def reason(error: Exception) -> str:
    """Return what is wrong with a file, in words that do not repeat its path."""
    return str(getattr(error, "strerror", None) or error)


def expanded(path: str | Path) -> Path:
    """Put the home folder in place of ``~``.

    Raises ``SettingsError`` for a user who is not there, and for what no file can be called.
    """
    try:
        os.fsencode(path)
        if "\0" in os.fspath(path):
            raise ValueError
        return Path(path).expanduser()
    except (ValueError, TypeError):  # UnicodeEncodeError: half a character
        shown = ascii(str(path)[:100])
        raise SettingsError(f"{shown} is no path.", "Leave out characters that no file name can have.") from None
    except RuntimeError:
        raise SettingsError(f"There is no home folder for {str(path)[:200]!r}.", "Write the path in full.") from None


def make_folder(path: str | Path) -> Path:
    """Make a folder and those above it; gives back its path. Raises ``SettingsError`` when it cannot be made."""
    folder = expanded(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"The folder {str(folder)[:200]!r} cannot be made ({reason(error)}).",
            "Give a folder that can be written to.",
        ) from None
    return folder
