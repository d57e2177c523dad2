"""From a question to the text around it: the chat template, where the latents stand, and what is tokenised.

    [ prefix | V | opening marker | T_1..T_L | closing marker, tail | answer ]

The prefix is the rendered template up to where V begins; with ``generation_start`` that is all of it and the tail is
empty, with ``user_turn`` it ends with the question and the tail is the rest. Markers appear only around latents.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from latent_tool.errors import ModelLoadError, QuestionError
from latent_tool.request import MAX_TEXT

__all__ = ["Markers", "Prompt", "Rendered", "find_markers", "neutralise", "render_prompt", "spells_control"]

# Begins and ends with different characters, so that no text before it makes a second one.
_END = "\u2062end-of-question-{}\u2063"
TEMPLATE_SECONDS = 5.0
_MOST_RENDERED = 4_000_000


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


@dataclass(frozen=True)
class Rendered:
    """What is the same for every prompt with one text and so many pictures: its template, tail and markers."""

    prompt: Prompt
    tail: tuple[int, ...]
    markers: Markers


def neutralise(text: str, tokenizer: Any, others: Collection[str] = ()) -> str:
    """Return the text with every spelling of a control token broken by a space, so that it is tokenised as plain text.

    ``others``: further spellings that have a meaning, to a processor for example. White space is left alone: some
    tokenizers have tokens of it.
    """
    names = {*_control_tokens(tokenizer), *(name for name in others if len(name.strip()) > 1)}
    while found := [name for name in names if name in text]:
        pattern = "|".join(re.escape(name) for name in sorted(found, key=len, reverse=True))
        text = re.sub(pattern, _broken, text)
    return text


def _broken(match: re.Match[str]) -> str:
    """A spelling with a space after its first visible character."""
    text = match.group()
    place = len(text) - len(text.lstrip()) + 1
    return f"{text[:place]} {text[place:]}"


def _control_tokens(tokenizer: Any) -> set[str]:
    return {token for token in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} if len(token.strip()) > 1}


def _plain(text: str, what: str, processor: Any) -> str:
    """Text of a stranger, made safe. Raises ``QuestionError`` when it is too long or cannot be made safe."""
    if len(text) > MAX_TEXT:
        raise QuestionError(
            f"The {what} has {len(text):,} characters; at most {MAX_TEXT:,} are allowed.", "Shorten it."
        )
    text = neutralise(text, processor.tokenizer, _placeholders(processor))
    if _becomes_control(text, processor.tokenizer):
        raise QuestionError(f"The {what} spells a control token of the model.", "Put it into other words.")
    return text


def spells_control(text: str, processor: Any) -> bool:
    """Tell whether a text, taken as it is, spells a control token of the model."""
    tokenizer = processor.tokenizer
    return neutralise(text, tokenizer, _placeholders(processor)) != text or _becomes_control(text, tokenizer)


def _placeholders(processor: Any) -> list[str]:
    """Spellings that have a meaning to a processor."""
    return [value for name, value in vars(processor).items() if "token" in name and isinstance(value, str)]


def _becomes_control(text: str, tokenizer: Any) -> bool:
    """Whether a text that spells no control token has one among its tokens all the same."""
    # A tokenizer that normalises its input may see tokens that are not spelled in it. What it adds to any text (and for
    # characters that it does not know) is no harm.
    harmless = {tokenizer.unk_token_id, *tokenizer("a", add_special_tokens=False).input_ids}
    control = set(tokenizer.convert_tokens_to_ids(list(_control_tokens(tokenizer)))) - harmless
    return not control.isdisjoint(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def find_markers(tokenizer: Any, wanted: Literal["auto"] | tuple[str, str] | None, prompt: Prompt) -> Markers:
    """Return token ids of the thinking markers; ``"auto"`` takes ``<think>`` if the tokenizer knows both as single
    tokens.

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

    Raises ``QuestionError`` for a question that is empty or too long and ``ModelLoadError`` if the template loses
    question or images, or does not come to an end.
    """
    if not question.strip():
        raise QuestionError("The question is empty.", "Ask something about the image.")
    question = _plain(question, "question", processor)
    system = _plain(system, "system text", processor).strip() if system else ""
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
    end = next(mark for number in count() if (mark := _END.format(number)) not in together)
    rendered = _render(processor, question, images, system, images_first, end) if system else None
    if rendered is None or system not in rendered:
        rendered = _render(processor, together, images, "", images_first, end)
        if system:
            warnings = ("The model's chat template has no system turn: the system text stands before the question.",)
    if rendered is None:
        raise ModelLoadError(
            "The model's chat template cannot be rendered.", "Fix the checkpoint's chat_template.jinja."
        )
    if len(rendered) > _MOST_RENDERED:
        raise ModelLoadError(
            f"The model's chat template writes {len(rendered):,} characters around one question.",
            "Fix the checkpoint's chat_template.jinja.",
        )
    if rendered.count(end) != 1:
        raise ModelLoadError(
            "The model's chat template does not show the question.", "Fix the checkpoint's chat_template.jinja."
        )
    if placeholder is not None and rendered.count(placeholder) != images:
        raise ModelLoadError(
            f"The model's chat template drops the image: {images} given, {rendered.count(placeholder)} shown.",
            "Fix the checkpoint's chat_template.jinja so that an image content part becomes the image token.",
        )
    before, after = rendered.split(end)
    if position == "user_turn":
        return Prompt(before, after, warnings)
    return Prompt(before + after, "", warnings)


def _render(processor: Any, question: str, images: int, system: str, images_first: bool, end: str) -> str | None:
    """The rendered template with the mark ``end`` where the user's turn ends; ``None`` if the template raises."""
    shown: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    if images_first:
        content = [*shown, {"type": "text", "text": question + end}]
    else:
        content = [{"type": "text", "text": question}, *shown, {"type": "text", "text": end}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    try:
        with _limited(TEMPLATE_SECONDS):
            rendered: Any = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except _TimeUp:
        raise ModelLoadError(
            f"The model's chat template takes more than {TEMPLATE_SECONDS:g} seconds of processor time.",
            "Fix the checkpoint's chat_template.jinja: its loops may repeat far too much.",
        ) from None
    except Exception:  # jinja raises whatever the template raises
        return None
    return rendered if isinstance(rendered, str) else None


class _TimeUp(BaseException):
    """No ``Exception``, so that nothing on the way up takes it for an error of its own."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise ``_TimeUp`` in what this thread runs in Python once it has used so many seconds of processor time.

    A template is a program of a stranger, and a loop of it can be stopped from within its own thread alone.
    """
    end = time.thread_time() + seconds

    def trace(_frame: Any, _event: str, _value: Any) -> Any:
        if time.thread_time() > end:
            raise _TimeUp
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
