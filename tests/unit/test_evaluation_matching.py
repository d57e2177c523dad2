"""When an answer is right."""

from __future__ import annotations

import cProfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_tool.errors import SettingsError
from latent_tool.evaluation.matching import Match, normalise, number_in, options_in, split_letter
from latent_tool.evaluation.synonyms import load_synonyms


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


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("iPhone5", 5.0),
        ("page-3", 3.0),
        ("type-2", 2.0),
        ("x=-5", -5.0),
        ("\u20135", -5.0),  # en dash
        ("(\u22125)", -5.0),
        ("-$1,200", -1200.0),
        ("minus 5", -5.0),
        ("Total \u2013 5", 5.0),
        ("5 m\u00b2", 5.0),
        ("<b>5</b>", 5.0),
        ("=> 5", 5.0),
        ("- 5", None),  # a sign, or a bullet
        ("10\u00b2", None),
        ("10^2", None),
        ("10\u2082", None),
        ("5!", None),
        ("2\u00bd", None),
        ("2\u20133", None),
        (">5", None),
        ("\u00b15", None),
        ("1,2000", None),
        ("1e400", None),
        ("9" * 400, None),
    ],
)
def test_a_number_keeps_its_sign_and_is_part_of_nothing_else(text: str, number: float | None) -> None:
    assert number_in(text) == number


@given(st.text("0123456789.,eE+-\u2013\u2212\u00b2\u00bd!^_$ ax(", max_size=12))
def test_no_text_is_too_strange_for_a_number(text: str) -> None:
    value = number_in(text)
    assert value is None or value == float(repr(value))
    match = Match("numeric")
    assert match.problem(text) is not None or match.right(text, text)


@given(st.text(max_size=20))
def test_every_text_is_its_own_answer(text: str) -> None:
    assert Match().right(text, text)
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10\u00b2", "102", False),
        ("10\u00b2", "10^2", True),
        ("5!", "5", False),
        ("\u20135", "5", False),
        ("\u20135", "-5", True),
        ("2\u00bd", "21/2", False),
        ("\u00bd", "1/2", True),
        ("10\u2082", "102", False),
        ("H\u2082O", "H2O", True),
        ("don\u2019t", "don't", True),
        ("well\u2013known", "well-known", True),
        ("great!", "great", True),
        ("\uff15", "5", True),
    ],
)
def test_folding_changes_no_value(one: str, other: str, same: bool) -> None:
    assert Match().right(one, other) is same and Match().right(other, one) is same


CLOTHES = [
    "**B**", "$B$", "`B`", "(B)", "[B]", "B.", "B. blue", "B) blue", "B - blue", "**B.** blue", "\\text{B}",
    "\\boxed{B}",
    "<answer>B</answer>", "<answer>B", "The answer is B.", "The answer is **B**.", "**Answer:** B", "Final answer: (B)",
    "Option B", "blue", "**blue**", "The answer is blue", "Answer: blue", "Blue.", "so the answer is $\\boxed{B}$",
]  # fmt: skip


@pytest.mark.parametrize("label", ["B", "blue", "**B**", "(b) blue", "The answer is blue", "$\\boxed{B}$"])
@pytest.mark.parametrize("answer", CLOTHES)
@pytest.mark.parametrize(
    "options", [("red", "blue", "green"), ("A. red", "B. blue", "C. green"), ("(a) red", "(b) blue")]
)
def test_the_same_answer_in_other_clothes(answer: str, label: str, options: tuple[str, ...]) -> None:
    match = Match("choice", options)
    assert match.problem(label) is None
    assert match.right(answer, label) and match.canonical(answer) == match.canonical(label)


@pytest.mark.parametrize(
    "answer",
    ["B or C", "not B", "A and B", "B, C", "The answer is not B", "Answer: not blue", "AB", "B/C", "(A) (B)", "B. red",
     "B. not blue", "blue or red", "C", "**C**", "The answer is red"],
)  # fmt: skip
def test_a_second_letter_or_a_not_stays_wrong(answer: str) -> None:
    assert not Match("choice", ("red", "blue", "green")).right(answer, "B")
    if answer != "B. red":  # without options nothing says that red is not B
        assert not Match("choice").right(answer, "B")


