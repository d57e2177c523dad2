"""Pictures of a result: the image with the patches that the answer rests on.

Patches that were injected stay as they are, less attended ones under a thin veil; the rest of the image lies under a
thicker one, so that colours inside the evidence stay true. Neighbouring patches share one outline in two tones (amber
and black), which is seen on dark and on light images and by colour-blind eyes; windows that were looked at again are
outlined in blue and black. Labels count the patches from 1 in the
order of their injection (label 1 is ``result.patches[0]``) and stand outside of the evidence.

This module knows results and Pillow, nothing of models. Pillow and numpy are imported when a picture is drawn.
"""

from __future__ import annotations

import base64
import importlib
import io
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from latent_tool.errors import InputError
from latent_tool.views.heat import attention_share, heat_colours, heat_layer, heat_of, heat_text, painted
from latent_tool.views.layout import Box, Cells, Label, Layout, labels_of, layout_of
from latent_tool.views.pictures import upright_image
from latent_tool.words import confidence_text, plain_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image, ImageDraw

    from latent_tool.schema import ReasoningResult

__all__ = ["overlay", "overlay_data_uri", "overlay_png", "overlays", "show"]

VEIL = 0.5  # share of grey over what is not evidence
THIN_VEIL = 0.25  # share of grey over evidence without attention; the most attended patch has none

AMBER = (255, 176, 0)
BLUE = (86, 180, 233)
BLACK = (0, 0, 0)
GREY = (128, 128, 128)
FRAME = (30, 32, 36)
TEXT = (240, 240, 240)
QUIET = (200, 202, 206)


def overlay(
    result: ReasoningResult,
    image: object = None,
    *,
    index: int = 0,
    heatmap: bool | Sequence[tuple[Box, float]] = False,
    caption: bool = True,
) -> Image.Image:
    """Draw the patches of a result on its image.

    Images with a shorter side below 480 pixels are scaled up by a whole factor, without smoothing; images with a longer
    side above 2,048 pixels are scaled down. Around the picture is a frame for labels. The image is not changed.

    Args:
        result: what a reasoner returned.
        image: the image that was asked about, as ``invoke`` takes it (PIL image, path, bytes, data URI, ...), opened
            under ``ImagePolicy.local()``; an EXIF orientation is applied. Without it the picture is opened again that
            the result was made from, in the process that made it.
        index: which of the request's images it is, from 0.
        heatmap: ``True`` colours every image cell by the attention it had (``result.attention``), or the patches
            alone if that was not measured; the caption says which. A sequence of ``(box, weight)`` colours these boxes,
            in pixels of the upright image, weights from 0 upwards. Where boxes overlap, the largest weight is seen.
        caption: write answer and confidence below the picture, in Pillow's own font (Latin letters).

    Returns:
        A new RGB image. Patches whose box is not known are counted in the caption, not drawn.

    Raises:
        InputError: the image is not the one the result is about, or a weight is negative or not finite.
        ImageError: the image cannot be opened.
    """
    from PIL import Image, ImageDraw

    upright = upright_image(result, image, index)
    patches = [patch for patch in result.patches if patch.image == index]
    known = [(patch.rank + 1, patch.box, patch.attention) for patch in patches if patch.box is not None]
    layout = layout_of(upright.size)
    placed = [(rank, layout.cells(box), attention) for rank, box, attention in known]
    drawn = [(rank, cells, attention) for rank, cells, attention in placed if cells is not None]
    if heatmap is True:
        weighted, most = heat_of(result, index)
    else:
        weighted = list(heatmap or ())
        most = max((weight for _, weight in weighted), default=0.0)

    picture = _scaled(upright, layout)
    if weighted:
        layer = heat_layer(layout, weighted, most).convert("RGBA")
        picture = Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")
    elif drawn:
        picture = _veiled(picture, layout, [(cells, attention) for _, cells, attention in drawn])

    canvas = Image.new("RGB", layout.canvas, FRAME)
    draw = ImageDraw.Draw(canvas)
    canvas.paste(picture, (layout.left, layout.top))
    _draw_windows(draw, layout, result, index)
    for colour, reach in ((BLACK, 2 * layout.line), (AMBER, layout.line)):
        for _, (left, top, right, bottom), _ in drawn:
            draw.rectangle((left - reach, top - reach, right + reach - 1, bottom + reach - 1), fill=colour)
    for _, (left, top, right, bottom), _ in drawn:
        inside = picture.crop((left - layout.left, top - layout.top, right - layout.left, bottom - layout.top))
        canvas.paste(inside, (left, top))
    _draw_labels(draw, layout, labels_of(layout, [(rank, cells) for rank, cells, _ in drawn]))
    if not caption:
        return canvas
    lines = _caption_lines(result, index, len(patches) - len(drawn))
    if heatmap is True:
        lines.append(heat_text(result, index))
    return _with_caption(canvas, layout, lines, most if weighted else None)


