"""What decoding needs beside the model: its own generation rules, and the answer inside the decoded text."""

from __future__ import annotations

import copy
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from latent_tool.models.families import AnswerMarks
from latent_tool.settings import GenerationSettings

__all__ = ["Decoded", "ExtractedAnswer", "GenerationRules", "extract_answer", "generation_rules"]


@dataclass(frozen=True)
class GenerationRules:
    """The model's own generation settings, for greedy decoding."""

    processors: LogitsProcessorList
    stop_tokens: frozenset[int]
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _KnownRules:
    """Rules without logits processors, which hold nothing but numbers, and the settings that they were read from.

    ``settings``: a copy of all that the model's ``generation_config`` held. ``found``: rules by prompt length and by
    what the caller wanted otherwise.
    """

    settings: dict[str, Any]
    found: dict[tuple[int, GenerationSettings | None], GenerationRules] = field(default_factory=dict)

    MOST = 1024


_known_rules: WeakKeyDictionary[PreTrainedModel, _KnownRules] = WeakKeyDictionary()


def generation_rules(
    model: PreTrainedModel, prompt_length: int, changes: GenerationSettings | None = None
) -> GenerationRules:
    """Stop tokens, stop strings and logits processors that ``model.generate(do_sample=False)`` would use.

    Args:
        model: the model whose ``generation_config`` counts, as it is now.
        prompt_length: tokens that are written before the first decoded one, as the logits processors see them.
        changes: what the caller wants otherwise.
    """
    known = _known_rules.get(model)
    now = vars(model.generation_config)
    if known is None or not _same(known.settings, now):
        known = _known_rules[model] = _KnownRules(copy.deepcopy(now))
    rules = known.found.get((prompt_length, changes))
    if rules is None:
        rules = _read_rules(model, prompt_length, changes)
        # Logits processors belong to one decoding: some remember what they saw.
        if not rules.processors and len(known.found) < known.MOST:
            known.found[prompt_length, changes] = rules
    return rules


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether settings are equal; tensors among them, whose comparison says nothing of the whole, are not."""
    try:
        return one == other
    except RuntimeError:
        return False


def _read_rules(model: PreTrainedModel, prompt_length: int, changes: GenerationSettings | None) -> GenerationRules:
    """Make the rules of a prompt, as transformers makes them."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample = False
    # Sampling settings do nothing here, and guidance would need a second, text-only forward pass per token.
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "guidance_scale"):
        setattr(config, name, None)
    for name, value in (changes or GenerationSettings()).model_dump(exclude_none=True).items():
        setattr(config, name, list(value) if name == "stop_strings" else value)
    device = cast(Tensor, model.get_input_embeddings().weight).device
    generator: Any = model
    # Special tokens are compared here; on the device, the host would have to wait for that.
    generator._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=torch.device("cpu"))
    for name in ("_bos_token_tensor", "_eos_token_tensor", "_pad_token_tensor", "_decoder_start_token_tensor"):
        tokens = getattr(config, name, None)
        if tokens is not None:
            setattr(config, name, tokens.to(device))
    processors = generator._get_logits_processor(
        generation_config=config, input_ids_seq_length=prompt_length, device=str(device), model_kwargs={}
    )
    stop = config.eos_token_id
    stop_tokens = frozenset([stop] if isinstance(stop, int) else stop or [])
    strings = config.stop_strings
    stop_strings = (strings,) if isinstance(strings, str) else tuple(strings or ())
    return GenerationRules(processors, stop_tokens, stop_strings)


@dataclass(frozen=True)
class Decoded:
    """Tokens that were decoded, and what the model's own softmax said of each, before any logits processor.

    ``log_probabilities`` and ``entropies`` are float32 on the CPU, ``(n,)``; the stop token is included.
    """

    tokens: tuple[int, ...]
    log_probabilities: Tensor
    entropies: Tensor
    finish_reason: str


@dataclass(frozen=True)
class ExtractedAnswer:
    """The answer, the whole text, and the range of tokens ``[start, stop)`` that spell the answer.

    ``stop`` includes the token that ends the answer if there is one.
    """

    text: str
    raw_text: str
    start: int
    stop: int
    ended: bool


_COMMON = AnswerMarks()
_BRACE = re.compile(r"(\\boxed)?\{|\}")


def _boxed(text: str) -> tuple[int, int] | None:
    r"""Span of the content of the last ``\boxed{...}`` whose braces are balanced: one that was cut does not count."""
    opened: list[re.Match[str]] = []
    found: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append(brace)
        elif opened:
            begun = opened.pop()
            if begun[1] and (found is None or begun.end() > found[0]):
                found = begun.end(), brace.start()
    return found


