"""The fast path, from a prefix cache, equals one naive forward pass over everything, in every family."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import naive_model
import pytest
import torch
from naive_model import CLOSE, MARKERS, QUESTION, draw_latents, some_cells
from tiny_checkpoints import picture
from torch import Tensor

from latent_tool.models import forcing
from latent_tool.models.families import family
from latent_tool.models.requests import TokenLogProbabilities


@pytest.mark.parametrize(("position", "markers"), [("generation_start", None), ("user_turn", MARKERS)])
def test_score_equals_the_naive_forward_pass(vlm, position, markers):
    inputs = vlm.prepare([picture()], QUESTION, position=position, thinking_markers=markers)
    prefix = vlm.prefill(inputs)
    latents, patches = draw_latents(vlm, 8), some_cells(vlm, len(inputs.cells))
    scored = vlm.score(prefix, latents, patches)
    row = family(vlm.model.config.model_type)
    assert (inputs.tail != ()) == (position == "user_turn" and row is not None and row.chat_template)
    for index, cells in enumerate(patches):
        naive = naive_model.run(vlm, inputs, latents[index], cells)
        torch.testing.assert_close(scored.latents[index], naive.at_latents, **CLOSE)
        torch.testing.assert_close(scored.answer[index], naive.at_answer[0], **CLOSE)
    alone = vlm.score(prefix, latents[5:6], patches[5:6])
    torch.testing.assert_close(alone.latents[0], scored.latents[5], **CLOSE)
    torch.testing.assert_close(alone.answer[0], scored.answer[5], **CLOSE)


@pytest.mark.parametrize(("position", "markers"), [("generation_start", None), ("user_turn", MARKERS)])
@pytest.mark.parametrize("with_latents", [False, True])
def test_teacher_forcing_equals_the_naive_forward_pass(vlm, position, markers, with_latents):
    inputs = vlm.prepare([picture()], QUESTION, position=position, thinking_markers=markers)
    prefix = vlm.prefill(inputs)
    tokens = [11, 60, 33, 7]
    for count, cells in ((3, ()), (1, (2, 0))):
        latents = draw_latents(vlm, 1, count)[0] if with_latents else None
        fast = vlm.token_log_probabilities(prefix, latents, cells, tokens)
        naive = naive_model.run(vlm, inputs, latents, cells, tokens)
        expected = naive.at_answer.log_softmax(-1)[range(4), tokens]
        torch.testing.assert_close(fast, expected, **CLOSE)


def test_teacher_forcing_in_one_batch_equals_one_after_another(vlm):
    prefixes = [vlm.prefill(vlm.prepare([picture()], question)) for question in (QUESTION, "and what is not?")]
    latents = draw_latents(vlm, 1)[0]
    states = [(None, ()), (latents, ()), (latents, (2, 0)), (None, (1,))]
    texts = [[11, 60, 33, 7], [5], [], [9, 8]]
    asked = [
        TokenLogProbabilities(prefix, *state, tokens)
        for prefix, state, tokens in itertools.product(prefixes, states, texts)
    ]
    for each, found in zip(asked, vlm.token_log_probabilities_many(asked), strict=True):
        naive = naive_model.run(vlm, each.prefix.inputs, each.latents, each.patches, each.tokens)
        expected = naive.at_answer.log_softmax(-1)[range(len(each.tokens)), each.tokens]
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("room", [1, 2, 3])
def test_teacher_forcing_in_pieces_equals_the_naive_forward_pass(vlm, monkeypatch, room):
    """Where only some positions' logits fit; the head never gives more at once."""
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    monkeypatch.setattr(forcing, "_MOST_LOGITS", room * prefix.last_logits.shape[-1])
    latents, tokens = draw_latents(vlm, 1)[0], [11, 60, 33, 7, 9]
    seen = []
    handle = vlm.model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    try:
        for state in ((None, ()), (latents, (2, 0))):
            (fast,) = vlm.token_log_probabilities_many([TokenLogProbabilities(prefix, *state, tokens)])
            naive = naive_model.run(vlm, prefix.inputs, *state, tokens)
            seen.pop()
            torch.testing.assert_close(fast, naive.at_answer.log_softmax(-1)[range(5), tokens], **CLOSE)
    finally:
        handle.remove()
    assert max(seen) == room


def test_a_wrong_position_or_patch_would_be_seen(vlm):
    """The check has teeth: small mistakes move the logits far beyond the tolerance."""
    inputs = vlm.prepare([picture()], QUESTION)
    prefix = vlm.prefill(inputs)
    latents = draw_latents(vlm, 1)
    naive = naive_model.run(vlm, inputs, latents[0], (1, 2))
    for wrong in ((2, 1), (1, 3), (1,)):
        moved = vlm.score(prefix, latents, [wrong]).latents[0] - naive.at_latents
        assert moved.abs().max() > 0.01
    shifted = naive_model.run(vlm, inputs, latents[0], (1, 2), shift=1)
    assert (shifted.at_latents - naive.at_latents).abs().max() > 0.05


