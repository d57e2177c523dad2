"""A result for people at a terminal: the facts, a bar for the confidence, and the patches as a tiny picture.

The picture is made of half blocks, two pixels to a character, and drawn only where it can be seen: on a terminal of
256 colours or more, and not under ``NO_COLOR``. Text from outside is shown as text: neither the terminal nor Rich obeys
it. This module knows results, Pillow and Rich, nothing of models; they are imported when something is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tool.about import what_it_is
from latent_tool.views.pictures import upright_image
from latent_tool.words import confidence_text, visible_text

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console
    from rich.text import Text

    from latent_tool.schema import ReasoningResult

__all__ = ["can_draw", "plain", "print_result", "tiny_picture", "what_to_do"]

OPTIONS_SHOWN = 12
COLUMNS, ROWS = 40, 14  # characters of the tiny picture at most
DIMMED = 0.75  # share of grey over what is not evidence
GREY = (104, 104, 104)
NO_PATCHES = "none: injecting any did not raise the reward"
NO_SEARCH = "none: the answer stood without"


def plain(text: str) -> str:
    """Put text on one line, with a mark for every character that a terminal would obey."""
    shown = visible_text(text, limit=len(text))
    return shown.replace("\n", " ").replace("\t", " ").strip()


def can_draw(console: Console) -> bool:
    """Tell whether a picture of coloured half blocks would be seen on this console."""
    return (
        console.is_terminal
        and not console.no_color
        and console.color_system in ("256", "truecolor")
        and console.encoding.lower().startswith("utf")
        and console.width >= COLUMNS + 16
    )


def tiny_picture(
    result: ReasoningResult, image: Image.Image, *, index: int = 0, columns: int = COLUMNS, rows: int = ROWS
) -> Text:
    """Return the image in at most ``columns`` x ``rows`` characters; what is not evidence is grey.

    Raises:
        InputError: the image is not the one the result is about.
    """
    from PIL import Image, ImageOps
    from rich.text import Text

    upright = upright_image(result, image, index)
    scale = min(columns / upright.width, 2 * rows / upright.height)
    width, height = max(1, round(upright.width * scale)), max(2, 2 * round(upright.height * scale / 2))
    kind = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    small = upright.resize((width, height), kind)
    boxes = [patch.box for patch in result.patches if patch.image == index and patch.box is not None]
    if boxes:
        grey = ImageOps.grayscale(small).convert("RGB")
        picture = Image.blend(grey, Image.new("RGB", small.size, GREY), DIMMED)
        for left, top, right, bottom in boxes:
            x, y = int(left / upright.width * width), int(top / upright.height * height)
            end_x = max(x + 1, round(right / upright.width * width))
            end_y = max(y + 1, round(bottom / upright.height * height))
            where = (max(0, x), max(0, y), min(width, end_x), min(height, end_y))
            if where[0] < where[2] and where[1] < where[3]:
                picture.paste(small.crop(where), where[:2])
        small = picture
    pixels = small.tobytes()

    def colour(x: int, y: int) -> str:
        at = 3 * (y * width + x)
        return "#" + pixels[at : at + 3].hex()

    drawn = Text(no_wrap=True)
    for y in range(0, height, 2):
        for x in range(width):
            drawn.append("▀", f"{colour(x, y)} on {colour(x, y + 1)}")
        drawn.append("\n" if y + 2 < height else "")
    return drawn


def what_to_do(result: ReasoningResult) -> str | None:
    """Say what to do about an answer that should not be relied on; ``None`` when there is nothing to say."""
    if not result.unsure:
        return None
    remedy = "Allow more work (--budget thorough), use a larger model (--model), or ask someone."
    if about := what_it_is(result.model):
        remedy = f"{about} Or allow more work (--budget thorough), or ask someone."
    if result.barred is not None:
        what = "The picture is " if result.barred.startswith("unlike") else "Not accepted: "
        return f"{what}{result.barred}. Do not rely on this answer. {remedy}"
    if result.accepted is False:
        short = "not known" if result.min_confidence is None else f"below {result.min_confidence:g}"
        return f"The confidence is {short}: do not rely on this answer. {remedy}"
    return f"By its own measure the model is more likely wrong than right. {remedy}"


def print_result(
    console: Console,
    result: ReasoningResult,
    *,
    pictures: Callable[[], Sequence[Image.Image]] | None = None,
    written: Sequence[Path] = (),
    patches: bool = True,
) -> None:
    """Print a result for people.

    Args:
        console: where to.
        result: what a reasoner returned.
        pictures: gives the images that were asked about; called only if they can be drawn.
        written: files that were written, to be named.
        patches: list every injected patch; otherwise a summary.
    """
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    facts.add_row("answer", Text(plain(result.answer) or "(empty)", style="bold"))
    facts.add_row("confidence", _confidence(result, "#-" if console.options.ascii_only else "█░"))
    if result.choices is not None:
        _add_options(facts, result, "#-" if console.options.ascii_only else "█░")
    if result.scores.reward is not None:
        facts.add_row("reward", f"{result.scores.initial_reward:.4f} -> {result.scores.reward:.4f}")
    if result.views:
        facts.add_row("looked again", Text(_views(result)))
    facts.add_row("patches", _patch_table(result) if patches else _patch_summary(result))
    if pictures is not None and can_draw(console) and any(patch.box is not None for patch in result.patches):
        for index, image in enumerate(pictures()):
            if any(patch.image == index and patch.box is not None for patch in result.patches):
                facts.add_row("", tiny_picture(result, image, index=index))
    if result.grounding is not None:
        words = [f"{plain(token.token)} {token.dependency:+.2f}" for token in result.grounding.tokens]
        facts.add_row("S, nats", Text("  ".join(words)))
    if result.controls is not None:
        for name, control in (
            ("no latents", result.controls.latents_off),
            ("noised image", result.controls.image_noised),
        ):
            share = "" if control.confidence is None else f" ({confidence_text(control.confidence)})"
            facts.add_row(name, Text(f"{plain(control.answer) or '(empty)'}{share}"))
    if result.usage is not None:
        seconds = sum(result.usage.seconds.values())
        facts.add_row(
            "cost",
            f"{result.usage.candidates} candidates, {result.usage.vision_passes} vision passes, "
            f" {result.usage.decoder_calls} decoder calls, {seconds:.2f} s "
            f"({result.stop_reason})",
        )
    for path in written:
        facts.add_row("written", Text(plain(str(path))))
    console.print(facts)


def _add_options(facts: Any, result: ReasoningResult, blocks: str) -> None:
    """A bar for each of the likeliest options, and the probability of all of them together."""
    from rich.text import Text

    ranked = sorted(result.choices or (), key=lambda choice: -choice.probability)
    for place, choice in enumerate(ranked[:OPTIONS_SHOWN]):
        filled = round(choice.probability * 20)
        bar = Text(blocks[0] * filled, style="cyan") + Text(blocks[1] * (20 - filled), style="dim")
        named = Text(f" {plain(choice.text)}")
        facts.add_row("" if place else "options", Text(f"{confidence_text(choice.probability)} ") + bar + named)
    if len(ranked) > OPTIONS_SHOWN:
        facts.add_row("", f"and {len(ranked) - OPTIONS_SHOWN} less likely ones")
    if result.mass is not None:
        facts.add_row("any of them", confidence_text(result.mass))


def _confidence(result: ReasoningResult, blocks: str) -> Any:
    from rich.text import Text

    if result.confidence is None:
        return "not known"
    filled = round(result.confidence * 20)
    colour = "green" if result.accepted is not False else "yellow"
    bar = Text(blocks[0] * filled, style=colour) + Text(blocks[1] * (20 - filled), style="dim")
    source = Text(f" {result.confidence_source.replace('_', ' ')}", style="dim")
    return Text(f"{confidence_text(result.confidence)} ") + bar + source


def _no_patches(result: ReasoningResult) -> str:
    """Say why nothing was injected."""
    stood = result.stop_reason in ("confident", "looked", "undecided") or not result.trace
    return NO_SEARCH if stood else NO_PATCHES


def _views(result: ReasoningResult) -> str:
    """Say which windows stayed and what each changed, or that none did."""
    kept = [view for view in result.views if view.accepted]
    count = f"{len(result.views)} window{'' if len(result.views) == 1 else 's'}"
    if not kept:
        return f"at {count}; the answer became surer with none"
    lines = []
    for view in kept:
        image = f" of image {view.image + 1}" if len(result.image_sizes) > 1 else ""
        change = f"{_sure(view.answer_before, view.reward_before)} -> {_sure(view.answer_after, view.reward_after)}"
        lines.append(f"at {view.where}{image}: {change}")
    return "\n".join([*lines, f"({count} looked at)"])


def _sure(answer: str, reward: float) -> str:
    return f"{plain(answer)[:60] or '(empty)'} {confidence_text(reward)}"


def _patch_summary(result: ReasoningResult) -> str:
    """How many, what they brought, and where the one is that the latents looked at most."""
    if not result.patches:
        return _no_patches(result)
    count = len(result.patches)
    most = max(result.patches, key=lambda patch: patch.attention)
    where = "" if most.box is None else f" at {', '.join(f'{value:g}' for value in most.box)}"
    return f"{count} injected; most attention{where} (--patches lists {'it' if count == 1 else 'them'})"


def _patch_table(result: ReasoningResult) -> Any:
    from rich.table import Table

    if not result.patches:
        return _no_patches(result)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("patch", "cell", "box (left, top, right, bottom)", "attention", "gain"):
        table.add_column(name, justify="left" if name.startswith("box") else "right")
    for patch in result.patches:
        box = "not known" if patch.box is None else ", ".join(f"{value:g}" for value in patch.box)
        table.add_row(str(patch.rank + 1), str(patch.cell), box, f"{patch.attention:.3f}", f"{patch.gain:+.2g}")
    return table
