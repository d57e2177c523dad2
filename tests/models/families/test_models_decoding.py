"""Decoding equals the model's own ``generate`` where there are no latents, and one naive pass where there are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import naive_model
import pytest
import torch
from naive_model import CLOSE, MARKERS, QUESTION, draw_latents
from tiny_checkpoints import picture

from latent_tool.models.families import family
from latent_tool.models.prefix import Inputs
from latent_tool.models.requests import Reason
from latent_tool.models.vlm import VisionLanguageModel

LENGTH = 6


@contextlib.contextmanager
def generation(vlm: VisionLanguageModel, **changes: Any) -> Iterator[None]:
    """The model with other generation settings."""
    config = vlm.model.generation_config
    before = {name: getattr(config, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def generate(vlm: VisionLanguageModel, inputs: Inputs, **options: Any) -> tuple[int, ...]:
    """Tokens of the model's own greedy decoding."""
    with torch.inference_mode():
        output = vlm.model.generate(**inputs.tensors, do_sample=False, max_new_tokens=LENGTH, **options)
    return tuple(output[0, inputs.length :].tolist())


RULES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 5.0},
    {"min_new_tokens": 3, "no_repeat_ngram_size": 1},
    {"suppress_tokens": [*range(0, 256, 2), *range(256, 768)]},
    {"do_sample": True, "temperature": 0.1, "top_k": 3, "top_p": 0.5},
]


def test_the_plain_model_decodes_as_generate_does(vlm):
    """Whether the prompt is cut at the end of the user's turn or not, and whatever the model's generation rules."""
    whole, cut = (
        vlm.prefill(vlm.prepare([picture()], QUESTION, position=position))
        for position in ("generation_start", "user_turn")
    )
    for rules in RULES:
        with generation(vlm, **rules):
            expected = generate(vlm, whole.inputs)
            for prefix in (whole, cut):
                decoded = vlm.decode(prefix, None, (), LENGTH)
                assert decoded.tokens == expected
                assert decoded.finish_reason == "length"


def test_decoding_stops_where_generate_stops(vlm):
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    free = vlm.decode(prefix, None, (), LENGTH).tokens
    end = free[3]
    with generation(vlm, eos_token_id=[end, 260]):
        decoded = vlm.decode(prefix, None, (), LENGTH)
        assert decoded.tokens == generate(vlm, prefix.inputs) == free[: free.index(end) + 1]
        assert decoded.finish_reason == "stop"
    with generation(vlm, eos_token_id=[free[0]], min_new_tokens=2):
        cut = vlm.prefill(vlm.prepare([picture()], QUESTION, position="user_turn"))
        for start in (prefix, cut):
            assert vlm.decode(start, None, (), LENGTH).tokens == generate(vlm, prefix.inputs)


def test_decoding_stops_at_stop_strings(vlm):
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    with generation(vlm, suppress_tokens=[*range(0, 33), *range(94, 768)]):  # printable characters only
        free = vlm.decode(prefix, None, (), LENGTH).tokens
        text = vlm.tokenizer.decode(free[2:4])
        with generation(vlm, stop_strings=[text]):
            decoded = vlm.decode(prefix, None, (), LENGTH)
            assert decoded.tokens == generate(vlm, prefix.inputs, tokenizer=vlm.tokenizer)
            assert len(decoded.tokens) <= 4
            assert decoded.finish_reason == "stop"


@pytest.mark.parametrize(("position", "markers"), [("generation_start", None), ("user_turn", MARKERS)])
def test_decoding_continues_the_state_that_was_scored(vlm, position, markers):
    inputs = vlm.prepare([picture()], QUESTION, position=position, thinking_markers=markers)
    prefix = vlm.prefill(inputs)
    latents, cells = draw_latents(vlm, 1), (2, 0)
    decoded = vlm.decode(prefix, latents[0], cells, LENGTH)
    naive = naive_model.run(vlm, inputs, latents[0], cells, decoded.tokens[:-1])
    rows = naive.at_answer.log_softmax(-1)
    plain = rows.clone()
    plain[:, vlm.model.generation_config.suppress_tokens] = float("-inf")
    assert decoded.tokens == tuple(plain.argmax(-1).tolist())
    torch.testing.assert_close(decoded.log_probabilities, plain.amax(-1), **CLOSE)
    torch.testing.assert_close(decoded.entropies, -(rows.exp() * rows).sum(-1), **CLOSE)
    forced = vlm.token_log_probabilities(prefix, latents[0], cells, decoded.tokens)
    torch.testing.assert_close(decoded.log_probabilities, forced, **CLOSE)


def test_log_probabilities_are_those_before_any_logits_processor(vlm):
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    with generation(vlm, repetition_penalty=5.0):
        decoded = vlm.decode(prefix, None, (), LENGTH)
    forced = vlm.token_log_probabilities(prefix, None, (), decoded.tokens)
    torch.testing.assert_close(decoded.log_probabilities, forced, **CLOSE)


def test_decoding_stops_when_asked(vlm):
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    calls = iter([False, False, True])
    decoded = vlm.decode(prefix, None, (), LENGTH, lambda: next(calls))
    assert len(decoded.tokens) == 2
    assert decoded.finish_reason == "deadline"
    assert vlm.decode(prefix, None, (), LENGTH, lambda: True).tokens == ()


def test_reasoning_is_the_text_after_the_opening_marker(vlm):
    inputs = vlm.prepare([picture()], QUESTION, thinking_markers=MARKERS)
    prefix = vlm.prefill(inputs)
    ((tokens, calls),) = vlm.reason_many([Reason(prefix, 5)])
    opening = list(inputs.markers.opening)
    naive = naive_model.run(vlm, inputs, None, (), [*opening, *tokens])
    rows = naive.at_answer[len(opening) :].clone()
    rows[:, vlm.model.generation_config.suppress_tokens] = float("-inf")
    expected = rows.argmax(-1)[: len(tokens)]
    assert list(tokens) == expected.tolist()
    assert calls == 5
    unmarked = vlm.prefill(vlm.prepare([picture()], QUESTION, thinking_markers=None))
    assert vlm.reason_many([Reason(unmarked, 5)]) == [((), 0)]


def test_reasoning_where_the_prompt_itself_ends_with_the_opening_marker(vlm):
    row = family(vlm.model.config.model_type)
    ends = "assistant" if row is not None and row.chat_template else "red?"
    inputs = vlm.prepare([picture()], QUESTION, thinking_markers=(ends, "))"))
    assert inputs.markers.opening == ()
    assert inputs.markers.closing != ()
    prefix = vlm.prefill(inputs)
    ((tokens, calls),) = vlm.reason_many([Reason(prefix, 4)])
    assert tokens == vlm.decode(prefix, None, (), 4).tokens
    assert calls == 3
    latents = draw_latents(vlm, 1)
    naive = naive_model.run(vlm, inputs, latents[0], (1,))
    scored = vlm.score(prefix, latents, [(1,)])
    torch.testing.assert_close(scored.answer[0], naive.at_answer[0], **CLOSE)
