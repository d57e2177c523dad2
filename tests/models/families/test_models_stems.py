"""Passes that begin after cells known from earlier passes, or that bring more or less along, in every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from naive_model import CLOSE, MARKERS, QUESTION, draw_latents
from tiny_checkpoints import picture

from latent_tool.models.own_rows import OwnRows
from latent_tool.models.prefix import Stems
from latent_tool.models.requests import Score


def behind_caches_of_their_own(vlm, prefix, latents, patches):
    """The same states, each behind a cache of its own."""
    (logits,) = vlm.score_behind(OwnRows, [Score(prefix, latents, patches)])
    return logits


@pytest.mark.parametrize(("position", "markers"), [("generation_start", None), ("user_turn", MARKERS)])
def test_cells_known_from_earlier_passes_change_nothing(vlm, position, markers):
    """A search as it goes: samples, proposals of several lengths, an accepted one, more, and back to fewer cells."""
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION, position=position, thinking_markers=markers))
    latents = draw_latents(vlm, 4)
    passes = [[(), ()], [(1, 2), (3,), (0, 1, 2)], [(3,), (3,)], [(3, 0, 1), (3, 2)], [(3, 0, 1)] * 4, [(3, 0)], [(2,)]]
    found = []
    for patches in passes:
        rows = latents[: len(patches)]
        scored, expected = vlm.score(prefix, rows, patches), behind_caches_of_their_own(vlm, prefix, rows, patches)
        torch.testing.assert_close(scored.latents, expected.latents, **CLOSE)
        torch.testing.assert_close(scored.answer, expected.answer, **CLOSE)
        stem = prefix.stems.find((3, 0, 1))
        found.append(0 if stem is None else len(stem.cells))
    assert found == ([0, 1, 1, 3, 3, 3, 3] if vlm.shares_prefixes(prefix) else [0] * 7)
    fresh = replace(prefix, stems=Stems())
    for cells in ((3, 0, 1), (3, 0, 1, 2), (3, 1)):
        attention, expected = vlm.attend(prefix, latents[0], cells), vlm.attend(fresh, latents[0], cells)
        torch.testing.assert_close(attention, expected, **CLOSE)
        assert vlm.decode(prefix, latents[0], cells, 4).tokens == vlm.decode(fresh, latents[0], cells, 4).tokens


def test_a_score_brings_the_attention_along(vlm):
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION, thinking_markers=MARKERS))
    latents = draw_latents(vlm, 3)
    patches = [(1, 2), (), (0,)]
    (scored,) = vlm.score_many([Score(prefix, latents, patches, attended=3)])
    if not vlm.shares_prefixes(prefix):
        assert scored.attention is None
        return
    fresh = replace(prefix, stems=Stems())
    for row, cells, attention in zip(latents, patches, scored.attention, strict=True):
        torch.testing.assert_close(attention, vlm.attend(fresh, row, cells), atol=1e-6, rtol=1e-4)


def test_the_answer_alone_has_the_same_logits(vlm):
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION, position="user_turn", thinking_markers=MARKERS))
    latents, patches = draw_latents(vlm, 3), [(1, 2), (), (0,)]
    whole, alone, mixed = (
        vlm.score_many(requests)
        for requests in (
            [Score(prefix, latents, patches)],
            [Score(prefix, latents, patches, answer_only=True)],
            [Score(prefix, latents, patches, answer_only=True), Score(prefix, latents[:1, :2], [(3,)])],
        )
    )
    assert alone[0].latents.shape[1] == mixed[0].latents.shape[1] == 0
    torch.testing.assert_close(alone[0].answer, whole[0].answer, **CLOSE)
    torch.testing.assert_close(mixed[0].answer, whole[0].answer, **CLOSE)
    expected = behind_caches_of_their_own(vlm, prefix, latents[:1, :2], [(3,)])
    torch.testing.assert_close(mixed[1].latents, expected.latents, **CLOSE)
    torch.testing.assert_close(mixed[1].answer, expected.answer, **CLOSE)
