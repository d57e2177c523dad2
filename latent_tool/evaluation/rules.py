"""The scoring rules of published benchmarks, each as its authors define it: from an answer to a number in [0, 1].

Answers and accepted answers are texts; several are accepted where people or documents gave several. This module knows
nothing of rows, files or models.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from latent_tool.evaluation.normalising import bare, number_in, plain

__all__ = ["anls", "relaxed", "squad_words", "token_f1", "vqa_accuracy", "vqa_form", "yes_or_no"]

_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_POINT = re.compile(r"(?<!\d)\.|\.(?!\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_WORD = re.compile(r"[a-z]+")
_SENTENCE = re.compile(r"[.!?\n]")


def vqa_form(text: str) -> str:
    """Write an answer as VQA compares it: lower case, digits for number words, no articles, no punctuation.

    A point between digits stays. An apostrophe goes, so that ``dont`` and ``don't`` are one word.
    """
    text = _POINT.sub("", _THOUSANDS.sub("", text.casefold().replace("'", "")))
    text = "".join(" " if sign in string.punctuation and sign not in ".:" else sign for sign in text)
    return " ".join(_NUMBER_WORDS.get(word, word) for word in _ARTICLES.sub(" ", text).split())


def vqa_accuracy(answer: str, accepted: Sequence[str], *, averaged: bool = False) -> float:
    """Score an answer by how many people gave it: ``min(n / 3, 1)`` (Antol et al., ICCV 2015, section 3.3).

    ``averaged``: over all sets that leave one person out, as the authors' evaluation does, and that of TextVQA.
    """
    given = vqa_form(bare(answer))
    same = [vqa_form(each) == given for each in accepted]
    count = sum(same)
    if not averaged or len(accepted) < 2:
        return min(count / 3, 1.0)
    return sum(min((count - each) / 3, 1.0) for each in same) / len(same)


def anls(answer: str, accepted: Sequence[str], threshold: float = 0.5) -> float:
    """Score an answer by its normalised edit distance ``d`` to the nearest accepted one: ``1 - d``, 0 from
    ``threshold`` on (Biten et al., ICCV 2019, equation 1)."""
    given = " ".join(bare(answer).casefold().split())
    best = 0.0
    for each in accepted:
        wanted = " ".join(each.casefold().split())
        longest = max(len(given), len(wanted))
        if not longest or abs(len(given) - len(wanted)) >= threshold * longest:
            continue  # so far apart in length alone
        distance = _edits(given, wanted) / longest
        best = max(best, 1 - distance if distance < threshold else 0.0)
    return best


def _edits(one: str, other: str) -> int:
    """Levenshtein distance, a row of the table at a time."""
    import numpy as np

    signs = np.array([ord(sign) for sign in other])
    places = np.arange(len(other) + 1)
    row = places.copy()
    for count, sign in enumerate(one, start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (signs != ord(sign)))
        row = np.minimum.accumulate(np.concatenate(([count], best)) - places) + places
    return int(row[-1])


def relaxed(answer: str, accepted: Sequence[str], tolerance: float = 0.05) -> float:
    """Score 1 for a number within a share of the accepted one, other texts exactly, case aside (Methani et al., WACV
    2020; Masry et al., ACL Findings 2022, section 5.1)."""
    given = bare(answer)
    number = number_in(given)
    for each in accepted:
        wanted = _whole_number(each)
        if wanted is not None and number is not None:
            if abs(number - wanted) <= tolerance * abs(wanted) + 1e-9 * max(1.0, abs(wanted)):
                return 1.0
        elif plain(given) == plain(each):
            return 1.0
    return 0.0


def _whole_number(text: str) -> float | None:
    """The number that a text is; one that merely stands in it, as in ``Q3 2019`` or ``iPhone 5``, is none."""
    signs = text.strip().strip("%$\u20ac\u00a3 ").replace(",", "")
    return number_in(text) if re.fullmatch(r"[-+\u2212]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", signs) else None


def squad_words(text: str) -> list[str]:
    """Return the words that F1 compares: lower case, without punctuation and articles."""
    kept = "".join(sign for sign in text.casefold() if sign not in string.punctuation)
    return _ARTICLES.sub(" ", kept).split()


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """Score an answer by the words it shares with the nearest accepted one: ``2 p r / (p + r)`` (Rajpurkar et al.,
    EMNLP 2016, section 6.1)."""
    given = squad_words(bare(answer))
    best = 0.0
    for each in accepted:
        wanted = squad_words(each)
        if not given or not wanted:
            best = max(best, float(given == wanted))
            continue
        shared = sum((Counter(given) & Counter(wanted)).values())
        best = max(best, 2 * shared / (len(given) + len(wanted)))
    return best


def yes_or_no(text: str) -> str | None:
    """Read ``"yes"`` or ``"no"`` off the first sentence of an answer; ``None`` where it says neither, or both."""
    stated = next((part for part in _SENTENCE.split(bare(text).casefold()) if part.strip()), "")
    words = set(_WORD.findall(stated))
    said = {name for name in ("yes", "no") if name in words}
    said |= {"no"} if "not" in words and "yes" not in words else set()
    return said.pop() if len(said) == 1 else None
