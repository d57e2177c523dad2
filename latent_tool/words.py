"""Numbers and strangers' texts for people, and what may be shown of an image reference.

A text from outside is made harmless here, once for pictures, pages, terminals and notebooks: nothing in it moves a
cursor or reorders what stands beside it. Of an image reference enough is shown to recognise it, never its bytes,
credentials or query. This module knows nothing of the rest of the package.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence

__all__ = [
    "NOTHING",
    "confidence_text",
    "number_text",
    "plain_text",
    "redact",
    "shown_image",
    "visible_text",
    "without_places",
]

NOTHING = "\N{EN DASH}"  # where there is no number

_LONGEST = 200  # characters of a path; what is longer is hardly one
_URL = re.compile(r"(https?)://(?:[^/?#\\]*@)?([^/?#\\@]*)", re.IGNORECASE | re.ASCII)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE | re.ASCII)
_DATA_URI = re.compile(r"data:[^\s,]{0,200},[^\s\"'<>)]*", re.IGNORECASE | re.ASCII)
_USER = re.compile(r"(?<=://)[^/\s?#\\@]*@", re.ASCII)
# No possessive repetition of groups: early versions of Python 3.11 match what follows one wrongly.
# A path's name ends at a space or a mark that a name hardly goes on after.
_NAME = r"(?:[^\s/\\'\",;:()<>]|['\",;:()](?=\w)|\)(?=[/\\]))+"
_ON = r"(?!~|\.{1,2}[/\\]|-[a-z][/\\])"  # no other path begins
# A folder may have spaces in its name: up to two further words that a slash follows are part of it.
_NAMES = rf"(?:{_NAME}(?:(?:[ ]{_ON}{_NAME}){{1,2}}(?=[/\\]))?)"
# Below a folder where people's files are known to lie, so are more blanks and a comma, unless a file's name ended
# before; and more words, unless they are small.
_BLANKS = rf"(?:,?[ ]{{1,3}}{_ON}"
_LONG = rf"""(?:{_NAME}(?:
      (?:[ ]{_ON}{_NAME}){{1,2}}(?=[/\\])
    | (?<!\.\w\w)(?<!\.\w\w\w)(?<!\.\w\w\w\w){_BLANKS}{_NAME}){{1,2}}(?=[/\\])
    | {_BLANKS}(?-i:(?![a-z])){_NAME}){{1,8}}(?=[/\\])
    )?)"""
_ROOTS = "(?:home|users|root|mnt|tmp|var|opt|srv|usr|etc|private|volumes)"
# Where a path may begin behind a letter: after an escape that was written out, and an option of one letter.
_BEHIND = r"(?<=\\[nrt])|(?<=\s-[a-z])|(?<=^-[a-z])"
_OPENS = r"(?:(?<!\w)|(?<=\b[bfru]))"  # a quote that closes ends a word
_QUOTED = r"(?:~[/\\a-z_]|/|[a-z]:[\\/]|\\\\)"
_PLACE = re.compile(
    rf"""
      (?P<url>(?<![a-z0-9+.-])(?!file:)[a-z][a-z0-9+.-]*://[^\s/'"<>][^\s'"<>]*)         # a host's, not this machine's
    | {_OPENS}'(?=(?P<single>{_QUOTED}(?:[^'\n]|'(?=\w)){{0,1000}}))(?P=single)'
    | {_OPENS}"(?=(?P<double>{_QUOTED}(?:[^"\n]|"(?=\w)){{0,1000}}))(?P=double)"
    | (?<![a-z0-9+.-])(?:file:(?://[^\s/'"<>]*)?|[a-z][a-z0-9+.-]+://)(?P<file>(?:[/\\]+{_LONG}?)+)
    | (?P<known>(?:(?<![a-z0-9_/\\.~-])|{_BEHIND})[/\\]{_ROOTS}(?:[/\\]+{_LONG})+[/\\]*
        | [/\\](?:home|users)(?:[/\\]+{_LONG}){{2,}}[/\\]*  # whatever it stands behind
        | [a-z]:[/\\]+users(?:[/\\]+{_LONG})+[/\\]*)
    | (?P<escaped>(?:[a-z]%3A)?%(?:2F|5C){_ROOTS}(?:%(?:2F|5C)(?:[\w.+~-]|%(?!2F|5C)[0-9a-f]{{2}})+)+)
    | (?:(?<![\w/\\.~-])|{_BEHIND})(?P<bare>
          ~(?:[a-z_][\w.-]*)?(?:[/\\]+{_LONG})+[/\\]*
        | [a-z]:(?:[/\\]+{_NAMES}(?:[/\\]+{_NAMES})+|\\+{_NAMES})[/\\]*
        | \\{{2,4}}(?=\w){_NAMES}(?:[/\\]+{_NAMES})*[/\\]*
        | /[/\\]*{_NAMES}(?:[/\\]+(?![?!.]+(?:\s|$)){_NAMES})+[/\\]*)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_SLASH = re.compile(r"[/\\]")
_ESCAPED_SLASH = re.compile(r"%2F|%5C", re.IGNORECASE)
_COLOUR = re.compile(r"(?:\x1b|\\x1b|\\u001b|\\033|\\e)\[[0-?]{0,64}[ -/]{0,8}[@-~]|\x9b[0-?]{0,64}[ -/]{0,8}[@-~]")
_LONGEST_TEXT = 10_000  # characters of a text for people
_LONGEST_PATH = 1_500
# What begins like a path and is one of a server's, or stands for any; none of them says anything of the machine.
_ROUTE = re.compile(
    r"/+(?:v1(?:/[a-z]+){0,2}|v1/[a-z]+/[\w-]*\d[\w-]*(?:/[a-z]+)?|health|metrics|mcp|openapi\.json"
    r"|folder(?:/name\.png)?)?/?[.!?]?",
    re.ASCII,
)
_IMAGE_KEYS = ("image", "images", "url", "image_url", "source", "base64", "data", "bytes", "path", "value")


def shown_image(reference: object) -> str:
    """Return an image reference in a few words: its kind and size, the host of a URL, a path as it is."""
    if isinstance(reference, str):
        text = reference.strip()
        scheme = _SCHEME.match(text)
        if url := _URL.match(text):
            return f"<{url[1].lower()} URL of {url[2][:_LONGEST]}>"
        if scheme is not None and scheme[1].lower() == "data":
            return f"<data URI of {len(text)} characters>"
        if len(text) > _LONGEST or scheme is not None:
            return f"<text of {len(text)} characters>"
        return text
    if isinstance(reference, bytes | bytearray | memoryview):
        return f"<{memoryview(reference).nbytes} bytes>"
    if isinstance(reference, os.PathLike):
        return str(reference)
    if isinstance(reference, Mapping):
        return f"<content block of type {str(reference.get('type'))[:20]}>"
    if callable(shown := getattr(reference, "shown", None)):  # a reference that knows what may be shown of it
        return str(shown())
    size = getattr(reference, "size", None)
    if isinstance(size, tuple) and len(size) == 2:
        return f"<picture of {size[0]}x{size[1]}>"
    return f"<{type(reference).__name__}>"


def redact(value: object) -> object:
    """Return a copy of nested plain values with every image replaced by ``shown_image``, and without credentials in
    URLs.
    """
    if isinstance(value, str):
        return _USER.sub("***@", _DATA_URI.sub("<data URI>", value))
    if isinstance(value, Mapping):
        return {key: _redact_image(item) if key in _IMAGE_KEYS else redact(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [redact(item) for item in value]
    return value if value is None or isinstance(value, int | float) else shown_image(value)


def _redact_image(value: object) -> object:
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redact_image(item) for item in value]
    return None if value is None else shown_image(value)


def plain_text(text: str, *, limit: int = 1000) -> str:
    """Put text on one line, without control, format and bidirectional characters, cut to ``limit`` characters."""
    spaced = "".join(" " if char.isspace() else char for char in text[: 10 * limit])
    line = " ".join("".join(char for char in spaced if unicodedata.category(char)[0] != "C").split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def confidence_text(value: float) -> str:
    """Write a confidence with two or three digits, rounded down so that it never seems to reach what it does not."""
    thousandths = value * 1000 + 1e-9
    if not math.isfinite(thousandths):
        return "not finite"
    shown = f"{math.floor(thousandths) / 1000:.3f}"
    return shown.removesuffix("0")


# Marks that reorder the text around them; without them nothing can pose as something else.
_REORDERING = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def visible_text(text: str, *, limit: int) -> str:
    """Keep line breaks, with control characters replaced and reordering marks left out, cut to ``limit`` characters."""
    kept = (char for char in text[:limit] if ord(char) not in _REORDERING)
    shown = "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else "\ufffd" for char in kept
    )
    return shown + " […]" if len(text) > limit else shown


def number_text(value: float | None, digits: int = 3) -> str:
    """Write a number for people: three significant digits, no exponent where it can be avoided, a dash for none."""
    if value is None:
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e7 else text.replace("-", "\N{MINUS SIGN}")


def without_places(text: str) -> str:
    """Return a text for people elsewhere: of a path of a machine, there or not, the last name alone is left.

    The servers' own routes, URLs with a host and paths that are relative stay. Colours of a terminal are left out; what
    is longer than 10,000 characters is cut, after a path that the cut would go through.
    """
    cut = len(text) > _LONGEST_TEXT
    text = _COLOUR.sub("", text[: _LONGEST_TEXT + _LONGEST_PATH])
    kept, at = [], 0
    for found in _PLACE.finditer(text):
        if found.start() >= _LONGEST_TEXT:
            break
        whole = not cut or found.end() < len(text)
        kept += [text[at : found.start()], _last_name(found) if whole else ""]
        at = found.end()
    kept.append(text[at : max(at, _LONGEST_TEXT)])
    return "".join(kept) + (" […]" if cut else "")


def _last_name(found: re.Match[str]) -> str:
    kind = str(found.lastgroup)
    path = found[kind]
    parts = [part for part in (_ESCAPED_SLASH if kind == "escaped" else _SLASH).split(path) if part]
    if kind == "url" or not parts or _ROUTE.fullmatch(path):
        return found[0]
    quote = {"single": "'", "double": '"'}.get(kind, "")
    return f"{quote}{parts[-1]}{quote}"
