"""Pictures of a result: the image with the patches that the answer rests on.

Patches that were injected stay as they are, less attended ones under a thin veil; the rest of the image lies under a
thicker one, so that colours inside the evidence stay true. Neighbouring patches share one outline in two tones (amber
and black), which is seen on dark and on light images and by colour-blind eyes. Labels count the patches from 1 in the
order of their injection (label 1 is ``result.patches[0]``) and stand outside of the evidence.

This module knows results and Pillow, nothing of models. Pillow and numpy are imported when a picture is drawn.
"""

from __future__ import annotations

import base64
import importlib
import io
import math
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from latent_tool.errors import InputError
from latent_tool.schema import CellAttention, Patch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image, ImageDraw

    from latent_tool.schema import ReasoningResult

__all__ = ["overlay", "overlay_data_uri", "overlay_png", "overlays", "show"]

Box = tuple[float, float, float, float]
Cells = tuple[int, int, int, int]

LEGIBLE_SIDE = 480  # pixels: images with a shorter side below are scaled up by a whole factor ...
LARGEST_SIDE = 2048  # ... and those with a longer side above are scaled down
VEIL = 0.5  # share of grey over what is not evidence
THIN_VEIL = 0.25  # share of grey over evidence without attention; the most attended patch has none
HEAT_OPACITY = (0.35, 0.7)  # of the heat map's colours, from no weight to the largest

AMBER = (255, 176, 0)
BLACK = (0, 0, 0)
GREY = (128, 128, 128)
FRAME = (30, 32, 36)
TEXT = (240, 240, 240)
QUIET = (200, 202, 206)
# Dark blue over grey to yellow: rises evenly in lightness and is told apart with every common colour blindness.
HEAT_STOPS = ((0, 34, 78), (66, 78, 108), (124, 123, 120), (186, 174, 108), (254, 232, 56))


