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
# fmt: off
_FOREIGN_NOUNS = (
    "man", "woman", "child", "person", "dog", "cat", "horse", "bird", "car", "bus", "train", "bicycle", "house",
    "tree", "flower", "table", "chair", "sign", "street", "road", "river", "mountain", "sky", "cloud", "ball", "cup",
    "plate", "food", "pizza", "apple", "banana", "shirt", "hat", "shoe", "phone", "computer", "book", "clock",
    "window", "door", "wall", "floor", "boat", "plane", "animal", "building", "player", "face", "hand", "hair",
    "label", "button", "page", "author", "company", "invoice", "receipt", "menu", "price", "date", "city", "country",
    "flag", "map", "logo",
)
_FOREIGN_QUALITIES = (
    "old", "happy", "open", "closed", "wet", "clean", "broken", "real", "tired", "expensive", "sunny", "empty",
    "famous", "parked", "asleep", "hot", "ripe", "moving", "wooden", "dangerous",
)
_FOREIGN_TEMPLATES = (
    "who is the {noun}?", "who painted this?", "who made the {noun}?", "what is the {noun} doing?",
    "why is the {noun} {quality}?", "what is written on the {noun}?", "how old is the {noun}?",
    "is the {noun} {quality}?", "what color is the {noun}?", "where is the {noun}?", "what brand is the {noun}?",
    "how much does the {noun} cost?", "what is the name of the {noun}?", "does the {noun} look {quality}?",
    "when was this taken?", "what time is it?", "which {noun} is {quality}?", "what is the {noun} made of?",
    "what is behind the {noun}?", "how many {noun}s are {quality}?", "which city is this?",
    "what is the capital of this {noun}?", "can you translate the {noun}?", "what kind of {noun} is this?",
    "what does the {noun} say?", "is there a {noun} behind the {noun}?", "what season is it?",
    "what is the weather like?", "tell me about the {noun}.", "explain the {noun}.", "what happened to the {noun}?",
    "what will the {noun} do next?",
)
# fmt: on
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


def foreign_question(rng: random.Random) -> str:
    """A question about things that no picture of this world shows."""
    text = rng.choice(_FOREIGN_TEMPLATES)
    while "{noun}" in text:
        noun = rng.choice(_FOREIGN_NOUNS) if rng.random() < 0.8 else _invented(rng)
        text = text.replace("{noun}", noun, 1)
    return text.replace("{quality}", rng.choice(_FOREIGN_QUALITIES))


def _invented(rng: random.Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3)))
