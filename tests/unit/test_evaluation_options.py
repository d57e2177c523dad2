"""Questions with options in an evaluation: asked by them, matched without parsing, calibrated by themselves."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from latent_tool import Budget, LatentReasoner
from latent_tool.calibration.fit import fit
from latent_tool.commands.calibrate import calibration_of
from latent_tool.errors import CalibrationError, SettingsError, TooFewItemsError
from latent_tool.evaluation import Item, Match, evaluate, load_dataset
from latent_tool.evaluation.summary import summarise
from latent_tool.schema import Choice, ReasoningResult, Scores

SCENES = "scenes:held_out:3000000-3000004"
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "brown")
SMALL = LatentReasoner(budget=Budget(iterations=1, max_patches=2))


def chosen(item: Item) -> Item:
    """The same question with its label and three others to choose from."""
    label = str(item.label)
    others = [colour for colour in COLOURS if colour != label][:3]
    return replace(item, match=Match("choice", tuple(random.Random(item.id).sample([label, *others], 4))))


@pytest.mark.slow
def test_questions_with_options_are_asked_by_them(tmp_path: Path) -> None:
    free = load_dataset(SCENES)
    items = [*map(chosen, free[:3]), *free[3:]]
    run = evaluate(SMALL, items, ["greedy"], tmp_path / "run", visual=False)
    assert run.manifest.options
    for row, item in zip(run.of("greedy"), items, strict=True):
        assert row.error is None
        if item.options is None:
            assert row.scores["option_probability"] is None and "options" not in row.details
            continue
        assert row.answer in item.options and len(row.details["options"]) == 4 and 0 <= row.details["mass"] <= 1
        assert row.correct is (row.answer == item.label)
        assert row.scores["option_probability"] == pytest.approx(max(row.details["options"]), rel=1e-5)
    assert "option_probability" in summarise(run)["methods"]["greedy"]["scores"]
    # Free text stays available, and is another run.
    with pytest.raises(SettingsError, match="another options"):
        evaluate(SMALL, items, ["greedy"], tmp_path / "run", visual=False, options=False)
    plain = evaluate(SMALL, items, ["greedy"], tmp_path / "plain", visual=False, options=False)
    assert not plain.manifest.options
    assert all(row.scores["option_probability"] is None for row in plain.of("greedy"))
    # A threshold of free answers is none of chosen ones.
    with pytest.raises(CalibrationError, match="asked by their options"):
        calibration_of(run, "pooled_probability")
    with pytest.raises(TooFewItemsError):
        calibration_of(run)


@pytest.mark.parametrize(
    ("match", "question", "expected"),
    [
        (Match("choice", ("red", "blue")), "which?", ("red", "blue")),
        (Match("choice", ("red", "blue")), "which?\nA. red\nB. blue", ("A", "B")),
        (Match("choice", ("red", " red")), "which?", None),
        (Match("choice"), "which?", None),
        (Match("exact", ("red", "blue")), "which?", None),
        (Match("numeric"), "how many?", None),
    ],
)
def test_what_a_question_is_asked_with(match: Match, question: str, expected: tuple[str, ...] | None) -> None:
    assert Item("1", question, "red", lambda: (), match=match).options == expected


def test_a_calibration_of_free_answers_does_not_hold_for_chosen_ones() -> None:
    draw = random.Random(0)
    scores = [draw.random() for _ in range(400)]
    right = [draw.random() < score for score in scores]
    result = ReasoningResult(
        answer="red",
        raw_text="red",
        confidence=0.9,
        confidence_source="option_probability",
        scores=Scores(pooled_probability=0.9, option_probability=0.9),
        choices=[
            Choice(text=text, log_probability=-1, probability=share) for text, share in (("red", 0.9), ("blue", 0.1))
        ],
    )
    free, by_option = (
        fit(scores, right, score=score, fingerprint="0" * 64) for score in ("pooled_probability", "option_probability")
    )
    refused = free.apply(result, 0.1)
    assert refused.confidence is None and refused.accepted is False and "options" in refused.warnings[-1]
    held = by_option.apply(result, 0.1)
    assert held.confidence_source == "calibrated" and held.accepted is True
    unscored = by_option.apply(result.model_copy(update={"choices": None, "scores": Scores()}), 0.1)
    assert unscored.confidence is None and unscored.accepted is False
