"""From a question to the text around it: the chat template, where the latents stand, and what is tokenised.

    [ prefix | V | opening marker | T_1..T_L | closing marker, tail | answer ]

The prefix is the rendered template up to where V begins; with ``generation_start`` that is all of it and the tail is
empty, with ``user_turn`` it ends with the question and the tail is the rest. Markers appear only around latents.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from latent_tool.errors import ModelLoadError, QuestionError

__all__ = ["Markers", "Prompt", "find_markers", "neutralise", "render_prompt"]

_END = "\u2063end-of-question\u2063"


@dataclass(frozen=True)
class Prompt:
    """The rendered template, cut where V and the latents stand."""

    prefix: str
    tail: str
    warnings: tuple[str, ...] = ()


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


def find_markers(tokenizer: Any, wanted: Literal["auto"] | tuple[str, str] | None, prompt: Prompt) -> Markers:
    """Token ids of the thinking markers; ``"auto"`` takes ``<think>`` if the tokenizer knows both as single tokens.

    If the prompt itself ends with the opening marker, as some templates have it, none is added.
    """
    if wanted == "auto":
        added = tokenizer.get_added_vocab()
        wanted = ("<think>", "</think>") if "<think>" in added and "</think>" in added else None
    if wanted is None:
        return Markers()
    opening, closing = (tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in wanted)
    if not prompt.tail and prompt.prefix.rstrip().endswith(wanted[0].strip()):
        opening = ()
    return Markers(opening, closing)


def render_prompt(
    processor: Any,
    question: str,
    images: int,
    system: str | None,
    position: Literal["generation_start", "user_turn"],
    *,
    images_first: bool = True,
    needs_template: bool = True,
) -> Prompt:
    """Render the chat template for one user turn of images and a question.

    A template that knows no system turn gets the system text before the question, with a warning. Without a template
    the question follows the images directly; unless ``needs_template`` is false, with a warning too.

    Raises ``QuestionError`` for an empty question and ``ModelLoadError`` if the template loses question or images.
    """
    if not question.strip():
        raise QuestionError("The question is empty.", "Ask something about the image.")
    question = neutralise(question, processor.tokenizer)
    system = neutralise(system, processor.tokenizer).strip() if system else ""
    together = f"{system}\n\n{question}" if system else question
    placeholder = getattr(processor, "image_token", None)
    if not getattr(processor, "chat_template", None):
        if placeholder is None:
            raise ModelLoadError(
                "The model has no chat template, and its processor does not say how an image is written.",
                "Save a template beside the checkpoint (chat_template.jinja).",
            )
        shown = placeholder * images
        missing = ("The model has no chat template: the question stands next to the image as it is.",)
        return Prompt(shown + together if images_first else together + shown, "", missing if needs_template else ())
    warnings: tuple[str, ...] = ()
    rendered = _render(processor, question, images, system, images_first) if system else None
    if rendered is None or system not in rendered:
        rendered = _render(processor, together, images, "", images_first)
        if system:
            warnings = ("The model's chat template has no system turn: the system text stands before the question.",)
    if rendered is None:
        raise ModelLoadError(
            "The model's chat template cannot be rendered.", "Mend the checkpoint's chat_template.jinja."
        )
    if rendered.count(_END) != 1:
        raise ModelLoadError(
            "The model's chat template does not show the question.", "Mend the checkpoint's chat_template.jinja."
        )
    if placeholder is not None and rendered.count(placeholder) != images:
        raise ModelLoadError(
            f"The model's chat template drops the image: {images} given, {rendered.count(placeholder)} shown.",
            "Mend the checkpoint's chat_template.jinja so that an image content part becomes the image token.",
        )
    before, after = rendered.split(_END)
    if position == "user_turn":
        return Prompt(before, after, warnings)
    return Prompt(before + after, "", warnings)


def _render(processor: Any, question: str, images: int, system: str, images_first: bool) -> str | None:
    """The rendered template with a mark where the user's turn ends; ``None`` if the template raises."""
    shown: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    if images_first:
        content = [*shown, {"type": "text", "text": question + _END}]
    else:
        content = [{"type": "text", "text": question}, *shown, {"type": "text", "text": _END}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    try:
        rendered: str = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception:  # jinja raises whatever the template raises
        return None
    return rendered
