"""When an answer counts as right: exact text, multiple choice, a number, a benchmark's rule, or the caller's own.

``Match`` says which rule holds for a question, what answers it accepts, and whether they can be matched at all; it
knows nothing of models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Literal

from latent_tool.errors import SettingsError
from latent_tool.evaluation import rules
from latent_tool.evaluation.normalising import (
    bare,
    normalise,
    number_in,
    option_texts,
    options_in,
    plain,
    split_letter,
)
from latent_tool.evaluation.synonyms import Synonyms, without_synonyms

__all__ = ["GRADED", "Match", "normalise", "number_in", "options_in", "split_letter"]

# A text after a letter that names another letter, or says that it is not this one: "B or C", "A, B", "B. not that".
_SECOND = re.compile(r"\W*(?:(?:not|nor)\b.*|(?:or|and|&|/)?\W*[A-Za-z]\W*|(?:or|and)\b.*)", re.IGNORECASE | re.DOTALL)
_HINT = (
    "Use exact, choice, numeric, numeric:0.5 (absolute), numeric:5% (relative), rounded:2 (decimals), yes-no, vqa, "
    "vqa:averaged, anls, relaxed:0.05, f1 or module:function."
)
Kind = Literal["exact", "choice", "numeric", "rounded", "yes-no", "vqa", "anls", "relaxed", "f1", "custom"]
# Rules whose name is all there is to them.
_PLAIN: dict[str, Kind] = {"exact": "exact", "choice": "choice", "yes-no": "yes-no", "anls": "anls", "f1": "f1"}
# Rules whose credit has more than two values; an answer is right from this credit on.
GRADED = ("vqa", "anls", "f1")
RIGHT = 0.5


@dataclass(frozen=True)
class Match:
    """A rule for telling right answers.

    Args:
        kind: ``"exact"`` after ``normalise``; ``"choice"`` by the letter or the text of an option; ``"numeric"``, the
            one number in the answer within the tolerance; ``"rounded"``, the same after rounding to ``tolerance``
            decimals; ``"yes-no"``; ``"vqa"``, ``"anls"``, ``"relaxed"`` and ``"f1"`` as in ``rules``; ``"custom"``,
            what ``function`` says.
        options: of a multiple-choice question, in the order of their letters; empty if they are not known.
        tolerance: largest difference that is right (numeric), the share of it (relaxed), or decimals (rounded).
        relative: the tolerance is a share of the label instead (numeric).
        averaged: over the sets that leave one accepted answer out (vqa).
        function: ``"module:function"``, called with answer and label, returning a bool (custom).
        synonyms: words that mean the same (exact and choice), see ``load_synonyms``.
        answers: every accepted answer, the label among them; empty if the label is the only one.
    """

    kind: Kind = "exact"
    options: tuple[str, ...] = ()
    tolerance: float = 0.0
    relative: bool = False
    averaged: bool = False
    function: str | None = None
    synonyms: Synonyms = ()
    answers: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, options: tuple[str, ...] = (), *, custom: bool = True) -> Match:
        """Return a rule from its name; see the hint of the ``SettingsError`` for those there are.

        ``custom=False`` for names that come with data: a function is then refused, and nothing is imported.
        """
        kind, _, rest = text.strip().partition(":")
        if kind == "vqa" and rest in ("", "averaged"):
            return cls("vqa", options, averaged=bool(rest))
        if kind in _PLAIN and not rest:
            return cls(_PLAIN[kind], options)
        if kind == "rounded" and rest.isascii() and rest.isdigit() and len(rest) < 3:
            return cls("rounded", options, float(rest))
        if kind in ("numeric", "relaxed"):
            number = rest.strip().removesuffix("%")
            try:
                tolerance = float(number) if number else 0.05 if kind == "relaxed" else 0.0
            except ValueError:
                tolerance = math.nan
            if not 0 <= tolerance < math.inf:
                raise SettingsError(f"{text!r} is no numeric tolerance.", _HINT)
            relative = rest.strip().endswith("%")
            tolerance = tolerance / 100 if relative else tolerance
            if kind == "relaxed":
                return cls("relaxed", options, tolerance)
            return cls("numeric", options, tolerance, relative)
        if not custom:
            raise SettingsError(
                f"There is no answer matching {text!r} that data may name.",
                "Data may name any rule but a function; give that yourself (match, --match).",
            )
        if rest and all(part.isidentifier() for part in kind.split(".")) and rest.isidentifier():
            _function(text.strip())
            return cls("custom", options, function=text.strip())
        raise SettingsError(f"There is no answer matching {text!r}.", _HINT)

    def __str__(self) -> str:
        if self.kind == "numeric" and self.tolerance:
            return f"numeric:{100 * self.tolerance:g}%" if self.relative else f"numeric:{self.tolerance:g}"
        if self.kind in ("relaxed", "rounded"):
            return f"{self.kind}:{self.tolerance:g}"
        return "vqa:averaged" if self.averaged else self.function or self.kind

    def problem(self, label: str) -> str | None:
        """Return why no answer could ever match a label, or one of the accepted answers, or ``None``."""
        return next((said for each in self.answers or (label,) if (said := self._problem(each))), None)

    def _problem(self, label: str) -> str | None:
        if self.kind in GRADED or self.kind == "relaxed":
            return None if label.strip() else "the label is empty"
        if not plain(label):
            return "the label is empty"
        if self.kind == "yes-no" and rules.yes_or_no(label) is None:
            return f"the label {_short(label)} is neither yes nor no"
        if self.kind in ("numeric", "rounded") and number_in(bare(label)) is None:
            return f"the label {_short(label)} is not one number"
        if self.kind == "choice":
            letter, _ = split_letter(label)
            if not self.options:
                return None if letter else f"the label {_short(label)} names no letter, and no options are given"
            if len(self.options) > 26:
                return "there are more than 26 options"
            chosen = self._candidates(label)
            if len(chosen) > 1:
                letters = " and ".join(chr(ord("A") + place) for place in sorted(chosen))
                return f"the label {_short(label)} may be the text of one option or the letter of another ({letters})"
            if not chosen:
                return f"the label {_short(label)} is not among the options"
        return None

    def right(self, answer: str, label: str) -> bool:
        """Tell whether an answer is right; what a custom function raises is passed on.

        By a graded rule it is from a credit of 0.5 on.
        """
        return self.credit(answer, label) >= RIGHT

    def credit(self, answer: str, label: str) -> float:
        """Score an answer against all accepted ones, in [0, 1]; 0 or 1 unless the rule is graded."""
        accepted = self.answers or (label,)
        if self.kind == "vqa":
            return rules.vqa_accuracy(answer, accepted, averaged=self.averaged)
        if self.kind == "anls":
            return rules.anls(answer, accepted)
        if self.kind == "f1":
            return rules.token_f1(answer, accepted)
        if self.kind == "relaxed":
            return rules.relaxed(answer, accepted, self.tolerance)
        return float(any(self._right(answer, each) for each in accepted))

    def _right(self, answer: str, label: str) -> bool:
        if self.kind == "custom":
            return bool(_function(self.function or "")(answer, label))
        if self.kind == "yes-no":
            said = rules.yes_or_no(answer)
            return said is not None and said == rules.yes_or_no(label)
        if self.kind == "rounded":
            given, wanted = number_in(bare(answer)), number_in(bare(label))
            decimals = int(self.tolerance)
            return given is not None and wanted is not None and round(given, decimals) == round(wanted, decimals)
        if self.kind == "numeric":
            given, wanted = number_in(bare(answer)), number_in(bare(label))
            if given is None or wanted is None:
                return False
            allowed = self.tolerance * abs(wanted) if self.relative else self.tolerance
            # Two readings of the same decimal may differ in the last bit.
            return abs(given - wanted) <= allowed + 1e-9 * max(1.0, abs(wanted))
        if self.kind == "choice":
            if self.options:
                chosen = self.chosen(answer)
                return chosen is not None and chosen == self.chosen(label)
            letter, text = split_letter(label)
            chosen_letter, chosen_text = split_letter(answer)
            if not chosen_letter:
                return bool(text) and self._plain(chosen_text) == self._plain(text)
            if not text or not chosen_text:
                return chosen_letter == letter and not (chosen_text and _SECOND.fullmatch(chosen_text))
            return chosen_letter == letter and self._plain(chosen_text) == self._plain(text)
        return self._plain(answer) == self._plain(label)

    def canonical(self, answer: str) -> str:
        """Return the answer as votes are counted: answers that match the same labels have the same canonical form.

        Where the options of a multiple choice are not known, the letter is all that counts.
        """
        if self.kind == "choice":
            chosen = self.chosen(answer) if self.options else None
            letter, text = split_letter(answer)
            return f"option {chosen}" if chosen is not None else letter or normalise(text)
        if self.kind == "yes-no":
            return rules.yes_or_no(answer) or normalise(answer)
        if self.kind == "vqa":
            return rules.vqa_form(bare(answer))
        if self.kind == "f1":
            return " ".join(sorted(rules.squad_words(bare(answer))))
        if self.kind == "anls":
            return " ".join(bare(answer).casefold().split())
        number = number_in(bare(answer)) if self.kind in ("numeric", "rounded", "relaxed") else None
        return self._plain(answer) if number is None else repr(number + 0.0)  # and -0.0 is 0.0

    @cached_property
    def _texts(self) -> dict[str, int | None]:
        """Place of every option by its normalised text; ``None`` where several have the same."""
        places: dict[str, int | None] = {}
        for place, option in enumerate(option_texts(self.options)):
            text = self._plain(option)
            places[text] = None if text in places else place
        return places

    def _plain(self, text: str) -> str:
        return without_synonyms(plain(text), self.synonyms)

    def _candidates(self, text: str) -> set[int]:
        """The options that a text may name: that which has this text, and that whose letter it is."""
        stripped, (letter, rest) = self._plain(text), split_letter(text)
        places = {self._texts.get(stripped)}
        if letter is not None:
            place = ord(letter) - ord("A")
            if place < len(self.options) and (not rest or self._is_text(rest, place)):
                places.add(place)
        return {place for place in places if place is not None}

    def _is_text(self, text: str, place: int) -> bool:
        option = option_texts(self.options)[place]
        return self._plain(text) == self._plain(option) or normalise(text) == normalise(option)

    def chosen(self, text: str) -> int | None:
        """Tell which option a text names, by its text or its letter; ``None`` if none, or if it may be two."""
        chosen = self._candidates(text)
        return chosen.pop() if len(chosen) == 1 else None


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
