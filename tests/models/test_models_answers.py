r"""The answer inside decoded text: ``\boxed{}``, ``<answer>`` or all of it, and the tokens that spell it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import END, tokenizer
from tokenizers import AddedToken
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from latent_tool.models.decoding import _read_rules, extract_answer, generation_rules
from latent_tool.models.families import answer_marks
from latent_tool.settings import GenerationSettings

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
    "a tag that never closes": ("<answer>blue", "blue"),
    "a tag that was cut while it closed": ("It is. <answer> blue </ans", "blue"),
    "a tag that was cut, after a whole one": ("<answer>red</answer>, so <answer>bl", "red"),
    "a tag that opens twice": ("<answer>red <answer>blue</answer>", "blue"),
    "a tag that the prompt opened": ("blue</answer> it is </answer>", "blue"),
    "a tag in capitals": ("<ANSWER>blue</Answer>", "blue"),
    "a tag after letters that grow in lower case": ("İİİ <Answer>İ</answer>", "İ"),
    "a box in a tag that never closes": ("<answer>\\boxed{blue}", "blue"),
    "an empty tag": ("<answer></answer>", ""),
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


BOX = {
    "GLM's box": ("<|begin_of_box|>4<|end_of_box|>", "4"),
    "in a sentence": ("The sum is <|begin_of_box|> 4 <|end_of_box|>.", "4"),
    "in a tag": ("<answer>It is <|begin_of_box|>4<|end_of_box|></answer>", "4"),
    "never closed": ("<answer>It is <|begin_of_box|>4", "4"),
    "the last one": ("<|begin_of_box|>3<|end_of_box|> or <|begin_of_box|>4<|end_of_box|>", "4"),
    "not opened": ("4<|end_of_box|>", "4"),
    "around LaTeX": ("<|begin_of_box|>\\boxed{4}<|end_of_box|>", "4"),
    "after reasoning": ("<think><|begin_of_box|>3<|end_of_box|></think><|begin_of_box|>4<|end_of_box|>", "4"),
    "multibyte": ("🫐<|begin_of_box|>🫐 å<|end_of_box|>🫐", "🫐 å"),
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", ["glm4v", "a_family_that_is_not_in_the_table"])
@pytest.mark.parametrize(("text", "expected"), BOX.values(), ids=BOX.keys())
def test_a_familys_own_marks_are_not_in_the_answer(text, expected, kind, special):
    """Whether the tokenizer calls its marks special, and so leaves them out of a text, or not."""
    words = tokenizer("<think>", "</think>")
    words.add_tokens([AddedToken(name, special=special) for name in ("<|begin_of_box|>", "<|end_of_box|>")])
    ids = [*words(text, add_special_tokens=False).input_ids, *STOP]
    answer = extract_answer(ids, words, CLOSING, STOP, answer_marks(kind))
    assert answer.text == expected
    assert words.decode(ids[answer.start : answer.stop - answer.ended], skip_special_tokens=True).strip() == expected
    assert answer.ended


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("gemma4", "<|channel>thought\n<channel|>blue"),
        ("gemma4", "<|channel>thought\nred, \\boxed{red}<channel|>blue"),
        ("mistral3", "[THINK]red? <answer>red</answer>[/THINK]blue"),
        ("qwen3_vl", "<think>red <answer>red</answer></think>\n\nblue"),
        ("unknown", "<|channel>thought\nred<channel|>blue"),
        ("unknown", "red</think>blue"),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_reasoning_that_a_family_marks_is_no_answer_though_no_marker_was_asked_for(kind, text, special):
    words = tokenizer()
    marks = ["<|channel>", "<channel|>", "[THINK]", "[/THINK]", "<think>", "</think>"]
    words.add_tokens([AddedToken(name, special=special) for name in marks])
    ids = [*words(text, add_special_tokens=False).input_ids, *STOP]
    answer = extract_answer(ids, words, (), STOP, answer_marks(kind))
    assert answer.text == "blue"
    assert words.decode(ids[answer.start : answer.stop - 1]).strip() == "blue"


@given(
    st.lists(
        st.sampled_from(["<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>", "å", " ", "}", "\\boxed{"])
    )
)
@settings(deadline=None)
def test_the_tokens_always_spell_the_answer(parts):
    ids = WORDS("".join(parts), add_special_tokens=False).input_ids
    answer = extract_answer(ids, WORDS, (), STOP, answer_marks("glm4v"))
    assert WORDS.decode(ids[answer.start : answer.stop - answer.ended]).strip() == answer.text
    assert answer.text == answer.text.strip()


def test_other_families_leave_the_marks_of_glm_alone():
    _, answer = extract("a <|begin_of_box|>4<|end_of_box|>")
    assert answer.text == "a <|begin_of_box|>4<|end_of_box|>"


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


@pytest.mark.parametrize("special", [True, False])
def test_a_token_that_is_added_later_counts(special):
    words = tokenizer()
    extract_answer(words("blue", add_special_tokens=False).input_ids, words, (), STOP)
    words.add_tokens([AddedToken("<seen>", special=special)])
    ids = words("<seen>blue", add_special_tokens=False).input_ids
    assert extract_answer(ids, words, (), STOP).text == ("blue" if special else "<seen>blue")
    words.add_special_tokens({"additional_special_tokens": ["<seen>"]})
    assert extract_answer(ids, words, (), STOP).text == "blue"


def test_generation_rules_are_those_of_the_settings_as_they_are_now():
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
    model = LlamaForCausalLM(config)
    settings = model.generation_config
    asked = (None, GenerationSettings(), GenerationSettings(stop_strings=(".",)), GenerationSettings(min_new_tokens=2))
    changes = [
        lambda: None,
        lambda: setattr(settings, "eos_token_id", 7),
        lambda: setattr(settings, "eos_token_id", [7, 8]),
        lambda: settings.eos_token_id.append(9),  # in place
        lambda: setattr(settings, "stop_strings", ["a"]),
        lambda: settings.stop_strings.append("b"),
        lambda: setattr(settings, "repetition_penalty", 2.0),
        lambda: setattr(settings, "repetition_penalty", 1.0),
        lambda: setattr(model, "generation_config", GenerationConfig(eos_token_id=3)),
    ]
    for change in changes:
        change()
        for length in (1, 5, 1):
            for wanted in asked:
                rules, fresh = (read(model, length, wanted) for read in (generation_rules, _read_rules))
                assert (rules.stop_tokens, rules.stop_strings) == (fresh.stop_tokens, fresh.stop_strings)
                assert [type(each) for each in rules.processors] == [type(each) for each in fresh.processors]
                again = generation_rules(model, length, wanted)
                assert not {*map(id, rules.processors)} & {*map(id, again.processors)}
