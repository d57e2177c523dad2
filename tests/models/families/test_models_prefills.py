"""Prompts of several questions in one pass, against naive passes and against one by one, in every family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import naive_model
import pytest
import torch
from naive_model import CLOSE
from tiny_checkpoints import picture

from latent_tool.errors import CancelledError, DeadlineError
from latent_tool.models.prefix import Inputs, Prefix
from latent_tool.models.prefix_cache import PrefixCache
from latent_tool.models.requests import Prefill
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.models.windows import Window

QUESTIONS = ("what is red?", "how many are there in this picture?", "what?", "is it so?")
# Families whose caches cannot be taken apart by row: layers with states of other kinds, or shared ones.
ALONE = {"qwen3_5", "lfm2_vl", "gemma4"}
# Families whose prompts are computed whole: only those of one length ride together.
WHOLE = {*ALONE, "ovis2", "paligemma"}
# Families that do not go on from an earlier picture.
FROM_THE_START = {*WHOLE, "gemma3", "llava_onevision"}


@pytest.fixture
def fresh(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> VisionLanguageModel:
    """The model as if it had answered nothing yet."""
    monkeypatch.setattr(vlm, "prefix_cache", PrefixCache(2**26))
    for name in ("_splits", "_goes_on"):
        monkeypatch.setattr(vlm, name, None)
    monkeypatch.setattr(vlm, "_joins", {})
    return vlm


@contextmanager
def passes(vlm: VisionLanguageModel) -> Iterator[list[int]]:
    """Count the decoder's forward passes."""
    seen: list[int] = []
    handle = vlm.model.get_decoder().register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        yield seen
    finally:
        handle.remove()


def asked(vlm: VisionLanguageModel) -> list[Inputs]:
    """Questions of different lengths about pictures of two shapes, one of them asked about twice."""
    shown = [picture(seed=seed) for seed in range(4)] + [picture(90, 130, seed=5), picture(seed=1)]
    return [vlm.prepare([each], QUESTIONS[at % 4]) for at, each in enumerate(shown)]


def same(found: Prefix | Exception, expected: Prefix) -> None:
    assert isinstance(found, Prefix)
    torch.testing.assert_close(found.last_logits, expected.last_logits, **CLOSE)
    torch.testing.assert_close(found.features, expected.features, **CLOSE)
    assert torch.equal(found.columns, expected.columns)
    assert found.next_position == expected.next_position
    if expected.positions is not None:
        assert found.positions is not None and torch.equal(found.positions, expected.positions)
    if (found.attention is None) is not (expected.attention is None):
        raise AssertionError("the attention of one of them was not read")
    if found.attention is not None:
        torch.testing.assert_close(found.attention, expected.attention, **CLOSE)


@pytest.mark.parametrize("attend", [False, True])
def test_prompts_in_one_pass_equal_the_naive_forward_pass(fresh: VisionLanguageModel, attend: bool) -> None:
    """The first questions decide how they are computed, the second round relies on it, the third on the cache."""
    inputs = asked(fresh)
    alone = [fresh.prefill(each, cached=False, attend=attend) for each in inputs]
    for each, prefix in zip(inputs, alone, strict=True):
        naive = naive_model.run(fresh, each, None, ())
        torch.testing.assert_close(prefix.last_logits, naive.at_answer[0], **CLOSE)
    for number in range(3):
        if number == 1:
            fresh.prefix_cache.clear()
        with passes(fresh) as count:
            found = fresh.prefill_many([Prefill(each, attend=attend) for each in inputs])
        for one, expected in zip(found, alone, strict=True):
            same(one, expected)
        if number == 1 and fresh.model.config.model_type not in {*ALONE, *WHOLE}:
            assert len(count) < 2 * len(inputs)  # one by one, every picture and every rest is a pass of its own
    kind = fresh.model.config.model_type
    if kind in ALONE:
        assert len(count) == len(inputs)
    elif kind in WHOLE:
        assert len(count) <= len({each.length for each in inputs})
    elif not attend:
        assert len(count) <= 2  # of every shape of picture one
    latents = naive_model.draw_latents(fresh, 2)
    for one, each in zip(found, inputs, strict=True):
        assert isinstance(one, Prefix)
        naive = naive_model.run(fresh, each, latents[1], (0,))
        torch.testing.assert_close(fresh.score(one, latents[1:], [(0,)]).answer[0], naive.at_answer[0], **CLOSE)


