"""What crosses the API: requests are parsed strictly, results are plain JSON, and their shape does not drift unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import latent_tool
from latent_tool.errors import InputError, SettingsError
from latent_tool.request import MAX_TEXT
from latent_tool.schema import Patch, ReasoningRequest, ReasoningResult
from latent_tool.settings import Budget, ImagePolicy, NoiseSettings, SearchSettings

GOLDEN = Path(__file__).parents[1] / "support" / "result_schema.json"


def shape(schema: Any) -> Any:
    """A JSON schema without its prose: names, types and ranges."""
    if isinstance(schema, dict):
        return {key: shape(value) for key, value in schema.items() if key not in ("description", "title")}
    return [shape(value) for value in schema] if isinstance(schema, list) else schema


def test_the_schema_of_a_result_is_the_golden_one() -> None:
    """A change here is a change of the API: raise ``schema_version`` if a reader could stumble over it."""
    found = shape(ReasoningResult.model_json_schema(mode="serialization"))
    assert found == json.loads(GOLDEN.read_text()), f"if this is meant, write the new schema to {GOLDEN.name}"


def test_results_survive_json() -> None:
    result = ReasoningResult(answer="red", raw_text="red", confidence=0.5, confidence_source="answer_probability")
    assert ReasoningResult.model_validate_json(result.model_dump_json()) == result
    assert result.schema_version == "1"


def test_results_of_older_versions_are_read() -> None:
    """What was added since has defaults that say that it is not known."""
    old = {"answer": "red", "raw_text": "red", "confidence": None, "confidence_source": "unscored"}
    row = {"round": 0, "reward": 0.5, "best_reward": 0.5, "mean_sampled_reward": None, "top_k_mass": 0.9}
    row |= {"sigma": None, "accepted": [], "candidates": 1, "seconds": 0.1}
    result = ReasoningResult.model_validate({**old, "trace": [row]})
    assert result.attention is None and result.trace[0].first_token_probability is None


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({"question": "what?"}, "image"),
        ({"image": "a.png", "images": ["a.png"], "question": "what?"}, "image"),
        ({"images": [], "question": "what?"}, "images"),
        ({"image": "a.png"}, "question"),
        ({"image": "a.png", "question": 3}, "question"),
        ({"image": "a.png", "question": "x" * (MAX_TEXT + 1)}, "question"),
        ({"image": "a.png", "question": "what?", "system": "x" * (MAX_TEXT + 1)}, "system"),
        ({"image": "a.png", "question": "what?", "budget": "huge"}, "budget"),
        ({"image": "a.png", "question": "what?", "budget": {"iterations": -1}}, "iterations"),
        ({"image": "a.png", "question": "what?", "seed": -1}, "seed"),
        ({"image": "a.png", "question": "what?", "min_confidence": 1.5}, "min_confidence"),
        ({"image": "a.png", "question": "what?", "min_confidence": float("nan")}, "min_confidence"),
        ({"image": "a.png", "question": "what?", "colour": "red"}, "colour"),
        *(
            ({"image": "a.png", "question": "what?", **wrong}, "option")
            for wrong in (
                {"options": "red"},
                {"options": []},
                {"options": ["red"]},
                {"options": [f"{number}" for number in range(256)]},
                {"options": ["red", " "]},
                {"options": ["red", "\u00a0\t"]},
                {"options": ["red", "blue", " red\n"]},
                {"options": ["caf\u00e9", "cafe\u0301"]},
                {"options": ["a  b", "a b"]},
                {"options": ["red", 3]},
                {"options": ["red", "\ud800"]},
                {"options": ["red", "a\x1b[31m"]},
                {"options": ["x" * MAX_TEXT, "y"]},
                {"unsure": True},
                {"options": ["red", "Cannot  tell"], "unsure": True},
            )
        ),
        ("what?", "request"),
        (None, "request"),
    ],
)
def test_wrong_requests_are_input_errors_that_name_the_field(request_: Any, named: str) -> None:
    with pytest.raises(InputError) as caught:
        ReasoningRequest.parse(request_)
    assert named in str(caught.value)
    assert caught.value.hint


def test_options_are_kept_in_order_without_the_white_space_around_them() -> None:
    request = ReasoningRequest.parse({"image": "a.png", "question": "which?", "options": [" b", "a\n", "B"]})
    assert request.options == ["b", "a", "B"] and not request.unsure
    assert "options" in request.shown() and "unsure" not in request.shown()
    joined = [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\U0001f468\u200d\U0001f469",
    ]  # joiners are no controls
    assert ReasoningRequest.parse({"image": "a.png", "question": "?", "options": joined}).options == joined
    many = ReasoningRequest.parse({"image": "a.png", "question": "?", "options": list(map(str, range(255)))})
    assert len(many.options or ()) == 255


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SearchSettings(reward_position="options", reward="top_k_entropy"), "top_k_entropy"),
        (lambda: Budget(iterations=-1), "iterations"),
        (lambda: Budget(iterations=float("nan")), "iterations"),  # type: ignore[arg-type]
        (lambda: Budget(deadline_s=0), "deadline_s"),
        (lambda: Budget(deadline_s=float("inf")), "deadline_s"),
        (lambda: Budget(target_reward=float("nan")), "target_reward"),
        (lambda: Budget(rounds=3), "rounds"),
        (lambda: Budget.level("huge"), "huge"),  # type: ignore[arg-type]
        (lambda: Budget.coerce(3), "int"),  # type: ignore[arg-type]
        (lambda: SearchSettings(samples=7), "samples"),
        (lambda: SearchSettings(samples=2), "baseline"),
        (lambda: SearchSettings(top_k=2), "top_k"),
        (lambda: SearchSettings(sigma=0), "sigma"),
        (lambda: SearchSettings(thinking_markers=("<a>", "")), "thinking_markers"),
        (lambda: SearchSettings.paper(samples=-1), "samples"),
        (lambda: NoiseSettings(strength=1.5), "strength"),
        (lambda: ImagePolicy(max_pixels=float("nan")), "max_pixels"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range_are_settings_errors(make: Any, named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        make()
    assert named in str(caught.value)
    assert caught.value.hint


def test_settings_are_frozen() -> None:
    budget = Budget()
    with pytest.raises(ValueError, match="frozen"):
        budget.iterations = 3
    assert budget.but(iterations=3).iterations == 3
    assert budget.iterations == 10


def test_the_papers_settings() -> None:
    """One sample, no baseline, plain ascent, the paper's reward at the latents."""
    paper = SearchSettings.paper()
    variant = paper.variant
    assert (paper.samples, variant.antithetic, variant.baseline, variant.normalise) == (1, False, "none", False)
    assert (paper.reward, paper.reward_position, variant.scale) == ("top_k_entropy", "latents", "absolute")
    assert (paper.init, variant.proposals, paper.min_gain) == ("token", "top", 0)


def test_public_names() -> None:
    assert set(latent_tool.__all__) >= {
        "Budget",
        "ChatLatentReasoner",
        "ConfidenceRouter",
        "ImagePolicy",
        "LatentReasoner",
        "LatentReasoningTool",
        "Patch",
        "ReasoningRequest",
        "ReasoningResult",
        "SearchSettings",
    }
    for name in latent_tool.__all__:
        assert getattr(latent_tool, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = latent_tool.no_such_name


@pytest.mark.parametrize("count", [0, 1, 500])
def test_a_result_in_a_console_takes_a_line_or_two(count: int) -> None:
    patch = Patch(rank=0, image=0, cell=0, box=(0, 0, 1, 1), attention=0.1, gain=0.1, latent=0)
    result = ReasoningResult(
        answer="b\x1b[2Jlue\n" + "x" * 5000,
        raw_text="y" * 5000,
        confidence=0.93,
        confidence_source="answer_probability",
        patches=[patch] * count,
        model="m" * 5000,
        warnings=["w" * 5000] * count,
    )
    for text in (repr(result), str(result)):
        assert len(text) < 240 and "confidence=0.93" in text and f"patches=<{count}>" in text
        assert text.isprintable()
    assert len(repr([result] * 3)) < 750