def test_exact_answers_in_other_clothes() -> None:
    for answer in (
        "**blue**",
        "The answer is blue.",
        "Answer: blue",
        "\\boxed{blue}",
        "<answer>blue</answer>",
        "$blue$",
    ):
        assert Match().right(answer, "blue") and Match().right("blue", answer)
    assert not Match().right("The answer is not blue", "blue")
    assert Match().right("snake_case_name", "snake_case_name") and not Match().right("2*3*4", "234")
    assert not Match().right("__init", "init")


def test_a_letter_that_is_another_options_text_is_an_error() -> None:
    match = Match("choice", ("B", "A"))
    assert "may be the text of one option or the letter of another" in str(match.problem("B"))
    assert not match.right("B", "A. B")


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (
            "Which?\nOptions:\nA. red\nB. blue\nPlease select the correct answer from the options above.",
            ("red", "blue"),
        ),
        ("Choices: (A) 1 (B) 2\nAnswer with A, B, C. or D. alone.", ("1", "2")),
        ("Options: A. red, B. blue. Please select the correct answer.", ("red", "blue.")),
        ("Options: A. red B. blue Hint: look at C. first", ("red", "blue")),
        ("Hint: Please give the letter.\nQuestion: x?\nChoices:\n(A) 1\n(B) 2", ("1", "2")),
        ("Q\nA. one\nB. two\nAnswer with the option's letter from the given choices.", ("one", "two")),
        ("Options: A. Vitamin C. pill B. tea", ("Vitamin C. pill", "tea")),
        ("Options:\nA. x\nmore of x\nB. y\nHint: z", ("x more of x", "y")),
        ("Options: A. to answer the phone B. to answer the door", ("to answer the phone", "to answer the door")),
        ("What colours? A. is a letter", ()),
    ],
)
def test_options_end_where_the_list_ends(question: str, options: tuple[str, ...]) -> None:
    assert options_in(question) == options


UNITS = ["\\boxed{", "<answer>", "</answer>", "*a ", "Options: A. x ", "$ ", "1,111", "\\text{", "- ", "A. x\n"]


@pytest.mark.parametrize("unit", UNITS)
def test_work_grows_no_faster_than_the_text(unit: str) -> None:
    """Counted, not timed: a text twice as long takes twice the calls."""

    def calls(text: str) -> int:
        profile = cProfile.Profile()
        profile.enable()
        for read in (number_in, normalise, split_letter, options_in):
            read(text)
        Match("choice", ("a", "b")).right(text, "A")
        profile.disable()
        return sum(entry.callcount for entry in profile.getstats())

    assert calls(unit * 4000) < 3 * calls(unit * 2000) + 1000


def test_synonyms_are_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "synonyms.txt"
    file.write_text("# naming\nsquare = Rectangle\nteal = blue = navy blue\n\n")
    synonyms = load_synonyms(file)
    exact = Match(synonyms=synonyms)
    assert exact.right("rectangle", "square") and exact.right("a navy blue square", "a teal rectangle")
    assert exact.canonical("Square.") == exact.canonical("rectangle")
    assert not exact.right("rectangles", "square") and not exact.right("not square", "rectangle")
    assert not Match().right("rectangle", "square")
    choice = Match("choice", ("square", "circle"), synonyms=synonyms)
    assert choice.right("rectangle", "A") and choice.right("A. rectangle", "square") and not choice.right("blue", "A")
    both = Match("choice", ("square", "rectangle"), synonyms=synonyms)
    assert both.problem("square") is not None and both.problem("A") is None and not both.right("rectangle", "A")
    for wrong in ("square", "a = ", "a = b\nb = c"):
        file.write_text(wrong)
        with pytest.raises(SettingsError):
            load_synonyms(file)
    with pytest.raises(SettingsError, match="cannot be read"):
        load_synonyms(tmp_path / "none.txt")


def test_a_label_of_nothing_that_is_seen_is_empty() -> None:
    for label in ("", "  ", "\u200b", "<answer></answer>"):
        assert Match().problem(label) == "the label is empty"
