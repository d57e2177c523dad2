"""The whole method on the embedded model: what is reported is what was computed, and no question disturbs another."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import torch
from naive_model import run as run_naively
from pictures import draw_shapes
from PIL import Image
from ticking import Ticking

from latent_tool.engine.engine import Engine, get_engine
from latent_tool.engine.job import Job, Outcome
from latent_tool.engine.question import Question
from latent_tool.engine.work import answer
from latent_tool.errors import (
    CancelledError,
    ContextLengthError,
    DeadlineError,
    NumericalError,
    QuestionError,
    SettingsError,
)
from latent_tool.method.reward import Logits, read_reward
from latent_tool.models.loading import ModelSpec
from latent_tool.schema import ReasoningStep
from latent_tool.settings import Budget, GenerationSettings, NoiseSettings, SearchSettings

QUESTION = "what is right of the circle?"
SHORT = Budget(iterations=3, max_patches=6)
# Injects patches readily, so that a defect in their handling shows.
EAGER = SearchSettings(search_below=None, reward_position="both", patches_per_latent=2, init="mean")
PAPER = SearchSettings.paper()


def job(picture: Image.Image, question: str = QUESTION, **options: Any) -> Job:
    return Job((picture,), question, **{"settings": EAGER, "budget": SHORT, **options})


@pytest.fixture(scope="module")
def outcome(engine: Engine) -> Outcome:
    """One outcome with latents and patches, which several tests look at."""
    found = engine.answer(job(draw_shapes()))
    assert found.latents is not None
    assert found.patches
    return found


def test_answers(engine: Engine, picture: Image.Image) -> None:
    result = engine.result(engine.answer(job(picture)))
    assert result.answer == "blue square"
    assert result.confidence is not None
    assert result.confidence > 0.5
    assert result.confidence_source == "pooled_probability"
    assert result.image_sizes == [(200, 150)]


def naive_reward(engine: Engine, found: Outcome) -> float:
    """The reward of an outcome's state from one forward pass over everything, pixels included, without a cache."""
    naive = run_naively(engine.vlm, found.inputs, found.latents, found.patches)
    logits = Logits(naive.at_latents[None], naive.at_answer[:1])
    return float(read_reward(logits, found.job.settings).reward[0])


@pytest.mark.parametrize(
    "settings", [EAGER, PAPER, SearchSettings(search_below=None)], ids=["eager", "paper", "default"]
)
def test_the_reported_reward_is_that_of_the_returned_state(
    engine: Engine, picture: Image.Image, settings: SearchSettings
) -> None:
    found = engine.answer(job(picture, settings=settings))
    assert found.search is not None
    reported = engine.result(found).scores.reward
    assert engine.rescore(found) == pytest.approx(reported, abs=1e-4)
    assert naive_reward(engine, found) == pytest.approx(reported, abs=1e-4)


def test_the_answer_is_decoded_from_the_state_that_was_scored(engine: Engine, outcome: Outcome) -> None:
    """Same latents, same patches, same positions: the naive forward pass gives every decoded token its probability."""
    naive = run_naively(engine.vlm, outcome.inputs, outcome.latents, outcome.patches, outcome.decoded.tokens[:-1])
    log_p = naive.at_answer.log_softmax(-1)
    expected = log_p[torch.arange(len(outcome.decoded.tokens)), list(outcome.decoded.tokens)]
    assert torch.allclose(expected, outcome.decoded.log_probabilities, atol=1e-4)
    assert naive.at_answer.argmax(-1).tolist() == list(outcome.decoded.tokens)


