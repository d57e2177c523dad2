"""One self-contained HTML page about a result: what was asked, what was answered, and what the answer rests on.

The page loads nothing: its style and script are inside and named by their hashes in a content security policy that
forbids everything else; images are data URIs. It can be read without the script, which only links the patches in the
picture with their rows in the table. Whatever comes from outside (question, answer, tokens, names) is escaped by the
template engine. Besides the images the page stays below 300 kB: long lists are cut, and the page says so.

This module knows results and overlays, nothing of models. Jinja and Pillow are imported when a page is made.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tool.about import what_it_is
from latent_tool.errors import InputError
from latent_tool.files import write_whole
from latent_tool.schema import CONFIDENCE_SOURCES
from latent_tool.validation import Settings
from latent_tool.views.chart import reward_chart
from latent_tool.views.heat import HEAT_STOPS, attention_share, heat_layer, heat_of, heat_text
from latent_tool.views.layout import labels_of, layout_of
from latent_tool.views.overlay import THIN_VEIL, VEIL
from latent_tool.views.pictures import as_list, upright_image
from latent_tool.words import NOTHING, confidence_text, number_text, visible_text

if TYPE_CHECKING:
    from PIL import Image

    from latent_tool.schema import Grounding, ReasoningResult
    from latent_tool.views.layout import Layout

__all__ = ["report_html", "summary_html", "write_report"]

MOST_PATCHES = 100  # listed and drawn
MOST_VIEWS = 32
MOST_TOKENS = 256
MOST_OPTIONS = 40
MOST_ROUNDS = 50  # rows of the table; the chart has more
MOST_TEXT = 3_000  # characters of one text
MOST_NAME = 500  # characters of the name of a model or of an image
PICTURE_SIDE = 900  # pixels: longer sides are shown smaller than they are ...
EMBEDDED_SIDE = 1600  # ... and embedded with at most this

STOPPED = {
    "iterations": "all rounds of the budget were used",
    "max_candidates": "the budget's candidates were used up",
    "deadline": "the deadline came",
    "target_reward": "the target reward was reached",
    "patience": "the reward no longer rose",
    "converged": "nothing was left to improve",
    "confident": "the answer was sure enough before any search",
    "looked": "a window of the picture made the answer surer",
    "undecided": "the model leaned to no answer that a search could sharpen",
    "no_latents": "there was nothing to search: no latents",
    "cancelled": "the caller stopped it",
}
FINISHED = {
    "stop": "the model ended its answer",
    "length": "max_new_tokens was reached, the answer may be cut",
    "deadline": "the deadline came, the answer may be cut",
}


def report_html(
    result: ReasoningResult,
    images: object,
    *,
    question: str,
    names: Sequence[str] | None = None,
) -> str:
    """Return the report page of a result.

    Args:
        result: what a reasoner returned.
        images: the image or a list of the images that were asked about, in the order of the request, as ``invoke``
            takes them (PIL image, path, bytes, data URI, ...), opened under ``ImagePolicy.local()``.
        question: the question as it was asked.
        names: names of the images, for example of their files; shown, and used in the snippet.

    Returns:
        A complete HTML document without references to anything outside of it.

    Raises:
        InputError: the images are not those the result is about.
        ImageError: an image cannot be opened.
    """
    import jinja2

    pictures = as_list(images)
    for given, what in ((pictures, "images"), (names, "names")):
        if given is not None and result.image_sizes and len(given) != len(result.image_sizes):
            raise InputError(
                f"The result is about {len(result.image_sizes)} images, not {len(given)} {what}.",
                "Pass one for each image of the request, in the same order.",
            )
    shown = [_visible(name, 200) for name in names or ("image.png",) * len(pictures)]
    rows, style, script = _patch_rows(result), SHARED_STYLE + _file("report.css"), _file("report.js")
    ranked = sorted(result.choices or (), key=lambda choice: -choice.probability)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number_text, visible=_visible, confidence=_confidence)
    return environment.from_string(_file("report.html")).render(
        result=result,
        question=question,
        options=ranked[:MOST_OPTIONS],
        more_options=len(ranked[MOST_OPTIONS:]),
        figures=[_figure(result, rows, picture, i, shown[i]) for i, picture in enumerate(pictures)],
        names_shown=names is not None,
        patches=rows,
        more_patches=len(result.patches) - len(rows),
        views=_view_rows(result),
        kept=[view.where for view in result.views if view.accepted],
        grounding=_grounding(result.grounding),
        fell=_fell(result),
        chart=reward_chart(result.trace, result.confidence, result.min_confidence),
        most_attention=heat_of(result, 0)[1],
        heat_stops=["#" + bytes(colour).hex() for colour in HEAT_STOPS],
        trace=result.trace[-MOST_ROUNDS:],
        more_rounds=max(0, len(result.trace) - MOST_ROUNDS),
        costs=_costs(result),
        phases=_phases(result),
        scores=list(result.scores),
        settings=[("All search settings", _fields(result.settings)), ("The whole budget", _fields(result.budget))],
        snippet=_snippet(result, question, list(names or shown)),
        nothing=NOTHING,
        about=what_it_is(result.model),
        unsure=result.unsure,
        sources=CONFIDENCE_SOURCES,
        stopped=STOPPED,
        finished=FINISHED,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def write_report(
    path: str | Path,
    result: ReasoningResult,
    images: object,
    *,
    question: str,
    names: Sequence[str] | None = None,
) -> Path:
    """Write ``report_html`` to ``path``: either the whole page is there afterwards, or what was there before.

    Raises:
        InputError: the images do not belong to the result.
        SettingsError: the file cannot be written.
    """
    page = report_html(result, images, question=question, names=names)
    path = Path(path)
    write_whole(path, page.encode())
    return path


def summary_html(result: ReasoningResult) -> str:
    """Write a few lines of HTML about a result, without picture: what a notebook shows for it."""
    return result._repr_html_()


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


# What the report and the playground have in common: colours, texts, tables, charts and tokens.
SHARED_STYLE = _file("shared.css")


def _visible(text: str, limit: int = MOST_TEXT) -> str:
    return visible_text(text, limit=limit)


def _confidence(value: float | None) -> str:
    return NOTHING if value is None else confidence_text(value)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- parts of the page ------------------------------------------------------------------------------------------------


def _patch_rows(result: ReasoningResult) -> list[dict[str, Any]]:
    rounds = {cell: row.round for row in result.trace for cell in row.accepted}
    patches = result.patches[:MOST_PATCHES]
    most = max((patch.attention for patch in patches), default=0.0)
    rows = []
    for patch in patches:
        found, number = rounds.get(patch.cell), patch.rank + 1
        box = None if patch.box is None else ", ".join(f"{round(edge, 1):g}" for edge in patch.box)
        since = "" if found is None else f" in round {found}"
        about = (
            f"Patch {number}: attention {number_text(patch.attention)}, gain {number_text(patch.gain)}, "
            f"proposed by latent {patch.latent + 1}{since}, box {box or 'not known'}"
        )
        share = attention_share(patch.attention, most)
        rows.append(
            {
                "patch": patch,
                "number": number,
                "round": found,
                "box": box,
                "about": about,
                "share": share,
                "bar": round(60 * share, 1),
            }
        )
    return rows


def _view_rows(result: ReasoningResult) -> list[dict[str, Any]]:
    """The windows that were looked at again, with the part of the page's picture that each of them is."""
    rows = []
    for view in result.views[:MOST_VIEWS]:
        known = result.image_sizes[view.image] if view.image < len(result.image_sizes) else None
        layout = None if known is None else layout_of(known, PICTURE_SIDE)
        part = None
        if layout is not None and known is not None:
            across, down = layout.width / known[0], layout.height / known[1]
            left, top, right, bottom = view.box
            size = max(1.0, (right - left) * across), max(1.0, (bottom - top) * down)
            scale = 96 / max(size)
            part = {
                "box": [round(value, 2) for value in (layout.left + left * across, layout.top + top * down, *size)],
                "size": [max(1, round(edge * scale)) for edge in size],
            }
        rows.append({"view": view, "part": part})
    return rows