def test_patches_are_copies_of_merged_image_features(vlm):
    inputs = vlm.prepare([picture()], QUESTION)
    prefix = vlm.prefill(inputs)
    naive = naive_model.run(vlm, inputs, None, ())
    placeholder = vlm.embed([vlm.image_token])[0]
    assert len(prefix.features) == len(inputs.cells)
    torch.testing.assert_close(prefix.features, naive.merged[prefix.columns], **CLOSE)
    assert ((prefix.features - placeholder).abs().amax(-1) > 1e-2).all()
    other = vlm.prefill(vlm.prepare([picture(seed=1)], QUESTION))
    seen = [cell.box is not None for cell in inputs.cells]
    assert ((prefix.features - other.features)[seen].abs().amax(-1) > 1e-3).all()


def test_another_image_changes_the_logits(vlm):
    latents, cells = draw_latents(vlm, 1), [(1, 2)]
    first, second = (
        vlm.score(vlm.prefill(vlm.prepare([picture(seed=seed)], QUESTION)), latents, cells).answer for seed in (0, 1)
    )
    assert (first - second).abs().max() > 0.05


def test_questions_in_alternation_do_not_disturb_each_other(vlm):
    """Nothing of a question is left on the model: images of other sizes are prefilled in between."""
    pictures = [picture(150, 100), picture(90, 200, seed=3)]
    latents = draw_latents(vlm, 2)
    inputs = [vlm.prepare([image], QUESTION) for image in pictures]
    alone = []
    for item in inputs:
        prefix = vlm.prefill(item)
        alone.append((vlm.score(prefix, latents, [(1,), (0,)]).answer, vlm.decode(prefix, latents[0], (1,), 5).tokens))
    prefixes = [vlm.prefill(item) for item in inputs]
    for _ in range(2):
        for prefix, (answer, tokens) in zip(prefixes, alone, strict=True):
            torch.testing.assert_close(vlm.score(prefix, latents, [(1,), (0,)]).answer, answer, **CLOSE)
            assert vlm.decode(prefix, latents[0], (1,), 5).tokens == tokens


def test_scoring_leaves_the_prefix_as_it_was(vlm):
    """The cache keeps every bit; scores only the order of sums, for injected cells are not computed twice."""

    def states() -> list[Tensor]:
        found = [getattr(layer, name, None) for layer in prefix.cache.layers for name in ("keys", "values")]
        for layer in prefix.cache.layers:
            for name in ("conv_states", "recurrent_states"):
                found += getattr(layer, name, {}).values()
        return [state for state in found if isinstance(state, Tensor)]

    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    kept = [state.clone() for state in states()]
    latents = draw_latents(vlm, 4)
    before = vlm.score(prefix, latents, [(1,)] * 4).answer
    vlm.decode(prefix, latents[0], (2,), 4)
    vlm.attend(prefix, latents[1], ())
    vlm.token_log_probabilities(prefix, None, (), [3, 4, 5])
    assert kept
    assert all(torch.equal(state, copy) for state, copy in zip(states(), kept, strict=True))
    torch.testing.assert_close(vlm.score(prefix, latents, [(1,)] * 4).answer, before, **CLOSE)


def test_threads_get_what_they_would_get_alone(vlm):
    latents = draw_latents(vlm, 2)
    start = threading.Barrier(2)

    def ask(seed: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        start.wait(timeout=60)
        inputs = vlm.prepare([picture(100 + 30 * seed, 120, seed=seed)], QUESTION)
        prefix = vlm.prefill(inputs)
        scored = vlm.score(prefix, latents, [(1,), (0,)]).answer
        return scored, vlm.attend(prefix, latents[0], (1,)), vlm.decode(prefix, latents[0], (1,), 4).tokens

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(ask, range(2)))
    start = threading.Barrier(1)
    for seed, (scored, attention, tokens) in enumerate(together):
        alone = ask(seed)
        torch.testing.assert_close(scored, alone[0], **CLOSE)
        torch.testing.assert_close(attention, alone[1], **CLOSE)
        assert tokens == alone[2]


def test_the_callers_tensors_and_images_are_left_alone(vlm):
    image = picture()
    pixels = image.tobytes()
    inputs = vlm.prepare([image], QUESTION)
    tensors = {key: value.clone() for key, value in inputs.tensors.items() if isinstance(value, Tensor)}
    prefix = vlm.prefill(inputs)
    latents = draw_latents(vlm, 2)
    kept = latents.clone()
    vlm.score(prefix, latents, [(1,), ()])
    vlm.decode(prefix, latents[0], (1,), 3)
    assert image.tobytes() == pixels
    assert torch.equal(latents, kept)
    for key, value in tensors.items():
        assert torch.equal(inputs.tensors[key], value)