def test_the_confidence_pools_the_answer_s_probability_with_that_of_the_plain_model(
    engine: Engine, outcome: Outcome
) -> None:
    """Both from naive forward passes: over the decoded state, and over the prompt and the answer alone."""
    tokens, answer = outcome.decoded.tokens[: outcome.answer.stop], slice(outcome.answer.start, outcome.answer.stop)
    joint = []
    for state in ((outcome.latents, outcome.patches), (None, ())):
        log_p = run_naively(engine.vlm, outcome.inputs, *state, tokens[:-1]).at_answer.log_softmax(-1)
        joint.append(float(log_p[range(len(tokens)), list(tokens)][answer].sum().exp()))
    scores = engine.result(outcome).scores
    assert scores.answer_probability == pytest.approx(joint[0], abs=1e-4)
    assert scores.plain_probability == pytest.approx(joint[1], abs=1e-4)
    assert abs(joint[0] - joint[1]) > 1e-3
    assert engine.result(outcome).confidence == pytest.approx((joint[0] * joint[1]) ** 0.5, abs=1e-4)


def test_the_plain_model_has_one_probability(engine: Engine, picture: Image.Image) -> None:
    result = engine.result(engine.answer(job(picture, settings=SearchSettings(latents=0))))
    scores = result.scores
    assert scores.answer_probability == scores.plain_probability == pytest.approx(scores.pooled_probability)
    assert result.usage.decoder_calls == 1 + result.usage.generated_tokens


@pytest.mark.parametrize("part", ["latents", "patches"])
def test_the_decoding_depends_on_latents_and_patches(engine: Engine, outcome: Outcome, part: str) -> None:
    """A decoding that dropped either would give the same probabilities without it."""
    prefix = engine.vlm.prefill(outcome.inputs)
    latents, patches = outcome.latents, outcome.patches
    if part == "latents":
        latents = None
    else:
        patches = ()
    changed = engine.vlm.token_log_probabilities(prefix, latents, patches, outcome.decoded.tokens)
    again = engine.vlm.token_log_probabilities(prefix, outcome.latents, outcome.patches, outcome.decoded.tokens)
    difference = (changed - outcome.decoded.log_probabilities).abs().max()
    assert difference > 10 * (again - outcome.decoded.log_probabilities).abs().max()
    assert difference > 1e-5


def test_the_reward_sees_the_image(engine: Engine, outcome: Outcome) -> None:
    """The very same latents and cells on another picture have another reward."""
    other = engine.vlm.prepare([draw_shapes("triangle", (25, 150, 40))], QUESTION)
    prefix = engine.vlm.prefill(other)
    assert outcome.latents is not None
    logits = engine.vlm.score(prefix, outcome.latents[None], (outcome.patches,))
    reward = float(read_reward(logits, outcome.job.settings).reward[0])
    assert abs(reward - engine.rescore(outcome)) > 1e-3


def test_patches_are_image_features(engine: Engine, outcome: Outcome) -> None:
    """Not the embedding of the placeholder token, and others for another picture."""
    prefix = engine.vlm.prefill(outcome.inputs)
    placeholder = engine.vlm.embed([engine.vlm.image_token])[0]
    for cell in outcome.patches:
        assert (prefix.features[cell] - placeholder).abs().max() > 0.1
    other = engine.vlm.prefill(engine.vlm.prepare([draw_shapes("triangle", (25, 150, 40))], QUESTION))
    assert (prefix.features - other.features).abs().max() > 0.1


def test_patches_are_reported_as_they_were_injected(engine: Engine, outcome: Outcome) -> None:
    patches = engine.result(outcome).patches
    assert [patch.cell for patch in patches] == list(outcome.patches)
    assert [patch.rank for patch in patches] == list(range(len(patches)))
    for patch in patches:
        assert patch.gain > 0
        assert patch.box is not None
        column, row = patch.cell % 8, patch.cell // 8
        assert patch.box == pytest.approx((column * 25, row * 18.75, column * 25 + 25, row * 18.75 + 18.75))


def test_the_same_seed_gives_the_same_result(engine: Engine, picture: Image.Image) -> None:
    first, again = (engine.result(engine.answer(job(picture, seed=3))) for _ in range(2))
    timeless = {"usage", "trace"}
    assert first.model_dump(exclude=timeless) == again.model_dump(exclude=timeless)
    other = engine.result(engine.answer(job(picture, seed=4)))
    assert other.trace[1].reward != first.trace[1].reward