def overlay(
    result: ReasoningResult,
    image: Image.Image,
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
        image: the image that was asked about; an EXIF orientation is applied.
        index: which of the request's images it is, from 0.
        heatmap: ``True`` colours every image cell by the attention it had (``result.attention``), or the patches
            alone if that was not measured; the caption says which. A sequence of ``(box, weight)`` colours these boxes,
            in pixels of the upright image, weights from 0 upwards. Where boxes overlap, the largest weight is seen.
        caption: write answer and confidence below the picture, in Pillow's own font (Latin letters).

    Returns:
        A new RGB image. Patches whose box is not known are counted in the caption, not drawn.

    Raises:
        InputError: the image is not the one the result is about, or a weight is negative or not finite.
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
    result: ReasoningResult, images: Sequence[Image.Image], *, heatmap: bool = False, caption: bool = True
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
    image: Image.Image,
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
    image: Image.Image,
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
    image: Image.Image,
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


def plain_text(text: str, *, limit: int = 1000) -> str:
    """Text on one line, without control, format and bidirectional characters, cut to ``limit`` characters."""
    spaced = "".join(" " if char.isspace() else char for char in text[: 10 * limit])
    line = " ".join("".join(char for char in spaced if unicodedata.category(char)[0] != "C").split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def confidence_text(value: float) -> str:
    """A confidence with two or three digits, rounded down, so that it never seems to reach what it does not."""
    thousandths = value * 1000 + 1e-9
    if not math.isfinite(thousandths):
        return "not finite"
    shown = f"{math.floor(thousandths) / 1000:.3f}"
    return shown.removesuffix("0")


# --- where things are -------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where the picture lies on the canvas; all in pixels of the canvas."""

    size: tuple[int, int]  # of the original image, in its own pixels
    left: int
    top: int
    width: int
    height: int
    canvas: tuple[int, int]
    line: int  # width of each of the outline's two tones
    font: int

    def cells(self, box: Box) -> Cells | None:
        """A box of the original image on the canvas, rounded outwards and cut at the picture; ``None`` if empty."""
        if not all(math.isfinite(edge) for edge in box):
            return None
        across, down = self.width / self.size[0], self.height / self.size[1]
        tiny = 1e-6  # so that 12.0 computed in another order does not become 13
        x, y = ([min(max(0.0, edge), side) for edge in box[i::2]] for i, side in enumerate(self.size))
        left, right = math.floor(x[0] * across + tiny), math.ceil(x[1] * across - tiny)
        top, bottom = math.floor(y[0] * down + tiny), math.ceil(y[1] * down - tiny)
        if right <= left or bottom <= top:
            return None
        return left + self.left, top + self.top, right + self.left, bottom + self.top


def layout_of(size: tuple[int, int], largest: int = LARGEST_SIDE) -> Layout:
    """Scale and place an image of ``size`` (width, height) so that no side is above ``largest``, in pixels."""
    shorter, longer = min(size), max(size)
    if longer > largest:
        factor = largest / longer
        width, height = (max(1, round(side * factor)) for side in size)
    else:
        whole = max(1, min(math.ceil(LEGIBLE_SIDE / shorter), largest // longer))
        width, height = size[0] * whole, size[1] * whole
    font = min(30, max(15, min(width, height) // 24))
    line = max(2, font // 8)
    frame = font + 4 * line + 8  # room for a label beside the outline
    wide, high = max(width + 2 * frame, LEGIBLE_SIDE), height + 2 * frame
    return Layout(size, (wide - width) // 2, frame, width, height, (wide, high), line, font)


def upright_image(result: ReasoningResult, image: Image.Image, index: int) -> Image.Image:
    """The caller's image, upright and RGB, after checking that it is the one the result is about."""
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        raise InputError(
            f"The image is {type(image).__name__}, not a PIL image.",
            "Open it with latent_tool.images.load.load_image or PIL.Image.open.",
        )
    count = len(result.image_sizes)
    if index < 0 or (count and index >= count):
        raise InputError(f"There is no image {index}: the result is about {count}.", "Images count from 0.")
    upright = ImageOps.exif_transpose(image)
    if count and upright.size != tuple(result.image_sizes[index]):
        width, height = result.image_sizes[index]
        raise InputError(
            f"The image is {upright.width} x {upright.height} pixels, image {index} of the result was "
            f"{width} x {height}.",
            "Pass the image that was asked about, not resized or cropped.",
        )
    if upright.has_transparency_data:
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
    return upright.convert("RGB")


# --- shading ----------------------------------------------------------------------------------------------------------


def attention_share(attention: float, most: float) -> float:
    """Attention as a share of the largest, in [0, 1]; 1 where there is nothing to compare with."""
    return attention / most if 0 < most < math.inf else 1.0


def _scaled(image: Image.Image, layout: Layout) -> Image.Image:
    from PIL import Image

    larger = layout.width >= layout.size[0]
    filter_ = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    return image.resize((layout.width, layout.height), filter_, reducing_gap=None if larger else 3.0)


def _painted(layout: Layout, shades: Sequence[tuple[Cells, float]], ground: float) -> NDArray[np.float32]:
    """A map ``(height, width)`` of the picture with ``shades`` painted on it in their order."""
    import numpy as np

    plane = np.full((layout.height, layout.width), ground, dtype=np.float32)
    for (left, top, right, bottom), shade in shades:
        plane[top - layout.top : bottom - layout.top, left - layout.left : right - layout.left] = shade
    return plane


def _mask(plane: NDArray[np.float32]) -> Image.Image:
    from PIL import Image

    return Image.fromarray((plane * 255).round().astype("uint8"))


def _veiled(picture: Image.Image, layout: Layout, cells: Sequence[tuple[Cells, float]]) -> Image.Image:
    """The picture under grey, thinner over patches the more they were attended to."""
    from PIL import Image

    most = max(attention for _, attention in cells)
    rising = sorted(cells, key=lambda item: item[1])
    shades = [(where, THIN_VEIL * (1 - attention_share(attention, most))) for where, attention in rising]
    veil = _mask(_painted(layout, shades, VEIL))
    return Image.composite(Image.new("RGB", picture.size, GREY), picture, veil)


def heat_of(result: ReasoningResult, index: int) -> tuple[list[tuple[Box, float]], float]:
    """What a heat map of image ``index`` shows, boxes and weights, and the largest weight in all images."""
    cells: Sequence[CellAttention | Patch] = result.patches if result.attention is None else result.attention
    weights = [cell.attention if isinstance(cell, Patch) else cell.weight for cell in cells]
    pairs = zip(cells, weights, strict=True)
    shown = [(cell.box, weight) for cell, weight in pairs if cell.image == index and cell.box is not None]
    return shown, max(weights, default=0.0)


def heat_text(result: ReasoningResult, index: int) -> str:
    """One line about what the heat map of image ``index`` shows, and what it cannot show."""
    if result.attention is None:
        left = "the attention to all image cells was not measured"
        return f"colours: the patches alone, {left}" if heat_of(result, index)[0] else f"no heat map: {left}"
    cells = [cell for cell in result.attention if cell.image == index]
    placed = sum(cell.box is not None for cell in cells)
    if not placed:
        return f"no heat map: the places of the {len(cells)} image cells are not known"
    text = f"colours: attention of the latents to {placed} image {'cell' if placed == 1 else 'cells'}"
    return text if placed == len(cells) else f"{text}; the places of {len(cells) - placed} more are not known"


def heat_layer(layout: Layout, weighted: Sequence[tuple[Box, float]], most: float) -> Image.Image:
    """The colours of a heat map as a picture to lay over the other one, transparent where there is no box.

    Weights count from 0 to ``most``; where boxes overlap, the largest weight is seen. The picture has a palette, which
    makes it small as a PNG. Raises ``InputError`` for a weight that is negative or not finite.
    """
    from PIL import Image

    if not all(math.isfinite(weight) and weight >= 0 for _, weight in weighted):
        raise InputError("A weight of the heat map is negative or not finite.", "Weights start at 0, as attention.")
    rising = sorted(((layout.cells(box), weight / (most or 1.0)) for box, weight in weighted), key=lambda item: item[1])
    shades = [(where, round(1 + 254 * weight)) for where, weight in rising if where is not None]
    layer = Image.fromarray(_painted(layout, shades, 0).astype("uint8"))
    layer.putpalette(_heat_colours())
    low, high = HEAT_OPACITY
    layer.info["transparency"] = bytes(
        [0, *(round(255 * low + (high - low) * (level - 1) / 254 * 255) for level in range(1, 256))]
    )
    return layer


def _heat_colours() -> list[int]:
    """256 colours, as red, green, blue, red, ...: one for no cell, then those of the heat map from 0 upwards."""
    colours = [0, 0, 0]
    for level in range(255):
        at = level / 254 * (len(HEAT_STOPS) - 1)
        low = min(int(at), len(HEAT_STOPS) - 2)
        colours += [round(a + (at - low) * (b - a)) for a, b in zip(HEAT_STOPS[low], HEAT_STOPS[low + 1], strict=True)]
    return colours


# --- labels -----------------------------------------------------------------------------------------------------------


def _regions(placed: Sequence[tuple[int, Cells]]) -> list[list[tuple[int, Cells]]]:
    """Patches grouped so that those that overlap or share a stretch of an edge are together, each by rank."""
    import numpy as np

    if not placed:
        return []
    placed = sorted(placed)
    left, top, right, bottom = np.array([cells for _, cells in placed]).T
    across = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
    down = np.minimum(bottom[:, None], bottom) - np.maximum(top[:, None], top)
    touching = (across >= 0) & (down >= 0) & (across + down > 0)
    regions, waiting = [], np.ones(len(placed), dtype=bool)
    for first in range(len(placed)):
        if not waiting[first]:
            continue
        members, fresh = set[int](), [first]
        waiting[first] = False
        while fresh:
            members.update(fresh)
            reached = touching[fresh].any(axis=0) & waiting
            waiting[reached] = False
            fresh = [int(i) for i in np.flatnonzero(reached)]
        regions.append([placed[i] for i in sorted(members)])
    return regions


def _rank_text(ranks: Sequence[int]) -> str:
    """Ranks in rising order as a short label: ``"1-3, 7, +4"``."""
    runs: list[tuple[int, int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], rank)
        else:
            runs.append((rank, rank))
    shown = runs if len(runs) <= 4 else runs[:3]
    parts = [f"{a}" if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in shown]
    rest = sum(b - a + 1 for a, b in runs[len(shown) :])
    return ", ".join([*parts, f"+{rest}"] if rest else parts)


class Label(NamedTuple):
    """Ranks of a region and where they are written."""

    text: str
    box: Cells
    leader: tuple[int, int] | None  # the point of the region that a line leads to, if the label is not right beside it

    @property
    def middle(self) -> tuple[int, int]:
        left, top, right, bottom = self.box
        return (left + right) // 2, (top + bottom) // 2


def labels_of(layout: Layout, placed: Sequence[tuple[int, Cells]]) -> list[Label]:
    """A label for every region, where no evidence and no other label is; regions without such a place have none."""
    import numpy as np
    from PIL import ImageFont

    font = ImageFont.load_default(layout.font)
    taken = np.zeros((layout.canvas[1], layout.canvas[0]), dtype=bool)
    reach = 2 * layout.line
    for _, (left, top, right, bottom) in placed:
        taken[top - reach : bottom + reach, left - reach : right + reach] = True
    labels = []
    for region in _regions(placed):
        text = _rank_text([rank for rank, _ in region])
        size = math.ceil(font.getlength(text)) + layout.font // 2 + 2, layout.font + 6
        for (x, y), leader in _places([cells for _, cells in region], size, reach):
            right, bottom = x + size[0], y + size[1]
            on_canvas = x >= 0 and y >= 0 and right <= layout.canvas[0] and bottom <= layout.canvas[1]
            if on_canvas and not taken[y:bottom, x:right].any():
                taken[y:bottom, x:right] = True
                labels.append(Label(text, (x, y, right, bottom), leader))
                break
    return labels


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


def _places(
    region: Sequence[Cells], size: tuple[int, int], reach: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int] | None]]:
    """Places for a label, best first: its corner, and the point of the region that a line has to lead to, if any.

    First beside the cells, in the order of their ranks; then further and further off.
    """
    wide, high = size
    for left, top, right, bottom in region:
        for x in (left, right - wide):
            yield (x, top - reach - high), None
            yield (x, bottom + reach), None
        for y in (top, bottom - high):
            yield (right + reach, y), None
            yield (left - reach - wide, y), None
    for distance in range(1, 5):
        for left, top, right, bottom in region[:64]:
            for step_x, step_y in ((0, -1), (0, 1), (1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1)):
                corner_x = left - reach - wide if step_x < 0 else right + reach if step_x > 0 else left
                corner_y = top - reach - high if step_y < 0 else bottom + reach if step_y > 0 else top
                edge_x = left if step_x < 0 else right - 1 if step_x > 0 else (left + right) // 2
                edge_y = top if step_y < 0 else bottom - 1 if step_y > 0 else (top + bottom) // 2
                yield (corner_x + step_x * distance * high, corner_y + step_y * distance * high), (edge_x, edge_y)


# --- caption ----------------------------------------------------------------------------------------------------------


def _caption_lines(result: ReasoningResult, index: int, without_place: int) -> list[str]:
    if result.confidence is None:
        confidence = "confidence: not scored"
    else:
        confidence = f"confidence {confidence_text(result.confidence)} ({result.confidence_source.replace('_', ' ')})"
    if result.min_confidence is not None and result.accepted is not None:
        confidence += f", {'accepted' if result.accepted else 'abstained'} at {confidence_text(result.min_confidence)}"
    lines = [plain_text(result.answer) or "(empty answer)", confidence]
    if len(result.image_sizes) > 1:
        lines.append(f"image {index + 1} of {len(result.image_sizes)}")
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
        colours = _heat_colours()
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
