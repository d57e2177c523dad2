"""A question about an image that was asked about before, against one that is asked first, in every family."""

from __future__ import annotations

import pytest
import torch
from naive_model import CLOSE, draw_latents
from tiny_checkpoints import picture

from latent_tool.models.prefix_cache import PrefixCache
from latent_tool.models.vlm import VisionLanguageModel

# Families whose prompts cannot be computed in two parts: layers with states of other kinds, or a prompt that is read in
# both directions.
WHOLE = {"qwen3_5", "lfm2_vl", "gemma4", "ovis2", "paligemma"}


@pytest.fixture
def cached(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> VisionLanguageModel:
    """The model with an empty cache, as if it had answered nothing yet."""
    monkeypatch.setattr(vlm, "prefix_cache", PrefixCache(2**26))
    monkeypatch.setattr(vlm, "_splits", None)
    return vlm


def test_a_second_question_equals_one_asked_first(cached, monkeypatch):
    """Logits, positions, features, and what follows them; of two images, too."""
    one, other = picture(), picture(90, 130, seed=2)
    latents = draw_latents(cached, 2)
    splits = cached.model.config.model_type not in WHOLE
    for images in ([one], [one, other]):
        for question in ("what is red?", "how many are there in this picture?", "what is red?"):
            inputs = cached.prepare(images, question)
            found = cached.prefill(inputs)
            scored, tokens = (
                cached.score(found, latents, [(1,), (0, 2)]),
                cached.decode(found, latents[0], (1,), 4).tokens,
            )
            with monkeypatch.context() as patch:
                patch.setattr(cached, "prefix_cache", PrefixCache(0))
                expected = cached.prefill(inputs)
                assert not len(cached.prefix_cache)
            torch.testing.assert_close(found.last_logits, expected.last_logits, **CLOSE)
            torch.testing.assert_close(found.features, expected.features, **CLOSE)
            assert torch.equal(found.columns, expected.columns)
            assert found.next_position == expected.next_position
            if expected.positions is not None:
                assert torch.equal(found.positions, expected.positions)
            torch.testing.assert_close(scored.answer, cached.score(expected, latents, [(1,), (0, 2)]).answer, **CLOSE)
            assert tokens == cached.decode(expected, latents[0], (1,), 4).tokens
    assert cached._splits is splits
    # The very first question was computed whole; of the five after it, one was about images not seen before.
    assert (cached.prefix_cache.hits, cached.prefix_cache.misses) == ((4, 1) if splits else (0, 0))


def test_other_pixels_are_another_image(cached):
    """The same question and the same shape: only the pixels differ."""
    first, second = (cached.prefill(cached.prepare([picture(seed=seed)], "what is red?")) for seed in (0, 1))
    assert cached.prefix_cache.hits == 0
    assert (first.last_logits - second.last_logits).abs().max() > 0.01