def test_a_second_question_does_not_change_the_first_ones_answer(engine: Engine, picture: Image.Image) -> None:
    """Two questions interleaved, step by step, end as each does alone."""
    other = draw_shapes("triangle", (25, 150, 40))
    alone = [engine.answer(job(picture)), engine.answer(job(other, "what color is the triangle?"))]
    steps = [engine.run(job(picture)), engine.run(job(other, "what color is the triangle?"))]
    ended: dict[int, Outcome] = {}
    while len(ended) < 2:
        for index, each in enumerate(steps):
            if index not in ended:
                try:
                    next(each)
                except StopIteration as end:
                    ended[index] = end.value
    for index in range(2):
        assert ended[index].patches == alone[index].patches
        assert torch.equal(ended[index].latents, alone[index].latents)  # type: ignore[arg-type]
        assert ended[index].decoded.tokens == alone[index].decoded.tokens


def test_threads_do_not_disturb_each_other(engine: Engine) -> None:
    jobs = [
        job(draw_shapes("circle" if index % 2 else "triangle", (220, 25, 25 * index)), seed=index) for index in range(4)
    ]
    alone = [engine.answer(each) for each in jobs]
    together: list[Outcome | None] = [None] * len(jobs)

    def work(index: int) -> None:
        together[index] = engine.answer(jobs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert other is not None
        assert (one.decoded.tokens, one.patches) == (other.decoded.tokens, other.patches)


def test_nothing_global_changes(engine: Engine, picture: Image.Image) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    attention = engine.vlm.model.config.get_text_config()._attn_implementation
    pixels = picture.tobytes()
    engine.answer(job(picture, grounding=NoiseSettings(), controls=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert engine.vlm.model.config.get_text_config()._attn_implementation == attention
    assert not any(module._forward_pre_hooks for module in engine.vlm.model.modules())
    assert picture.tobytes() == pixels
    assert not any(parameter.requires_grad for parameter in engine.vlm.model.parameters())


# ---------------------------------------------------------------------- budgets


def test_no_iterations_are_a_plain_answer_with_a_confidence(engine: Engine, picture: Image.Image) -> None:
    result = engine.result(engine.answer(job(picture, budget=Budget(iterations=0))))
    assert result.patches == []
    assert result.usage is not None
    assert result.usage.candidates == 1
    assert result.scores.reward == result.scores.initial_reward is not None
    assert result.confidence is not None
    assert result.answer == "blue square"


def test_no_latents_are_the_plain_model(engine: Engine, picture: Image.Image) -> None:
    result = engine.result(engine.answer(job(picture, settings=SearchSettings(latents=0))))
    assert (result.scores.reward, result.stop_reason, result.trace) == (None, "no_latents", [])
    inputs = engine.vlm.prepare([picture], QUESTION)
    generated = engine.vlm.model.generate(**inputs.tensors, max_new_tokens=20, do_sample=False)[0, inputs.length :]
    assert result.answer == engine.vlm.tokenizer.decode(generated, skip_special_tokens=True).strip()


def test_limits_are_honoured_and_reported(engine: Engine, picture: Image.Image) -> None:
    result = engine.result(engine.answer(job(picture, budget=Budget(iterations=50, max_candidates=20, max_patches=3))))
    assert result.usage is not None
    assert result.usage.candidates <= 20
    assert result.stop_reason == "max_candidates"
    assert len(result.patches) <= 3
    cut = engine.result(engine.answer(job(picture, budget=Budget(iterations=0, max_new_tokens=1))))
    assert cut.usage is not None
    assert (cut.usage.generated_tokens, cut.finish_reason) == (1, "length")
    assert any("cut" in warning for warning in cut.warnings)


def test_an_expired_deadline_gives_the_best_so_far(engine: Engine, picture: Image.Image) -> None:
    clock = Ticking()
    timed = Engine(engine.vlm, clock)
    found = timed.answer(job(picture, budget=Budget(iterations=10_000, deadline_s=300), deadline=300.0))
    result = timed.result(found)
    assert result.stop_reason == "deadline"
    assert result.answer
    assert engine.rescore(found) == pytest.approx(result.scores.reward, abs=1e-4)
    # The clock moves when it is looked at, so this bounds how often it was looked at after the deadline.
    assert clock.time < 300 + 20


def test_a_deadline_before_anything_was_scored_is_an_error(engine: Engine, picture: Image.Image) -> None:
    for deadline in (0.5, 3.0):
        with pytest.raises(DeadlineError, match="deadline") as caught:
            Engine(engine.vlm, Ticking()).answer(job(picture, deadline=deadline))
        assert caught.value.hint
    assert engine.answer(job(picture)).answer.text == "blue square"


class Late(Engine):
    """An engine whose clock jumps from 0 to 2 when it is looked at for the nth time after the answer was decoded."""

    def __init__(self, engine: Engine, jump: int) -> None:
        super().__init__(engine.vlm, self.look)
        self.jump, self.looks, self.answered = jump, 0, False

    def look(self) -> float:
        self.looks += self.answered
        return 2.0 if self.looks >= self.jump else 0.0

    def work(self, job: Job) -> Any:
        question = Question(self.vlm, job, self.clock)
        extract = question.extract

        def noted(*arguments: Any) -> Any:
            self.answered = True
            return extract(*arguments)

        question.extract = noted  # type: ignore[method-assign]
        return answer(question)


def test_the_deadline_holds_while_grounding_and_controls_are_made(engine: Engine, picture: Image.Image) -> None:
    """What there is no time for is left out or averaged over fewer draws, each with a warning; never an error."""
    noise = NoiseSettings(draws=3)
    asked = job(picture, grounding=noise, controls=True, deadline=1.0, budget=Budget(iterations=0))
    results = []
    for jump in itertools.count(1, 3):
        late = Late(engine, jump)
        results.append(late.result(late.answer(asked)))
        if late.looks < jump:
            break
    whole = results[-1]
    assert whole.grounding is not None and whole.controls is not None and not whole.warnings
    kinds = set()
    for result in results[:-1]:
        assert result.answer == whole.answer and result.confidence == pytest.approx(whole.confidence, abs=1e-5)
        grounded = [text for text in result.warnings if "grounding" in text]
        controlled = [text for text in result.warnings if "controls" in text]
        assert bool(controlled) == (result.controls is None)
        assert grounded or result.grounding == whole.grounding
        assert len(grounded) <= 1 and any("no time" in text for text in grounded) == (result.grounding is None)
        kinds.add((result.grounding is None, bool(grounded), result.controls is None))
    # Nothing; some draws; all draws and no controls.
    assert kinds >= {(True, True, True), (False, True, True), (False, False, True)}


def test_cancelling_takes_effect_within_one_step(engine: Engine, picture: Image.Image) -> None:
    cancelled = threading.Event()
    steps = engine.run(job(picture, budget=Budget(iterations=1000), cancelled=cancelled))
    seen = 0
    with pytest.raises(CancelledError):
        for step in steps:
            seen += 1
            if step.trace is not None and step.trace.round == 1:
                cancelled.set()
                at = seen
    assert seen <= at + 1
    assert engine.answer(job(picture)).answer.text == "blue square"


def test_steps_tell_what_happens(engine: Engine, picture: Image.Image) -> None:
    steps = engine.run(job(picture))
    seen: list[ReasoningStep] = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            found: Outcome = end.value
            break
    assert [step.phase for step in seen] == ["prefill", *["search"] * (len(seen) - 2), "decode"]
    rows = [step.trace for step in seen if step.trace is not None]
    assert [row.round for row in rows] == list(range(len(rows)))
    assert rows == engine.result(found).trace


def test_generation_settings_change_the_models_own(engine: Engine, picture: Image.Image) -> None:
    def ask(**changes: Any) -> Outcome:
        return engine.answer(job(picture, generation=GenerationSettings(**changes), budget=Budget(iterations=0)))

    assert ask().answer.raw_text == "blue square"
    assert ask(stop_strings=("blu",)).answer.raw_text == "blue"
    assert ask(stop_strings=("blu",)).decoded.finish_reason == "stop"
    assert len(ask(min_new_tokens=5).decoded.tokens) >= 5
    # The default is the model's own generate; a strong penalty keeps the question's words out of the answer.
    assert (
        "square"
        not in engine.answer(
            job(picture, "is it a blue square?" + QUESTION, generation=GenerationSettings(repetition_penalty=100.0))
        ).answer.raw_text
    )


def test_images_may_stand_after_the_question() -> None:
    """On a model whose template keeps the order of the parts: then the image cells come after the question's tokens."""
    model = Engine(tiny_checkpoints.loaded("qwen2_5_vl"))
    firsts = []
    for images_first in (True, False):
        found = model.answer(
            Job(
                (tiny_checkpoints.picture(),),
                QUESTION,
                images_first=images_first,
                budget=Budget(iterations=0, max_new_tokens=2),
            )
        )
        ids = found.inputs.tensors["input_ids"][0]
        firsts.append(int((ids == model.vlm.image_token).nonzero()[0]))
    assert firsts[1] - firsts[0] >= len(QUESTION)  # one token per byte


# ---------------------------------------------------------------------- grounding and controls


def test_visual_dependency_is_what_its_formula_says(engine: Engine, picture: Image.Image) -> None:
    """Worked out again with naive forward passes over the clean and the noised pixels."""
    from latent_tool.method.grounding import add_noise

    noise = NoiseSettings(strength=0.9, seed=7)
    found = engine.answer(job(picture, grounding=noise))
    assert found.grounding is not None
    tokens = list(found.decoded.tokens)
    generator = torch.Generator().manual_seed(7)
    pixels = add_noise(found.inputs.tensors["pixel_values"], noise, generator)
    rows = []
    for tensors in (found.inputs.tensors, {**found.inputs.tensors, "pixel_values": pixels}):
        inputs = type(found.inputs)(
            tensors, found.inputs.tail, found.inputs.markers, found.inputs.cells, found.inputs.warnings
        )
        naive = run_naively(engine.vlm, inputs, found.latents, found.patches, tokens[:-1])
        rows.append(naive.at_answer.log_softmax(-1)[torch.arange(len(tokens)), tokens])
    expected = (rows[0] - rows[1]).tolist()
    assert [token.dependency for token in found.grounding.tokens] == pytest.approx(expected, abs=1e-3)
    assert found.grounding.mean == pytest.approx(sum(expected) / len(expected), abs=1e-3)


def test_what_is_seen_depends_on_the_image_and_what_is_grammar_does_not(engine: Engine, picture: Image.Image) -> None:
    found = engine.answer(job(picture, "what color is the circle?", grounding=NoiseSettings()))
    assert found.grounding is not None
    by_token = {token.token.strip(): token.dependency for token in found.grounding.tokens}
    assert by_token["red"] > 1
    assert abs(by_token["<|end|>"]) < 1


def test_controls(engine: Engine, picture: Image.Image) -> None:
    controls = engine.result(engine.answer(job(picture, controls=True))).controls
    assert controls is not None
    plain = engine.result(engine.answer(job(picture, settings=SearchSettings(latents=0))))
    assert controls.latents_off.answer == plain.answer
    assert controls.latents_off.confidence == pytest.approx(plain.confidence, abs=1e-5)
    assert controls.latents_off.agrees
    assert controls.image_noised.confidence is not None
    assert not controls.image_noised.agrees  # in noise it cannot tell


# ---------------------------------------------------------------------- attention to every cell, and on the way


def test_the_attention_to_every_cell_is_that_of_the_decoded_state(engine: Engine, picture: Image.Image) -> None:
    """Worked out again with eager attention in one naive forward pass."""
    found = engine.answer(job(picture, attention=True))
    assert found.latents is not None and found.patches and found.attention is not None
    naive = run_naively(engine.vlm, found.inputs, found.latents, found.patches, attention=True)
    assert naive.attention is not None
    cells = found.inputs.tensors["input_ids"][0] == engine.vlm.image_token
    columns = naive.attention[:, :, naive.latents][..., : len(cells)][..., cells]
    assert found.attention == pytest.approx(columns.mean((0, 1, 2)).tolist(), abs=1e-6)
    result = engine.result(found)
    assert result.attention is not None
    assert [(each.cell, each.image, each.box) for each in result.attention] == [
        (index, place.image, place.box) for index, place in enumerate(found.inputs.cells)
    ]
    assert tuple(each.weight for each in result.attention) == found.attention
    assert not result.warnings


def test_measuring_the_attention_takes_one_pass_and_changes_nothing_else(engine: Engine, picture: Image.Image) -> None:
    plain, measured = engine.answer(job(picture)), engine.answer(job(picture, attention=True))
    assert measured.usage.decoder_calls == plain.usage.decoder_calls + 1
    assert "attention" in measured.usage.seconds and "attention" not in plain.usage.seconds
    assert (measured.answer, measured.patches) == (plain.answer, plain.patches)
    assert plain.attention is None and engine.result(plain).attention is None
    (later,), (kept,) = engine.attention_many([plain]), engine.attention_many([measured])
    assert measured.attention is not None and not isinstance(later, Exception)
    assert later == pytest.approx(measured.attention, abs=1e-6)
    assert kept == list(measured.attention)


def test_the_plain_model_has_no_attention_and_the_result_says_so(engine: Engine, picture: Image.Image) -> None:
    result = engine.result(engine.answer(job(picture, settings=SearchSettings(latents=0), attention=True)))
    assert result.attention is None
    assert result.warnings == ["Without latents there is no attention to the image cells that could be measured."]


def test_what_the_deadline_leaves_no_time_for_is_not_measured_but_named(engine: Engine, picture: Image.Image) -> None:
    """The deadline passes while the answer is decoded."""
    clock = Ticking()
    timed = Engine(engine.vlm, clock)
    run = timed.run(job(picture, deadline=1e6, attention=True, grounding=NoiseSettings(), controls=True))
    while next(run).phase != "decode":
        pass
    clock.time = 1e6
    with pytest.raises(StopIteration) as end:
        next(run)
    result = timed.result(end.value.value)
    assert result.answer and (result.attention, result.grounding, result.controls) == (None, None, None)
    assert "The deadline left no time to measure: attention, grounding, controls." in result.warnings


@pytest.mark.parametrize("position", ["latents", "answer", "both"])
def test_the_probability_of_the_first_token_is_that_of_a_naive_pass(
    engine: Engine, picture: Image.Image, position: Any
) -> None:
    found = engine.answer(job(picture, settings=EAGER.but(reward_position=position)))
    assert found.search is not None
    naive = run_naively(engine.vlm, found.inputs, found.latents, found.patches)
    expected = float(naive.at_answer[0].softmax(-1).max())
    trace = engine.result(found).trace
    assert trace[-1].first_token_probability == pytest.approx(expected, abs=1e-4)
    start = engine.answer(job(picture, settings=EAGER.but(reward_position=position), budget=Budget(iterations=0)))
    naive = run_naively(engine.vlm, start.inputs, start.latents, ())
    expected = float(naive.at_answer[0].softmax(-1).max())
    assert trace[0].first_token_probability == pytest.approx(expected, abs=1e-4)
    assert all(0 < (row.first_token_probability or 0) <= 1 for row in trace)


# ---------------------------------------------------------------------- confidence


def test_the_answer_probability_is_joint_over_answer_and_end(engine: Engine, picture: Image.Image) -> None:
    found = engine.answer(job(picture, confidence="answer_probability"))
    naive = run_naively(engine.vlm, found.inputs, found.latents, found.patches, found.decoded.tokens[:-1])
    p = naive.at_answer.softmax(-1)[torch.arange(len(found.decoded.tokens)), list(found.decoded.tokens)]
    assert engine.result(found).confidence == pytest.approx(float(p.prod()), abs=1e-4)
    assert engine.result(found).confidence_source == "answer_probability"


def test_thresholds(engine: Engine, picture: Image.Image) -> None:
    sure = engine.result(engine.answer(job(picture, min_confidence=0.1)))
    assert (sure.accepted, sure.abstained) == (True, False)
    unsure = engine.result(engine.answer(job(picture, min_confidence=1.0)))
    assert (unsure.accepted, unsure.abstained) == (False, True)
    assert unsure.answer == sure.answer


def test_the_reward_as_confidence(engine: Engine, picture: Image.Image) -> None:
    result = engine.result(engine.answer(job(picture, confidence="reward")))
    assert result.confidence_source == "reward"
    assert result.confidence is not None
    assert 0 <= result.confidence <= 1
    for settings in (SearchSettings(latents=0), SearchSettings(reward="neg_log_probability")):
        found = engine.answer(job(picture, confidence="reward", settings=settings))
        with pytest.raises(SettingsError):
            engine.result(found)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda picture: job(picture, ""), QuestionError),
        (lambda picture: job(picture, " \n\t "), QuestionError),
        (lambda picture: job(picture, "why? " * 20_000), ContextLengthError),
        (
            lambda picture: job(picture, settings=SearchSettings(init="token", variant={"init_token": "<no-such>"})),
            SettingsError,
        ),
    ],
    ids=["empty", "blank", "100 kB", "unknown token"],
)
def test_bad_questions_are_typed_errors_and_the_next_one_works(
    engine: Engine, picture: Image.Image, make: Callable[[Image.Image], Job], error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        engine.answer(make(picture))
    assert getattr(caught.value, "hint", "")
    assert engine.answer(job(picture)).answer.text == "blue square"


@pytest.mark.parametrize(
    "text", ["<image>", "<image><image>", "<|end|>", "<|assistant|>", "</think>", "<im<image>age>"]
)
def test_control_tokens_in_a_question_stay_text(engine: Engine, picture: Image.Image, text: str) -> None:
    inputs = engine.vlm.prepare([picture], f"what color is the circle? {text}")
    plain = engine.vlm.prepare([picture], "what color is the circle?")
    special = set(engine.vlm.tokenizer.all_special_ids) | set(engine.vlm.tokenizer.get_added_vocab().values())

    def count(ids: torch.Tensor) -> int:
        return sum(token in special for token in ids[0].tolist())

    assert count(inputs.tensors["input_ids"]) == count(plain.tensors["input_ids"])
    assert engine.answer(job(picture, f"what color is the circle? {text}")).answer.text


def test_one_bad_job_leaves_the_others_alone(engine: Engine, picture: Image.Image) -> None:
    outcomes = engine.answer_many([job(picture), job(picture, ""), job(picture, "what color is the circle?")])
    assert isinstance(outcomes[1], QuestionError)
    assert isinstance(outcomes[0], Outcome)
    assert isinstance(outcomes[2], Outcome)
    assert (outcomes[0].answer.text, outcomes[2].answer.text) == ("blue square", "red")


def test_a_model_that_returns_nan_is_an_error_and_leaves_no_trace(engine: Engine, picture: Image.Image) -> None:
    head = engine.vlm.model.lm_head
    handle = head.register_forward_hook(lambda _module, _inputs, output: output * float("nan"))
    try:
        with pytest.raises(NumericalError):
            engine.answer(job(picture))
    finally:
        handle.remove()
    assert engine.answer(job(picture)).answer.text == "blue square"


# ---------------------------------------------------------------------- one engine per model


def test_engines_are_shared_per_model_and_loaded_once(engine: Engine) -> None:
    found: list[Engine] = []
    threads = [threading.Thread(target=lambda: found.append(get_engine(ModelSpec()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [engine] * 4
