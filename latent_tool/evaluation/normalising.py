"""Read a label or an answer as it is meant: without its clothes, and without changing any value.

Labels and answers go through the same functions. What these take off stands around a text (Markdown, LaTeX, tags,
quotes, "The answer is"); what stands inside it stays. Every function takes time linear in its text, whatever the text.
This module knows nothing of rules, rows or models.
"""

from __future__ import annotations

import math
import re
import unicodedata

__all__ = [
    "fold",
    "is_letter",
    "normalise",
    "number_in",
    "option_texts",
    "options_in",
    "plain",
    "split_letter",
    "unwrap",
]

_QUOTES = "\"'`"
_END = ".,!?;: "
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BRACE = re.compile(r"\\boxed\s*\{|[{}]")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit)\s*\{([^{}]*)\}")
_BOX_MARK = re.compile(r"<\|(?:begin|end)_of_box\|>")
# As Markdown has it: no space inside next to the signs, no digit after them, so that prices are left alone.
_FORMULA = re.compile(r"(\$\$?)(?=\S)([^$]*)(?<=\S)\1(?![\d$])")
_EMPHASIS = re.compile(r"\*{1,3}|_{1,3}|`+")
_LEAD = re.compile(
    r"(?:so|thus|hence|therefore)?,?\s*(?:the\s+|my\s+)?(?:(?:correct|final|right|best)\s+)?"
    r"(?:answer|option|choice)(?:\s+(?:is|would\s+be)\b\s*:?|\s*[:=])\s*",
    re.IGNORECASE,
)
_OPTION_WORD = re.compile(r"(?:option|choice)\s+(?=\(?[A-Za-z]\b)", re.IGNORECASE)
_LETTERED = re.compile(
    r"(?:[(\[]([A-Za-z])[)\]][.:,]?|([A-Za-z])(?:\s*[.):]|,(?=\s)|\s+[-\u2013\u2014](?=\s)))\s*(.*)", re.DOTALL
)
_MARKED = re.compile(r"\([A-Za-z]\)|[A-Za-z][.)]")
# Digits with what belongs to the number: thousands, a fraction, an exponent.
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?")

_CURRENCY = re.compile(r"\s?[$\u20ac\u00a3\u00a5]\s?\Z")
_MINUS = re.compile(r"\b(?:minus|negative)\s\Z", re.IGNORECASE)
_BOUND = re.compile(r"(?:^|[^-=])[<>\u2264\u2265\u00b1\u2260]=?\s?[-+]?\Z")
_HTML = re.compile(r"<[^<>]{1,20}>\s?\Z")

_SUPERSCRIPTS = {
    "\u00b9": "1",
    "\u00b2": "2",
    "\u00b3": "3",
    "\u2070": "0",
    "\u207a": "+",
    "\u207b": "-",
    "\u207f": "n",
}
_SUPERSCRIPTS |= {chr(0x2070 + digit): str(digit) for digit in range(4, 10)}
_SUBSCRIPTS = {chr(0x2080 + digit): str(digit) for digit in range(10)} | {"\u208a": "+", "\u208b": "-"}
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
# One sign for one meaning: every dash and minus, every apostrophe, every quotation mark; nothing for what is not seen.
_ALIKE = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-")
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\uff07", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\uff02", '"')
    | dict.fromkeys("\u200b\u2060\ufeff\u00ad")
)


# --- values ------------------------------------------------------------------------------------------------------


def fold(text: str) -> str:
    """Return one way to write what means the same: NFKC, one dash, one apostrophe, plain spaces.

    No value changes: ``10²`` becomes ``10^2`` and not 102, ``2½`` becomes ``2 1/2``, a typographic minus a ``-``; the 2
    of ``H₂O`` stays a 2, that of ``10₂`` becomes ``_2``.
    """
    text = _RAISED.sub(lambda run: "^" + "".join(_SUPERSCRIPTS[sign] for sign in run[0]), text.translate(_ALIKE))
    text = _LOWERED.sub(_lowered, text)
    if not text.isascii():
        text = "".join(map(_apart, " " + text, text))
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").translate(_ALIKE)
    return " ".join(text.split())


def _lowered(run: re.Match[str]) -> str:
    before, after = run.string[: run.start()][-1:], run.string[run.end() : run.end() + 1]
    digits = "".join(_SUBSCRIPTS[sign] for sign in run[0])
    return digits if before.isalpha() and not after.isdigit() else "_" + digits


def _apart(before: str, sign: str) -> str:
    """A sign, set apart from a digit before it that NFKC would make one number of: ``2½``, ``2①``."""
    return f" {sign}" if unicodedata.category(sign) == "No" and before.isdigit() else sign


