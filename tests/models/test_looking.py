"""Looking again on the embedded model: what is decoded is what was scored, and nothing changes where nothing helps."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from ticking import Ticking

from latent_tool.cannot_tell import PHRASES_OF_ALL, says_cannot_tell
from latent_tool.engine.engine import Engine
from latent_tool.engine.job import Job, Outcome
from latent_tool.engine.looking import hides_pixels, reward_of, times_smaller
from latent_tool.engine.question import Question
from latent_tool.errors import CancelledError, DeadlineError, ImageError, NumericalError
from latent_tool.models import serving
from latent_tool.models.prefix import Inputs
from latent_tool.models.requests import Decode
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.models.windows import Window
from latent_tool.scenes import generate
from latent_tool.schema import ReasoningStep, View
from latent_tool.settings import Budget, SearchSettings

pytestmark = pytest.mark.slow

BUDGET = Budget(iterations=1, max_patches=2)


def jobs(count: int, **options: object) -> Iterator[Job]:
    """Questions about small things on large canvases."""
    for seed in range(3_100_000, 3_100_000 + count):
        scene = generate(seed, "canvas", max_questions=1, scale=3.0)
        for question in scene.questions:
            yield Job((scene.image,), question.text, **{"budget": BUDGET, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def outcomes(engine: Engine) -> list[Outcome]:
    return [engine.answer(job) for job in jobs(10)]


@pytest.mark.parametrize(("side", "hidden"), [(96, False), (115, False), (116, True), (400, True)])
def test_only_pictures_that_were_made_smaller_are_looked_at(engine: Engine, side: int, hidden: bool) -> None:
    """The embedded model is given 96 x 96 pixels of any picture."""
    picture = generate(3_100_000, "canvas", max_questions=1, scale=3.0).image.resize((side, side))
    inputs = engine.vlm.prepare([picture], "what is red?")
    assert hides_pixels((picture,), inputs) is hidden
    assert times_smaller((picture,), inputs) == pytest.approx(side / 96)
    assert times_smaller((picture, picture.resize((192, 96))), engine.vlm.prepare([picture] * 2, "?")) == pytest.approx(
        max(side / 96, 2**0.5)
    )
    if not hidden:
        sure_of_nothing = SearchSettings(look_below=1.0)
        outcome = engine.answer(
            Job(
                (picture,),
                "what color is the star?",
                settings=sure_of_nothing,
                budget=BUDGET.but(target_confidence=None),
            )
        )
        assert outcome.views == () and outcome.usage.views == 0


def test_windows_are_looked_at_and_some_stay(outcomes: list[Outcome]) -> None:
    views = [view for outcome in outcomes for view in outcome.views]
    assert any(view.accepted for view in views)
    assert not all(view.accepted for view in views)
    assert {view.depth for view in views} == {1, 2}
    for outcome in outcomes:
        accepted = [view for view in outcome.views if view.accepted]
        assert [view.depth for view in accepted] in ([], [1], [2], [1, 2])
        shown = {cell.window for cell in outcome.inputs.cells} - {None}
        assert shown == ({0} if accepted else set())  # the innermost
        for outer, inner in itertools.pairwise(accepted):
            assert outer.box[0] <= inner.box[0] < inner.box[2] <= outer.box[2]
            assert outer.box[1] <= inner.box[1] < inner.box[3] <= outer.box[3]


def test_a_window_stays_only_if_the_answer_becomes_surer(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        for view in outcome.views:
            best = max(each.reward_after for each in outcome.views if each.depth == view.depth)
            enough = best > 1.15 * view.reward_before
            if says_cannot_tell(view.answer_before):
                enough = best >= 0.5
            assert view.accepted == (view.reward_after == best and enough)


def test_the_next_level_looks_inside_the_surest_window_unless_it_is_sure_enough(outcomes: list[Outcome]) -> None:
    refused = 0
    for outcome in outcomes:
        first, second = ([view for view in outcome.views if view.depth == depth] for depth in (1, 2))
        if not first:
            continue
        surest = max(first, key=lambda view: view.reward_after)
        assert bool(second) == ((surest.reward_after if surest.accepted else surest.reward_before) < 0.7)
        for view in second:
            assert surest.box[0] <= view.box[0] < view.box[2] <= surest.box[2]
            assert surest.box[1] <= view.box[1] < view.box[3] <= surest.box[3]
        refused += bool(second) and not surest.accepted
    assert refused


def test_cannot_tell_after_looking_in_vain_is_the_answer(engine: Engine) -> None:
    """Whatever the plain model said: two ways to answer that disagree are no reason to be sure."""
    text = "Which is bigger: the teal triangle or the purple square?"
    job = Job((generate(3_400_007, "canvas", scale=2.0).image,), text, budget=BUDGET)
    plain = engine.answer(replace(job, settings=SearchSettings(latents=0)))
    found = engine.answer(job)
    assert not says_cannot_tell(plain.answer.text) and says_cannot_tell(found.answer.text)
    assert found.views and not any(view.accepted for view in found.views)


def test_scoring_the_answers_state_again_gives_its_reward(engine: Engine, outcomes: list[Outcome]) -> None:
    """From the pictures on, and without latents: with them the search's reward is reproduced as ever."""
    plain = [one for one in outcomes if one.latents is None and any(view.accepted for view in one.views)]
    assert plain
    for outcome in plain:
        last = [view for view in outcome.views if view.accepted][-1]
        assert last.answer_after == outcome.answer.text
        assert engine.rescore(outcome) == pytest.approx(last.reward_after, abs=1e-4)
    for outcome in outcomes:
        if outcome.search is not None:
            assert engine.rescore(outcome) == pytest.approx(outcome.search.best.reward, abs=1e-4)