def _marked(text: str, marks: AnswerMarks) -> tuple[int, int] | None:
    """Span of what stands between two marks: the last complete pair, else what was opened and not closed."""
    cut: tuple[int, int] | None = None
    for opening, closing in marks.pairs:
        opened: int | None = None
        whole: tuple[int, int] | None = None
        for mark in re.finditer(f"({re.escape(opening)})|{re.escape(closing)}", text, re.IGNORECASE):
            if mark[1]:
                opened = mark.end()
            elif opened is not None:
                whole, opened = (opened, mark.start()), None
            elif whole is None and cut is None:  # nothing opens it, as when the prompt has opened it already
                cut = 0, mark.start()
        if whole is not None:
            return whole
        if opened is not None and (cut is None or cut[0] == 0):
            cut = opened, len(text) - _begun(text[opened:], closing)
    return cut


def _begun(text: str, mark: str) -> int:
    """How many characters of a mark stand at the end of a text that was cut inside the mark."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)


def _span(text: str, marks: AnswerMarks) -> tuple[int, int]:
    r"""Span of the answer inside a text: the last ``\boxed{}``, what marks enclose, or all of it; stripped."""
    first = max((text.rfind(end) + len(end) for end in marks.reasoning_ends if end in text), default=0)
    answer = text[first:]
    start, stop = _boxed(answer) or _marked(answer, marks) or (0, len(answer))
    start, stop = first + start, first + stop
    inner = text[start:stop]
    stripped = inner.strip()
    if not stripped:
        return start, start
    start += inner.index(stripped)
    return start, start + len(stripped)


def extract_answer(
    tokens: Sequence[int],
    tokenizer: Any,
    closing: Sequence[int],
    stop_tokens: frozenset[int],
    marks: AnswerMarks = _COMMON,
) -> ExtractedAnswer:
    """Find the answer in decoded tokens, as text and as the tokens that spell it.

    Args:
        tokens: decoded token ids, with the stop token if there was one.
        tokenizer: of the model.
        closing: ids of the closing thinking marker; what stands before its last occurrence is reasoning.
        stop_tokens: ids that end the decoding.
        marks: what the model's family writes around its answers (``families.answer_marks``).
    """
    ids = list(tokens)
    hidden = _hidden(tokenizer, marks)
    first = 0
    for index in range(len(ids) - len(closing) + 1):
        if closing and ids[index : index + len(closing)] == list(closing):
            first = index + len(closing)
    last = len(ids) - 1 if ids and ids[-1] in stop_tokens else len(ids)
    text = _text(tokenizer, ids[first:last], hidden)
    begin, end = _span(text, marks)
    places = range(first, last)

    def spelled(place: int) -> str:
        return _text(tokenizer, ids[first : place + 1], hidden)

    # A character of several bytes may take several tokens, which show as U+FFFD until the last one: the answer starts
    # with the first token of its first character, and stops after the last token of its last.
    start = stop = first + bisect_right(places, begin, key=lambda place: len(spelled(place)))
    if end > begin:
        whole = bisect_left(places, end, key=lambda place: len(spelled(place).rstrip("\ufffd")))
        stop = min(first + whole + 1, last)
    ended = stop < len(ids)
    raw_text: str = tokenizer.decode(ids[:last], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return ExtractedAnswer(text[begin:end], raw_text.strip(), start, stop + ended, ended)


_known_hidden: WeakKeyDictionary[Any, tuple[object, frozenset[int]]] = WeakKeyDictionary()


def _hidden(tokenizer: Any, marks: AnswerMarks) -> frozenset[int]:
    """Ids of the special tokens that a text leaves out: all but the marks of answers, which have to be seen."""
    state = marks, len(tokenizer), tuple(tokenizer.all_special_ids)  # what tokens that are added later change
    known = _known_hidden.get(tokenizer)
    if known is None or known[0] != state:
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        names = [*(name for pair in marks.pairs for name in pair), *marks.reasoning_ends]
        hidden = frozenset({*special, *tokenizer.all_special_ids} - set(tokenizer.convert_tokens_to_ids(names)))
        known = _known_hidden[tokenizer] = state, hidden
    return known[1]


def _text(tokenizer: Any, ids: Sequence[int], hidden: Collection[int]) -> str:
    shown = [index for index in ids if index not in hidden]
    text: str = tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
