"""The command line. The result goes to stdout, everything else to stderr.

Exit codes: 0 answered, 3 below ``--min-confidence``, 2 bad usage or input, 1 anything else.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer

from latent_tool.commands.calibrate import calibrate
from latent_tool.commands.evaluate import evaluate
from latent_tool.commands.mcp import mcp
from latent_tool.commands.play import play
from latent_tool.commands.serve import serve
from latent_tool.commands.study import study
from latent_tool.errors import ImageNotAllowedError, InputError, LatentToolError, ModelError
from latent_tool.files import require_writable, write_whole

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from latent_tool.schema import ReasoningResult

__all__ = ["app", "main"]

app = typer.Typer(
    name="latent-tool",
    help="Ask questions about images; get an answer, a confidence to gate on, and the patches it rests on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

UNSURE = 3


class Level(StrEnum):
    """Names of budgets."""

    quick = "quick"
    standard = "standard"
    thorough = "thorough"


class Preset(StrEnum):
    """Names of search settings."""

    default = "default"
    paper = "paper"


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"latent-tool {version('latent-tool')}")
        raise typer.Exit


def _finite(value: float | None) -> float | None:
    """Click compares with the limits of an option, which not-a-number passes."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter("must be a finite number")
    return value


@app.callback()
def _main(
    _version_wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def ask(
    image: Annotated[str, typer.Argument(help="Path of the image, or a data URI.")],
    question: Annotated[str, typer.Argument(help="What to answer about it.")],
    also: Annotated[
        list[str] | None, typer.Option("--also", metavar="IMAGE", help="A further image; may be repeated.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Checkpoint directory or hub id; the model that ships with the package by default.")
    ] = "embedded",
    device: Annotated[str, typer.Option(help="For example cpu or cuda:0; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    system: Annotated[str | None, typer.Option(help="System text before the question.")] = None,
    budget: Annotated[Level, typer.Option(help="How much work at most.")] = Level.standard,
    iterations: Annotated[
        int | None, typer.Option(min=0, max=10_000, help="Rounds of the search; 0 scores the initial latents only.")
    ] = None,
    max_patches: Annotated[int | None, typer.Option(min=0, max=4096, help="Image cells injected at most.")] = None,
    max_candidates: Annotated[int | None, typer.Option(min=1, help="States scored at most.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, max=32_768, help="Tokens of the answer at most.")] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            min=0.001, callback=_finite, metavar="SECONDS", help="From reading the image to the last token at most."
        ),
    ] = None,
    preset: Annotated[Preset, typer.Option(help="How the search works.")] = Preset.default,
    latents: Annotated[
        int | None, typer.Option(min=0, max=256, help="Latent thought tokens; 0 is the plain model.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the search.")] = 0,
    min_confidence: Annotated[
        str | None,
        typer.Option(
            metavar="C", help="Exit with code 3 below this confidence, 0 to 1, or below the calibration's: calibrated."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Makes the confidence a probability; 'embedded' for the embedded model's."),
    ] = None,
    attention: Annotated[bool, typer.Option("--attention", help="Measure the attention to every image cell.")] = False,
    grounding: Annotated[
        bool, typer.Option("--grounding", help="Measure how each token depends on the image.")
    ] = False,
    controls: Annotated[
        bool, typer.Option("--controls", help="Answer again without latents, and on a noised image.")
    ] = False,
    overlay: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Write the picture with the injected patches.")
    ] = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(metavar="OUT.png", help="Write the picture coloured by that attention, which is measured for it."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="OUT.html", help="Write a page that shows how the answer came about.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Ask one question about an image.

    Example: latent-tool ask chart.png "Which bar is tallest?" --overlay seen.png
    """
    from latent_tool.settings import Budget, SearchSettings

    references = [image, *(also or [])]
    if any(each.strip().lower().startswith(("http:", "https:")) for each in references):
        raise ImageNotAllowedError("URLs are not opened here.", "Download the image and name its file.")
    if overlay is not None and overlay == heatmap:
        raise typer.BadParameter("is the file of --overlay, too", param_hint="--heatmap")
    drawings = [*_drawings(overlay, len(references)), *_drawings(heatmap, len(references), heatmap=True)]
    for drawing in drawings:
        require_writable(drawing.path, ".png")
    if report is not None:
        require_writable(report, ".html")
    limits = {
        "iterations": iterations,
        "max_patches": max_patches,
        "max_candidates": max_candidates,
        "max_new_tokens": max_new_tokens,
        "deadline_s": deadline,
    }
    chosen = Budget.level(budget.value).but(**{name: value for name, value in limits.items() if value is not None})
    settings = SearchSettings.paper() if preset is Preset.paper else SearchSettings()
    if latents == 0:  # without latents there is no place where they start
        settings = settings.but(latents=0, init=SearchSettings().init)
    elif latents is not None:
        settings = settings.but(latents=latents)

    from latent_tool.langchain.reasoner import LatentReasoner

    reasoner = LatentReasoner(
        model=model,
        device=device,
        dtype=dtype,
        budget=chosen,
        settings=settings,
        seed=seed,
        min_confidence=_confidence_wanted(min_confidence),
        calibration=calibration,
        attention=attention or heatmap is not None,
        grounding=grounding,
        controls=controls,
    )
    result = _follow(reasoner, {"images": references, "question": question, "system": system}, quiet)
    written: list[Path] = []
    failure: LatentToolError | None = None
    try:
        for path in _write_files(result, references, question, drawings, report):
            written.append(path)
    except LatentToolError as error:  # the answer is told all the same
        failure = error
    if as_json:
        _print(_json(result))
    else:
        _show(result, references, written)
    if failure is not None:
        raise failure
    if result.accepted is False:
        raise typer.Exit(UNSURE)


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False) -> None:
    """List the model families that are supported, and how well each was verified."""
    from latent_tool.models.families import supported

    if as_json:
        import json

        rows = [
            {
                "family": row.model_type,
                "example": row.example,
                "exact_prefix": row.exact_prefix,
                "boxes_verified": row.boxes_verified,
                "decoding_verified": row.decoding_verified,
                "needs": list(row.needs),
                "note": row.note,
            }
            for row in supported()
        ]
        _print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("family", "for example", "prefix", "boxes", "decoding", "needs", "note"):
        table.add_column(name, overflow="fold")
    for row in supported():
        marks = ("yes" if flag else "no" for flag in (row.exact_prefix, row.boxes_verified, row.decoding_verified))
        table.add_row(row.model_type, row.example, *marks, ", ".join(row.needs), row.note)
    with _reaching_stdout():
        Console(highlight=False).print(table)
    _print(
        "\nprefix: scoring from the cache equals one full forward pass; boxes: every image cell found in the pixels;"
        "\ndecoding: equals the model's own generate. Checked on tiny random checkpoints of each family."
    )


app.command()(play)
app.command("eval")(evaluate)
app.command()(calibrate)
app.command()(study)
app.command()(mcp)
app.command()(serve)


def _confidence_wanted(text: str | None) -> float | str | None:
    """``--min-confidence``: a number, or the calibration's own threshold."""
    if text is None or text == "calibrated":
        return text
    try:
        wanted = float(text)
    except ValueError:
        wanted = math.nan
    if not 0 <= wanted <= 1:
        raise typer.BadParameter("must be a number from 0 to 1, or 'calibrated'", param_hint="--min-confidence")
    return wanted


def _pictures(references: list[str]) -> list[Image]:
    """The pictures, opened as the reasoner opened them."""
    from latent_tool.images.load import load_image
    from latent_tool.settings import ImagePolicy

    return [load_image(reference, ImagePolicy.local()).image for reference in references]


class _Drawing(NamedTuple):
    """A picture to be written: where, and which of the request's images with what on it."""

    path: Path
    image: int
    heatmap: bool


def _drawings(path: Path | None, images: int, *, heatmap: bool = False) -> list[_Drawing]:
    """That of the first image goes to ``path``, those of further images beside it, numbered from 1."""
    if path is None:
        return []
    paths = [path, *(path.with_stem(f"{path.stem}-{index}") for index in range(1, images))]
    return [_Drawing(each, index, heatmap) for index, each in enumerate(paths)]


def _write_files(
    result: ReasoningResult, references: list[str], question: str, drawings: list[_Drawing], report: Path | None
) -> Iterator[Path]:
    """Write the pictures and the report; yields each path when its file is there."""
    from latent_tool.views.overlay import overlay_png

    pictures = _pictures(references) if drawings else []
    for path, image, heatmap in drawings:
        write_whole(path, overlay_png(result, pictures[image], index=image, heatmap=heatmap))
        yield path
    if report is not None:
        _write_report(result, references, question, report)
        yield report


def _write_report(result: ReasoningResult, references: list[str], question: str, path: Path) -> None:
    from latent_tool.views.report import write_report

    names = [
        "data URI" if reference.strip()[:5].lower() == "data:" else Path(reference).name for reference in references
    ]
    write_report(path, result, _pictures(references), question=question, names=names)


def _follow(reasoner: Any, request: dict[str, Any], quiet: bool) -> ReasoningResult:
    """Run the reasoner with a progress bar on stderr."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from latent_tool.schema import ReasoningStep

    console = _stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("loading the model", total=None, note="")
        for item in reasoner.stream(request):
            if not isinstance(item, ReasoningStep):
                result: ReasoningResult = item
                return result
            if item.phase == "search" and item.trace is not None:
                first = item.trace.first_token_probability
                note = f"reward {item.trace.best_reward:.4f}" + (f", first token {first:.2f}" if first else "")
                progress.update(
                    task, description="thinking", total=item.iterations, completed=item.trace.round, note=note
                )
            else:
                progress.update(task, description={"prefill": "looking", "decode": "answering"}[item.phase])
    raise LatentToolError("The reasoner gave no result.")


@contextmanager
def _reaching_stdout() -> Iterator[None]:
    """What is printed inside must get out. Raises ``LatentToolError`` if it cannot, for example on a full disk."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has had enough: nothing is wrong
        raise
    except OSError as error:
        # What is left in the buffer would be tried again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise LatentToolError(
            f"The result cannot be written to standard output ({error.strerror}).",
            "Send it to a file that has room for it.",
        ) from None


def _print(text: str) -> None:
    with _reaching_stdout():
        print(text)


def _json(result: ReasoningResult) -> str:
    """The result as JSON, with escapes for what standard output has no characters for."""
    import json

    text = result.model_dump_json(indent=2)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(json.loads(text), indent=2)
    return text


def _show(result: ReasoningResult, references: list[str], written: list[Path]) -> None:
    """Print a result for people; warnings and advice go to stderr."""
    from rich.console import Console

    from latent_tool.views.terminal import print_result, what_to_do

    with _reaching_stdout():
        print_result(Console(highlight=False), result, pictures=lambda: _pictures(references), written=written)
    for note in (*result.warnings, what_to_do(result)):
        if note:
            _note(note)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _note(message: str) -> None:
    from rich.text import Text

    from latent_tool.views.terminal import plain

    _stderr().print(Text(f"note: {plain(message)}", style="yellow"), soft_wrap=True)


def _fail(error: LatentToolError) -> NoReturn:
    from rich.text import Text

    from latent_tool.views.terminal import plain

    console = _stderr()
    console.print(Text.assemble(("error: ", "bold red"), plain(error.message)), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble(("what to do: ", "bold"), plain(error.hint)), soft_wrap=True)
    sys.exit(2 if isinstance(error, InputError | ModelError) else 1)


def main() -> None:
    """Entry point of the ``latent-tool`` command."""
    # Read when torch is loaded: on a busy machine, threads that spin make a small model twenty times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a question mark for what an encoding lacks, not a traceback
    try:
        app()
    except LatentToolError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
