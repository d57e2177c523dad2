"""Read an image file that the policy allows, and nothing else: no device, no way out of the allowed folders.

This module knows nothing of what is in the file. Errors name a file's own name at most, never its folders.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from latent_tool.errors import ImageDecodeError, ImageError, ImageNotAllowedError, ImageNotFoundError
from latent_tool.images.kinds import BASE64_IMAGE
from latent_tool.images.limits import check_bytes

if TYPE_CHECKING:
    from latent_tool.settings import ImagePolicy

__all__ = ["file_url_path", "read_file"]


def file_url_path(url: str) -> str:
    """Give the path of a ``file:`` URL. Raises ``ImageNotAllowedError`` if it names another machine."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ImageNotAllowedError("The file URL is not valid.", "Write file:///folder/name.png.") from None
    if parts.netloc.lower() not in ("", "localhost"):
        raise ImageNotAllowedError("The file URL names another machine.", "Write file:///folder/name.png.")
    return url2pathname(parts.path)


def read_file(path: str, policy: ImagePolicy) -> tuple[bytes, str]:
    """Give the bytes of a regular file that the policy allows, and a name of it that may be shown.

    It is examined before it is opened, because opening a device can have effects, and again through its descriptor,
    because it may have been exchanged in between.

    Raises:
        ImageNotFoundError: there is no such file, or it may not be read; the hint fits what was given.
        ImageNotAllowedError: the policy forbids files, or this one, or it is no regular file.
        ImageTooLargeError: more bytes than the policy allows.
        ImageDecodeError: it is empty.
    """
    name = _safe_name(path)
    if policy.files == "none":
        filler = path.strip().lower() in _FILLERS
        raise ImageNotAllowedError(
            "Files may not be opened here.",
            _NO_PATH if filler else "Send the image itself, or allow folders in the image policy.",
        )
    try:
        descriptor = _open_inside(path, policy.folders) if policy.files == "folders" else _open(path)
        with os.fdopen(descriptor, "rb") as file:
            size = _check_regular(os.fstat(descriptor))
            if not size:  # also what pseudo files say of themselves
                raise ImageDecodeError(f"{name} is empty: 0 bytes.", "Save or download the image again.")
            check_bytes(size, policy)
            data = file.read(policy.max_bytes + 1)
    except ImageError:
        raise
    except _OutsideError:
        raise ImageNotAllowedError(
            f"{name} is outside the allowed folders.", "Put it into an allowed folder, or allow its folder."
        ) from None
    except _NotRegularError:
        raise ImageNotAllowedError(
            f"{name} is not a regular file.", "Devices, pipes and sockets are not opened."
        ) from None
    except IsADirectoryError:
        filler = path.strip().lower() in _FILLERS
        raise ImageNotFoundError(f"{name} is a folder.", _NO_PATH if filler else "Name an image file in it.") from None
    except PermissionError:
        raise ImageNotFoundError(f"{name} may not be read by this user.", "Change its permissions.") from None
    except (OSError, ValueError):  # ValueError: a name that no file system can hold
        raise ImageNotFoundError(f"There is no file {name}.", _hint(path, policy)) from None
    check_bytes(len(data), policy)
    return data, name


# What people and models write instead of a path, and what to do about it; the first that fits is told.
_FILLERS = ("", "null", "none", "nil", "undefined", "nan", "n/a", "false", "image", "string")
_NO_PATH = "This is a filler and no path: leave the image out, or name one."
_MISTAKES = tuple(
    (re.compile(pattern, re.ASCII | re.DOTALL), hint)
    for pattern, hint in (
        (r"\s*['\"`\u2018\u201c\u00ab].*['\"`\u2019\u201d\u00bb]\s*", "Leave out the quotes around the path."),
        (r".*[\r\n]\s*|[\r\n].*", "The path begins or ends with a line break: pass path.strip()."),
        (r"\s.*|.*\s", "The path begins or ends with a space: pass path.strip()."),
        (r"~.*", "A ~ is not replaced here: pass os.path.expanduser(path), or write the whole path."),
        (r"\$.*|%\w+%.*", "Variables are not replaced here: pass os.path.expandvars(path), or write the whole path."),
        (r"[A-Za-z]:[\\/].*|[^/]*\\.*", "This is a path of Windows; here folders are separated by '/'."),
        (
            r"(?:www\.|[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|io|dev|edu|ai)/).*",
            "If it is a URL, write https:// before it.",
        ),
        (r".*[*?].*", "Patterns are not expanded here: name one file."),
        (r".*%[0-9A-Fa-f]{2}.*", "Only a file: URL may hold escapes such as %20: write the characters themselves."),
    )
)
_MAX_HINTED = 4096  # characters of what may be a path at all


