"""The attention that the search reads equals eager attention, and reading it leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import naive_model
import pytest
import torch
from naive_model import CLOSE, MARKERS, QUESTION, draw_latents
from tiny_checkpoints import checkpoint, loaded, picture
from transformers import AttentionInterface, AttentionMaskInterface

from latent_tool.errors import ModelNotSupportedError
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.prefix import Stems
from latent_tool.models.vlm import VisionLanguageModel


@pytest.mark.parametrize(("position", "markers"), [("generation_start", None), ("user_turn", MARKERS)])
@pytest.mark.parametrize("cells", [(), (2, 0, 1)])
def test_attention_equals_eager_attention(vlm, position, markers, cells):
    inputs = vlm.prepare([picture()], QUESTION, position=position, thinking_markers=markers)
    prefix = vlm.prefill(inputs)
    latents = draw_latents(vlm, 1)[0]
    tapped = vlm.attend(prefix, latents, cells)
    naive = naive_model.run(vlm, inputs, latents, cells, attention=True)
    assert naive.attention is not None
    columns = naive.attention[:, :, naive.latents][..., prefix.columns]
    torch.testing.assert_close(tapped, columns.mean((0, 1)), atol=1e-5, rtol=1e-4)
    assert tapped.shape == (3, len(inputs.cells))
    assert 0.01 < tapped.sum(-1).min() <= tapped.sum(-1).max() < 1


def _settings(vlm: VisionLanguageModel) -> list[Any]:
    configs = [vlm.model.config, *(getattr(vlm.model.config, name, None) for name in vlm.model.config.sub_configs)]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in vlm.model.modules()]
    modules = [config._attn_implementation for config in configs if config is not None]
    registries = [dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)]
    return [modules, hooks, registries, torch.get_rng_state().tolist(), torch.is_grad_enabled(), vlm.model.training]


def test_reading_attention_leaves_no_trace(vlm, monkeypatch):
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    latents = draw_latents(vlm, 2)
    before, scored = _settings(vlm), vlm.score(prefix, latents, [(), (1,)]).answer
    vlm.attend(prefix, latents[0], (1,))
    assert _settings(vlm) == before

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(vlm.model.get_decoder(), "forward", fail)
        for call in (
            lambda: vlm.attend(prefix, latents[0], ()),
            lambda: vlm.prefill(prefix.inputs),
            lambda: vlm.score(prefix, latents, [(), ()]),
        ):
            with pytest.raises(RuntimeError, match="broken on purpose"):
                call()
    assert _settings(vlm) == before
    torch.testing.assert_close(vlm.score(prefix, latents, [(), (1,)]).answer, scored, atol=0, rtol=0)


def test_attention_is_the_same_after_another_implementation_was_chosen(vlm):
    """Whatever implementation the model has at the moment, it keeps."""
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    latents = draw_latents(vlm, 1)
    attention, scored = vlm.attend(prefix, latents[0], (1,)), vlm.score(prefix, latents, [(1,)]).answer
    with naive_model.eager(vlm.model):
        torch.testing.assert_close(vlm.attend(prefix, latents[0], (1,)), attention, **CLOSE)
        torch.testing.assert_close(vlm.score(prefix, latents, [(1,)]).answer, scored, **CLOSE)
        assert vlm.model.config.get_text_config()._attn_implementation == "eager"
    fresh = replace(prefix, stems=Stems())  # nothing known of the cells, as before
    torch.testing.assert_close(vlm.attend(fresh, latents[0], (1,)), attention, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_model_that_cannot_be_tapped_shows_its_own_attention(family, monkeypatch):
    vlm = load(ModelSpec(model=str(checkpoint(family)), attn_implementation="eager"))
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    latents = draw_latents(vlm, 1)[0]
    expected = vlm.attend(prefix, latents, (1,))
    decoder = type(vlm.model.get_decoder())
    monkeypatch.setattr(decoder, "_can_set_attn_implementation", classmethod(lambda cls: False))
    monkeypatch.setattr(vlm, "_shares", False)
    torch.testing.assert_close(vlm.attend(prefix, latents, (1,)), expected, **CLOSE)


def test_a_model_that_does_not_show_its_attention_is_named(monkeypatch):
    vlm = loaded("llava")
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    decoder = type(vlm.model.get_decoder())
    monkeypatch.setattr(decoder, "_can_set_attn_implementation", classmethod(lambda cls: False))
    monkeypatch.setattr(vlm, "_shares", False)
    with pytest.raises(ModelNotSupportedError, match="attention"):
        vlm.attend(prefix, draw_latents(vlm, 1)[0], ())