def _figure(
    result: ReasoningResult, rows: Sequence[dict[str, Any]], image: object, index: int, name: str
) -> dict[str, Any]:
    """What the template needs to draw one image with its patches; places are in the units of the SVG's view box."""
    upright = upright_image(result, image, index)
    layout = layout_of(upright.size, PICTURE_SIDE)
    marks, placed = [], []
    for row in rows:
        patch = row["patch"]
        cells = layout.cells(patch.box) if patch.image == index and patch.box is not None else None
        if cells is not None:
            left, top, right, bottom = cells
            rect = {"x": left, "y": top, "width": right - left, "height": bottom - top}
            level = round(255 * THIN_VEIL / VEIL * (1 - row["share"]))
            marks.append({"row": row, "rect": rect, "veil": f"#{level:02x}{level:02x}{level:02x}"})
            placed.append((row["number"], cells))
    windows = [
        {"x": where[0], "y": where[1], "width": where[2] - where[0], "height": where[3] - where[1]}
        for view in result.views
        if view.accepted and view.image == index and (where := layout.cells(view.box)) is not None
    ]
    return {
        "name": name,
        "uri": _data_uri(upright),
        "pixelated": layout.width > upright.width,
        "size": upright.size,
        "layout": layout,
        "heat": _heat(result, index, layout),
        "marks": marks,
        "windows": windows,
        "labels": labels_of(layout, placed),
    }