@pytest.mark.parametrize("confidence", ["pooled_probability", "answer_probability"])
def test_windows_that_say_something_else_make_the_confidence_lower(engine: Engine, confidence: str) -> None:
    """Every window's answer counts as much as it was sure, and those of the plain model and of the reasoning over the
    whole picture count less, the smaller it was made.
    """
    lowered = objections = 0
    for outcome in (engine.answer(job) for job in jobs(16, confidence=confidence)):
        result = engine.result(outcome)
        assert result.scores.answer_probability is not None and result.scores.plain_probability is not None
        expected = result.scores.answer_probability
        if confidence == "pooled_probability":
            expected = (expected * result.scores.plain_probability) ** 0.5
        if any(view.accepted for view in result.views):
            alone = engine.result(engine.answer(replace(outcome.job, budget=Budget(iterations=0))))
            (picture,) = outcome.job.images
            smaller = (picture.width * picture.height) ** 0.5 / 96
            said = [(view.answer_after, view.reward_after) for view in result.views]
            plainly = result.views[0].reward_before
            said.append((result.views[0].answer_before, plainly / smaller if plainly >= 0.1 else 0.0))
            reasoned = alone.scores.answer_probability or 0.0
            if reasoned >= 0.1 and not says_cannot_tell(alone.answer):
                said.append((alone.answer, reasoned / smaller))
                objections += alone.answer != result.answer
            ours = sum(sure for answer, sure in said if answer == result.answer)
            expected *= (ours / sum(sure for _, sure in said)) ** (1 / smaller)
            lowered += ours < sum(sure for _, sure in said)
        assert result.confidence == pytest.approx(expected, abs=1e-6)
        assert outcome.support == 1 or any(view.accepted for view in result.views)
    assert lowered and objections