def overlays(
    result: ReasoningResult, images: Sequence[object], *, heatmap: bool = False, caption: bool = True
) -> list[Image.Image]:
    """``overlay`` for every image of a request, in order; raises ``InputError`` if their number is wrong."""
    if result.image_sizes and len(images) != len(result.image_sizes):
        raise InputError(
            f"The result is about {len(result.image_sizes)} images, not {len(images)}.",
            "Pass the same images as in the request, in the same order.",
        )
    return [overlay(result, image, index=i, heatmap=heatmap, caption=caption) for i, image in enumerate(images)]


def overlay_png(
    result: ReasoningResult,
    image: object = None,
    *,
    index: int = 0,
    heatmap: bool | Sequence[tuple[Box, float]] = False,
    caption: bool = True,
) -> bytes:
    """``overlay`` as the bytes of a PNG file."""
    stream = io.BytesIO()
    overlay(result, image, index=index, heatmap=heatmap, caption=caption).save(stream, "PNG", optimize=False)
    return stream.getvalue()


def overlay_data_uri(
    result: ReasoningResult,
    image: object = None,
    *,
    index: int = 0,
    heatmap: bool | Sequence[tuple[Box, float]] = False,
    caption: bool = True,
) -> str:
    """``overlay`` as a ``data:image/png;base64,...`` URI for an ``<img>`` or a message."""
    png = overlay_png(result, image, index=index, heatmap=heatmap, caption=caption)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def show(
    result: ReasoningResult,
    image: object = None,
    *,
    index: int = 0,
    heatmap: bool | Sequence[tuple[Box, float]] = False,
    caption: bool = True,
) -> None:
    """Show the overlay: inline in a notebook, otherwise in the system's image viewer."""
    picture = overlay(result, image, index=index, heatmap=heatmap, caption=caption)
    display = _notebook_display()
    if display is not None:
        display(picture)
    else:
        picture.show()


