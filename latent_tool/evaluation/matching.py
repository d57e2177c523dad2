"""When an answer counts as right: exact text, multiple choice, a number within a tolerance, or the caller's own rule.

``Match`` says which rule holds for a question and whether a label can be matched at all; it knows nothing of models.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Literal

from latent_tool.errors import SettingsError

__all__ = ["Match", "normalise", "number_in"]

_QUOTES = "\"'`\u2018\u2019\u201c\u201d"
_NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
_LETTERED = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])\s*[.):])\s*(.*)", re.DOTALL)
_MARKED = re.compile(r"\([A-Za-z]\)|[A-Za-z][.)]")
_OPTIONS = re.compile(r"\b(?:options|choices)\s*:(.*)", re.IGNORECASE | re.DOTALL)
_OPTION = re.compile(r"(?:^|(?<=[\s,;]))(?:\(([A-Za-z])\)|([A-Za-z])[.:)])\s+")
_LEAD = re.compile(r"(?:the\s+)?(?:correct\s+|final\s+)?(?:answer|option|choice)\s*(?:is\b\s*:?|:)\s*", re.IGNORECASE)
_HINT = "Use exact, choice, numeric, numeric:0.5 (absolute), numeric:5% (relative) or module:function."


def normalise(text: str) -> str:
    """Text as it is compared: NFKC, no case, single spaces, without quotes around it and punctuation after it.

    A text of nothing but such signs is kept as it is.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    stripped = plain.rstrip(".,!?;: ").strip(_QUOTES + " ").rstrip(".,!?;: ")
    return stripped or plain


def number_in(text: str) -> float | None:
    """The one number in a text (``"$1,200"``, ``"-3.5"``, ``"12 %"``); ``None`` when there is none, or several."""
    found = [match for match in _NUMBER.findall(text) if any(character.isdigit() for character in match)]
    if len(found) != 1:
        return None
    value = float(found[0].replace(",", "").replace("\u2212", "-"))
    return value if math.isfinite(value) else None


def split_letter(text: str) -> tuple[str | None, str]:
    """``"(b) blue"``, ``"B. blue"`` or ``"b"`` as ``("B", "blue")``; the letter is ``None`` where none is named."""
    stripped = text.strip()
    if lead := _LEAD.match(stripped):
        stripped = stripped[lead.end() :].rstrip(". ")
    if len(stripped) == 1 and stripped.isascii() and stripped.isalpha():
        return stripped.upper(), ""
    found = _LETTERED.fullmatch(stripped)
    return (None, stripped) if found is None else ((found[1] or found[2]).upper(), found[3].strip())


def is_letter(text: str) -> bool:
    """Whether a text is nothing but a marked letter: ``"(B)"``, ``"B."`` or ``"B)"``."""
    return _MARKED.fullmatch(text.strip()) is not None


def options_in(question: str) -> tuple[str, ...]:
    """Options that a question lists itself after ``Options:``, lettered from A on; empty if it does not."""
    listed = _OPTIONS.search(question)
    if listed is None:
        return ()
    marks = list(_OPTION.finditer(listed[1]))
    letters = [(mark[1] or mark[2]).upper() for mark in marks]
    if letters != [chr(ord("A") + place) for place in range(len(letters))]:
        return ()
    ends = [mark.start() for mark in marks[1:]] + [len(listed[1])]
    return tuple(listed[1][mark.end() : end].strip(" \t\r\n,;") for mark, end in zip(marks, ends, strict=True))