@pytest.mark.parametrize("most", [8, 64])
def test_what_the_deadline_leaves_no_time_to_hear_is_an_objection(
    engine: Engine, outcomes: list[Outcome], most: int
) -> None:
    """As many as were left out, whatever the budget; and where all was heard, the deadline is not to blame."""
    timed = Engine(engine.vlm, clock := Ticking())
    cut = set()
    for whole in [one for one in outcomes if one.stop_reason == "looked"][:3]:
        for deadline in range(20, 400, 2):
            clock.time = 0.0
            job = replace(whole.job, deadline=float(deadline), budget=BUDGET.but(max_views=most))
            try:
                found = timed.answer(job)
            except DeadlineError:
                continue
            told = any("no time to hear" in warning for warning in found.warnings)
            if any(view.accepted for view in found.views):
                assert found.stop_reason == ("deadline" if told else "looked")
            if found.stop_reason == "looked":
                assert (found.answer, found.support) == (whole.answer, whole.support)
                break
            if told:
                (picture,) = job.images
                smaller = (picture.width * picture.height) ** 0.5 / 96
                ours = sum(view.reward_after for view in found.views if view.answer_after == found.answer.text)
                said = sum(view.reward_after for view in found.views)
                plainly = found.views[0].reward_before
                ours += plainly / smaller * (found.views[0].answer_before == found.answer.text and plainly >= 0.1)
                said += plainly / smaller * (plainly >= 0.1) + 1 / smaller
                # Without the objections of windows, then with those of so many.
                supports = [(ours / (said + left)) ** (1 / smaller) for left in range(8)]
                (left,) = (at for at, each in enumerate(supports) if found.support == pytest.approx(each, abs=1e-9))
                cut.add(left)
                first = [view for view in found.views if view.depth == 1]
                assert left >= len([view for view in whole.views if view.depth == 1]) - len(first)
        else:
            pytest.fail("no deadline was late enough")
    assert 0 in cut and max(cut) > 0


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), NumericalError("The logits are not finite.", "Use float32.")],
    ids=["memory", "numbers"],
)
def test_where_the_reasoning_cannot_be_heard_the_answer_stays_and_is_less_sure(
    engine: Engine, outcomes: list[Outcome], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = next(one for one in outcomes if one.stop_reason == "looked")
    serve = serving._SERVED[Decode]

    def fail(vlm: VisionLanguageModel, asked: Sequence[Decode]) -> object:
        if any(one.latents is not None for one in asked):
            raise error
        return serve(vlm, asked)

    monkeypatch.setitem(serving._SERVED, Decode, fail)
    found = engine.answer(whole.job)
    assert (found.answer, found.stop_reason) == (whole.answer, "looked")
    assert found.support < whole.support
    assert any("could not be heard" in warning for warning in found.warnings)


def test_a_window_that_cannot_be_looked_at_is_an_objection(
    engine: Engine, outcomes: list[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it would have said: without it, an answer is not surer."""
    build, checked = Question.inputs, 0
    for whole in [one for one in outcomes if one.stop_reason == "looked"][:4]:
        for lost in [view for view in whole.views if view.depth == 1 and not view.accepted]:

            def inputs(self: Question, windows: Sequence[Window] = (), lost: View = lost, **options: Any) -> Inputs:
                if any(window.box == lost.box for window in windows):
                    raise ImageError("The window is broken.", "Send another picture.")
                return build(self, windows, **options)

            monkeypatch.setattr(Question, "inputs", inputs)
            found = engine.answer(whole.job)
            assert any("The window is broken" in warning for warning in found.warnings)
            if (found.stop_reason, found.answer) == ("looked", whole.answer):
                assert found.support < whole.support
                checked += 1
    assert checked


def test_an_answer_that_was_read_in_part_is_no_objection(engine: Engine, outcomes: list[Outcome]) -> None:
    """Cut, "cannot tell" would read "cannot"."""
    unlimited = [one for one in outcomes if one.stop_reason == "looked" and len(one.decoded.tokens) == 2]
    checked = 0
    for whole in unlimited:
        alone = engine.answer(replace(whole.job, budget=Budget(iterations=0)))
        if says_cannot_tell(alone.answer.text):
            found = engine.answer(replace(whole.job, budget=BUDGET.but(max_new_tokens=2)))
            assert (found.answer.text, found.stop_reason) == (whole.answer.text, "looked")
            assert found.support >= whole.support
            checked += 1
    assert checked


def test_the_confidence_in_an_option_asks_no_reasoning(engine: Engine) -> None:
    looked = 0
    for job in jobs(6, options=("yes", "no", "red", "blue", "green", "orange")):
        outcome = engine.answer(job)
        result = engine.result(outcome)
        looked += outcome.stop_reason == "looked"
        assert outcome.support == 1 and result.scores.pooled_probability == pytest.approx(
            ((result.scores.answer_probability or 0) * (result.scores.plain_probability or 0)) ** 0.5
        )
    assert looked


def test_the_costs_are_told(engine: Engine, outcomes: list[Outcome]) -> None:
    for outcome in outcomes[1:]:  # with the first window, the model is asked whether it needs the picture again
        result = engine.result(outcome)
        assert result.usage is not None
        assert result.usage.views == len(result.views) <= BUDGET.max_views
        assert len(result.views) <= result.usage.vision_passes <= len(result.views) + 1
        assert "look" in result.usage.seconds or not result.views


@pytest.mark.parametrize(
    "options",
    [
        {"budget": BUDGET.but(max_views=0)},
        {"settings": SearchSettings(view_depth=0)},
        {"settings": SearchSettings.paper()},
        {"settings": SearchSettings(latents=0)},
    ],
)
def test_it_can_be_switched_off(engine: Engine, options: dict[str, object]) -> None:
    for job in jobs(2, **options):
        outcome = engine.answer(job)
        assert outcome.views == ()
        assert {cell.window for cell in outcome.inputs.cells} == {None}


def test_the_budget_limits_the_windows(engine: Engine) -> None:
    for job in jobs(3, budget=BUDGET.but(max_views=2)):
        assert len(engine.answer(job).views) <= 2


def test_a_batch_answers_like_one_after_another(engine: Engine, outcomes: list[Outcome]) -> None:
    together = engine.answer_many(list(jobs(10)))
    for alone, found in zip(outcomes, together, strict=True):
        assert isinstance(found, Outcome)
        assert found.answer.text == alone.answer.text
        assert [view.box for view in found.views] == [view.box for view in alone.views]
        assert (found.stop_reason, found.support) == (alone.stop_reason, pytest.approx(alone.support, abs=1e-5))


def test_random_windows_are_of_the_same_number_and_sizes(engine: Engine) -> None:
    for job in jobs(3, settings=SearchSettings(variant={"view_source": "random"})):
        first, again = (engine.answer(job) for _ in range(2))
        assert [view.box for view in first.views] == [view.box for view in again.views]
        width, _ = job.images[0].size
        sides = [(view.box[2] - view.box[0]) / width for view in first.views if view.depth == 1]
        assert sides == pytest.approx([0.375, 0.5, 0.6875, 0.5][: len(sides)], abs=2 / width)


def test_every_window_is_told_as_a_step_and_so_is_what_is_heard_then(engine: Engine, outcomes: list[Outcome]) -> None:
    steps = engine.run(next(one.job for one in outcomes if one.stop_reason == "looked"))
    told: list[ReasoningStep] = []
    while True:
        try:
            told.append(next(steps))
        except StopIteration as end:
            outcome: Outcome = end.value
            break
    assert tuple(step.view for step in told if step.phase == "look") == outcome.views
    last = max(at for at, step in enumerate(told) if step.phase == "look")
    assert [step.phase for step in told[last + 1 :]] == ["decode"]


def test_options_are_chosen_from_with_each_window(engine: Engine) -> None:
    """The reward is the best option's probability; what stays is what was scored, alone and in a batch."""
    options = ("red", "green", "yes", "no", "2", "3", "circle", "square", "cannot tell")
    asked = list(jobs(8, options=options))
    outcomes = [engine.answer(job) for job in asked]
    assert any(outcome.views for outcome in outcomes)
    stayed = [outcome for outcome in outcomes if any(view.accepted for view in outcome.views)]
    assert stayed
    for outcome in stayed:
        last = [view for view in outcome.views if view.accepted][-1]
        result = engine.result(outcome)
        assert result.stop_reason == "looked" and last.reward_after > outcome.views[0].reward_before
        assert result.answer == last.answer_after != "cannot tell"
        assert engine.rescore(outcome) == pytest.approx(last.reward_after, abs=1e-4)
        assert result.confidence == pytest.approx(last.reward_after, abs=1e-4)
        assert sum(choice.probability for choice in result.choices or ()) == pytest.approx(1, abs=1e-6)
    for alone, found in zip(outcomes, engine.answer_many(asked), strict=True):
        assert isinstance(found, Outcome)
        assert found.answer.text == alone.answer.text
        assert [view.box for view in found.views] == [view.box for view in alone.views]
    for job in jobs(2, options=options, budget=BUDGET.but(max_views=0)):
        assert engine.answer(job).views == ()


def test_an_answer_that_cannot_be_told_has_no_reward() -> None:
    assert reward_of("cannot tell", 0.9, PHRASES_OF_ALL) == reward_of("", 0.9, ()) == reward_of("red", None, ()) == 0
    assert reward_of("red", 0.4, PHRASES_OF_ALL) == reward_of("cannot tell", 0.4, ()) == 0.4


def test_cancelled_while_it_looks(engine: Engine) -> None:
    (job,) = jobs(1)
    signal = threading.Event()
    steps = engine.run(Job(job.images, job.question, budget=BUDGET, cancelled=signal))
    with pytest.raises(CancelledError):
        for step in steps:
            if step.phase == "look":
                signal.set()
