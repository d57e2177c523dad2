"""Options: their probabilities in one batch equal those of every spelling alone in one full forward pass."""

from __future__ import annotations

import naive_model
import pytest
import torch
from naive_model import CLOSE, MARKERS, QUESTION, draw_latents
from tiny_checkpoints import picture

from latent_tool.models import options as options_module
from latent_tool.models.options import score_options, score_options_many, spell
from latent_tool.models.requests import ScoreOptions

OPTIONS = ["red", "redder", "re", "Blue", "not the blue one", "17", "z\u00fcrich"]


@pytest.mark.parametrize(("position", "markers"), [("generation_start", None), ("user_turn", MARKERS)])
@pytest.mark.parametrize("with_latents", [False, True])
def test_options_equal_the_naive_forward_pass(vlm, position, markers, with_latents):
    inputs = vlm.prepare([picture()], QUESTION, position=position, thinking_markers=markers)
    prefix = vlm.prefill(inputs)
    spelled = spell(vlm, [[option] for option in OPTIONS])
    assert all(len(spellings) >= 2 for spellings in spelled)
    latents = draw_latents(vlm, 2) if with_latents else None
    cells = [(2, 0), ()] if with_latents else [()]
    scored = score_options(vlm, ScoreOptions(prefix, latents, cells, spelled, tokens=True))
    assert scored.log_probabilities.exp().sum(-1).max() <= 1
    for row, chosen in enumerate(cells):
        state = None if latents is None else latents[row]
        naive = [naive_model.option_log_probability(vlm, inputs, state, chosen, spellings) for spellings in spelled]
        torch.testing.assert_close(scored.log_probabilities[row], torch.stack(naive), **CLOSE)
        first = naive_model.run(vlm, inputs, state, chosen)
        torch.testing.assert_close(scored.answer[row].float(), first.at_answer[0], **CLOSE)
    # As if it had been decoded: the same tokens teacher-forced.
    for option, decoded in enumerate(scored.decoded[0]):
        assert decoded.tokens[:-1] in spelled[option] and decoded.finish_reason == "stop"
        state = None if latents is None else latents[0]
        again = vlm.token_log_probabilities(prefix, state, cells[0], decoded.tokens)
        torch.testing.assert_close(decoded.log_probabilities, again, **CLOSE)
        after = naive_model.run(vlm, inputs, state, cells[0], decoded.tokens[:-1]).at_answer.log_softmax(-1)
        torch.testing.assert_close(decoded.entropies, -(after.exp() * after).sum(-1), atol=1e-3, rtol=1e-3)


def test_options_of_several_questions_in_one_batch_and_in_pieces(vlm, monkeypatch):
    prefixes = [vlm.prefill(vlm.prepare([picture()], question)) for question in (QUESTION, "and what is not?")]
    short, long = (spell(vlm, [[option] for option in options]) for options in (["a", "b"], OPTIONS))
    latents = draw_latents(vlm, 3)
    asked = [
        ScoreOptions(prefixes[0], None, [()], long),
        ScoreOptions(prefixes[1], latents, [(1,), (), (2, 0)], short),
        ScoreOptions(prefixes[0], latents[:1], [()], short, tokens=True),
    ]
    alone = [score_options(vlm, each) for each in asked]
    for room in (options_module._MOST_LOGITS, 40 * prefixes[0].last_logits.shape[-1]):
        monkeypatch.setattr(options_module, "_MOST_LOGITS", room)
        for one, together in zip(alone, score_options_many(vlm, asked), strict=True):
            torch.testing.assert_close(together.log_probabilities, one.log_probabilities, **CLOSE)
            torch.testing.assert_close(together.answer, one.answer, **CLOSE)
            assert [len(each) for each in together.decoded] == [len(each) for each in one.decoded]
