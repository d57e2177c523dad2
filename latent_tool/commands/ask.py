"""``latent-tool ask``: one question about one image or several."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from latent_tool.commands import options
from latent_tool.commands.output import note, print_out, reaching_stdout, stderr
from latent_tool.errors import ImageNotAllowedError, LatentToolError
from latent_tool.files import require_apart, require_writable, write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

    from latent_tool.schema import ReasoningResult

__all__ = ["ask"]


class Preset(StrEnum):
    """Names of search settings."""

    default = "default"
    paper = "paper"


def _finite(value: float | None) -> float | None:
    """Click compares with the limits of an option, which not-a-number passes."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter("must be a finite number")
    return value


def ask(
    image: Annotated[str, typer.Argument(help="Path of the image, or a data URI.")],
    question: Annotated[str, typer.Argument(help="What to answer about it.")],
    also: Annotated[
        list[str] | None, typer.Option("--also", metavar="IMAGE", help="A further image; may be repeated.")
    ] = None,
    answers: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="TEXT", help="An answer to choose from; give two or more of these."),
    ] = None,
    or_cannot_tell: Annotated[
        bool, typer.Option("--or-cannot-tell", help="Add 'cannot tell' to the options, and abstain if it is the best.")
    ] = False,
    model: options.Model = "embedded",
    budget: options.Budget = options.Level.standard,
    min_confidence: options.MinConfidence = None,
    calibration: options.Calibration = None,
    check_domain: options.CheckDomain = True,
    overlay: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Write the picture with the injected patches.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="OUT.html", help="Write a page that shows how the answer came about.")
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            min=0.001, callback=_finite, metavar="SECONDS", help="From reading the image to the last token at most."
        ),
    ] = None,
    system: options.System = None,
    patches: Annotated[bool, typer.Option("--patches", help="List every injected patch, not a summary.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=10_000,
            help="Rounds of the search; 0 scores the initial latents only.",
            rich_help_panel=options.SEARCH,
        ),
    ] = None,
    always_search: Annotated[
        bool,
        typer.Option(
            "--always-search",
            help="Search even where the model is sure without (only a search injects patches); look at windows only "
            "with --views.",
            rich_help_panel=options.SEARCH,
        ),
    ] = False,
    max_patches: Annotated[
        int | None, typer.Option(min=0, max=4096, help="Image cells injected at most.", rich_help_panel=options.SEARCH)
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=64,
            help="Windows of the picture looked at again at most, while the answer is unsure; 0: none.",
            rich_help_panel=options.SEARCH,
        ),
    ] = None,
    max_candidates: Annotated[
        int | None, typer.Option(min=1, help="States scored at most.", rich_help_panel=options.SEARCH)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=32_768, help="Tokens of the answer at most.", rich_help_panel=options.SEARCH),
    ] = None,
    preset: Annotated[
        Preset, typer.Option(help="Settings of the search: ours, or the paper's.", rich_help_panel=options.SEARCH)
    ] = Preset.default,
    latents: Annotated[
        int | None,
        typer.Option(
            min=0, max=256, help="Latent thought tokens; 0 is the plain model.", rich_help_panel=options.SEARCH
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of the search.", rich_help_panel=options.SEARCH)
    ] = 0,
    attention: options.Attention = False,
    grounding: options.Grounding = False,
    controls: options.Controls = False,
    heatmap: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.png",
            help="Write the picture coloured by the attention, which is measured for it.",
            rich_help_panel=options.MEASURED,
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    compile: options.Compile = "auto",
) -> None:
    """Ask one question about an image.

    Exit code 3: there is an answer, and it is below --min-confidence or abstained from.

    Example: latent-tool ask chart.png "Which bar is tallest?" --overlay seen.png
    """
    question, system = options.as_text(question), None if system is None else options.as_text(system)
    from latent_tool.request import checked_options
    from latent_tool.settings import Budget, ImagePolicy, SearchSettings

    if answers or or_cannot_tell:
        try:
            checked_options(answers or [])
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--option") from None
    references = [image, *(also or [])]
    if any(each.strip().lower().startswith(("http:", "https:")) for each in references):
        raise ImageNotAllowedError("URLs are not opened here.", "Download the image and name its file.")
    drawings = [*_drawings(overlay, len(references)), *_drawings(heatmap, len(references), heatmap=True)]
    outputs = [("--heatmap" if each.heatmap else "--overlay", each.path) for each in drawings]
    if report is not None:
        outputs.append(("--report", report))
    inputs = [each for each in (*references, calibration, model) if each is not None and not _is_data(each)]
    require_apart(outputs, [Path(each) for each in inputs])
    for option, path in outputs:
        require_writable(path, ".html" if option == "--report" else ".png")
    limits = {
        "iterations": iterations,
        "max_patches": max_patches,
        "max_views": views,
        "max_candidates": max_candidates,
        "max_new_tokens": max_new_tokens,
        "deadline_s": deadline,
    }
    chosen = Budget.level(budget.value).but(**{name: value for name, value in limits.items() if value is not None})
    if always_search:
        # A window that makes the answer surer would end the call without a search, too, unless it was asked for.
        chosen = chosen.but(target_confidence=None, max_views=views or 0)
    settings = SearchSettings.paper() if preset is Preset.paper else SearchSettings()
    if latents == 0:  # without latents there is no place where they start
        settings = settings.but(latents=0, init=SearchSettings().init)
    elif latents is not None:
        settings = settings.but(latents=latents)

    from latent_tool.images.picture import Picture

    reasoner = options.make_reasoner(
        model=model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        budget=chosen,
        settings=settings,
        seed=seed,
        min_confidence=min_confidence,
        calibration=calibration,
        check_domain=check_domain,
        attention=attention or heatmap is not None,
        grounding=grounding,
        controls=controls,
    )
    opened = [Picture(reference, ImagePolicy.local()) for reference in references]  # each decoded once
    asked = {"question": question, "system": system, "options": answers or None, "unsure": or_cannot_tell}
    result = _follow(reasoner, {"images": opened, **asked}, quiet)
    pictures = [picture.load(ImagePolicy.local()).image for picture in opened]
    written: list[Path] = []
    failure: LatentToolError | None = None
    try:
        for path in _write_files(result, pictures, _names(references), question, drawings, report):
            written.append(path)
    except LatentToolError as error:  # the answer is told all the same
        failure = error
    if as_json:
        print_out(_json(result))
    else:
        _show(result, pictures, written, patches)
    if as_json or not result.unsure:  # otherwise the advice says it
        options.tell_what_it_is(model)
    if not as_json:
        from latent_tool.views.terminal import what_to_do

        for each in (*result.warnings, what_to_do(result)):
            if each:
                note(each)
    if failure is not None:
        raise failure
    if result.accepted is False:
        raise typer.Exit(options.BELOW)


