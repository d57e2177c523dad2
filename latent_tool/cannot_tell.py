"""Recognise the answers that mean "I cannot tell", by language: they are abstentions, neither right nor wrong.

``CANNOT_TELL`` is the embedded model's own. What other models say stands in ``PHRASES``; a reasoner may be given a list
of its own. This module knows nothing of models, confidences or thresholds.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

__all__ = ["CANNOT_TELL", "CANNOT_TELL_REASON", "PHRASES", "PHRASES_OF_ALL", "says_cannot_tell"]

CANNOT_TELL = "cannot tell"
# Why such an answer is abstained from, wherever a result says so.
CANNOT_TELL_REASON = "the answer says that it cannot be told"


def _all(openings: Sequence[str], verbs: Sequence[str]) -> tuple[str, ...]:
    """Every opening with every verb: a beginning, whatever follows."""
    return tuple(f"{opening} {verb}..." for opening in openings for verb in verbs)


# Language -> phrases. One that ends in "..." stands for every answer that begins so and takes nothing back. "It is
# impossible to turn left" is an answer: what cannot be done must be to tell, to know or to see.
PHRASES: dict[str, tuple[str, ...]] = {
    "en": (
        *(
            CANNOT_TELL,
            "can't tell",
            "can not tell",
            "cannot say",
            "can't say",
            "impossible to tell",
            "impossible to say",
        ),
        *("unknown", "not known", "unsure", "not sure", "no idea", "undetermined", "indeterminate", "not determinable"),
        *(
            "unanswerable",
            "not answerable",
            "unsuitable image",
            "not applicable",
            "n/a",
            "not enough information",
        ),
        *("insufficient information", "i do not know...", "i don't know...", "i am not sure...", "i'm not sure..."),
        *("i am unsure...", "i'm unsure...", "i have no idea...", "it is unclear...", "it's unclear..."),
        *("it is not clear...", "it's not clear...", "not enough information to...", "insufficient information to..."),
        *("there is not enough information...", "there isn't enough information...", "there is no way to tell..."),
        *("the image does not provide...", "the image doesn't provide...", "the image does not contain enough..."),
        *("the picture does not provide...", "the picture doesn't provide...", "the question cannot be answered..."),
        *("cannot be determined...", "can't be determined...", "cannot be told...", "cannot be answered..."),
        *("it cannot be determined...", "it can't be determined...", "it cannot be told...", "this cannot be told..."),
        *("this cannot be determined...", "that cannot be determined...", "this cannot be answered..."),
        *_all(("i cannot", "i can't", "i can not"), ("tell", "say", "determine", "see", "answer", "identify", "know")),
        *_all(
            ("i am unable to", "i'm unable to", "i am not able to", "i'm not able to", "unable to", "not able to"),
            ("tell", "say", "determine", "see", "answer", "identify", "view", "provide"),
        ),
        *_all(("cannot", "can't"), ("determine", "identify", "tell from", "tell what", "tell which", "tell how")),
        *_all(("cannot", "can't"), ("tell whether", "tell if", "tell who", "tell where", "answer")),
        *_all(
            (
                "it is impossible to",
                "it's impossible to",
                "it is not possible to",
                "it's not possible to",
                "impossible to",
                "not possible to",
            ),
            ("tell", "say", "determine", "know", "see", "answer", "identify"),
        ),
    ),
    "de": (
        *("unbekannt", "unklar", "keine ahnung", "nicht bekannt", "nicht erkennbar", "nicht zu erkennen", "weiß nicht"),
        *("weiss nicht", "das kann ich nicht sagen...", "das kann ich nicht erkennen...", "ich weiß nicht..."),
        *("ich weiß es nicht...", "das weiß ich nicht...", "ich weiss nicht...", "ich weiss es nicht..."),
        *("ich bin nicht sicher...", "ich bin mir nicht sicher...", "es ist unklar...", "es ist nicht erkennbar..."),
        *("das ist nicht erkennbar...", "das lässt sich nicht sagen...", "das lässt sich nicht erkennen..."),
        *("es lässt sich nicht...", "lässt sich nicht sagen...", "lässt sich nicht bestimmen...", "nicht bestimmbar"),
        *("kann nicht bestimmt werden...", "nicht genug informationen...", "es ist nicht möglich zu sagen..."),
        *_all(("ich kann nicht", "ich kann es nicht", "ich kann das nicht"), ("sagen", "erkennen", "bestimmen")),
        *_all(("ich kann nicht", "ich kann es nicht", "ich kann das nicht"), ("sehen", "beantworten", "beurteilen")),
    ),
    "fr": (
        *("inconnu", "inconnue", "indéterminé", "aucune idée", "je ne sais pas...", "je ne suis pas sûr..."),
        *("je ne suis pas sûre...", "je ne suis pas certain...", "je ne suis pas certaine...", "impossible à dire..."),
        *("impossible à déterminer...", "il n'y a pas assez d'informations...", "pas assez d'informations..."),
        *_all(
            ("je ne peux pas", "on ne peut pas", "il est impossible de", "il n'est pas possible de", "impossible de"),
            ("dire", "déterminer", "voir", "savoir", "répondre", "identifier", "distinguer"),
        ),
    ),
    "es": (
        *("desconocido", "desconocida", "indeterminado", "ni idea", "no lo sé...", "no sé...", "no estoy seguro..."),
        *("no estoy segura...", "no está claro...", "no hay suficiente información...", "imposible saber..."),
        *_all(
            ("no se puede", "no puedo", "no es posible", "es imposible", "imposible"),
            ("decir", "determinar", "ver", "saber", "responder", "identificar", "distinguir"),
        ),
    ),
    "it": (
        *("sconosciuto", "sconosciuta", "non lo so...", "non so...", "non sono sicuro...", "non sono sicura..."),
        *("non è chiaro...", "non ci sono abbastanza informazioni...", "indeterminato"),
        *_all(
            ("non posso", "non si può", "non è possibile", "è impossibile", "impossibile", "non riesco a"),
            ("dire", "determinare", "vedere", "sapere", "rispondere", "identificare", "distinguere"),
        ),
    ),
    "pt": (
        *("desconhecido", "desconhecida", "indeterminado", "não sei...", "não tenho certeza...", "não está claro..."),
        *("não há informação suficiente...", "não há informações suficientes..."),
        *_all(
            ("não posso", "não consigo", "não é possível", "é impossível", "impossível"),
            ("dizer", "determinar", "ver", "saber", "responder", "identificar", "distinguir"),
        ),
    ),
    "nl": (
        *("onbekend", "geen idee", "weet ik niet", "ik weet het niet...", "ik weet niet...", "ik ben niet zeker..."),
        *("het is onduidelijk...", "niet te zeggen", "niet te zien", "onvoldoende informatie...", "onduidelijk"),
        *_all(("ik kan niet", "ik kan het niet", "het is niet mogelijk om te"), ("zeggen", "zien", "bepalen")),
    ),
    "zh": (
        *("未知", "不知道", "不确定", "不清楚", "无法判断...", "无法确定...", "无法回答...", "无法看出..."),
        *(
            "我不知道...",
            "我不确定...",
            "我无法判断...",
            "我无法确定...",
            "我无法回答...",
            "看不出来...",
            "不能确定...",
        ),
    ),
    "ja": (
        *("不明", "不明です", "わからない", "分からない", "わかりません...", "分かりません...", "判断できません..."),
        *("答えられません...", "判断できない...", "確認できません..."),
    ),
}
PHRASES_OF_ALL = tuple(dict.fromkeys(phrase for phrases in PHRASES.values() for phrase in phrases))

# An answer that goes on like this is a hedged answer, not an abstention.
_TAKEN_BACK = re.compile(
    r"\b(but|however|though|although|aber|jedoch|doch|mais|cependant|pero|sin embargo|però|ma|mas|porém|maar|echter)\b"
    r"|但|不过|しかし|でも|けど|が、"
)
_OPENINGS = re.compile(
    r"^(?:(?:i am |i'm )?sorry(?:,? but|[,.:;]| that)?|unfortunately,?|leider,?|désolée?,?|lo siento,?|answer:)\s+"
)
_LONGEST = 400  # characters; who goes on for longer than this has said something


def says_cannot_tell(answer: str, phrases: Sequence[str] = PHRASES_OF_ALL) -> bool:
    """Return whether an answer means that it cannot be told.

    Args:
        answer: what a model said.
        phrases: what means it, compared without case, punctuation at the ends, quotes and emphasis; one that ends in
            ``"..."`` stands for every answer that begins so and does not take it back ("I am not sure, but red").
    """
    text = _plain(answer)
    if not text or len(text) > _LONGEST:
        return False
    wholes, beginnings = _compiled(tuple(phrases))
    forms = dict.fromkeys((text, _OPENINGS.sub("", text)))
    return any(
        # Most answers begin like none of them, which one look says.
        form in wholes or (form.startswith(beginnings) and any(_goes_on(form, each) for each in beginnings))
        for form in forms
    )


@lru_cache(maxsize=16)
def _compiled(phrases: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """What an answer may be as a whole, and what it may begin with."""
    wholes, beginnings = set(), []
    for phrase in phrases:
        text = phrase.rstrip()
        begins = text.endswith(("...", "\N{HORIZONTAL ELLIPSIS}"))
        wanted = _plain(text.removesuffix("...").removesuffix("\N{HORIZONTAL ELLIPSIS}"))
        if wanted:
            wholes.add(wanted)
            beginnings += [wanted] if begins else []
    return frozenset(wholes), tuple(beginnings)


def _goes_on(text: str, beginning: str) -> bool:
    """Whether a text begins so, at the end of a word, and takes nothing back."""
    if len(text) <= len(beginning) or not text.startswith(beginning):
        return False
    # Words of Chinese and Japanese have no gaps between them.
    apart = beginning[-1] >= "\u3040" or not (text[len(beginning)].isalnum() or text[len(beginning)] == "_")
    return apart and _TAKEN_BACK.search(text, len(beginning)) is None


def _plain(text: str) -> str:
    """Lower case, one kind of apostrophe, single spaces, without quotes, emphasis and punctuation at the ends."""
    folded = unicodedata.normalize("NFKC", text[: 2 * _LONGEST]).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    spaced = " ".join(re.sub(r"[*_`\"“”«»]+", " ", folded.casefold()).split())
    return spaced.strip(" .,;:!?。'()[]-")
