"""In bfloat16 the fast path is as close to the naive pass as rounding allows, and rewards are computed in float32."""

from __future__ import annotations

import naive_model
import pytest
import torch
from naive_model import QUESTION, draw_latents, some_cells
from tiny_checkpoints import checkpoint, loaded, picture

from latent_tool.method.reward import read_reward
from latent_tool.models.loading import ModelSpec, load
from latent_tool.settings import SearchSettings

# One family per kind of decoder: full attention, three-axis positions, sliding window, linear attention.
KINDS = ["llava", "qwen2_5_vl", "gemma3", "qwen3_5"]
# Logits here have a deviation of about 2, and bfloat16 keeps 8 bits: both ways of computing are off by about 0.05.
LOGITS, REWARD = 0.3, 0.05


@pytest.mark.parametrize("family", KINDS)
def test_bfloat16_stays_within_the_stated_tolerance(family):
    exact = loaded(family)
    vlm = load(ModelSpec(model=str(checkpoint(family)), dtype="bfloat16"))
    inputs = vlm.prepare([picture()], QUESTION)
    prefix = vlm.prefill(inputs)
    latents, patches = draw_latents(exact, 8), some_cells(exact, len(inputs.cells))
    scored = vlm.score(prefix, latents, patches)
    settings = SearchSettings(search_below=None, reward_position="both")
    rewards = read_reward(scored, settings).reward
    truth = exact.score(exact.prefill(exact.prepare([picture()], QUESTION)), latents, patches)
    assert scored.answer.dtype == torch.bfloat16
    assert rewards.dtype == torch.float64
    fast_error, slow_error = [], []
    for index, cells in enumerate(patches):
        naive = naive_model.run(vlm, inputs, latents[index], cells)
        torch.testing.assert_close(scored.answer[index].float(), naive.at_answer[0], atol=LOGITS, rtol=0)
        fast_error.append((scored.answer[index].float() - truth.answer[index]).abs().mean())
        slow_error.append((naive.at_answer[0] - truth.answer[index]).abs().mean())
    assert torch.stack(fast_error).mean() < 1.5 * torch.stack(slow_error).mean()
    assert (rewards - read_reward(truth, settings).reward).abs().max() < REWARD


def test_attention_is_float32_in_half_precision():
    vlm = load(ModelSpec(model=str(checkpoint("llava")), dtype="bfloat16"))
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    latents = draw_latents(vlm, 1)[0]
    attention = vlm.attend(prefix, latents, (1,))
    assert attention.dtype == torch.float32
    exact = loaded("llava")
    expected = exact.attend(exact.prefill(exact.prepare([picture()], QUESTION)), latents, (1,))
    torch.testing.assert_close(attention, expected, atol=0.02, rtol=0)
