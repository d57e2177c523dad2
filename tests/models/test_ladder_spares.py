"""What the ladder does not do: read an answer to its end that nothing is compared with, or search where there is no
answer to sharpen.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import tiny_checkpoints
import torch
from pictures import draw_shapes

from latent_tool.engine.engine import Engine
from latent_tool.engine.job import Job, Outcome
from latent_tool.engine.ladder import _ask
from latent_tool.engine.question import Question
from latent_tool.method.asking import Asking
from latent_tool.models.families import answers_behind_words
from latent_tool.models.requests import Decode
from latent_tool.settings import Budget, SearchSettings

QUESTION = "what is right of the circle?"
UNSURE = SearchSettings(search_below=1.0, patches_per_latent=2)
BUDGET = Budget(iterations=1, max_patches=2, target_confidence=1.0)
TINY = ("qwen2_5_vl", "smolvlm", "internvl", "gemma3")
LATENTS = SearchSettings(latents=3)


def asked(**changes: Any) -> Job:
    picture = draw_shapes().resize((96, 96))  # as large as the embedded model is given any
    return Job((picture,), QUESTION, **{"settings": UNSURE, "budget": BUDGET, **changes})


def undecided(family: str, **changes: Any) -> Outcome:
    """A question to a model with random weights, whose first tokens are all about equally likely."""
    budget = Budget(iterations=2, max_new_tokens=6)
    picture = tiny_checkpoints.picture(56, 56)
    made = {"settings": LATENTS, "budget": budget, **changes}
    return Engine(tiny_checkpoints.loaded(family)).answer(Job((picture,), "what is red?", **made))


def test_a_plain_answer_that_no_window_is_compared_with_is_not_read_to_its_end(engine: Engine) -> None:
    """The picture has nothing new to show: a call costs what it costs without windows, and ends with the same."""
    found, without = (engine.answer(asked(budget=BUDGET.but(max_views=views))) for views in (8, 0))
    assert found.usage.decoder_calls == without.usage.decoder_calls
    assert (found.answer, found.decoded.tokens, found.patches) == (without.answer, without.decoded.tokens, ())
    assert found.plain_probability == without.plain_probability
    assert torch.equal(found.latents, without.latents)  # type: ignore[arg-type]


def test_with_a_deadline_the_whole_plain_answer_is_kept(engine: Engine) -> None:
    hurried = engine.answer(asked(deadline=time.monotonic() + 1000))
    assert hurried.usage.decoder_calls > engine.answer(asked()).usage.decoder_calls
    assert hurried.answer == engine.answer(asked()).answer


@pytest.mark.parametrize(
    ("prompt", "floor"),
    [("", 0.9), ("Think in steps.", 0.9), ("Put it in \\boxed{}.", 0.0), ("Reply as <answer>...</answer>.", 0.0)],
)
def test_an_answer_behind_words_is_never_given_up(engine: Engine, prompt: str, floor: float) -> None:
    question = Question(engine.vlm, asked(system=prompt or None), time.monotonic)
    prefix = engine.vlm.prefill(question.inputs())
    work = Asking(_ask(question, prefix, None, (), BUDGET, 0.9))
    assert isinstance(work.request, Decode) and work.request.floor == floor
    work.close()


def test_families_that_write_marks_or_reasoning_of_their_own_accord() -> None:
    behind = {
        family for family in ("llava", "qwen3_vl", "glm4v", "gemma4", "mistral3") if answers_behind_words(family, "")
    }
    assert behind == {"glm4v", "gemma4", "mistral3"}
    assert not answers_behind_words("a family that is not known", "what is red?")
    assert answers_behind_words("a family that is not known", "Write <|begin_of_box|> before it.")


@pytest.mark.parametrize("family", TINY)
def test_where_the_model_leans_to_nothing_there_is_no_search(family: str) -> None:
    start = undecided(family, budget=Budget(iterations=0, max_new_tokens=6))
    assert start.search is not None
    likeliest = start.search.start.first_token_probability
    most = math.floor(1 / likeliest)  # so many tokens have an even share each that is larger
    found = undecided(family, settings=LATENTS.but(top_k=most))
    assert found.search is not None and found.latents is not None and start.latents is not None
    assert (found.stop_reason, found.search.candidates, found.patches) == ("undecided", 1, ())
    assert torch.equal(found.latents, start.latents) and found.decoded.tokens == start.decoded.tokens
    assert found.plain_probability == pytest.approx(start.plain_probability, abs=1e-5)
    # With one more the likeliest has more than its share; and who asks for the search gets it.
    assert undecided(family, settings=LATENTS.but(top_k=most + 1)).stop_reason == "iterations"
    assert undecided(family, settings=LATENTS.but(top_k=most, search_below=None)).stop_reason == "iterations"
    always = Budget(iterations=2, max_new_tokens=6, target_confidence=None)
    assert undecided(family, settings=LATENTS.but(top_k=most), budget=always).stop_reason == "iterations"


def test_options_are_chosen_among_whatever_the_first_token_is() -> None:
    assert undecided("qwen2_5_vl", options=("red", "blue")).stop_reason != "undecided"


def test_where_the_answer_stands_behind_words_its_first_token_says_nothing() -> None:
    found = [
        undecided("qwen2_5_vl", settings=LATENTS.but(top_k=3), system=system).stop_reason
        for system in (None, "Put the answer in \\boxed{}.")
    ]
    assert found == ["undecided", "iterations"]


def test_the_embedded_model_leans_to_something(engine: Engine) -> None:
    outcomes = [engine.answer(replace(asked(), question=text)) for text in (QUESTION, "what color is it?", "why?")]
    assert {outcome.stop_reason for outcome in outcomes} <= {"iterations", "confident"}
