"""English for questions: templates with alternatives, synonyms, and how people open and end a question."""

from __future__ import annotations

import random
import re

from latent_tool.scenes.world import Question

_CHOICE = re.compile(r"\{([^{}]*)\}")
_SYNONYMS = {
    "COLOR": ("color", "color", "color", "colour"),
    "IMAGE": ("image", "image", "picture", "picture", "photo", "scene", "drawing"),
    "THING": ("shape", "shape", "object", "object", "thing", "figure", "item"),
}
OPENINGS = ("please tell me, ", "look at the picture: ", "please answer: ", "question: ", "tell me: ", "hey, ")
ENDINGS = (" answer with one word.", " please.", " answer briefly.", " use a single word.", " thanks!")


def expand(rng: random.Random, template: str) -> str:
    """Resolve ``{a|b}`` alternatives, innermost first, and the synonyms ``COLOR``, ``IMAGE`` and ``THING``."""
    while found := _CHOICE.search(template):
        template = template[: found.start()] + rng.choice(found.group(1).split("|")) + template[found.end() :]
    for word, choices in _SYNONYMS.items():
        while word in template:
            template = template.replace(word, rng.choice(choices), 1)
    return template


def polish(rng: random.Random, question: Question) -> Question:
    """Now and then an opening, an ending or no question mark; always a capital letter, as people write."""
    text = question.text
    if rng.random() < 0.06 and text.endswith("?"):
        text = text[:-1]
    elif rng.random() < 0.06:
        text = text + rng.choice(ENDINGS)
    if rng.random() < 0.06:
        text = rng.choice(OPENINGS) + text
    return Question(question.type, text[0].upper() + text[1:], question.answer, question.reasoning, question.boxes)


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def plural(word: str) -> str:
    """``"cross"`` -> ``"crosses"``."""
    return word + ("es" if word.endswith("s") else "s")
