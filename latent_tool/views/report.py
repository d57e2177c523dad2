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
import html
import io
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tool.errors import InputError
from latent_tool.files import write_whole
from latent_tool.views.overlay import (
    HEAT_STOPS,
    THIN_VEIL,
    VEIL,
    attention_share,
    confidence_text,
    heat_layer,
    heat_of,
    heat_text,
    labels_of,
    layout_of,
    plain_text,
    upright_image,
)

if TYPE_CHECKING:
    from PIL import Image

    from latent_tool.schema import Grounding, ReasoningResult, TraceRow
    from latent_tool.views.overlay import Layout

__all__ = ["report_html", "summary_html", "write_report"]

MOST_PATCHES = 100  # listed and drawn
MOST_TOKENS = 256
MOST_ROUNDS = 50  # rows of the table; the chart has up to CHART_POINTS
CHART_POINTS = 200
MOST_TEXT = 3_000  # characters of one text
MOST_NAME = 500  # characters of the name of a model or of an image
PICTURE_SIDE = 900  # pixels: longer sides are shown smaller than they are ...
EMBEDDED_SIDE = 1600  # ... and embedded with at most this

NOTHING = "\N{EN DASH}"  # where there is no number
SOURCES = {
    "calibrated": "probability of being right, fitted on held-out questions",
    "pooled_probability": "joint probability of the answer's tokens, pooled over the model with and without latents",
    "answer_probability": "joint probability of the answer's tokens",
    "reward": "reward of the search, rescaled to 0 to 1",
    "unscored": "this answer was not scored",
}
STOPPED = {
    "iterations": "all rounds of the budget were used",
    "max_candidates": "the budget's candidates were used up",
    "deadline": "the deadline came",
    "target_reward": "the target reward was reached",
    "patience": "the reward no longer rose",
    "converged": "nothing was left to improve",
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
    images: Image.Image | Sequence[Image.Image],
    *,
    question: str,
    names: Sequence[str] | None = None,
) -> str:
    """The report page of a result.

    Args:
        result: what a reasoner returned.
        images: the image or the images that were asked about, in the order of the request.
        question: the question as it was asked.
        names: names of the images, for example of their files; shown, and used in the snippet.

    Returns:
        A complete HTML document without references to anything outside of it.

    Raises:
        InputError: the images are not those the result is about.
    """
    import jinja2

    pictures = list(images) if isinstance(images, Sequence) else [images]
    for given, what in ((pictures, "images"), (names, "names")):
        if given is not None and result.image_sizes and len(given) != len(result.image_sizes):
            raise InputError(
                f"The result is about {len(result.image_sizes)} images, not {len(given)} {what}.",
                "Pass one for each image of the request, in the same order.",
            )
    shown = [_visible(name, 200) for name in names or ("image.png",) * len(pictures)]
    rows, style = _patch_rows(result), SHARED_STYLE + _STYLE
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=_number, visible=_visible, confidence=_confidence)
    return environment.from_string(_PAGE).render(
        result=result,
        question=question,
        figures=[_figure(result, rows, picture, i, shown[i]) for i, picture in enumerate(pictures)],
        names_shown=names is not None,
        patches=rows,
        more_patches=len(result.patches) - len(rows),
        grounding=_grounding(result.grounding),
        fell=_fell(result),
        chart=_chart(result.trace, result.confidence, result.min_confidence),
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
        sources=SOURCES,
        stopped=STOPPED,
        finished=FINISHED,
        style=style,
        script=_SCRIPT,
        style_hash=_hash(style),
        script_hash=_hash(_SCRIPT),
    )


def write_report(
    path: str | Path,
    result: ReasoningResult,
    images: Image.Image | Sequence[Image.Image],
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
    """A few lines of HTML about a result, without picture: what a notebook shows for it."""
    confidence = "not scored" if result.confidence is None else confidence_text(result.confidence)
    verdict = {None: "", True: ", accepted", False: ", abstained"}[result.accepted]
    rows = [
        ("answer", f"<b>{html.escape(plain_text(result.answer)) or '(empty)'}</b>"),
        ("confidence", f"{confidence}{verdict} <small>({SOURCES[result.confidence_source]})</small>"),
        ("patches", str(len(result.patches))),
        *(("warning", html.escape(plain_text(warning))) for warning in result.warnings[:10]),
    ]
    cells = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
    return f"<table>{cells}</table>"


# --- texts and numbers ------------------------------------------------------------------------------------------------

# Marks that reorder the text around them; without them nothing can pose as something else.
_REORDERING = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def _visible(text: str, limit: int = MOST_TEXT) -> str:
    """Text with line breaks kept, control characters replaced, reordering marks left out, cut to ``limit``."""
    kept = (char for char in text[:limit] if ord(char) not in _REORDERING)
    shown = "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else "\ufffd" for char in kept
    )
    return shown + " […]" if len(text) > limit else shown


