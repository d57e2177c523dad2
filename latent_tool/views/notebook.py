"""What a notebook shows of results: one with its picture, many as a table with thumbnails.

A result that was made in this process remembers the references that were asked about, and opens them again when it is
shown: under the policy they were opened with, and without downloading anything. What cannot be opened any more is left
out. Everything that comes from outside is escaped. This module knows results and overlays, nothing of models; Pillow is
imported when something is shown, pandas and IPython never: both are only asked for what is loaded already.
"""

from __future__ import annotations

import base64
import html
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from latent_tool.errors import LatentToolError
from latent_tool.schema import ReasoningResult
from latent_tool.views.overlay import overlay
from latent_tool.words import confidence_text, plain_text

if TYPE_CHECKING:
    from PIL import Image

    from latent_tool.settings import ImagePolicy

__all__ = ["Seen", "remember", "results_html"]

_SIDE = 420  # pixels of a picture beside its result
_THUMBNAIL = 96
_PICTURES = 4  # of one result
_ROWS = 50  # of a table
_CHOICES = 10


class Seen:
    """The references that a result is about, and how it is shown with them.

    It is no part of what the result says: two results are equal whatever they have seen, and neither a copy in another
    process nor JSON has it.
    """

    def __init__(self, references: Sequence[object], policy: ImagePolicy) -> None:
        from latent_tool.images.picture import Picture

        # Not the Picture itself, which holds its pixels.
        pairs = [
            (each.reference, each.policy or policy) if isinstance(each, Picture) else (each, policy)
            for each in references
        ]
        self.references = tuple((reference, governing.but(hosts=())) for reference, governing in pairs)

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, Seen)

    def __hash__(self) -> int:
        return 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def __deepcopy__(self, memo: object) -> Seen:
        return self

    def image(self, index: int) -> Image.Image:
        """Open one of the pictures again, upright. Raises ``ImageError`` if that cannot be done any more."""
        from latent_tool.images.load import load_image

        reference, policy = self.references[index]
        return load_image(reference, policy).image

    def html(self, result: ReasoningResult, facts: str) -> str:
        """Return the pictures with their patches beside the facts of a result, which are HTML."""
        images = [self._drawn(result, index) for index in range(min(len(self.references), _PICTURES))]
        shown = "".join(
            f'<img src="{uri}" alt="picture {n + 1} with its patches">' for n, uri in enumerate(images) if uri
        )
        more = len(self.references) - _PICTURES
        note = f"<small>and {more} more pictures</small>" if more > 0 else ""
        return (
            '<div style="display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start">'
            f"<div>{shown}{note}</div><div>{facts}</div></div>"
        )

    def _drawn(self, result: ReasoningResult, index: int) -> str | None:
        try:
            picture = overlay(result, self.image(index), index=index, caption=False)
        except (LatentToolError, OSError, IndexError):
            return None
        return _uri(picture, _SIDE)

    def thumbnail(self) -> str | None:
        """Return the first picture as a small data URI; ``None`` if it cannot be opened any more."""
        try:
            return _uri(self.image(0), _THUMBNAIL)
        except (LatentToolError, OSError, IndexError):
            return None


def remember(result: ReasoningResult, references: Sequence[object], policy: ImagePolicy) -> ReasoningResult:
    """Let a result know its pictures, for notebooks; gives back the same result."""
    result._seen = Seen(references, policy)
    _register()
    return result


def results_html(results: Iterable[object]) -> str:
    """Return a table of results: thumbnail, answer, confidence, verdict. What is no result (an error of a batch) is
    named.
    """
    every = list(results)
    rows = "".join(_row(number, each) for number, each in enumerate(every[:_ROWS]))
    more = f"<small>the first {_ROWS} of {len(every)}</small>" if len(every) > _ROWS else ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "picture", "answer", "confidence", "verdict"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}"


def _row(number: object, each: object) -> str:
    if not isinstance(each, ReasoningResult):
        name = html.escape(plain_text(f"{type(each).__name__}: {each}", limit=200))
        return f'<tr><th scope="row">{number}</th><td></td><td colspan="3">{name}</td></tr>'
    verdict = {None: "", True: "accepted", False: "abstained"}[each.accepted]
    confidence = "not scored" if each.confidence is None else confidence_text(each.confidence)
    answer = html.escape(plain_text(each.answer, limit=120)) or "(empty)"
    cells = (_picture(each), f"<b>{answer}</b>", confidence, verdict)
    return f'<tr><th scope="row">{number}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _picture(result: ReasoningResult) -> str:
    uri = result._seen.thumbnail() if isinstance(result._seen, Seen) else None
    return "" if uri is None else f'<img src="{uri}" alt="">'


def _uri(picture: Image.Image, side: int) -> str:
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


# --- lists, series and data frames ------------------------------------------------------------------------------------


def _register() -> None:
    """Teach the notebook that runs this, if one does, to show lists and columns of results as tables.

    Whatever else is in a list or a column is shown as before.
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None or not hasattr(shell, "display_formatter"):
        return
    formatter = shell.display_formatter.formatters["text/html"]
    if formatter.type_printers.get(list) is not _list_html:
        formatter.for_type(list, _list_html)
        formatter.for_type_by_name("pandas", "Series", _series_html)
        formatter.for_type_by_name("pandas", "DataFrame", _frame_html)
        formatter.for_type_by_name("pandas.core.series", "Series", _series_html)
        formatter.for_type_by_name("pandas.core.frame", "DataFrame", _frame_html)


def _holds_results(values: Sequence[object]) -> bool:
    """Whether these are results, among which there may be the errors of a batch."""
    return any(isinstance(each, ReasoningResult) for each in values) and all(
        isinstance(each, ReasoningResult | Exception) for each in values
    )


def _list_html(values: list[object]) -> str | None:
    return results_html(values) if _holds_results(values) else None


def _series_html(series: Any) -> str | None:
    return results_html(series) if series.dtype == object and _holds_results(list(series)) else None


def _frame_html(frame: Any) -> str | None:
    """The frame with thumbnails, answers and confidences in its columns of results."""
    if not frame.columns.is_unique:
        return str(frame._repr_html_())
    own = [name for name in frame.columns if frame[name].dtype == object and _holds_results(list(frame[name]))]
    if not own:
        shown: str | None = frame._repr_html_()
        return shown
    few = frame.head(_ROWS)
    formatters: dict[str, Callable[[object], str]] = {
        name: _cell if name in own else lambda value: html.escape(plain_text(str(value), limit=120))
        for name in few.columns
    }
    renamed = few.rename(columns=lambda name: html.escape(str(name)), index=lambda name: html.escape(str(name)))
    renamed = renamed.rename_axis(index=_axis, columns=_axis)
    by_place = [formatters[name] for name in few.columns]
    table: str = renamed.to_html(formatters=by_place, escape=False, max_rows=None)
    more = f"<small>the first {_ROWS} of {len(frame)} rows</small>" if len(frame) > _ROWS else ""
    return table + more


def _axis(name: object) -> str | None:
    return None if name is None else html.escape(str(name))


def _cell(each: object) -> str:
    if not isinstance(each, ReasoningResult):
        return html.escape(plain_text(f"{type(each).__name__}: {each}", limit=120))
    confidence = "not scored" if each.confidence is None else confidence_text(each.confidence)
    return f"{_picture(each)} <b>{html.escape(plain_text(each.answer, limit=60)) or '(empty)'}</b> {confidence}"
