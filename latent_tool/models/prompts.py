"""From a question to the text around it: the chat template, where the latents stand, and what is tokenised.

    [ prefix | V | opening marker | T_1..T_L | closing marker, tail | answer ]

The prefix is the rendered template up to where V begins; with ``generation_start`` that is all of it and the tail is
empty, with ``user_turn`` it ends with the question and the tail is the rest. Markers appear only around latents.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from latent_tool.errors import ModelLoadError, ModelNotSupportedError, QuestionError

__all__ = ["Markers", "Prompt", "find_markers", "neutralise", "render_prompt"]

_END = "\u2063end-of-question\u2063"


@dataclass(frozen=True)
class Prompt:
    """The rendered template, cut where V and the latents stand."""

    prefix: str
    tail: str


@dataclass(frozen=True)
class Markers:
    """Token ids before and after the latents; both empty without thinking markers."""

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()


def neutralise(text: str, tokenizer: Any) -> str:
    """The text with every spelling of a control token broken by a space, so that it is tokenised as plain text."""
    names = {token for token in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} if len(token) > 1}
    if not names:
        return text
    pattern = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))
    while pattern.search(text):
        text = pattern.sub(lambda match: match.group()[0] + " " + match.group()[1:], text)
    return text


def find_markers(tokenizer: Any, wanted: Literal["auto"] | tuple[str, str] | None) -> Markers:
    """Token ids of the thinking markers; ``"auto"`` takes ``<think>`` if the tokenizer knows both as single tokens."""
    if wanted is None:
        return Markers()
    if wanted == "auto":
        added = tokenizer.get_added_vocab()
        if "<think>" in added and "</think>" in added:
            return Markers((added["<think>"],), (added["</think>"],))
        return Markers()
    opening, closing = (tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in wanted)
    return Markers(opening, closing)


def render_prompt(
    processor: Any, question: str, images: int, system: str | None, position: Literal["generation_start", "user_turn"]
) -> Prompt:
    """Render the chat template for one user turn of images and a question.

    Raises ``QuestionError`` for an empty question and ``ModelNotSupportedError`` for a model without a template.
    """
    if not question.strip():
        raise QuestionError("The question is empty.", "Ask something about the image.")
    tokenizer = processor.tokenizer
    question = neutralise(question, tokenizer)
    messages: list[dict[str, Any]] = []
    if system:
        messages.append({"role": "system", "content": [{"type": "text", "text": neutralise(system, tokenizer)}]})
    content: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    content.append({"type": "text", "text": question + _END})
    messages.append({"role": "user", "content": content})
    if not getattr(processor, "chat_template", None):
        raise ModelNotSupportedError(
            "The model has no chat template.", "Save one beside the checkpoint (chat_template.jinja)."
        )
    try:
        rendered: str = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # jinja raises whatever the template raises
        raise ModelLoadError(
            f"The model's chat template cannot be rendered ({type(error).__name__}).",
            "Ask without a system text, or mend chat_template.jinja.",
        ) from error
    if rendered.count(_END) != 1:
        raise ModelLoadError(
            "The model's chat template does not show the question.", "Mend the checkpoint's chat_template.jinja."
        )
    before, after = rendered.split(_END)
    if position == "user_turn":
        return Prompt(before, after)
    return Prompt(before + after, "")
