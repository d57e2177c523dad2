"""Bar charts, and the questions about a chart, whoever drew it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw

from latent_tool.scenes.drawing import Context, blank_canvas, blend, finish, font_of, jitter, visible
from latent_tool.scenes.wording import article, expand
from latent_tool.scenes.world import COLORS, LETTERS, Box, Color, Question, SceneObject


def bars_scene(context: Context) -> tuple[Image.Image, list[SceneObject], list[Question]]:
    rng = context.rng
    dark = rng.random() < 0.15
    blank_canvas(context, with_photographs=False)
    paper = jitter(rng, (20, 20, 30) if dark else (246, 246, 246), 8)
    context.background = (paper,)
    image = Image.new("RGB", context.size, paper)
    (width, height), unit = context.size, context.unit
    draw = ImageDraw.Draw(image)
    number = rng.randint(6, 7) if context.hard else rng.randint(2, 5)
    number = min(context.objects, 7) if context.objects and context.objects > 1 else number
    colors = rng.sample(visible(context, 150), number)
    step = 0.04 if context.hard else 0.065
    lengths = [k * step for k in rng.sample(range(math.ceil(0.14 / step), math.floor(1.0 / step) + 1), number)]
    lengths = [min(1.0, length + rng.uniform(0, step / 3)) for length in lengths]
    horizontal = rng.random() < 0.3
    pen: Color = (215, 215, 215) if dark else (50, 50, 50)
    left, top = width * rng.uniform(0.05, 0.17), height * rng.uniform(0.04, 0.16)
    right, bottom = width * rng.uniform(0.92, 0.98), height * rng.uniform(0.84, 0.95)
    _axes(context, draw, (left, top, right, bottom), horizontal, pen)
    slot = ((bottom - top) if horizontal else (right - left)) / number
    gap = rng.uniform(0.06, 0.2)
    outline = pen if rng.random() < 0.2 else None
    bars: dict[str, SceneObject] = {}
    for index, (color, length) in enumerate(zip(colors, lengths, strict=True)):
        start, end = (index + gap) * slot, (index + 1 - gap) * slot
        if horizontal:
            box = (left, top + start, left + length * (right - left), top + end)
        else:
            box = (left + start, bottom - length * (bottom - top), left + end, bottom)
        draw.rectangle(box, fill=jitter(rng, COLORS[color]), outline=outline)
        center = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        bars[color] = SceneObject("bar", color, box, center, (box[2] - box[0]) * (box[3] - box[1]))
    if rng.random() < 0.25 and unit >= 1:
        size = max(8, round(7 * unit))
        title = "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 7))).title()
        draw.text((left, 0), title, font=font_of(None, size), fill=pen)
    return finish(context, image), list(bars.values()), bar_questions(rng, bars, lengths, horizontal)


def _axes(context: Context, draw: ImageDraw.ImageDraw, plot: Box, horizontal: bool, pen: Color) -> None:
    """Axis lines, and now and then a grid, ticks and their numbers."""
    rng = context.rng
    left, top, right, bottom = plot
    lines, numbers = rng.random() < 0.3, rng.random() < 0.4
    faint = blend(context.background[0], pen, 0.18)
    ticks = rng.randint(3, 6)
    font = font_of(None, max(6, round(6 * context.unit)))
    for k in range(1, ticks):
        share = k / (ticks - 1)
        if horizontal:
            x = left + share * (right - left)
            if lines:
                draw.line((x, top, x, bottom), fill=faint)
            if numbers:
                draw.text((x - 3, bottom), str(k * 10), font=font, fill=pen)
        else:
            y = bottom - share * (bottom - top)
            if lines:
                draw.line((left, y, right, y), fill=faint)
            if numbers:
                draw.text((0, y - 3), str(k * 10), font=font, fill=pen)
    if rng.random() < 0.85:
        draw.line((left, bottom, right, bottom) if not horizontal else (left, top, left, bottom), fill=pen)
    if rng.random() < 0.4:
        draw.line((left, bottom, right, bottom) if horizontal else (left, top, left, bottom), fill=pen)
    if rng.random() < 0.15:
        draw.rectangle(plot, outline=pen)


def bar_questions(
    rng: random.Random, bars: dict[str, SceneObject], lengths: Sequence[float], horizontal: bool
) -> list[Question]:
    """Return questions about a chart, whoever drew it.

    Args:
        rng: chooses what is asked.
        bars: colour -> bar, in the order of the chart (left to right, or top to bottom when horizontal).
        lengths: of the bars, as shares of the axis, in the same order.
        horizontal: whether the bars lie.
    """
    names = list(bars)
    tall = dict(zip(names, lengths, strict=True))
    ranked = sorted(names, key=tall.__getitem__)
    height = {name: str(min(9, int(10 * value))) for name, value in tall.items()}
    overview = " ".join(f"{name} {height[name]}" for name in names)
    everything = tuple(bar.box for bar in bars.values())
    questions: list[Question] = []

    def say(*templates: str) -> str:
        return expand(rng, rng.choice(templates))

    def superlative(word: str, name: str) -> None:
        text = say(
            f"which bar is {{|the }}{word}?",
            f"what COLOR is the {word} bar?",
            f"what is the {{COLOR of the |}}{word} bar?",
            f"{{name|tell me|find|identify}} the {word} bar.",
            f"which COLOR has the {word} bar?",
            f"which bar in the chart is {{|the }}{word}?",
        )
        questions.append(Question("bar", text, name, overview, (bars[name].box,)))

    superlative("{longest|largest|biggest}" if horizontal else "{tallest|highest|largest|biggest|longest}", ranked[-1])
    superlative("{shortest|smallest}" if horizontal else "{shortest|smallest|lowest}", ranked[0])
    value = rng.random() < 0.5
    text = say(
        f"which bar has the {'{largest|highest|greatest|biggest}' if value else '{smallest|lowest}'} value?",
        f"what COLOR is the bar with the {'{largest|highest}' if value else '{smallest|lowest}'} value?",
    )
    winner = ranked[-1] if value else ranked[0]
    questions.append(Question("bar", text, winner, overview, (bars[winner].box,)))
    text = say(
        "how many bars {are there|are shown|do you see|are in the chart|does the chart have|can you see}?",
        "{count|count all} the bars.",
        "what is the number of bars{| in the chart}?",
        "how many bars are in the IMAGE?",
    )
    listing = " ".join(f"{name} {k}" for k, name in enumerate(names, start=1))
    questions.append(Question("count", text, str(len(names)), listing, everything))
    for _ in range(2):
        one, other = rng.sample(names, 2)
        more = rng.random() < 0.5
        if horizontal:
            word = "{longer|larger|bigger}" if more else "{shorter|smaller}"
        else:
            word = "{taller|higher|larger|bigger|longer}" if more else "{shorter|smaller|lower}"
        text = say(
            f"is the {one} bar {word} than the {other} bar?",
            f"is the {one} bar {word} than the {other} one?",
            f"is it true that the {one} bar is {word} than the {other} bar?",
        )
        answer = "yes" if (tall[one] > tall[other]) == more else "no"
        steps = f"{one} {height[one]} {other} {height[other]}"
        questions.append(Question("bar_compare", text, answer, steps, (bars[one].box, bars[other].box)))
    one, other = rng.sample(names, 2)
    more = rng.random() < 0.5
    word = (
        ("{longer|larger}" if more else "{shorter|smaller}")
        if horizontal
        else ("{taller|higher|larger}" if more else "{shorter|smaller|lower}")
    )
    text = say(
        f"which bar is {word}, {{|the }}{one} or {{|the }}{other}?",
        f"which is {word}, the {one} bar or the {other} bar?",
        f"is the {one} bar or the {other} bar {word}?",
    )
    winner = one if (tall[one] > tall[other]) == more else other
    steps = f"{one} {height[one]} {other} {height[other]}"
    questions.append(Question("bar_compare", text, winner, steps, (bars[one].box, bars[other].box)))
    present = rng.random() < 0.5
    name = rng.choice(names if present else [color for color in COLORS if color not in names])
    text = say(
        f"is there {article(name)} bar{{| in the chart| in the IMAGE}}?",
        f"does the {{chart|IMAGE}} {{have|show|contain}} {article(name)} bar?",
        f"{{do|can}} you see {article(name)} bar?",
    )
    found = (bars[name].box,) if present else ()
    questions.append(Question("exist", text, "yes" if present else "no", " ".join(names), found))
    index = rng.randrange(len(names) - 1)
    near, far = index, index + 1
    words = "{below|under}" if horizontal else "{right of|to the right of|on the right of}"
    if rng.random() < 0.5:
        near, far = far, near
        words = "{above|over}" if horizontal else "{left of|to the left of|on the left of}"
    text = say(
        f"which bar is {{|directly |just }}{words} the {names[near]} bar?",
        f"what COLOR is the bar {words} the {names[near]} bar?",
        f"which bar stands next to the {names[near]} bar, {words} it?",
    )
    steps = f"{names[near]} {near + 1} {names[far]} {far + 1}"
    questions.append(Question("spatial", text, names[far], steps, (bars[names[near]].box, bars[names[far]].box)))
    if rng.random() < 0.4:
        text = say(
            "describe the {IMAGE|chart}.", "list the bars.", "what is in the IMAGE?", "what does the chart show?"
        )
        questions.append(Question("describe", text, ", ".join(f"{name} bar" for name in names), "", everything))
    return questions
