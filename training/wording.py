"""Noise on the wording of training questions, so that the model listens to the words that matter.

Small words are left out and words that mean nothing here are put in. Templates alone would teach their exact shape.
"""

from __future__ import annotations

import random

# fmt: off
_SMALL = frozenset((
    "a", "an", "and", "are", "can", "do", "does", "have", "has", "image", "in", "is", "it", "of", "on", "picture",
    "photo", "please", "scene", "that", "the", "there", "this", "to", "you",
))
# fmt: on
_FILLERS = (
    "well",
    "so",
    "now",
    "okay",
    "exactly",
    "really",
    "just",
    "currently",
    "maybe",
    "quickly",
    "i wonder",
    "do you think",
    "in your opinion",
    "as far as you know",
    "from what is drawn",
    "over here",
    "actually",
    "precisely",
    "my question is",
    "help me out",
    "if any",
    "for me",
    "also",
    "we want to know",
)
_SYLLABLES = ("ba", "ko", "mi", "ter", "sun", "vel", "ing", "pra", "lo", "ghe", "ost", "und", "fi", "wex", "ju", "ane")


def reword(text: str, rng: random.Random) -> str:
    """A noisy version of a question that asks the same.

    Questions that name a letter are returned as they are: there, ``a`` is no small word.
    """
    words = text.split()
    if "letter" in text.lower() or len(words) < 3:
        return text
    if rng.random() < 0.6:
        kept = [word for word in words if word.lower() not in _SMALL or rng.random() > 0.3]
        words = kept if len(kept) > 1 else words
    if rng.random() < 0.6:
        for _ in range(rng.randint(1, 2)):
            place = rng.choice((0, 0, len(words), rng.randint(0, len(words))))
            words.insert(place, _filler(rng))
    return " ".join(words)


def _filler(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(_FILLERS)
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(1, 3)))