def normalise(text: str) -> str:
    """Return the text as it is compared: ``fold``ed, no case, without quotes around it and punctuation after it.

    A text of nothing but such signs is kept as it is, and so is what makes a factorial of a number.
    """
    folded = fold(text).casefold()
    stripped = _without_end(_without_end(folded).strip(_QUOTES + " "))
    return stripped or folded


def _without_end(text: str) -> str:
    body = text.rstrip(_END)
    tail = text[len(body) :]
    if tail.startswith("!") and (body[-1:].isdigit() or body[-1:] == ")" or len(body) == 1):
        return body + tail[: len(tail) - len(tail.lstrip("!"))]
    return body


def number_in(text: str) -> float | None:
    """Return the one number in a text (``"$1,200"``, ``"-3.5"``, ``"12 %"``); ``None`` when there is none, or several.

    A hyphen after a letter is no sign (``page-3`` has a 3). A number that is part of something else is none: a power
    (``10²``), a factorial (``5!``), a bound (``>5``), or a lone dash before it that may be a sign or a bullet.
    """
    folded = fold(text)
    numbers = [match for match in _NUMBER.finditer(folded) if not _exponent_of_unit(folded, match.start())]
    if len(numbers) != 1:
        return None
    start, end = numbers[0].span()
    if folded[end : end + 1] in ("!", "^", "_") or folded[max(start - 1, 0) : start] in ("^", "_"):
        return None
    before = _CURRENCY.sub("", folded[:start])
    sign = ""
    if before.endswith(("-", "+")):
        if not before[-2:-1].isalnum() and before[-2:-1] != ")":
            sign = before[-1]
    elif before.endswith(("- ", "+ ")):
        if not before[:-2].rstrip()[-1:].isalnum():
            return None
    elif _MINUS.search(before[-12:]):
        sign = "-"
    if _BOUND.search(before[-4:]) and not _HTML.search(before[-24:]):
        return None
    try:
        value = float(sign + numbers[0][0].replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _exponent_of_unit(text: str, start: int) -> bool:
    """Whether a number stands in ``m^2``: a power of a unit is no number of its own."""
    before = text[max(start - 3, 0) : start]
    return re.search(r"[^\W\d_]\^-?$", before) is not None


# --- clothes -----------------------------------------------------------------------------------------------------


def unwrap(text: str) -> str:
    """Take off what stands around an answer: ``<answer>``, ``\\boxed{}``, ``$...$``, ``\\text{}``, ``**...**``."""
    text = _BOX_MARK.sub("", _answer_of(text))
    boxed = _boxed_of(text)
    text = text if boxed is None else boxed
    text = _TEXT.sub(r"\1", _FORMULA.sub(r"\2", text).replace("\\(", "").replace("\\)", ""))
    return _without_emphasis(text).strip()


def _answer_of(text: str) -> str:
    """What stands in the last closed ``<answer>``, else after the last open one, else the text."""
    begun: int | None = None
    inside: tuple[int, int] | None = None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            begun = tag.end()
        elif begun is not None:
            inside, begun = (begun, tag.start()), None
    if inside is not None:
        return text[slice(*inside)]
    return text if begun is None else text[begun:]


def _boxed_of(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}`` of a text whose braces are balanced; ``None`` without one."""
    opened: list[int | None] = []  # for every open brace, where the content of a box begins
    last: tuple[int, int] | None = None
    for sign in _BRACE.finditer(text):
        if sign[0] == "}":
            begun = opened.pop() if opened else None
            if begun is not None and (last is None or begun > last[0]):
                last = begun, sign.start()
        else:
            opened.append(None if sign[0] == "{" else sign.end())
    return None if last is None else text[slice(*last)]


def _without_emphasis(text: str) -> str:
    """The text without Markdown's marks of emphasis where they come in pairs around words."""
    opened: dict[str, tuple[int, int]] = {}
    gone: list[tuple[int, int]] = []
    for mark in _EMPHASIS.finditer(text):
        before, after = text[max(mark.start() - 1, 0) : mark.start()], text[mark.end() : mark.end() + 1]
        closes = bool(before.strip()) and not after.isalnum()
        if closes and mark[0] in opened:
            gone += [opened.pop(mark[0]), mark.span()]
        elif after.strip() and not before.isalnum():
            opened[mark[0]] = mark.span()
    parts, place = [], 0
    for start, end in sorted(gone):
        parts.append(text[place:start])
        place = end
    return "".join([*parts, text[place:]])


def without_lead(text: str) -> str:
    """Take off what leads to an answer: "The answer is", "Final answer:", "Option" before its letter."""
    for _ in range(3):
        stripped = text.strip()
        lead = _LEAD.match(stripped) or _OPTION_WORD.match(stripped)
        if lead is None or not stripped[lead.end() :].strip():
            return stripped
        text = stripped[lead.end() :]
    return text.strip()


def plain(text: str) -> str:
    """Return a label or an answer as the rules compare it: unwrapped, without its lead, normalised."""
    return normalise(bare(text))


def bare(text: str) -> str:
    """Return a label or an answer without clothes and lead, otherwise as it was written."""
    return unwrap(without_lead(unwrap(text)))


# --- letters and options -----------------------------------------------------------------------------------------


def split_letter(text: str) -> tuple[str | None, str]:
    """``"(b) blue"``, ``"B. blue"`` or ``"b"`` as ``("B", "blue")``; the letter is ``None`` where none is named."""
    stripped = bare(text)
    if len(alone := stripped.rstrip(_END)) == 1 and alone.isascii() and alone.isalpha():
        return alone.upper(), ""
    lettered = _LETTERED.fullmatch(stripped)
    if lettered is None:
        return None, stripped
    return (lettered[1] or lettered[2]).upper(), lettered[3].strip().rstrip(". ")


def is_letter(text: str) -> bool:
    """Tell whether a text is nothing but a marked letter: ``"(B)"``, ``"B."`` or ``"B)"``."""
    return _MARKED.fullmatch(text.strip()) is not None


def option_texts(options: tuple[str, ...]) -> tuple[str, ...]:
    """Return the options without the letters that they carry, where all do so in order from A."""
    parts = [_LETTERED.fullmatch(option.strip()) for option in options]
    letters = [None if part is None else (part[1] or part[2]).upper() for part in parts]
    if len(options) < 2 or letters != [chr(ord("A") + place) for place in range(len(options))]:
        return options
    return tuple(part[3].strip() or option for part, option in zip(parts, options, strict=True) if part is not None)


_HEADER = re.compile(r"\b(?:options|choices)\s*:", re.IGNORECASE)
_MARK = re.compile(r"(?:^|(?<=[\s,;]))(?:\(([A-Za-z])\)|([A-Za-z])[.:)])\s+")
_LINE_MARK = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])[.:)])\s+\S")
# What is said after a list on its last line, and is no part of the last option.
_INSTRUCTION = re.compile(
    r"(?:^|\s)(?:please,?\s+(?:\w+ly\s+)?(?:select|choose|answer|pick|give|respond|reply|provide|output|indicate|only)\b"
    r"|(?:hint|answer|note|question|context)\s*:)"
    r"|(?:^|(?<=[.;:!?]\s))(?:answer|select|choose|pick|give|respond|reply|provide|output)\s",
    re.IGNORECASE,
)