def _hint(path: str, policy: ImagePolicy) -> str:
    """What to do about a file that is not there."""
    if path.strip().lower() in _FILLERS:
        return _NO_PATH
    if BASE64_IMAGE.match(path):
        return "This looks like base64: write data:image/png;base64, before it."
    if len(path) <= _MAX_HINTED:
        for mistake, hint in _MISTAKES:
            if not (os.name == "nt" and "Windows" in hint) and mistake.fullmatch(path):
                return hint
    if policy.files == "folders":
        return "Check the name: a path that is not absolute is looked up in the allowed folders and the current one."
    return "Check the path; a relative one starts at the current folder."


class _OutsideError(Exception):
    """A path that is in none of the allowed folders."""


class _NotRegularError(Exception):
    """A device, a pipe or a socket."""


_FLAGS = ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")  # non-blocking: a pipe would wait for its writer
_OPEN_FLAGS = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in _FLAGS)
_PSEUDO = ("/proc/", "/sys/", "/dev/")


def _check_regular(status: os.stat_result) -> int:
    """The size in bytes of what must be a regular file."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError
    if not stat.S_ISREG(status.st_mode):
        raise _NotRegularError
    return status.st_size


def _open(path: str, folder: int | None = None) -> int:
    """A descriptor of a file; below an open folder no link is followed."""
    if folder is None:
        _check_regular(os.stat(path))
        return os.open(path, _OPEN_FLAGS)
    _check_regular(os.stat(path, dir_fd=folder, follow_symlinks=False))
    return os.open(path, _OPEN_FLAGS | os.O_NOFOLLOW, dir_fd=folder)


def _open_inside(path: str, folders: tuple[Path, ...]) -> int:
    """A descriptor of a file that is in one of the folders once all links are resolved.

    A relative path is looked up in every folder and then in the current one. The time is linear in the number of
    folders: what is not there is resolved, to know whether it would be inside, for the first few only.
    """
    if len(path) > _MAX_PATH:
        raise FileNotFoundError
    roots = dict.fromkeys(os.path.realpath(folder) for folder in folders)
    starts = [""] if os.path.isabs(path) else [*roots, os.getcwd()]
    inside = False
    for number, start in enumerate(starts):
        whole = os.path.join(start, path)
        if number >= _RESOLVED and not os.path.lexists(whole):
            continue
        target = Path(os.path.realpath(whole))
        root = next((str(place) for place in (target, *target.parents) if str(place) in roots), None)
        if root is None or str(target).startswith(_PSEUDO):
            continue
        inside = True
        try:
            return _open_steps(root, target.relative_to(root).parts)
        except FileNotFoundError:
            continue
    raise FileNotFoundError if inside else _OutsideError


_MAX_PATH = 32_767  # characters; no system opens a longer one
_RESOLVED = 16  # starts from which a path is resolved whether or not something is there


def _open_steps(root: str, steps: tuple[str, ...]) -> int:
    """Open step by step without following links: after resolving there are none, unless something was exchanged."""
    if os.open not in os.supports_dir_fd or not steps:
        return _open(os.path.join(root, *steps))
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for step in steps[:-1]:
            inner = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        return _open(steps[-1], folder)
    finally:
        os.close(folder)


def _safe_name(path: str) -> str:
    """A file's own name, if it is one that can be printed; never its folders, never text posing as a path."""
    name = os.path.basename(path.rstrip("/"))
    return f"'{name}'" if _PRINTABLE.fullmatch(name) else "of that name"


_PRINTABLE = re.compile(r"[\w][\w .()+-]{0,79}", re.ASCII)