def test_one_that_is_given_up_disturbs_nobody(fresh: VisionLanguageModel) -> None:
    """Before its first layer or further on, alone or with all others; what it was the first to ask about is there."""
    inputs = asked(fresh)
    expected = [fresh.prefill(each, cached=False) for each in inputs]
    fresh.prefill_many([Prefill(each) for each in inputs])

    def after(layers: int, error: Exception):
        left = [layers]

        def check() -> None:
            left[0] -= 1
            if left[0] < 0:
                raise error

        return check

    for layers in (0, 3):
        fresh.prefix_cache.clear()
        gone = {1: after(layers, CancelledError("gone")), 2: after(layers, DeadlineError("late"))}
        found = fresh.prefill_many([Prefill(each, gone.get(at, lambda: None)) for at, each in enumerate(inputs)])
        for at, (one, other) in enumerate(zip(found, expected, strict=True)):
            if at in gone:
                assert isinstance(one, CancelledError if at == 1 else DeadlineError)
            else:
                same(one, other)
        fresh.prefix_cache.clear()
        with passes(fresh) as count:
            every = fresh.prefill_many([Prefill(each, after(layers, CancelledError("gone"))) for each in inputs])
        assert all(isinstance(one, CancelledError) for one in every)
        assert len(count) <= len(inputs)
    for one, other in zip(fresh.prefill_many([Prefill(each) for each in inputs]), expected, strict=True):
        same(one, other)


def test_what_is_not_finite_decides_nothing_for_later_questions(fresh: VisionLanguageModel) -> None:
    """Nor do questions that are equal: whether a pass keeps its rows apart, they cannot show."""
    inputs = asked(fresh)
    expected = [fresh.prefill(each, cached=False) for each in inputs]
    fresh.prefix_cache.clear()
    fresh._splits = fresh._goes_on = None
    fresh._joins.clear()
    pixels = inputs[0].tensors["pixel_values"]
    broken = replace(inputs[0], tensors={**inputs[0].tensors, "pixel_values": torch.full_like(pixels, float("nan"))})
    for one in fresh.prefill_many([Prefill(broken)] * 3):
        assert isinstance(one, Exception) and "not finite" in str(one)
    fresh.prefill_many([Prefill(inputs[0])] * 3)
    assert fresh._joins == {}
    for one, other in zip(fresh.prefill_many([Prefill(each) for each in inputs]), expected, strict=True):
        same(one, other)
    if fresh.model.config.model_type not in ALONE:
        assert any(fresh._joins.values())


def test_what_is_not_finite_is_the_error_of_its_own_question(fresh: VisionLanguageModel) -> None:
    inputs = asked(fresh)
    expected = [fresh.prefill(each, cached=False) for each in inputs]
    fresh.prefill_many([Prefill(each) for each in inputs])
    fresh.prefix_cache.clear()
    pixels = inputs[2].tensors["pixel_values"]
    broken = replace(inputs[2], tensors={**inputs[2].tensors, "pixel_values": torch.full_like(pixels, float("nan"))})
    found = fresh.prefill_many([Prefill(broken if at == 2 else each) for at, each in enumerate(inputs)])
    assert isinstance(found[2], Exception) and "not finite" in str(found[2])
    for at in {*range(len(inputs))} - {2}:
        same(found[at], expected[at])


def test_windows_of_one_round_go_on_from_their_picture_in_one_pass(fresh: VisionLanguageModel) -> None:
    image = picture(240, 180)
    alone = fresh.prepare([image], QUESTIONS[0])
    boxes = [(30 + 8 * at, 20, 118 + 8 * at, 90) for at in range(4)]
    inputs = [fresh.prepare([image], QUESTIONS[0], windows=[Window(0, box)]) for box in boxes]
    expected = [fresh.prefill(each, cached=False, attend=True) for each in inputs]
    for _ in range(2):
        fresh.prefix_cache.clear()
        fresh.prefill(alone)
        with passes(fresh) as count:
            found = fresh.prefill_many([Prefill(each, attend=True, begins=alone) for each in inputs])
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    kind = fresh.model.config.model_type
    assert all(isinstance(one, Prefix) for one in found)
    if kind not in FROM_THE_START:
        assert [one.encoded for one in found if isinstance(one, Prefix)] == [1] * 4
        assert len(count) == 2
