"""The ladder inside one call: it stops at the first rung that is sure enough, and reports what that rung computed.

What a rung should give is worked out with calls that have one rung alone: the plain model, the start of the latents
without a round, and a search that is always made.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from pictures import draw_shapes
from ticking import Ticking

from latent_tool.engine.engine import Engine
from latent_tool.engine.job import Job, Outcome
from latent_tool.schema import ReasoningStep
from latent_tool.settings import Budget, GenerationSettings, NoiseSettings, SearchSettings

QUESTION = "what is right of the circle?"
SEARCH = SearchSettings(patches_per_latent=2)
BUDGET = Budget(iterations=2, max_patches=4)


def asked(target: float | None = 0.95, below: float | None = 0.7, **fields: Any) -> Job:
    settings = SEARCH.but(search_below=below)
    return Job(
        (draw_shapes(),),
        QUESTION,
        **{"settings": settings, "budget": BUDGET.but(target_confidence=target), **fields},
    )


def always(**fields: Any) -> Job:
    return asked(None, None, **fields)


@pytest.fixture(scope="module")
def probabilities(engine: Engine) -> tuple[float, float]:
    """Of the plain answer, and of the answer from where the latents start."""
    plain = engine.result(engine.answer(always(settings=SearchSettings(latents=0))))
    start = engine.result(engine.answer(always(budget=Budget(iterations=0))))
    assert plain.scores.answer_probability is not None and start.scores.answer_probability is not None
    return plain.scores.answer_probability, start.scores.answer_probability


def same(one: Outcome, other: Outcome) -> None:
    """Two outcomes report the same state, answer and confidence."""
    assert (one.latents is None) == (other.latents is None)
    if one.latents is not None and other.latents is not None:
        assert torch.equal(one.latents, other.latents)
    assert (one.patches, one.answer, one.decoded.tokens) == (other.patches, other.answer, other.decoded.tokens)
    assert one.decoded.finish_reason == other.decoded.finish_reason
    assert torch.allclose(one.decoded.log_probabilities, other.decoded.log_probabilities, atol=1e-5)
    assert torch.allclose(one.decoded.entropies, other.decoded.entropies, atol=1e-5)
    assert one.plain_probability == pytest.approx(other.plain_probability, abs=1e-5)


def test_a_sure_plain_answer_is_that_of_the_plain_model(engine: Engine, probabilities: tuple[float, float]) -> None:
    found = engine.answer(asked(target=probabilities[0] - 1e-4))
    plain = engine.answer(always(settings=SearchSettings(latents=0)))
    same(found, plain)
    result = engine.result(found)
    assert (result.stop_reason, result.scores.reward, result.trace, result.patches) == ("confident", None, [], [])
    assert result.confidence == pytest.approx(probabilities[0], abs=1e-5)
    assert result.usage is not None and plain.usage.decoder_calls == result.usage.decoder_calls
    assert (result.usage.candidates, result.usage.latent_tokens) == (0, 0)


def test_a_sure_start_is_scored_and_decoded_and_nothing_is_searched(
    engine: Engine, probabilities: tuple[float, float]
) -> None:
    found = engine.answer(asked(target=1.0, below=probabilities[1] - 1e-4))
    start = engine.answer(always(budget=Budget(iterations=0)))
    same(found, start)
    result = engine.result(found)
    assert result.stop_reason == "confident" and result.usage is not None
    assert (result.usage.candidates, len(result.trace), result.patches) == (1, 1, [])
    assert engine.rescore(found) == pytest.approx(result.scores.reward, abs=1e-4)
    # The plain answer is known already, so that its probability takes no pass of its own.
    assert result.usage.decoder_calls <= start.usage.decoder_calls + len(found.decoded.tokens)


@pytest.mark.parametrize("confidence", ["pooled_probability", "answer_probability"])
def test_where_no_rung_is_sure_the_search_is_the_same_as_ever(engine: Engine, confidence: Any) -> None:
    found = engine.answer(asked(target=1.0, below=1.0, confidence=confidence))
    ever = engine.answer(always(confidence=confidence))
    same(found, ever)
    assert found.stop_reason == ever.stop_reason == "iterations"
    one, other = engine.result(found), engine.result(ever)
    untimed = {"usage", "trace", "settings", "budget", "tokens", "confidence", "scores"}
    assert one.model_dump(exclude=untimed) == other.model_dump(exclude=untimed)
    assert one.confidence == pytest.approx(other.confidence, abs=1e-5)
    assert [row.model_dump(exclude={"seconds"}) for row in one.trace] == [
        row.model_dump(exclude={"seconds"}) for row in other.trace
    ]
    # What the lower rungs cost: a token each before they are given up.
    assert one.usage is not None and other.usage is not None
    assert one.usage.decoder_calls <= other.usage.decoder_calls + 2 * len(found.decoded.tokens)


def test_a_decoding_that_was_given_up_goes_on_where_it_stopped(engine: Engine) -> None:
    """The best state is the start (no round can better it): its answer is decoded once, in two parts."""
    stuck = SEARCH.but(samples=0, patches_per_latent=0, search_below=1.0)
    found = engine.answer(asked(target=1.0, settings=stuck))
    assert found.search is not None and found.search.best is found.search.start
    same(found, engine.answer(always(settings=stuck.but(search_below=None))))


@pytest.mark.parametrize(
    "change",
    [
        {"budget": BUDGET.but(target_confidence=None)},
        {"settings": SEARCH.but(search_below=None)},
        {"settings": SearchSettings.paper()},
        {"budget": Budget.level("thorough").but(iterations=1)},
        {"budget": Budget(iterations=0)},
        {"confidence": "reward"},
    ],
    ids=["no target", "no bound", "paper", "thorough", "no rounds", "reward"],
)
def test_who_wants_the_search_gets_it(engine: Engine, change: dict[str, Any]) -> None:
    result = engine.result(engine.answer(asked(**{"target": 1e-9, **change})))
    assert result.stop_reason != "confident" and result.trace and result.scores.reward is not None
    assert len(result.trace) == 1 + result.budget.iterations  # type: ignore[union-attr]


def test_an_empty_answer_is_not_sure(engine: Engine) -> None:
    """A stop string that stands in every answer ends it before anything was said."""
    job = asked(target=1e-9, below=1e-9, generation=GenerationSettings(stop_strings=("u", "e", "r", "s", "l", "t")))
    found = engine.answer(replace(job, budget=job.budget.but(max_new_tokens=1)))
    assert found.answer.text or found.stop_reason == "iterations"


def test_the_steps_of_an_answer_that_stops_early(engine: Engine) -> None:
    def phases(job: Job) -> list[str]:
        steps: list[ReasoningStep] = []
        run = engine.run(job)
        try:
            while True:
                steps.append(next(run))
        except StopIteration:
            return [step.phase for step in steps]

    assert phases(asked(target=1e-9)) == ["prefill", "decode"]
    assert phases(asked(target=1.0, below=1e-9)) == ["prefill", "decode", "search", "decode"]
    assert phases(asked(target=1.0, below=1.0)) == ["prefill", "decode", "search", "search", "search", "decode"]


def test_questions_in_step_stop_at_different_rungs(engine: Engine) -> None:
    jobs = [
        replace(asked(target, below), question=question)
        for (target, below), question in itertools.product(
            [(1e-9, 1.0), (1.0, 1e-9), (1.0, 1.0), (None, 0.7)], [QUESTION, "what color is the circle?"]
        )
    ]
    together = engine.answer_many(jobs)
    assert {each.stop_reason for each in together if isinstance(each, Outcome)} == {"confident", "iterations"}
    for job, found in zip(jobs, together, strict=True):
        assert isinstance(found, Outcome)
        alone = engine.answer(job)
        assert (found.answer, found.stop_reason, found.patches) == (alone.answer, alone.stop_reason, alone.patches)
        assert found.plain_probability == pytest.approx(alone.plain_probability, abs=1e-4)


def test_what_is_measured_of_a_plain_answer(engine: Engine) -> None:
    found = engine.answer(asked(target=1e-9, attention=True, grounding=NoiseSettings(), controls=True))
    result = engine.result(found)
    assert result.grounding is not None and result.controls is not None and result.controls.latents_off.agrees
    assert result.attention is None and any("target_confidence=None" in warning for warning in result.warnings)
    assert engine.attention_many([found]) == [[]]


@pytest.mark.slow
def test_a_deadline_on_any_rung_leaves_an_answer(engine: Engine) -> None:
    timed = Engine(engine.vlm, clock := Ticking())
    reasons = set()
    for target in (1e-9, 1.0):
        for deadline in range(5, 90, 2):
            clock.time = 0.0
            try:
                found = timed.answer(asked(target, below=1.0, deadline=float(deadline)))
            except Exception as error:
                assert type(error).__name__ == "DeadlineError" and deadline < 30
                continue
            result = timed.result(found)
            reasons.add((result.stop_reason, found.latents is None))
            assert found.decoded.tokens and result.confidence is not None
            assert result.finish_reason in ("stop", "deadline")
            if found.latents is not None:
                assert engine.rescore(found) == pytest.approx(result.scores.reward, abs=1e-4)
            if result.stop_reason != "deadline" and result.finish_reason == "stop":
                break  # nothing was cut, nor would be by a later one
    assert {("deadline", True), ("deadline", False), ("iterations", False)} <= reasons
