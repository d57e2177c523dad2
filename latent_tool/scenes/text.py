"""Scenes of printed numbers and letters, and the questions about them."""

from __future__ import annotations

from PIL import Image, ImageDraw

from latent_tool.scenes.drawing import Context, blank_canvas, finish, font_of, jitter, visible
from latent_tool.scenes.wording import article, expand
from latent_tool.scenes.world import COLORS, LETTERS, Box, Question, SceneObject, location


def text_scene(context: Context) -> tuple[Image.Image, list[SceneObject], list[Question]]:
    rng = context.rng
    image = blank_canvas(context, with_photographs=False)
    (width, height), unit = context.size, context.unit
    color = rng.choice(visible(context, 200))
    numeric = rng.random() < 0.65
    if not numeric:
        text = rng.choice(LETTERS)
    elif context.objects:
        text = str(rng.randint(10 ** (context.objects - 1), 10**context.objects - 1))
    elif context.hard:
        text = str(rng.randint(100, 9999))
    else:
        text = str(rng.choice((rng.randint(0, 9), rng.randint(10, 99), rng.randint(10, 99), rng.randint(100, 999))))
    points = rng.uniform(17, 27) if context.hard else rng.uniform(22, {1: 66, 2: 52, 3: 42}.get(len(text), 30))
    path = rng.choice((None, None, *context.assets.fonts)) if context.assets.fonts else None
    font = font_of(path, max(9, round(points * unit)))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    wide, high = right - left, bottom - top
    x = rng.uniform(2, max(2.1, width - wide - 2))
    y = rng.uniform(2, max(2.1, height - high - 2))
    draw.text((x - left, y - top), text, font=font, fill=jitter(rng, COLORS[color]))
    objects = []
    for index, character in enumerate(text):
        start = x - left + draw.textlength(text[:index], font=font)
        end = x - left + draw.textlength(text[: index + 1], font=font)
        box = (max(0.0, start), y, min(float(width), end), min(float(height), y + high))
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        objects.append(SceneObject(character, color, box, middle, (box[2] - box[0]) * (box[3] - box[1])))
    whole = (x, y, min(float(width), x + wide), min(float(height), y + high))
    return finish(context, image), objects, _text_questions(context, text, color, numeric, whole)


def _text_questions(context: Context, text: str, color: str, numeric: bool, box: Box) -> list[Question]:
    rng = context.rng
    kind, shown = ("number" if numeric else "letter"), text.lower()
    seen = f"{color} {kind} {len(text)} {shown}"
    place = location(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), context.size)
    boxes = (box,)

    def say(*templates: str) -> str:
        return expand(rng, rng.choice(templates))

    read_text = say(
        f"{{what|which}} {kind} is {{shown|this|in the IMAGE|visible|printed|written}}?",
        f"read the {kind}.",
        f"what is the {kind}{{| in the IMAGE}}?",
        f"{{what|which}} {kind} {{do|can}} you see?",
        f"{{tell me|name|give}} the {kind}{{| in the IMAGE}}.",
        f"{{what|which}} {kind} does the IMAGE show?",
    )
    say_text = say(
        "what does {the|this} text say?",
        "read the text{| in the IMAGE}.",
        "what is {written|printed}{| in the IMAGE| here}?",
        "what text is {shown|visible|in the IMAGE}?",
        "what does it say?",
    )
    color_text = say(
        f"what COLOR is the {{{kind}|text}}?",
        f"what is the COLOR of the {{{kind}|text}}?",
        f"which COLOR does the {{{kind}|text}} have?",
        f"{{in what|in which}} COLOR is the {{{kind}|text}} {{printed|written}}?",
        f"{{tell me|name}} the COLOR of the {{{kind}|text}}.",
    )
    claim = shown
    if rng.random() < 0.5:
        claim = str(rng.randint(0, 10 ** len(text) - 1)) if numeric else rng.choice(LETTERS).lower()
    claim_text = say(
        f"is {{the|this}} {kind} {claim}?",
        f"is this the {kind} {claim}?",
        f"does the IMAGE show the {kind} {claim}?",
        f"is {claim} the {kind}{{| in the IMAGE}}?",
    )
    which = rng.choice(("number", "letter"))
    which_text = say(
        f"is there a {which} {{in the IMAGE|here}}?",
        f"does {{the|this}} IMAGE {{show|contain}} a {which}?",
        f"{{do|can}} you see a {which}?",
    )
    questions = [
        Question("read", read_text, shown, seen, boxes),
        Question("read", say_text, shown, seen, boxes),
        Question("color", color_text, color, f"{kind} {place} {color}", boxes),
        Question("exist", claim_text, "yes" if claim == shown else "no", seen, boxes),
        Question("exist", which_text, "yes" if which == kind else "no", f"{color} {kind} {place}", boxes),
    ]
    if not numeric:
        return questions
    value, bound = int(text), rng.choice((5, 10, 20, 50, 100, 500))
    if value != bound:
        above = rng.random() < 0.7
        word = "{larger|bigger|greater|more}" if above else "{smaller|less}"
        compare_text = say(
            f"is the number {word} than {bound}?",
            f"is {{this|it}} {word} than {bound}?",
            f"is {{the|this}} {{printed|written|shown}} number {word} than {bound}?",
            f"{{do|can}} you see a number {word} than {bound}?",
        )
        questions.append(Question("number", compare_text, "yes" if (value > bound) == above else "no", seen, boxes))
    parity = rng.choice(("even", "odd"))
    holds = (value % 2 == 0) == (parity == "even")
    parity_text = say(
        f"is the number {parity}?",
        f"is this {article(parity)} number?",
        f"is {{it|the printed number|the number shown}} {parity}?",
        f"{{is|does}} the IMAGE {{showing|show}} an {parity} number?",
    )
    questions.append(Question("number", parity_text, "yes" if holds else "no", seen, boxes))
    digits_text = say(
        "how many digits does the number have?",
        "how many digits {are there|do you see|are in the IMAGE|are shown}?",
        "{count|count all} the digits.",
        "what is the number of digits?",
    )
    steps = " ".join(f"{digit} {k}" for k, digit in enumerate(text, start=1))
    questions.append(Question("count", digits_text, str(len(text)), steps, boxes))
    return questions
