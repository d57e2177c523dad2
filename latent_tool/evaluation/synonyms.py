"""Read a file of words that mean the same, one group a line: ``square = rectangle``. Knows nothing of rules or rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from latent_tool.errors import SettingsError
from latent_tool.evaluation.normalising import normalise
from latent_tool.files import expanded

__all__ = ["Synonyms", "load_synonyms", "without_synonyms"]

# Pairs of a word, or several, and what it is read as; both normalised.
Synonyms = tuple[tuple[str, str], ...]


def load_synonyms(path: str | Path) -> Synonyms:
    """Return the synonyms of a file in UTF-8: a group of two words or more a line, ``=`` between them; ``#`` begins a
    comment.

    Raises ``SettingsError`` for a file that cannot be read, a line that is no group, and a word in two groups.
    """
    try:
        text = expanded(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"The synonyms {str(path)[:200]!r} cannot be read ({getattr(error, 'strerror', None) or error}).",
            "Give a readable file in UTF-8.",
        ) from None
    meant: dict[str, str] = {}
    for line, content in enumerate(text.split("\n"), start=1):
        group = content.partition("#")[0].strip()
        if not group:
            continue
        words = [normalise(word) for word in group.split("=")]
        if len(words) < 2 or not all(words):
            raise SettingsError(f"Line {line} of the synonyms is no group.", "Write square = rectangle.")
        for word in words:
            if word in meant:
                raise SettingsError(f"{word!r} on line {line} of the synonyms stands there twice.", "Make one group.")
            meant[word] = words[0]
    return tuple(sorted(meant.items()))


def without_synonyms(text: str, synonyms: Synonyms) -> str:
    """Return a normalised text with every word that has synonyms replaced by the first of its group."""
    return _replacing(synonyms)(text) if synonyms else text


@lru_cache(maxsize=16)
def _replacing(synonyms: Synonyms) -> Callable[[str], str]:
    meant = dict(synonyms)
    words = "|".join(re.escape(word) for word in sorted(meant, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)")
    return lambda text: pattern.sub(lambda word: meant[word[0]], text)