def _heat(result: ReasoningResult, index: int, layout: Layout) -> dict[str, str | None] | None:
    """The heat map of an image as a layer to lay over it, and what it shows; ``None`` if that was not measured."""
    if result.attention is None:
        return None
    weighted, most = heat_of(result, index)
    text = heat_text(result, index)
    if not weighted:
        return {"uri": None, "about": None, "text": text}
    stream = io.BytesIO()
    heat_layer(layout, weighted, most).save(stream, "PNG", optimize=True)
    box, weight = max(weighted, key=lambda pair: pair[1])
    where = ", ".join(f"{round(edge, 1):g}" for edge in box)
    return {
        "uri": _png_uri(stream),
        "about": f"Heat map, {text}; the largest, {number_text(weight)}, at box {where}",
        "text": text,
    }


def _png_uri(stream: io.BytesIO, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _data_uri(image: Image.Image) -> str:
    """The pixels of an image, and nothing else that its file held, as a data URI: PNG, or JPEG where that is large."""
    from PIL import Image

    clean = Image.new("RGB", image.size)
    clean.paste(image)
    clean.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE), Image.Resampling.LANCZOS)
    kind, stream = "png", io.BytesIO()
    clean.save(stream, "PNG", optimize=clean.width * clean.height < 250_000)
    if stream.tell() > 400_000:
        kind, stream = "jpeg", io.BytesIO()
        clean.save(stream, "JPEG", quality=90)
    return _png_uri(stream, kind)


def _grounding(grounding: Grounding | None) -> dict[str, Any] | None:
    """Tokens with a level from -3 (speaks against the image) to 5 (rests on it), as the style sheet colours them."""
    if grounding is None:
        return None
    threshold = grounding.noise.threshold
    tokens = []
    for token in grounding.tokens[:MOST_TOKENS]:
        s = token.dependency
        level = max(-3, min(5, math.ceil(abs(s) - 0.25) * (1 if s > 0 else -1))) if math.isfinite(s) else 0
        text = _visible(token.token, 24)
        classes = [f"m{-level}" if level < 0 else f"p{level}"]
        classes += ["above"] * (s > threshold) + ["answers"] * token.in_answer
        listed = text.replace("\n", "⏎").replace(" ", "␣")
        tokens.append({"text": text, "listed": listed, "token": token, "classes": " ".join(classes)})
    more = len(grounding.tokens) - len(tokens)
    return {"whole": grounding, "tokens": tokens, "more": more, "threshold": threshold}


def _fell(result: ReasoningResult) -> bool:
    """Whether noise takes more than half of the confidence away."""
    noised = result.controls.image_noised.confidence if result.controls else None
    return noised is not None and result.confidence is not None and noised < result.confidence / 2


