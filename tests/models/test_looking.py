"""Looking again on the embedded model: what is decoded is what was scored, and nothing changes where nothing helps."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from latent_tool.cannot_tell import PHRASES_OF_ALL, says_cannot_tell
from latent_tool.engine.engine import Engine
from latent_tool.engine.job import Job, Outcome
from latent_tool.engine.looking import hides_pixels, reward_of, times_smaller
from latent_tool.errors import CancelledError
from latent_tool.scenes import generate
from latent_tool.schema import ReasoningStep
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
    """Every window's answer counts as much as it was sure, the less the smaller the picture was made."""
    lowered = 0
    for outcome in (engine.answer(job) for job in jobs(10, confidence=confidence)):
        result = engine.result(outcome)
        assert result.scores.answer_probability is not None and result.scores.plain_probability is not None
        expected = result.scores.answer_probability
        if confidence == "pooled_probability":
            expected = (expected * result.scores.plain_probability) ** 0.5
        if any(view.accepted for view in result.views):
            ours = sum(view.reward_after for view in result.views if view.answer_after == result.answer)
            others = sum(view.reward_after for view in result.views if view.answer_after != result.answer)
            (picture,) = outcome.job.images
            expected *= (ours / (ours + others)) ** ((96 / (picture.width * picture.height) ** 0.5) ** 0.75)
            lowered += others > 0
        assert result.confidence == pytest.approx(expected, abs=1e-6)
        assert outcome.support == 1 or any(view.accepted for view in result.views)
    assert lowered


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


def test_random_windows_are_of_the_same_number_and_sizes(engine: Engine) -> None:
    for job in jobs(3, settings=SearchSettings(variant={"view_source": "random"})):
        first, again = (engine.answer(job) for _ in range(2))
        assert [view.box for view in first.views] == [view.box for view in again.views]
        width, _ = job.images[0].size
        sides = [(view.box[2] - view.box[0]) / width for view in first.views if view.depth == 1]
        assert sides == pytest.approx([0.375, 0.5, 0.6875, 0.5][: len(sides)], abs=2 / width)


def test_every_window_is_told_as_a_step(engine: Engine) -> None:
    (job,) = jobs(1)
    steps = engine.run(job)
    told: list[ReasoningStep] = []
    while True:
        try:
            told.append(next(steps))
        except StopIteration as end:
            outcome: Outcome = end.value
            break
    assert tuple(step.view for step in told if step.phase == "look") == outcome.views


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
