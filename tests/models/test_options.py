"""Questions with options on the embedded model: exact probabilities, and nothing that a free answer has is lost."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from naive_model import CLOSE, option_log_probability
from PIL import Image

from latent_tool.cannot_tell import CANNOT_TELL, CANNOT_TELL_REASON
from latent_tool.engine.engine import Engine
from latent_tool.engine.job import Job
from latent_tool.errors import ContextLengthError, QuestionError, SettingsError
from latent_tool.models.options import spell
from latent_tool.schema import ReasoningResult
from latent_tool.settings import Budget, NoiseSettings, SearchSettings

QUESTION = "what color is the circle?"
COLOURS = ("blue", "red", "green", "yellow")
SHORT = Budget(iterations=2, max_patches=4, max_new_tokens=8)
EAGER = SearchSettings(patches_per_latent=2, samples=4, init="token", search_below=None)
READ = EAGER.but(reward_position="options")


def job(picture: Image.Image, options: tuple[str, ...] | None = COLOURS, **changes: Any) -> Job:
    return Job((picture,), **{"question": QUESTION, "settings": EAGER, "budget": SHORT, "options": options, **changes})


def asked(engine: Engine, picture: Image.Image, *options: str, **changes: Any) -> ReasoningResult:
    return engine.result(engine.answer(job(picture, options, **changes)))


def test_the_best_option_is_the_answer_and_its_probability_the_confidence(engine: Engine, picture: Image.Image) -> None:
    result = asked(engine, picture, *COLOURS)
    assert result.answer == result.raw_text == "red" and result.finish_reason == "stop"
    assert result.choices is not None and [choice.text for choice in result.choices] == list(COLOURS)
    best = max(result.choices, key=lambda choice: choice.probability)
    assert result.confidence == best.probability == result.scores.option_probability and best.text == "red"
    assert result.confidence_source == "option_probability"
    assert math.fsum(choice.probability for choice in result.choices) == pytest.approx(1)
    assert result.mass == pytest.approx(math.fsum(math.exp(choice.log_probability) for choice in result.choices))
    assert result.mass > 0.9 and "".join(token.token for token in result.tokens).strip().startswith("red")
    assert ReasoningResult.model_validate_json(result.model_dump_json()) == result
    # Pooled as free answers are, from what is reported of every option.
    pooled = [(choice.log_probability + (choice.plain_log_probability or 0.0)) / 2 for choice in result.choices]
    expected = torch.tensor(pooled).double().softmax(0).tolist()
    assert [choice.probability for choice in result.choices] == pytest.approx(expected)


@pytest.mark.parametrize("settings", [EAGER, READ, SearchSettings(latents=0)], ids=["eager", "options", "plain"])
def test_every_option_equals_one_full_forward_pass(
    engine: Engine, picture: Image.Image, settings: SearchSettings
) -> None:
    """Words of letters that begin alike, in random order, so that paths share and end inside one another."""
    draw = random.Random(3)
    words = ["red", "re", "redder", "red circle", "red circles", "blue", "Blue square", "17", "1", "z\u00fcrich", "x y"]
    words += ["".join(draw.choices("abr ", k=draw.randint(2, 9))).strip() or "q" for _ in range(12)]
    words = list({" ".join(word.lower().split()): word for word in words}.values())
    draw.shuffle(words)
    found = engine.answer(job(picture, tuple(words), settings=settings))
    assert found.chosen is not None and found.chosen.mass <= 1
    spellings = spell(engine.vlm, [[word] for word in words])
    for latents, cells, reported in (
        (found.latents, found.patches, found.chosen.log_probabilities),
        (None, (), found.chosen.plain),
    ):
        for option, log_p in zip(spellings, reported, strict=True):
            naive = option_log_probability(engine.vlm, found.inputs, latents, cells, option)
            torch.testing.assert_close(log_p, naive, **CLOSE)


def test_as_many_options_as_are_allowed(engine: Engine, picture: Image.Image) -> None:
    result = asked(engine, picture, "red", *(f"thing {number}" for number in range(254)))
    assert result.answer == "red" and len(result.choices or ()) == 255


def test_the_order_of_the_options_changes_no_probability(engine: Engine, picture: Image.Image) -> None:
    one, other = asked(engine, picture, *COLOURS), asked(engine, picture, *COLOURS[::-1])
    again = {choice.text: choice.probability for choice in other.choices or ()}
    assert {choice.text: choice.probability for choice in one.choices or ()} == pytest.approx(again, abs=1e-5)
    assert one.answer == other.answer


def test_in_a_batch_as_alone(engine: Engine, picture: Image.Image) -> None:
    jobs = [job(picture), job(picture, None), job(picture, ("yes", "no"), question="is there a circle?", settings=READ)]
    together = [engine.result(found) for found in engine.answer_many(jobs) if not isinstance(found, Exception)]
    alone = [engine.result(engine.answer(each)) for each in jobs]
    assert [each.answer for each in together] == [each.answer for each in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=1e-3)
        assert one.confidence_source == other.confidence_source


@pytest.mark.parametrize("reward", ["renormalised_top_k_entropy", "entropy"])
def test_the_reward_read_in_the_options_is_that_of_their_distribution(
    engine: Engine, picture: Image.Image, reward: Any
) -> None:
    found = engine.answer(job(picture, settings=READ.but(reward=reward)))
    assert found.search is not None and found.chosen is not None
    chances = found.chosen.log_probabilities.double().softmax(0)
    entropy = float(-(chances * chances.log()).sum())
    expected = 1 - entropy / (math.log(len(COLOURS)) if reward == "entropy" else 1)
    assert found.search.best.reward == pytest.approx(expected, abs=1e-4)
    assert engine.rescore(found) == pytest.approx(found.search.best.reward, abs=1e-4)
    assert found.search.best.top_k_mass == pytest.approx(found.chosen.mass, abs=1e-4)
    assert 0 <= (engine.result(found).confidence or -1) <= 1
    gated = engine.result(engine.answer(job(picture, settings=READ.but(reward=reward), confidence="reward")))
    assert gated.confidence_source == "reward" and 0 <= (gated.confidence or -1) <= 1


def test_the_reward_is_read_in_options_only_where_there_are_some(engine: Engine, picture: Image.Image) -> None:
    with pytest.raises(SettingsError, match="has none"):
        engine.answer(job(picture, None, settings=READ))


def test_cannot_tell_is_an_abstention(engine: Engine, picture: Image.Image) -> None:
    result = asked(engine, picture, *COLOURS, CANNOT_TELL, unsure=True)
    assert [choice.unsure for choice in result.choices or ()] == [False] * 4 + [True]
    assert result.answer == "red" and result.accepted is None
    nothing = asked(engine, Image.new("RGB", (64, 64)), "zebra", CANNOT_TELL, question="what?", unsure=True)
    if nothing.answer == CANNOT_TELL:
        assert nothing.accepted is False and nothing.abstain_reason == CANNOT_TELL_REASON
    given = asked(engine, picture, "zebra crossing", CANNOT_TELL, question="what?")
    assert given.choices is not None and not any(choice.unsure for choice in given.choices)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        (("a", "A"), QuestionError, "does not tell|do not tell"),  # this tokenizer knows no case
        (("red", "<|end|>"), QuestionError, "control token"),
        (("red", "blue<image>"), QuestionError, "control token"),
        (("red", "\u200b"), QuestionError, "option"),
        (("red", "word " * 600), ContextLengthError, "longest option"),
    ],
)
def test_options_that_the_model_cannot_write_are_refused(
    engine: Engine, picture: Image.Image, options: tuple[str, ...], error: type[Exception], named: str
) -> None:
    try:
        engine.answer(job(picture, options))
    except (QuestionError, ContextLengthError) as caught:
        assert isinstance(caught, error) and caught.hint
        assert any(part in str(caught) for part in named.split("|"))
    else:
        assert options[1] == "\u200b", "only what has tokens of its own may pass"


def test_a_long_option_leaves_room_for_itself(engine: Engine, picture: Image.Image) -> None:
    """The longest option that fits is scored, however many cells the budget allows."""
    limit = engine.vlm.context_length or 0
    long = "red " * (limit - 150)
    found = engine.answer(job(picture, ("red", long), budget=SHORT.but(max_patches=64, iterations=1)))
    length = max(len(tokens) for tokens in spell(engine.vlm, [[long]])[0])
    assert found.inputs.length + len(found.patches) + EAGER.latents + 2 + length + 1 <= limit
    assert found.answer.text == "red"


def test_what_is_measured_of_free_answers_is_measured_of_options(engine: Engine, picture: Image.Image) -> None:
    wanted = {"grounding": NoiseSettings(), "controls": True, "attention": True}
    result = asked(engine, picture, *COLOURS, **wanted)
    assert result.attention and result.grounding is not None and result.controls is not None
    assert len(result.grounding.tokens) == len(result.tokens)
    assert result.controls.latents_off.answer in COLOURS and result.controls.image_noised.answer in COLOURS
    assert result.usage is not None and result.usage.generated_tokens == len(result.tokens)


def test_a_threshold_is_compared_with_the_option(engine: Engine, picture: Image.Image) -> None:
    sure = asked(engine, picture, "red", "blue", min_confidence=0.5)
    unsure = asked(engine, picture, "crimson", "scarlet", min_confidence=1.0)
    assert sure.accepted is True and unsure.accepted is False and unsure.confidence is not None
    unpooled = asked(engine, picture, *COLOURS, confidence="answer_probability")
    ours = torch.tensor([choice.log_probability for choice in unpooled.choices or ()]).double().softmax(0)
    assert (
        unpooled.confidence == pytest.approx(float(ours.max())) and unpooled.confidence_source == "option_probability"
    )