def _costs(result: ReasoningResult) -> list[tuple[str, str, str]]:
    """What was used, and how much the budget allowed: name, used, at most."""
    usage, budget = result.usage, result.budget
    if usage is None:
        return []
    rounds = max((row.round for row in result.trace), default=0)

    def limit(name: str) -> str:
        return number_text(getattr(budget, name, None))

    seconds = sum(value for value in usage.seconds.values() if math.isfinite(value))
    return [
        ("rounds", number_text(rounds), limit("iterations")),
        ("candidates scored", number_text(usage.candidates), limit("max_candidates")),
        ("candidates discarded", number_text(usage.discarded), NOTHING),
        ("windows looked at again", number_text(usage.views), limit("max_views")),
        ("vision passes", number_text(usage.vision_passes), NOTHING),
        ("patches injected", number_text(usage.patch_tokens), limit("max_patches")),
        ("latents", number_text(usage.latent_tokens), NOTHING),
        ("tokens generated", number_text(usage.generated_tokens), limit("max_new_tokens")),
        ("tokens of the prompt", number_text(usage.prompt_tokens), NOTHING),
        ("of these, image cells", number_text(usage.image_cells), NOTHING),
        ("decoder calls", number_text(usage.decoder_calls), NOTHING),
        ("seconds", number_text(seconds), limit("deadline_s")),
    ]


def _phases(result: ReasoningResult) -> list[dict[str, Any]]:
    """Seconds per phase, with the width of a bar of at most 160."""
    if result.usage is None:
        return []
    seconds = {name: value for name, value in result.usage.seconds.items() if math.isfinite(value)}
    most = max(seconds.values(), default=0.0)
    return [
        {"name": name, "seconds": value, "bar": round(160 * value / most, 1) if most > 0 else 0}
        for name, value in list(seconds.items())[:20]
    ]


# --- how to get the same again ----------------------------------------------------------------------------------------


def _fields(settings: Settings | None) -> list[tuple[str, str, bool]]:
    """Every field of a settings object, those of a group too: its name, its value as Python writes it, and whether it
    is not the default.
    """
    if settings is None:
        return []
    rows = []
    for name, value in settings:
        if isinstance(value, Settings):
            rows += [(f"{name}.{inner}", shown, changed) for inner, shown, changed in _fields(value)]
        else:
            rows.append((name, repr(value), value != type(settings).model_fields[name].default))
    return rows


def _options_asked(result: ReasoningResult) -> list[tuple[str, Any]]:
    """The options of a request, as its fields."""
    if result.choices is None:
        return []
    asked: list[tuple[str, Any]] = [("options", [choice.text for choice in result.choices if not choice.unsure])]
    return [*asked, ("unsure", True)] if any(choice.unsure for choice in result.choices) else asked


def _snippet(result: ReasoningResult, question: str, names: Sequence[str]) -> str:
    """Python that asks the same again. Every text in it is a literal that ``repr`` wrote."""

    def call(name: str, settings: Settings) -> str:
        given = []
        for key, value in settings:
            if value != type(settings).model_fields[key].default:
                shown = value.model_dump(exclude_defaults=True) if isinstance(value, Settings) else value
                given.append(f"{key}={shown!r}")
        return f"{name}({', '.join(given)})"

    classes, arguments = ["LatentReasoner"], [f"model={result.model[:MOST_NAME]!r}"] if result.model else []
    if result.budget is not None:
        classes.append("Budget")
        arguments.append(f"budget={call('Budget', result.budget)}")
    if result.settings is not None:
        classes.append("SearchSettings")
        arguments.append(f"settings={call('SearchSettings', result.settings)}")
    if result.attention is not None:
        arguments.append("attention=True")
    if result.grounding is not None:
        noise = result.grounding.noise.model_dump(exclude_defaults=True)
        arguments.append(f"grounding={noise or True}")
    if result.controls is not None:
        arguments.append("controls=True")
    names = [name[:MOST_NAME] for name in names]
    images = [("image", names[0])] if len(names) == 1 else [("images", names)]
    request: Iterable[tuple[str, Any]] = [
        *images,
        ("question", question[:MOST_TEXT]),
        *_options_asked(result),
        *([("seed", result.seed)] if result.seed is not None else []),
        *([("min_confidence", result.min_confidence)] if result.min_confidence is not None else []),
    ]
    lines = [
        f"from latent_tool import {', '.join(sorted(classes))}",
        "",
        "reasoner = LatentReasoner(",
        *(f"    {argument}," for argument in arguments),
        ")",
        "result = reasoner.invoke({",
        *(f"    {key!r}: {value!r}," for key, value in request),
        "})",
        *(["# The question was longer and is cut here."] if len(question) > MOST_TEXT else []),
        "print(result.answer, result.confidence)",
    ]
    return "\n".join(lines)