@dataclass(frozen=True)
class Match:
    """A rule for telling right answers.

    Args:
        kind: ``"exact"`` after ``normalise``; ``"choice"`` by the letter or the text of an option; ``"numeric"``, the
            one number in the answer within the tolerance; ``"custom"``, what ``function`` says.
        options: of a multiple-choice question, in the order of their letters; empty if they are not known.
        tolerance: largest difference that is right (numeric).
        relative: the tolerance is a share of the label instead.
        function: ``"module:function"``, called with answer and label, returning a bool (custom).
    """

    kind: Literal["exact", "choice", "numeric", "custom"] = "exact"
    options: tuple[str, ...] = ()
    tolerance: float = 0.0
    relative: bool = False
    function: str | None = None

    @classmethod
    def parse(cls, text: str, options: tuple[str, ...] = (), *, custom: bool = True) -> Match:
        """A rule from its name; see the hint of the ``SettingsError`` for those there are.

        ``custom=False`` for names that come with data: a function is then refused, and nothing is imported.
        """
        kind, _, rest = text.strip().partition(":")
        if kind in ("exact", "choice") and not rest:
            return cls("choice" if kind == "choice" else "exact", options)
        if kind == "numeric":
            number = rest.strip().removesuffix("%")
            try:
                tolerance = float(number) if number else 0.0
            except ValueError:
                tolerance = math.nan
            if not 0 <= tolerance < math.inf:
                raise SettingsError(f"{text!r} is no numeric tolerance.", _HINT)
            relative = rest.strip().endswith("%")
            return cls("numeric", options, tolerance / 100 if relative else tolerance, relative)
        if not custom:
            raise SettingsError(
                f"There is no answer matching {text!r} that data may name.",
                "Data may name exact, choice and numeric; give a function yourself (match, --match).",
            )
        if rest and all(part.isidentifier() for part in kind.split(".")) and rest.isidentifier():
            _function(text.strip())
            return cls("custom", options, function=text.strip())
        raise SettingsError(f"There is no answer matching {text!r}.", _HINT)

    def __str__(self) -> str:
        if self.kind == "numeric" and self.tolerance:
            return f"numeric:{100 * self.tolerance:g}%" if self.relative else f"numeric:{self.tolerance:g}"
        return self.function or self.kind

    def problem(self, label: str) -> str | None:
        """Why no answer could ever match a label, or ``None``."""
        if not label.strip():
            return "the label is empty"
        if self.kind == "numeric" and number_in(label) is None:
            return f"the label {_short(label)} is not one number"
        if self.kind == "choice":
            letter, _ = split_letter(label)
            if not self.options:
                return None if letter else f"the label {_short(label)} names no letter, and no options are given"
            if len(self.options) > 26:
                return "there are more than 26 options"
            if self._choice(label) is None:
                return f"the label {_short(label)} is not among the options"
        return None

    def right(self, answer: str, label: str) -> bool:
        """Whether an answer is right; what a custom function raises is passed on."""
        if self.kind == "custom":
            return bool(_function(self.function or "")(answer, label))
        if self.kind == "numeric":
            found, wanted = number_in(answer), number_in(label)
            if found is None or wanted is None:
                return False
            allowed = self.tolerance * abs(wanted) if self.relative else self.tolerance
            # Two readings of the same decimal may differ in the last bit.
            return abs(found - wanted) <= allowed + 1e-9 * max(1.0, abs(wanted))
        if self.kind == "choice":
            if self.options:
                chosen = self._choice(answer)
                return chosen is not None and chosen == self._choice(label)
            letter, text = split_letter(label)
            chosen_letter, chosen_text = split_letter(answer)
            if chosen_letter and (chosen_letter != letter or not text or not chosen_text):
                return chosen_letter == letter
            return bool(text) and normalise(chosen_text) == normalise(text)
        return normalise(answer) == normalise(label)

    def canonical(self, answer: str) -> str:
        """The answer as votes are counted: answers that match the same labels have the same canonical form.

        Where the options of a multiple choice are not known, the letter is all that counts.
        """
        if self.kind == "choice":
            chosen = self._choice(answer) if self.options else None
            letter, text = split_letter(answer)
            return f"option {chosen}" if chosen is not None else letter or normalise(text)
        number = number_in(answer) if self.kind == "numeric" else None
        return normalise(answer) if number is None else repr(number + 0.0)  # and -0.0 is 0.0

    def _choice(self, text: str) -> int | None:
        """Which option a text names, by its own text first, by its letter otherwise; ``None`` if by neither."""
        texts = [normalise(option) for option in self.options]
        if texts.count(normalise(text)) == 1:
            return texts.index(normalise(text))
        letter, rest = split_letter(text)
        place = None if letter is None else ord(letter) - ord("A")
        if place is None or place >= len(texts):
            return None
        return place if not rest or normalise(rest) == texts[place] else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


@lru_cache(maxsize=64)
def _function(name: str) -> Callable[[str, str], object]:
    module, _, attribute = name.partition(":")
    try:
        found: Callable[[str, str], object] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"The matching function {name!r} cannot be imported ({error}).",
            "Name it as module:function, importable from the folder you are in or installed.",
        ) from error
    if not callable(found):
        raise SettingsError(f"{name!r} is not a function.", "Name a function of an answer and a label.")
    return found
