"""Published scoring rules, against values worked out by hand from their definitions."""

from __future__ import annotations

import random

import pytest

from latent_tool.errors import SettingsError
from latent_tool.evaluation import rules
from latent_tool.evaluation.matching import Match


@pytest.mark.parametrize(
    ("people", "credit", "averaged"),
    [
        # Of ten people n gave this answer. min(n / 3, 1); averaged over the ten sets of nine:
        # (n min((n - 1) / 3, 1) + (10 - n) min(n / 3, 1)) / 10.
        (0, 0.0, 0.0),
        (1, 1 / 3, 0.3),
        (2, 2 / 3, 0.6),
        (3, 1.0, 0.9),
        (4, 1.0, 1.0),
        (10, 1.0, 1.0),
    ],
)
def test_vqa_accuracy(people: int, credit: float, averaged: float) -> None:
    accepted = ["red"] * people + [f"other {number}" for number in range(10 - people)]
    assert rules.vqa_accuracy("Red.", accepted) == pytest.approx(credit)
    assert rules.vqa_accuracy("The answer is red", accepted, averaged=True) == pytest.approx(averaged)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Two", "2", True),
        ("a red car", "red car", True),
        ("don't walk", "dont walk", True),
        ("1,000", "1000", True),
        ("3.5", "3.5", True),
        ("3.5", "35", False),
        ("St. Ives", "st ives", True),
        ("t-shirt", "t shirt", True),
        ("another", "other", False),
        ("10:30", "10:30", True),
    ],
)
def test_how_vqa_writes_answers(one: str, other: str, same: bool) -> None:
    assert (rules.vqa_form(one) == rules.vqa_form(other)) is same


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("coca cola", ["coca cola", "coca"], 1.0),
        ("Coca  Cola", ["coca cola"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),  # three edits, seven signs
        ("abcd", ["abxx"], 0.0),  # distance 0.5 is not below the threshold
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("abc", ["xyz", "abd"], 1 - 1 / 3),  # the nearest counts
        ("", ["abc"], 0.0),
    ],
)
def test_anls(answer: str, accepted: list[str], score: float) -> None:
    assert rules.anls(answer, accepted) == pytest.approx(score)


def test_edits_equal_the_recursion_they_are_defined_by() -> None:
    def naive(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        if one[0] == other[0]:
            return naive(one[1:], other[1:])
        return 1 + min(naive(one[1:], other), naive(one, other[1:]), naive(one[1:], other[1:]))

    draw = random.Random(0)
    for _ in range(60):
        one, other = ("".join(draw.choices("abc", k=draw.randrange(1, 6))) for _ in range(2))
        assert rules._edits(one, other) == naive(one, other), (one, other)


def test_anls_of_long_texts_takes_no_more_than_their_product() -> None:
    assert rules.anls("a" * 4000, ["b" * 4000]) == 0.0
    assert rules.anls("a" * 4000, ["a" * 3999 + "b"]) == pytest.approx(1 - 1 / 4000)


@pytest.mark.parametrize(
    ("answer", "label", "right"),
    [
        ("95", "100", True),
        ("94.9", "100", False),
        ("105", "100", True),
        ("105.1", "100", False),
        ("-95", "-100", True),
        ("0", "0", True),
        ("0.001", "0", False),
        ("it is 42", "42", True),
        ("42%", "42", True),
        ("1,020", "1000", True),
        ("Germany", "germany", True),
        ("Germany", "France", False),
        ("Q3 2019", "Q3 2018", False),  # a text with numbers in it is a text
        ("2018", "Q3 2018", False),
    ],
)
def test_relaxed_accuracy(answer: str, label: str, right: bool) -> None:
    assert rules.relaxed(answer, [label]) == float(right)
    assert Match.parse("relaxed").right(answer, label) is right


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("the red car", ["a red car"], 1.0),
        ("red car", ["red"], 2 * 0.5 * 1 / 1.5),
        ("red car", ["blue", "big red car"], 2 * 1 * (2 / 3) / (5 / 3)),
        ("red red", ["red"], 2 / 3),
        ("dog", ["cat"], 0.0),
        ("the", ["a"], 1.0),  # nothing is left of either
        ("dog", ["the"], 0.0),
    ],
)
def test_f1_of_words(answer: str, accepted: list[str], score: float) -> None:
    assert rules.token_f1(answer, accepted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("Yes, there is a dog.", "yes"),
        ("No. Yes, it was there before.", "no"),
        ("There is not a dog", "no"),
        ("yes or no", None),
        ("A dog.", None),
        ("nothing", None),
        ("", None),
        ("<answer>yes</answer>", "yes"),
    ],
)
def test_yes_or_no(text: str, said: str | None) -> None:
    assert rules.yes_or_no(text) == said


@pytest.mark.parametrize(
    "name", ["vqa", "vqa:averaged", "anls", "relaxed:0.05", "relaxed:0.1", "f1", "yes-no", "rounded:2"]
)
def test_rules_by_name(name: str) -> None:
    assert str(Match.parse(name)) == name
    assert Match.parse(name, custom=False) == Match.parse(name)


@pytest.mark.parametrize(
    "name", ["vqa:9", "anls:0.5", "relaxed:x", "relaxed:-1", "f1:2", "rounded", "rounded:x", "rounded:-1"]
)
def test_rules_that_there_are_not(name: str) -> None:
    with pytest.raises(SettingsError):
        Match.parse(name, custom=False)


def test_several_accepted_answers() -> None:
    match = Match(answers=("New York", "NYC"))
    assert match.right("nyc", "New York") and match.right("new york.", "New York") and not match.right("York", "NYC")
    assert Match("numeric", tolerance=1.0, answers=("3", "10")).right("9", "3")
    assert Match("numeric", answers=("3", "three")).problem("3") is not None
    graded = Match("vqa", answers=("red",) * 2 + ("blue",) * 8)
    assert graded.credit("red", "blue") == pytest.approx(2 / 3) and graded.right("red", "blue")
    assert Match("vqa", answers=("red", *("blue",) * 9)).right("red", "blue") is False
    assert Match.parse("rounded:1").right("1.44", "1.4") and not Match.parse("rounded:1").right("1.46", "1.4")


@pytest.mark.parametrize("name", ["vqa", "anls", "f1", "yes-no", "relaxed", "rounded:1", "exact", "numeric"])
def test_answers_of_one_canonical_form_have_the_same_credit(name: str) -> None:
    match = Match.parse(name)
    answers = [
        "Yes.",
        "yes",
        "the red car",
        "red car",
        "Red  car",
        "3",
        "3.0",
        "three",
        "no",
        "No, three",
        "-0",
        "0",
        "",
    ]
    labels = ["yes", "red car", "3", "0"]
    for one in answers:
        for other in answers:
            if match.canonical(one) == match.canonical(other):
                assert all(match.credit(one, label) == match.credit(other, label) for label in labels), (one, other)
