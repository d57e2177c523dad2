r"""The answer inside decoded text: ``\boxed{}``, ``<answer>`` or all of it, and the tokens that spell it."""

from __future__ import annotations

import pytest
from tiny_checkpoints import END, tokenizer

from latent_tool.models.decoding import extract_answer

WORDS = tokenizer("<think>", "</think>")
STOP = frozenset([WORDS.convert_tokens_to_ids(END)])
CLOSING = (WORDS.convert_tokens_to_ids("</think>"),)


def extract(text: str, *, ended: bool = True, closing: tuple[int, ...] = CLOSING):
    ids = WORDS(text, add_special_tokens=False).input_ids + (list(STOP) if ended else [])
    return ids, extract_answer(ids, WORDS, closing, STOP)


CASES = {
    "plain": ("blue", "blue"),
    "white space": ("  blue \n", "blue"),
    "boxed": ("It is \\boxed{blue}.", "blue"),
    "the last box counts": ("\\boxed{red}, no: \\boxed{blue}", "blue"),
    "nested braces": ("\\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
    "a box that never closes": ("so \\boxed{blue", "so \\boxed{blue"),
    "a box that was cut": ("\\boxed{red}, so \\boxed{blue", "red"),
    "a box that was cut in its braces": ("\\boxed{red}, so \\boxed{\\frac{1}{", "red"),
    "a box in a box that was cut": ("\\boxed{red \\boxed{blue}", "blue"),
    "a box after a stray brace": ("} { \\boxed{blue}", "blue"),
    "tag": ("I see. <answer> blue </answer> done", "blue"),
    "the last tag counts": ("<answer>red</answer><answer>blue</answer>", "blue"),
    "several lines in a tag": ("<answer>a\nb</answer>", "a\nb"),
    "a tag that never closes": ("<answer>blue", "<answer>blue"),
    "a box beats a tag": ("<answer>\\boxed{blue}</answer>", "blue"),
    "an empty box": ("so \\boxed{ }", ""),
    "nothing": ("", ""),
    "multibyte": ("\\boxed{blåbær 🫐}", "blåbær 🫐"),
    "multibyte alone": ("日本語", "日本語"),
    "repeated strings": ("blue blue \\boxed{blue} blue", "blue"),
    "reasoning is no answer": ("<think>red \\boxed{red}</think>blue", "blue"),
    "only the last reasoning ends": ("<think>a</think>b</think>blue", "blue"),
}


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES.keys())
def test_answer_and_the_tokens_that_spell_it(text, expected, ended):
    ids, answer = extract(text, ended=ended)
    assert answer.text == expected
    spelled = WORDS.decode(ids[answer.start : answer.stop - answer.ended], skip_special_tokens=True)
    assert spelled.strip() == expected
    assert 0 <= answer.start <= answer.stop <= len(ids)
    assert answer.ended == (answer.stop - answer.ended < len(ids))


def test_the_whole_text_is_kept():
    _, answer = extract("<think>hm</think> It is \\boxed{blue}. ")
    assert answer.raw_text == "hm It is \\boxed{blue}."


def test_the_token_that_ends_the_answer_is_counted():
    ids, answer = extract("\\boxed{blue}")
    assert answer.ended
    assert WORDS.decode(ids[answer.stop - 1]) == "}"
    ids, answer = extract("blue")
    assert answer.ended
    assert ids[answer.stop - 1] in STOP
    ids, answer = extract("blue", ended=False)
    assert not answer.ended
    assert answer.stop == len(ids)


def test_repeated_strings_give_the_tokens_of_the_right_one():
    ids, answer = extract("blue is \\boxed{blue}, blue")
    assert WORDS.decode(ids[: answer.start]) == "blue is \\boxed{"


def test_without_a_closing_marker_all_of_the_text_is_read():
    _, answer = extract("<think>red", closing=())
    assert answer.text == "red"
    _, answer = extract("<think>red")
    assert answer.text == "red"


def test_markers_of_several_tokens():
    closing = tuple(WORDS("))", add_special_tokens=False).input_ids)
    assert extract("((red))blue", closing=closing)[1].text == "blue"


def test_a_half_written_character_does_not_break_the_answer():
    ids = WORDS("å", add_special_tokens=False).input_ids
    assert len(ids) == 2
    answer = extract_answer(ids[:1], WORDS, (), STOP)
    assert answer.stop == 1
    assert not answer.ended
