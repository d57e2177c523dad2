"""Answers that mean "I cannot tell" are known by what they say; an answer, however hedged, is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_tool.cannot_tell import CANNOT_TELL, PHRASES, says_cannot_tell

MEANT = (
    *("cannot tell", "Cannot tell.", "**Cannot tell**", " CAN'T TELL! ", "can\u2019t tell", "Unknown", "I don't know."),
    *("I'm sorry, but I cannot determine that from the image.", "It is impossible to tell from this picture."),
    *("Unanswerable", "not enough information", "I'm not sure what is shown here.", "Cannot be determined"),
    *("Ich weiß es nicht.", "Das lässt sich nicht sagen.", "Je ne sais pas", "No se puede determinar con esta imagen."),
    *("无法判断。", "无法确定图中的颜色", "わかりません。", "Non lo so", "Não sei", "Onbekend", '"cannot tell"'),
)
ANSWERS = (
    *("red", "", "no", "none", "7", "cannot", "I cannot tell, but it looks red", "I am not sure, though probably blue"),
    *(
        "Unknown Pleasures",
        "It is impossible to turn left here",
        "No se puede estacionar",
        "tell",
        "telling",
        "notable",
    ),
    *("The image does not show a cat.", "I know", "It cannot be red", "unknown soldier", "nothing", "unclear water"),
    *("Ich kann nicht klagen", "我知道", "the man cannot tell the time", "I don't knowingly see any, but one"),
)


@pytest.mark.parametrize("text", MEANT)
def test_an_abstention_is_known(text: str) -> None:
    assert says_cannot_tell(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_no_abstention(text: str) -> None:
    assert not says_cannot_tell(text)


@pytest.mark.parametrize("language", list(PHRASES))
def test_every_phrase_of_every_language_means_it(language: str) -> None:
    """However it is cased and punctuated, alone or with what may follow."""
    for phrase in PHRASES[language]:
        whole = phrase.removesuffix("...")
        for form in (whole, whole.upper().replace("SS", "ß") if "ß" in whole else whole.title(), f"  {whole}. "):
            assert says_cannot_tell(form), form
        if phrase.endswith("..."):
            assert says_cannot_tell(f"{whole} in this picture"), phrase


def test_a_list_of_ones_own_stands_alone() -> None:
    assert says_cannot_tell("Pass.", ["pass"]) and not says_cannot_tell(CANNOT_TELL, ["pass"])
    assert says_cannot_tell("I pass on this one", ["i pass ..."]) and not says_cannot_tell("cannot tell", [])
    assert not says_cannot_tell("red", ["", "..."])


@given(st.text(max_size=300))
def test_any_text_gets_a_verdict(text: str) -> None:
    assert says_cannot_tell(text) == says_cannot_tell(f"  {text}\n")
    assert not says_cannot_tell("red " + text) or "cannot" in text.casefold()