def _notebook_display() -> Any:
    """IPython's ``display`` when this code runs in a notebook's kernel, else ``None``."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    return importlib.import_module("IPython.display").display


# --- shading ----------------------------------------------------------------------------------------------------------


def _scaled(image: Image.Image, layout: Layout) -> Image.Image:
    from PIL import Image

    larger = layout.width >= layout.size[0]
    filter_ = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    return image.resize((layout.width, layout.height), filter_, reducing_gap=None if larger else 3.0)


def _mask(plane: NDArray[np.float32]) -> Image.Image:
    from PIL import Image

    return Image.fromarray((plane * 255).round().astype("uint8"))


def _veiled(picture: Image.Image, layout: Layout, cells: Sequence[tuple[Cells, float]]) -> Image.Image:
    """The picture under grey, thinner over patches the more they were attended to."""
    from PIL import Image

    most = max(attention for _, attention in cells)
    rising = sorted(cells, key=lambda item: item[1])
    shades = [(where, THIN_VEIL * (1 - attention_share(attention, most))) for where, attention in rising]
    veil = _mask(painted(layout, shades, VEIL))
    return Image.composite(Image.new("RGB", picture.size, GREY), picture, veil)


# --- windows ----------------------------------------------------------------------------------------------------------


def _draw_windows(draw: ImageDraw.ImageDraw, layout: Layout, result: ReasoningResult, index: int) -> None:
    """Outline the windows of an image that were looked at again and stayed, on their inner side."""
    for view in result.views:
        where = layout.cells(view.box) if view.accepted and view.image == index else None
        if where is None:
            continue
        left, top, right, bottom = where
        reach = layout.line
        draw.rectangle((left - reach, top - reach, right + reach - 1, bottom + reach - 1), outline=BLACK, width=reach)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=BLUE, width=2 * reach)


# --- labels -----------------------------------------------------------------------------------------------------------


def _draw_labels(draw: ImageDraw.ImageDraw, layout: Layout, labels: Sequence[Label]) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(layout.font)
    for label in labels:
        if label.leader is not None:
            draw.line((*label.leader, *label.middle), fill=BLACK, width=layout.line + 2)
            draw.line((*label.leader, *label.middle), fill=AMBER, width=layout.line)
    for label in labels:
        left, top, right, bottom = label.box
        draw.rounded_rectangle((left, top, right - 1, bottom - 1), 4, fill=AMBER, outline=BLACK, width=1)
        draw.text(label.middle, label.text, fill=BLACK, font=font, anchor="mm")


# --- caption ----------------------------------------------------------------------------------------------------------


def _caption_lines(result: ReasoningResult, index: int, without_place: int) -> list[str]:
    if result.confidence is None:
        confidence = "confidence: not scored"
    else:
        confidence = f"confidence {confidence_text(result.confidence)} ({result.confidence_source.replace('_', ' ')})"
    if result.min_confidence is not None and result.accepted is not None:
        confidence += f", {'accepted' if result.accepted else 'abstained'} at {confidence_text(result.min_confidence)}"
    lines = [plain_text(result.answer) or "(empty answer)", confidence]
    if result.barred is not None:
        lines.append(plain_text(result.barred))
    if len(result.image_sizes) > 1:
        lines.append(f"image {index + 1} of {len(result.image_sizes)}")
    if again := [view.where for view in result.views if view.accepted and view.image == index]:
        lines.append(f"looked again at {', '.join(again)}")
    if without_place:
        lines.append(f"{without_place} more {'patch' if without_place == 1 else 'patches'} without a known place")
    return lines


def _with_caption(canvas: Image.Image, layout: Layout, lines: Sequence[str], largest: float | None) -> Image.Image:
    """The canvas with lines of text below it, the first one larger, and the scale of a heat map if there is one."""
    from PIL import Image, ImageDraw, ImageFont

    margin = layout.font
    room = canvas.width - 2 * margin
    big, small = ImageFont.load_default(layout.font + 4), ImageFont.load_default(layout.font)
    rows = [(line, big, TEXT) for line in _wrapped(lines[0], big, room)]
    rows += [(row, small, QUIET) for line in lines[1:] for row in _wrapped(line, small, room)]
    steps = [round((layout.font + (4 if font is big else 0)) * 1.4) for _, font, _ in rows]
    scale = round(layout.font * 1.6) if largest is not None else 0
    whole = Image.new("RGB", (canvas.width, canvas.height + sum(steps) + scale + margin), FRAME)
    whole.paste(canvas, (0, 0))
    draw = ImageDraw.Draw(whole)
    y = canvas.height
    for (text, font, colour), step in zip(rows, steps, strict=True):
        draw.text((margin, y), text, fill=colour, font=font)
        y += step
    if largest is not None:
        before, after = "0", f"{largest:.3g}"
        x = margin + math.ceil(small.getlength(before)) + 8
        stretch = max(16, min(256, room - math.ceil(small.getlength(before + after)) - 24))
        colours = heat_colours()
        for column in range(stretch):
            level = 3 * round(1 + column / (stretch - 1) * 254)
            red, green, blue = colours[level : level + 3]
            draw.line((x + column, y + 3, x + column, y + layout.font), fill=(red, green, blue))
        draw.text((margin, y), before, fill=TEXT, font=small)
        draw.text((x + stretch + 8, y), after, fill=TEXT, font=small)
    return whole


def _wrapped(text: str, font: Any, room: float, most: int = 3) -> list[str]:
    """Text in at most ``most`` rows of ``room`` pixels, broken at spaces where there are any."""
    rows: list[str] = []
    rest = text
    while rest and len(rows) < most:
        fits = len(rest)
        while fits > 1 and font.getlength(rest[:fits]) > room:
            fits = min(fits - 1, int(fits * room / font.getlength(rest[:fits])) + 1)
        if fits < len(rest) and (space := rest.rfind(" ", 1, fits + 1)) > 0:
            fits = space
        rows.append(rest[:fits].rstrip())
        rest = rest[fits:].lstrip()
    if rest:
        last = rows[-1]
        while last and font.getlength(last + "…") > room:
            last = last[:-1]
        rows[-1] = last + "…"
    return rows