def options_in(question: str) -> tuple[str, ...]:
    """Return options that a question lists itself, lettered from A on; empty if it does not.

    The list stands after ``Options:`` or ``Choices:``, or on lines that begin with ``A.``, ``B.`` and so on. It ends
    where the list ends: with the last lettered line, before an instruction.
    """
    headers = [header.end() for header in _HEADER.finditer(question)]
    for place, start in enumerate(headers):
        end = headers[place + 1] if place + 1 < len(headers) else len(question)
        listed = question[start:end]
        if _LINE_MARK.match(listed) and len(options := _listed(listed)) > 1:
            return options
    if headers:
        return ()
    first = re.search(r"^\s*(?:\([Aa]\)|[Aa][.)])\s+\S", question, re.MULTILINE)
    options = () if first is None else _listed(question[first.start() :])
    return options if len(options) > 1 else ()


def _listed(text: str) -> tuple[str, ...]:
    """The options of a list at whose first mark a text begins."""
    lines = text.strip().split("\n")
    marked = [_LINE_MARK.match(line) for line in lines]
    lettered = [None if mark is None else (mark[1] or mark[2]).upper() for mark in marked]
    last = {letter: place for place, letter in enumerate(lettered) if letter is not None}
    options: list[str] = []
    further: list[str] = []  # lines on which the last option goes on
    for place, line in enumerate(lines):
        expected = chr(ord("A") + len(options))
        if lettered[place] == expected:
            if further:
                options[-1] = " ".join([options[-1], *further]).strip()
                further = []
            options += _on_line(line, len(options))
        elif not options:
            return ()
        elif last.get(expected, -1) > place and not _INSTRUCTION.match(line.strip()):
            further.append(line.strip())
        elif line.strip():
            break
    return tuple(option.strip(" \t\r,;") for option in options)


def _on_line(line: str, first: int) -> list[str]:
    """The options on one line, which begins with the mark of the option of that number."""
    mark_end = _LINE_MARK.match(line)
    instruction = _INSTRUCTION.search(line, mark_end.end() if mark_end else 0)
    line = line if instruction is None else line[: instruction.start()]
    begun: list[int] = []
    ends: list[int] = []
    for mark in _MARK.finditer(line):
        if (mark[1] or mark[2]).upper() == chr(ord("A") + first + len(begun)):
            ends += [mark.start()] if begun else []
            begun.append(mark.end())
    return [line[start:end] for start, end in zip(begun, [*ends, len(line)], strict=True)]
