"""When an answer is right."""

from __future__ import annotations

import pytest

from latent_tool.errors import SettingsError
from latent_tool.evaluation.matching import Match, normalise, number_in, options_in, split_letter


def even_length(answer: str, label: str) -> bool:
    """A rule of a user's own."""
    return len(answer) % 2 == 0


@pytest.mark.parametrize(
    ("answer", "label", "right"),
    [
        ("Red", "red", True),
        (" red  circle. ", "Red circle", True),
        ("'blue'", "blue", True),
        ("\uff32ed", "red", True),  # full-width letter
        ("-5", "5", False),
        ("dark red", "red", False),
        ("", "red", False),
        ("?", "!", False),
    ],
)
def test_exact(answer: str, label: str, right: bool) -> None:
    assert Match().right(answer, label) is right


def test_a_text_of_nothing_but_signs_is_kept() -> None:
    assert normalise("?") == "?"
    assert not Match().right("", "?")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$1,200", 1200.0),
        ("-3.5 degrees", -3.5),
        ("\u22124", -4.0),
        ("12 %", 12.0),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("3 of 5", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_one_number_in_a_text(text: str, number: float | None) -> None:
    assert number_in(text) == number


def test_numeric_tolerance_is_absolute_or_a_share() -> None:
    assert Match.parse("numeric").right("7.0", "7")
    assert not Match.parse("numeric").right("7.1", "7")
    assert Match.parse("numeric:0.1").right("7.1", "7")
    assert not Match.parse("numeric:0.1").right("7.2", "7")
    assert Match.parse("numeric:5%").right("105", "100")
    assert not Match.parse("numeric:5%").right("106", "100")
    assert not Match.parse("numeric:5%").right("about a hundred", "100")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", True),
        ("b", True),
        ("(B)", True),
        ("B. blue", True),
        ("blue", True),
        ("The answer is B.", True),
        ("Answer: (b)", True),
        ("A", False),
        ("B. red", False),
        ("red", False),
        ("E", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("label", ["B", "blue", "(b) blue"])
def test_choice_by_letter_or_text(answer: str, label: str, right: bool) -> None:
    match = Match("choice", ("red", "blue", "green"))
    assert match.problem(label) is None
    assert match.right(answer, label) is right


def test_choice_without_options_goes_by_the_lettered_label() -> None:
    match = Match("choice")
    assert match.right("B", "B. quarter")
    assert match.right("quarter", "B. quarter")
    assert not match.right("C", "B. quarter")
    assert match.problem("quarter") is not None


def test_texts_after_the_same_letter_must_match() -> None:
    match = Match("choice")
    assert match.right("B", "B. Smith") and match.right("B. Smith", "B")
    assert not match.right("J. Doe", "J. Smith") and match.right("j. smith", "J. Smith")


def test_large_numbers_are_votes_of_their_own() -> None:
    match = Match("numeric")
    assert match.canonical("1234567") != match.canonical("1234568")
    assert match.canonical("7.0") == match.canonical("7") and match.canonical("-0") == match.canonical("0")


def test_data_names_no_function() -> None:
    for name in ("exact", "choice", "numeric:5%"):
        assert Match.parse(name, custom=False) == Match.parse(name)
    with pytest.raises(SettingsError, match="data may name"):
        Match.parse("test_evaluation_matching:even_length", custom=False)


def test_labels_that_nothing_can_match() -> None:
    options = ("red", "blue")
    assert "not among the options" in str(Match("choice", options).problem("purple"))
    assert "not among the options" in str(Match("choice", options).problem("C"))
    assert "not one number" in str(Match("numeric").problem("three or four"))
    assert "empty" in str(Match().problem("  "))
    assert Match("choice", options).problem("A") is None


def test_options_listed_in_the_question() -> None:
    assert options_in("Open?\nOptions: (a) Open (b) Closed\n") == ("Open", "Closed")
    assert options_in("Which?\n\nOptions:\nA. Maryland\nB. New Hampshire") == ("Maryland", "New Hampshire")
    assert options_in("Main?\nOptions: A: A bench., B: A couple.") == ("A bench.", "A couple.")
    assert options_in("What colour?") == ()
    assert split_letter("a cat") == (None, "a cat")


def test_votes_for_the_same_choice_count_together() -> None:
    match = Match("choice", ("red", "blue"))
    assert match.canonical("B") == match.canonical("(b) blue") == match.canonical("Blue")
    assert match.canonical("A") != match.canonical("B")
    assert Match("numeric").canonical("7.0") == Match("numeric").canonical("7")


def test_a_rule_of_the_users_own() -> None:
    match = Match.parse("test_evaluation_matching:even_length")
    assert match.right("ab", "anything")
    assert not match.right("abc", "anything")


@pytest.mark.parametrize(
    "text", ["nearly", "numeric:x", "numeric:-1", "numeric:nan", "exact:1", "no_such_module:f", "json:no"]
)
def test_unknown_rules_are_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        Match.parse(text)