def _number(value: float | None, digits: int = 3) -> str:
    """A number for people: three significant digits, no exponent where it can be avoided, a dash for none."""
    if value is None:
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e7 else text.replace("-", "\N{MINUS SIGN}")


def _confidence(value: float | None) -> str:
    return NOTHING if value is None else confidence_text(value)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of the rows, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


# --- parts of the page ------------------------------------------------------------------------------------------------


def _patch_rows(result: ReasoningResult) -> list[dict[str, Any]]:
    rounds = {cell: row.round for row in result.trace for cell in row.accepted}
    patches = result.patches[:MOST_PATCHES]
    most = max((patch.attention for patch in patches), default=0.0)
    rows = []
    for patch in patches:
        found, number = rounds.get(patch.cell), patch.rank + 1
        box = None if patch.box is None else ", ".join(f"{round(edge, 1):g}" for edge in patch.box)
        about = (
            f"Patch {number}: attention {_number(patch.attention)}, gain {_number(patch.gain)}, proposed by latent "
            f"{patch.latent + 1}{'' if found is None else f' in round {found}'}, box {box or 'not known'}"
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


def _figure(
    result: ReasoningResult, rows: Sequence[dict[str, Any]], image: Image.Image, index: int, name: str
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
    return {
        "name": name,
        "uri": _data_uri(upright),
        "pixelated": layout.width > upright.width,
        "size": upright.size,
        "layout": layout,
        "heat": _heat(result, index, layout),
        "marks": marks,
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
        "about": f"Heat map, {text}; the largest, {_number(weight)}, at box {where}",
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


def _chart(
    trace: Sequence[TraceRow], confidence: float | None = None, threshold: float | None = None
) -> dict[str, Any] | None:
    """Lines and marks of the reward per round, in a view box of 640 x 300; ``None`` if there is nothing to draw.

    Under ``"sure"`` the probability of the first token, with confidence and threshold on the same scale from 0 to 1, in
    a view box of 640 x 170; ``None`` if no round has it.
    """
    rows = [row for row in trace if math.isfinite(row.reward) and math.isfinite(row.best_reward)]
    if not rows:
        return None
    values = [value for row in rows for value in (row.reward, row.best_reward)]
    low, high = min(values), max(values)
    margin = (high - low) * 0.08 or max(abs(high) * 0.05, 1e-3)
    low, high = low - margin, high + margin
    first, last = rows[0].round, max(rows[-1].round, rows[0].round + 1)
    left, right, top, bottom = 92, 624, 24, 244

    def x(number: float) -> float:
        return round(left + (number - first) / (last - first) * (right - left), 1)

    def y(value: float) -> float:
        return round(bottom - (value - low) / (high - low) * (bottom - top), 1)

    thinned = _thinned(rows, CHART_POINTS)
    accepted = [row for row in rows if row.accepted]
    rises = f"from {_number(rows[0].best_reward, 4)} in round {rows[0].round} to {_number(rows[-1].best_reward, 4)}"
    where = ", ".join(str(row.round) for row in accepted[:20]) + (" and more" if len(accepted) > 20 else "")
    return {
        "best": " ".join(f"{x(row.round)},{y(row.best_reward)}" for row in thinned),
        "current": " ".join(f"{x(row.round)},{y(row.reward)}" for row in thinned),
        "sure": _sure(thinned, x, confidence, threshold),
        "single": len(rows) == 1,
        "marks": [
            {
                "x": x(row.round),
                "y": y(row.best_reward),
                "text_y": y(row.best_reward) + (26 if y(row.best_reward) < top + 20 else -14),
                "text": f"+{len(row.accepted)}",
                "title": f"Round {row.round}: {len(row.accepted)} {_plural(row.accepted)} accepted, "
                f"best reward {_number(row.best_reward, 4)}",
            }
            for row in _thinned(accepted, 60)
        ],
        "ticks_y": [{"at": y(value), "text": _number(value, 4)} for value in _ticks(low, high)],
        "ticks_x": [{"at": x(number), "text": str(number)} for number in _whole_ticks(first, last)],
        "summary": f"The best reward goes {rises} in round {rows[-1].round}. "
        + (f"Patches were accepted in round {where}." if accepted else "No patches were accepted."),
    }


def _sure(
    rows: Sequence[TraceRow], x: Callable[[float], float], confidence: float | None, threshold: float | None
) -> dict[str, Any] | None:
    """How probable the first token was, round by round; ``x`` places a round."""
    known = [(row.round, row.first_token_probability) for row in rows if row.first_token_probability is not None]
    if not known:
        return None

    def y(value: float) -> float:
        return round(150 - 134 * min(1.0, max(0.0, value)), 1)

    (_, start), (last, end) = known[0], known[-1]
    ends = "" if confidence is None else f"; the confidence of the answer is {_confidence(confidence)}"
    return {
        "line": " ".join(f"{x(number)},{y(value)}" for number, value in known),
        "single": len(known) == 1,
        "ticks": [{"at": y(value), "text": f"{value:g}"} for value in (0, 0.5, 1)],
        "final": None if confidence is None else {"x": x(last), "y": y(confidence)},
        "threshold": None if threshold is None else y(threshold),
        "summary": f"The most probable first token goes from {_confidence(start)} to {_confidence(end)}{ends}.",
    }


def _plural(patches: Sequence[Any]) -> str:
    return "patch" if len(patches) == 1 else "patches"


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between ``low`` and ``high``."""
    rough = (high - low) / 4
    step: float = 10.0 ** math.floor(math.log10(rough))
    step *= min((1, 2, 5, 10), key=lambda factor: abs(factor * step - rough))
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _whole_ticks(first: int, last: int) -> list[int]:
    return sorted({round(first + (last - first) * i / 5) for i in range(6)})


def _costs(result: ReasoningResult) -> list[tuple[str, str, str]]:
    """What was used, and how much the budget allowed: name, used, at most."""
    usage, budget = result.usage, result.budget
    if usage is None:
        return []
    rounds = max((row.round for row in result.trace), default=0)

    def limit(name: str) -> str:
        return _number(getattr(budget, name, None))

    seconds = sum(value for value in usage.seconds.values() if math.isfinite(value))
    return [
        ("rounds", _number(rounds), limit("iterations")),
        ("candidates scored", _number(usage.candidates), limit("max_candidates")),
        ("candidates discarded", _number(usage.discarded), NOTHING),
        ("patches injected", _number(usage.patch_tokens), limit("max_patches")),
        ("latents", _number(usage.latent_tokens), NOTHING),
        ("tokens generated", _number(usage.generated_tokens), limit("max_new_tokens")),
        ("tokens of the prompt", _number(usage.prompt_tokens), NOTHING),
        ("of these, image cells", _number(usage.image_cells), NOTHING),
        ("decoder calls", _number(usage.decoder_calls), NOTHING),
        ("seconds", _number(seconds), limit("deadline_s")),
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


def _fields(settings: Any) -> list[tuple[str, str, bool]]:
    """Every field of a settings object: its name, its value as Python writes it, and whether it is not the default."""
    if settings is None:
        return []
    defaults = {name: field.default for name, field in type(settings).model_fields.items()}
    return [(name, repr(value), value != defaults[name]) for name, value in settings]


def _snippet(result: ReasoningResult, question: str, names: Sequence[str]) -> str:
    """Python that asks the same again. Every text in it is a literal that ``repr`` wrote."""

    def call(name: str, settings: Any) -> str:
        return f"{name}({', '.join(f'{key}={value}' for key, value, changed in _fields(settings) if changed)})"

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


# --- the page ---------------------------------------------------------------------------------------------------------

# What the report and the playground have in common: colours, texts, tables, charts and tokens.
SHARED_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f4f5f7; --ink: #1b1d21; --quiet: #565c66; --rule: #d5d8de; --edge: #80868f;
  --accent: #0b62c4; --on-accent: #ffffff; --good: #00684f; --bad: #a33b00; --amber: #ffb000;
  --see: 11, 98, 196; --against: 196, 84, 0;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #16181c; --panel: #20242a; --ink: #eceef1; --quiet: #a9b0bb; --rule: #3a404a; --edge: #7d8591;
    --accent: #79b4ff; --on-accent: #10131a; --good: #4fd1ad; --bad: #ff9a5c;
    --see: 74, 144, 255; --against: 255, 130, 40;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.4rem 1.25rem 3rem; }
p { margin: .4rem 0; }
.free { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.quiet { color: var(--quiet); font-size: .9rem; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.answer { font-size: 1.9rem; line-height: 1.25; font-weight: 650; margin: .3rem 0 .5rem; max-height: 14rem;
  overflow: auto; }
.verdict { font-weight: 650; }
.gauge { display: block; width: 100%; max-width: 30rem; height: auto; }
.gauge .ground { fill: var(--panel); stroke: var(--edge); }
.gauge .level { fill: var(--accent); }
.gauge .threshold { stroke: var(--ink); stroke-width: 3; }
.picture { display: block; width: 100%; height: auto; background: #1e2024; border-radius: .4rem; }
.pixelated { image-rendering: pixelated; }
.veil { fill: #808080; fill-opacity: .5; }
.outline { fill: #ffb000; }
.hit { fill: transparent; vector-effect: non-scaling-stroke; }
[data-patch]:has(.hit) { outline: none; cursor: pointer; }
[data-patch]:is(:hover, :focus-visible, .on) .hit { stroke: #000000; stroke-width: 5;
  filter: drop-shadow(0 0 1px #ffffff) drop-shadow(0 0 2px #ffffff) drop-shadow(0 0 2px #ffffff); }
.detail { padding: .4rem .7rem; background: var(--panel); border-radius: .4rem; font-size: .9rem; }
.chart { display: block; width: 100%; height: auto; }
.chart text { fill: var(--quiet); font: 16px system-ui, sans-serif; }
@media (max-width: 34rem) { .chart text { font-size: 22px; } }
.chart .axis { stroke: var(--rule); }
.chart .threshold { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 2 4; }
.chart polyline { fill: none; stroke-linejoin: round; }
.chart .best { stroke: var(--accent); stroke-width: 2.5; }
.chart .current { stroke: var(--quiet); stroke-width: 1.5; stroke-dasharray: 5 4; }
.chart circle { fill: var(--amber); stroke: #000000; stroke-width: 1.5; }
.chart .point { fill: var(--accent); stroke: none; }
.chart .final { fill: var(--accent); stroke: var(--paper); stroke-width: 2; }
.chart .count { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.bar { width: 100%; max-width: 10rem; height: .7rem; fill: var(--accent); vertical-align: middle; }
.scroll { overflow-x: auto; }
.scroll.tall { max-height: 34rem; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { color: var(--quiet); font-weight: 500; }
tbody th { font-weight: 500; }
tr.on { background: var(--panel); box-shadow: inset .25rem 0 var(--amber); }
.tokens { line-height: 2; padding: .6rem .8rem; border: 1px solid var(--rule); border-radius: .4rem; max-height: 22rem;
  overflow: auto; }
.tokens span { padding: .15em .05em; border-radius: .2em; }
.tokens .answers { font-weight: 700; }
.key span { padding: .1em .5em; border-radius: .2em; color: var(--ink); }
.p1 { background: rgba(var(--see), .12); }
.p2 { background: rgba(var(--see), .22); }
.p3 { background: rgba(var(--see), .32); }
.p4 { background: rgba(var(--see), .42); }
.p5 { background: rgba(var(--see), .52); }
.m1 { background: rgba(var(--against), .14); }
.m2 { background: rgba(var(--against), .28); }
.m3 { background: rgba(var(--against), .42); }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: .4rem; padding: .8rem 1rem; margin: 0;
  overflow-x: auto; font: .85rem/1.5 ui-monospace, monospace; unicode-bidi: isolate; }
:is(button, summary, select, input, pre, .scroll, .tokens):focus-visible { outline: 3px solid var(--accent);
  outline-offset: 2px; }
.tokens, .picture, .chart, .gauge, .bar, .key span, tr { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
@media print {
  :root { color-scheme: light; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  .scroll, .scroll.tall, .tokens, .answer { max-height: none; overflow: visible; }
  figure, tr, .chart, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
"""

_STYLE = """
.columns { display: grid; grid-template-columns: minmax(0, 7fr) minmax(0, 5fr); gap: 0 2.5rem; align-items: start; }
@media (max-width: 60rem) { .columns { grid-template-columns: minmax(0, 1fr); } }
h1 { font-size: 1.15rem; font-weight: 500; margin: 0; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
.kicker { color: var(--quiet); font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; margin: .8rem 0 0; }
.warnings { border-left: .3rem solid var(--bad); background: var(--panel); margin: 1rem 0; padding: .6rem 1rem; }
.warnings ul { margin: 0; padding-left: 1.1rem; }
figure { margin: 0 0 1rem; }
.picture { max-height: 80vh; }
.tag { fill: #ffb000; stroke: #000000; }
.leader { stroke: #ffb000; }
.label { font-family: system-ui, sans-serif; fill: #000000; text-anchor: middle; dominant-baseline: central; }
.marks:not(:checked) ~ figure .mark, .heats:not(:checked) ~ figure .heat, .heats:not(:checked) ~ .heat,
.heats:checked ~ figure .veil, .heats:checked ~ p .veil { display: none; }
.toggle { margin-right: .6rem; }
.detail { min-height: 3em; }
tr:target { background: var(--panel); box-shadow: inset .25rem 0 var(--amber); }
.small.bar { width: 3.8rem; }
.box { white-space: nowrap; }
@media (max-width: 34rem) { .small.bar { display: none; } }
.tokens .above { text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: .2em; }
summary { cursor: pointer; color: var(--accent); padding: .3rem 0; }
@media print {
  .columns { display: block; }
  .marks, .heats, .toggle, .detail { display: none; }
  .picture { max-height: 60vh; }
}
"""

_SCRIPT = """
"use strict";
const detail = document.getElementById("detail");
const marks = document.querySelectorAll("[data-patch]");
for (const mark of marks) {
  const same = [...marks].filter(other => other.dataset.patch === mark.dataset.patch);
  const enter = () => {
    same.forEach(other => other.classList.add("on"));
    const about = same.find(other => other.ariaLabel);
    if (about) detail.textContent = about.ariaLabel;
  };
  const leave = () => same.forEach(other => other.classList.remove("on"));
  mark.addEventListener("mouseenter", enter);
  mark.addEventListener("mouseleave", leave);
  mark.addEventListener("focusin", enter);
  mark.addEventListener("focusout", leave);
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));
"""

_PAGE = """
{%- macro place(rect, by=0) -%}
x="{{ rect.x - by }}" y="{{ rect.y - by }}" width="{{ rect.width + 2 * by }}" height="{{ rect.height + 2 * by }}"
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src '{{ style_hash }}'; \
script-src '{{ script_hash }}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{{ question | visible(120) }}</title>
<link rel="icon" href="data:,">
<style>{{ style | safe }}</style>
</head>
<body>
<main>

<header>
  <p class="kicker">Question</p>
  <h1 class="free" dir="auto">{{ question | visible }}</h1>
  <p class="kicker">Answer</p>
  <p class="answer free" dir="auto">{{ result.answer.strip() | visible or "(empty)" }}</p>
  {% if result.confidence is not none %}
  <svg class="gauge" viewBox="0 0 300 16" role="img" aria-label="Confidence {{ result.confidence | confidence }} of 1\
{% if result.min_confidence is not none %}, threshold {{ result.min_confidence | number }}{% endif %}">
    <rect class="ground" x="1" y="2" width="298" height="12" rx="3"/>
    <rect class="level" x="1" y="2" width="{{ (298 * result.confidence) | round(1) }}" height="12" rx="3"/>
    {% if result.min_confidence is not none %}
    {% set at = (1 + 298 * result.min_confidence) | round(1) %}
    <path class="threshold" d="M{{ at }} 0V16"/>
    {% endif %}
  </svg>
  {% endif %}
  <p>
    Confidence
    <strong>{{ result.confidence | confidence if result.confidence is not none else "not scored" }}</strong>
    {% if result.min_confidence is not none %}
    against a threshold of <strong>{{ result.min_confidence | confidence }}</strong>
    {% endif %}
    {% if result.accepted is not none %}
    {% set verdict = ("good", "✓ accepted") if result.accepted else ("bad", "✗ abstained") %}
    <span class="verdict {{ verdict[0] }}">{{ verdict[1] }}</span>
    {% endif %}
    <span class="quiet">({{ result.confidence_source | replace("_", " ") }}:
      {{ sources[result.confidence_source] }})</span>
  </p>
  {% if result.warnings %}
  <div class="warnings" role="note" aria-label="Warnings">
    <ul>
      {% for warning in result.warnings[:10] %}<li class="free">{{ warning | visible(300) }}</li>
      {% endfor %}
    </ul>
  </div>
  {% endif %}
</header>

<div class="columns">
<div>

<section aria-labelledby="picture-title">
  <h2 id="picture-title">What the answer rests on</h2>
  {% if patches or result.attention is not none %}<span class="toggle">Show</span>{% endif %}
  {% if patches %}
  <input type="checkbox" id="marks" class="marks" checked>
  <label for="marks" class="toggle">patches</label>
  {% endif %}
  {% if result.attention is not none %}
  <input type="checkbox" id="heats" class="heats">
  <label for="heats" class="toggle">heat map</label>
  {% endif %}
  {% for figure in figures %}
  {% set i, layout = loop.index0, figure.layout %}
  {% set canvas = {"x": 0, "y": 0, "width": layout.canvas[0], "height": layout.canvas[1]} %}
  {% set image = {"x": layout.left, "y": layout.top, "width": layout.width, "height": layout.height} %}
  <figure>
    <svg class="picture" viewBox="0 0 {{ canvas.width }} {{ canvas.height }}" role="group"
      aria-label="Image {{ i + 1 }}">
      <image {{ place(image) }} href="{{ figure.uri }}" preserveAspectRatio="none" role="img" aria-label="\
{{ figure.name }}, the image that was asked about, {{ figure.size[0] }} by {{ figure.size[1] }} pixels"\
{% if figure.pixelated %} class="pixelated"{% endif %}/>
      {% if figure.heat and figure.heat.uri %}
      <image class="heat" {{ place(image) }} href="{{ figure.heat.uri }}" preserveAspectRatio="none" role="img" \
aria-label="{{ figure.heat.about }}"/>
      {% endif %}
      {% if figure.marks %}
      <g class="mark" aria-hidden="true" shape-rendering="crispEdges">
        <mask id="veil-{{ i }}" maskUnits="userSpaceOnUse" {{ place(image) }}>
          <rect {{ place(image) }} fill="#fff"/>
          {% for mark in figure.marks | sort(attribute="row.patch.attention") %}
          <rect {{ place(mark.rect) }} fill="{{ mark.veil }}"/>
          {% endfor %}
        </mask>
        <mask id="outside-{{ i }}" maskUnits="userSpaceOnUse" {{ place(canvas) }}>
          <rect {{ place(canvas) }} fill="#fff"/>
          {% for mark in figure.marks %}
          <rect {{ place(mark.rect) }}/>
          {% endfor %}
        </mask>
        <rect class="veil" {{ place(image) }} mask="url(#veil-{{ i }})"/>
        <g mask="url(#outside-{{ i }})">
          {% for mark in figure.marks %}
          <rect {{ place(mark.rect, 2 * layout.line) }}/>
          {% endfor %}
          {% for mark in figure.marks %}
          <rect class="outline" {{ place(mark.rect, layout.line) }}/>
          {% endfor %}
        </g>
        {% for label in figure.labels if label.leader %}
        <path class="leader" stroke-width="{{ layout.line }}"
          d="M{{ label.leader | join(" ") }}L{{ label.middle | join(" ") }}"/>
        {% endfor %}
        {% for label in figure.labels %}
        {% set left, top, right, bottom = label.box %}
        <rect class="tag" x="{{ left }}" y="{{ top }}" width="{{ right - left }}" height="{{ bottom - top }}" rx="4"/>
        <text class="label" font-size="{{ layout.font }}" x="{{ label.middle[0] }}" y="{{ label.middle[1] }}">\
{{ label.text }}</text>
        {% endfor %}
      </g>
      {% for mark in figure.marks %}
      <a class="mark" href="#patch-{{ mark.row.number }}" data-patch="{{ mark.row.number }}"
        aria-label="{{ mark.row.about }}">\
<rect class="hit" {{ place(mark.rect) }}/></a>
      {% endfor %}
      {% endif %}
    </svg>
    {% if names_shown or figure.heat %}
    <figcaption class="quiet">
      {% if names_shown %}
      <bdi>{{ figure.name }}</bdi>, {{ figure.size[0] }} &times; {{ figure.size[1] }} pixels
      {% endif %}
      {% if figure.heat %}
      <span class="heat">{{ "(" if names_shown }}{{ figure.heat.text }}{{ ")" if names_shown }}</span>
      {% endif %}
    </figcaption>
    {% endif %}
  </figure>
  {% endfor %}
  {% if result.attention is not none %}
  <p class="quiet heat">Attention to a cell, mean over latents, heads and layers, where the answer was decoded:
    <span class="box">0 <svg class="bar" viewBox="0 0 160 10" preserveAspectRatio="none" aria-hidden="true">\
<linearGradient id="heat-colours">{% for colour in heat_stops %}
<stop offset="{{ loop.index0 / (heat_stops | length - 1) }}" stop-color="{{ colour }}"/>{% endfor %}\
</linearGradient><rect width="160" height="10" fill="url(#heat-colours)"/></svg> {{ most_attention | number }}.</span>
    Where cells overlap, the largest is seen.</p>
  {% else %}
  <p class="quiet">The attention to all image cells was not measured.</p>
  {% endif %}
  {% if patches %}
  <p class="detail" id="detail">Point at a patch, or reach it with the Tab key, to read about it.</p>
  <p class="quiet">Labels count the patches in the order of their injection; label 1 is <code>result.patches[0]</code>.
    <span class="veil">The clearer a patch, the more attention it had.</span></p>
  <div class="scroll tall" tabindex="0" role="region" aria-label="Table of patches">
  <table>
    <thead><tr><th scope="col">patch</th><th scope="col">attention</th><th scope="col">gain</th>
      <th scope="col">round</th><th scope="col">latent</th>
      {% if figures | length > 1 %}<th scope="col">image</th>{% endif %}

      <th scope="col">box in pixels</th></tr></thead>
    <tbody>
    {% for row in patches %}
    <tr id="patch-{{ row.number }}" data-patch="{{ row.number }}">
      <th scope="row">{{ row.number }}</th>
      <td>{{ row.patch.attention | number }} <svg class="small bar" viewBox="0 0 60 8" aria-hidden="true">\
<rect width="{{ row.bar }}" height="8"/></svg></td>
      <td>{{ row.patch.gain | number }}</td>
      <td>{{ row.round if row.round is not none else nothing }}</td>
      <td>{{ row.patch.latent + 1 }}</td>
      {% if figures | length > 1 %}
      <td>{{ row.patch.image + 1 }}</td>
      {% endif %}
      <td class="box">{{ row.box or "not known" }}</td>
    </tr>
    {% endfor %}
    </tbody>
  </table>
  </div>
  {% if more_patches %}
  <p class="quiet">{{ more_patches | number }} more patches are neither drawn nor listed.</p>
  {% endif %}
  {% else %}
  <p class="quiet">No patches were injected.</p>
  {% endif %}
</section>

{% if costs %}
<section aria-labelledby="cost-title">
  <h2 id="cost-title">What it cost</h2>
  <table>
    <thead><tr><th scope="col">what</th><th scope="col">used</th><th scope="col">budget</th></tr></thead>
    <tbody>
    {% for name, used, limit in costs %}
    <tr><th scope="row">{{ name }}</th><td>{{ used }}</td><td>{{ limit }}</td></tr>
    {% endfor %}
    </tbody>
  </table>
  {% if phases %}
  <h3>Seconds per phase</h3>
  <table>
    <tbody>
    {% for phase in phases %}
    <tr><th scope="row">{{ phase.name | visible(60) }}</th><td>{{ phase.seconds | number }}</td>\
<td><svg class="bar" viewBox="0 0 160 10" preserveAspectRatio="none" aria-hidden="true">\
<rect width="{{ phase.bar }}" height="10"/></svg></td></tr>
    {% endfor %}
    </tbody>
  </table>
  {% endif %}
</section>
{% endif %}
</div>

<div>
<section aria-labelledby="tokens-title">
  {% if grounding %}
  <h2 id="tokens-title">How much each token depends on the image</h2>
  <p class="tokens free" dir="auto" tabindex="0" role="region" aria-labelledby="tokens-title">\
{% for item in grounding.tokens %}
<span class="{{ item.classes }}" title="S = {{ item.token.dependency | number }} nats, probability \
{{ item.token.probability | number }}">{{ item.text }}</span>\
{% endfor %}
{% if grounding.more %} […]{% endif %}</p>
  <p class="quiet key"><span class="m2">against</span> <span>none</span> <span class="p2">some</span>
    <span class="p5">much</span>; underlined above {{ grounding.threshold | number }} nats,
    bold: the extracted answer</p>
  <p>Mean visual dependency <strong>{{ grounding.whole.mean | number }} nats</strong>;
    {{ "%.0f" | format(100 * grounding.whole.share_above) }} % of the tokens are above
    {{ grounding.threshold | number }} nats.</p>
  <p class="quiet">S = log p(token | image) &minus; log p(token | noised image), with
    {{ grounding.whole.noise.kind }} noise of strength {{ grounding.whole.noise.strength | number }}.</p>
  <details>
    <summary>The tokens as a table</summary>
    <div class="scroll tall" tabindex="0" role="region" aria-label="Table of tokens">
    <table>
      <thead><tr><th scope="col">token</th><th scope="col">S, nats</th><th scope="col">probability</th>
        <th scope="col">in answer</th></tr></thead>
      <tbody>
      {% for item in grounding.tokens %}
      <tr><td class="free">{{ item.listed }}</td><td>{{ item.token.dependency | number }}</td>\
<td>{{ item.token.probability | number }}</td><td>{{ "yes" if item.token.in_answer else "" }}</td></tr>
      {% endfor %}
      </tbody>
    </table>
    </div>
  </details>
  {% if grounding.more %}<p class="quiet">{{ grounding.more | number }} more tokens are not shown.</p>{% endif %}

  {% else %}
  <h2 id="tokens-title">What the model wrote</h2>
  <p class="tokens free" dir="auto" tabindex="0" role="region" aria-labelledby="tokens-title">\
{{ result.raw_text | visible }}</p>
  <p class="quiet">How much it depends on the image was not measured.</p>
  {% endif %}
</section>

{% if result.controls %}
<section aria-labelledby="controls-title">
  <h2 id="controls-title">The same question with one part taken away</h2>
  <div class="scroll"><table>
    <thead><tr><th scope="col">condition</th><th scope="col">answer</th><th scope="col">confidence</th>
      <th scope="col">agrees</th></tr></thead>
    <tbody>
    <tr><th scope="row">as asked</th><td class="free">{{ result.answer | visible(300) }}</td>
      <td>{{ result.confidence | confidence }}</td><td></td></tr>
    {% for name, control in (("latents off", result.controls.latents_off),
                             ("image noised", result.controls.image_noised)) %}
    <tr><th scope="row">{{ name }}</th><td class="free">{{ control.answer | visible(300) }}</td>
      <td>{{ control.confidence | confidence }}</td><td>{{ "yes" if control.agrees else "no" }}</td></tr>
    {% endfor %}
    </tbody>
  </table></div>
  {% if result.controls.image_noised.agrees and fell %}
  <p class="quiet">The answer is the same on the noised image, but the confidence falls to less than half.</p>
  {% elif result.controls.image_noised.agrees %}
  <p class="bad">The answer is the same on the noised image: it may not rest on the image at all.</p>
  {% else %}
  <p class="quiet">The answer changes when the image is noised, as it should if it rests on what is seen.</p>
  {% endif %}
</section>
{% endif %}

<section aria-labelledby="search-title">
  <h2 id="search-title">The search, round by round</h2>
  {% if chart %}
  {% if chart.sure %}
  <svg class="chart" viewBox="0 0 640 170" role="img" aria-label="{{ chart.sure.summary }}">
    {% for tick in chart.sure.ticks %}
    <path class="axis" d="M92 {{ tick.at }}H624"/>
    <text x="82" y="{{ tick.at + 5 }}" text-anchor="end">{{ tick.text }}</text>
    {% endfor %}
    {% if chart.sure.threshold is not none %}
    <path class="threshold" d="M92 {{ chart.sure.threshold }}H624"/>
    {% endif %}
    <polyline class="best" points="{{ chart.sure.line }}"/>
    {% if chart.sure.single %}
    <circle class="point" cx="92" cy="{{ chart.sure.line.split(",")[1] }}" r="4"/>
    {% endif %}
    {% if chart.sure.final %}
    <path class="final" d="M{{ chart.sure.final.x }} {{ chart.sure.final.y - 9 }}l9 9l-9 9l-9 -9z"/>
    {% endif %}
  </svg>
  <p class="quiet">How sure: the probability of the most probable first token of the best state so far\
{% if chart.sure.final %}; diamond: the confidence of the answer, on the same scale{% endif %}\
{% if chart.sure.threshold is not none %}; dotted: the threshold{% endif %}.</p>
  <p>{{ chart.sure.summary }}</p>
  {% endif %}
  <svg class="chart" viewBox="0 0 640 300" role="img" aria-label="Reward per round. {{ chart.summary }}">
    {% for tick in chart.ticks_y %}
    <path class="axis" d="M92 {{ tick.at }}H624"/>
    <text x="82" y="{{ tick.at + 5 }}" text-anchor="end">{{ tick.text }}</text>
    {% endfor %}
    {% for tick in chart.ticks_x %}
    <text x="{{ tick.at }}" y="268" text-anchor="middle">{{ tick.text }}</text>
    {% endfor %}
    <text x="358" y="292" text-anchor="middle">round</text>
    <polyline class="current" points="{{ chart.current }}"/>
    <polyline class="best" points="{{ chart.best }}"/>
    {% if chart.single %}<circle class="point" cx="92" cy="{{ chart.best.split(",")[1] }}" r="4"/>{% endif %}

    {% for mark in chart.marks %}
    <g><title>{{ mark.title }}</title><circle cx="{{ mark.x }}" cy="{{ mark.y }}" r="6"/>
      <text class="count" x="{{ mark.x }}" y="{{ mark.text_y }}" text-anchor="middle">{{ mark.text }}</text></g>
    {% endfor %}
  </svg>
  <p class="quiet">Solid: best reward; dashed: current reward; dots: patches accepted, and how many.
    {% if result.settings %}The reward is the <code>{{ result.settings.reward }}</code>, read at:
    {{ result.settings.reward_position }}.{% endif %}</p>
  <p>{{ chart.summary }}</p>
  <details>
    <summary>The rounds as a table</summary>
    <div class="scroll tall" tabindex="0" role="region" aria-label="Table of rounds">
    <table>
      <thead><tr><th scope="col">round</th><th scope="col">reward</th><th scope="col">best</th>
        <th scope="col">mean of samples</th><th scope="col">top-k mass</th><th scope="col">first token</th>
        <th scope="col">sigma</th>
        <th scope="col">accepted</th><th scope="col">candidates</th><th scope="col">seconds</th></tr></thead>
      <tbody>
      {% for row in trace %}
      <tr><th scope="row">{{ row.round }}</th>
        <td>{{ row.reward | number(4) }}</td><td>{{ row.best_reward | number(4) }}</td>
        <td>{{ row.mean_sampled_reward | number(4) }}</td><td>{{ row.top_k_mass | number }}</td>
        <td>{{ row.first_token_probability | number }}</td>
        <td>{{ row.sigma | number }}</td><td>{{ row.accepted | length or "" }}</td>
        <td>{{ row.candidates | number }}</td><td>{{ row.seconds | number }}</td></tr>
      {% endfor %}
      </tbody>
    </table>
    </div>
    {% if more_rounds %}<p class="quiet">{{ more_rounds | number }} earlier rounds are not listed.</p>{% endif %}

  </details>
  {% else %}
  <p class="quiet">There was no search.</p>
  {% endif %}
  {% if result.stop_reason %}
  <p>The search ended because {{ stopped[result.stop_reason] }}
    <span class="quiet">({{ result.stop_reason }})</span>.</p>
  {% endif %}
  {% if result.finish_reason %}
  <p>Decoding ended because {{ finished[result.finish_reason] }}
    <span class="quiet">({{ result.finish_reason }})</span>.</p>
  {% endif %}
</section>
</div>
</div>

<section aria-labelledby="again-title">
  <h2 id="again-title">Get the same again</h2>
  <p>Model <code class="free">{{ (result.model or "not named") | visible(300) }}</code>, seed
    {{ result.seed if result.seed is not none else "not set" }}.</p>
  <pre tabindex="0" aria-label="Python that asks the same again"><code>{{ snippet }}</code></pre>
  {% for title, fields in settings if fields %}
  <details>
    <summary>{{ title }}</summary>
    <div class="scroll"><table><tbody>
    {% for name, value, changed in fields %}
    <tr><th scope="row">{{ name }}</th><td><code class="free">{{ value | visible(300) }}</code></td>
      <td class="quiet">{{ "changed" if changed else "default" }}</td></tr>
    {% endfor %}
    </tbody></table></div>
  </details>
  {% endfor %}
  <details>
    <summary>All scores</summary>
    <div class="scroll"><table><tbody>
    {% for name, value in scores %}
    <tr><th scope="row">{{ name | replace("_", " ") }}</th><td>{{ value | number(5) }}</td></tr>
    {% endfor %}
    </tbody></table></div>
  </details>
</section>

</main>
<script>{{ script | safe }}</script>
</body>
</html>
"""