def _is_data(reference: str) -> bool:
    return reference.strip()[:5].lower() == "data:"


def _names(references: list[str]) -> list[str]:
    """What the report calls the images."""
    return ["data URI" if _is_data(each) else Path(each).name for each in references]


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
    result: ReasoningResult,
    pictures: Sequence[Image],
    names: list[str],
    question: str,
    drawings: list[_Drawing],
    report: Path | None,
) -> Iterator[Path]:
    """Write the pictures and the report; yields each path when its file is there."""
    from latent_tool.views.overlay import overlay_png

    for path, image, heatmap in drawings:
        write_whole(path, overlay_png(result, pictures[image], index=image, heatmap=heatmap))
        yield path
    if report is not None:
        from latent_tool.views.report import write_report

        write_report(report, result, pictures, question=question, names=names)
        yield report


def _follow(reasoner: Any, request: dict[str, Any], quiet: bool) -> ReasoningResult:
    """Run the reasoner with a progress bar on stderr."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from latent_tool.schema import ReasoningStep

    console = stderr()
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
            elif item.view is not None:
                progress.update(task, description="looking again", note=f"at {item.view.where}")
            else:
                told = {"prefill": "looking", "look": "looking again", "decode": "answering"}
                progress.update(task, description=told[item.phase], note="")
    raise LatentToolError("The reasoner gave no result.")


def _json(result: ReasoningResult) -> str:
    """The result as JSON, with escapes for what standard output has no characters for."""
    import json

    text = result.model_dump_json(indent=2)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(json.loads(text), indent=2)
    return text


def _show(result: ReasoningResult, pictures: Sequence[Image], written: list[Path], patches: bool) -> None:
    """Print a result for people."""
    from rich.console import Console

    from latent_tool.views.terminal import print_result

    with reaching_stdout():
        print_result(Console(highlight=False), result, pictures=lambda: pictures, written=written, patches=patches)
