"""Options that several commands share, said once, and what they are made into.

This module knows settings and errors; models and servers are imported by the commands that need them.
"""

from __future__ import annotations

import math
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from latent_tool.errors import LatentToolError, SettingsError

if TYPE_CHECKING:
    from latent_tool.langchain.reasoner import LatentReasoner
    from latent_tool.settings import Budget as Budget_
    from latent_tool.settings import ImagePolicy

__all__ = [
    "BELOW",
    "AsJson",
    "Attention",
    "Batch",
    "Budget",
    "Calibration",
    "CheckDomain",
    "Command",
    "Compile",
    "Controls",
    "Data",
    "Device",
    "DownloadFrom",
    "Dtype",
    "Folder",
    "Grounding",
    "Images",
    "Isolate",
    "KeepGoing",
    "Level",
    "Limit",
    "Log",
    "LogLevel",
    "MaxMegabytes",
    "MinConfidence",
    "Model",
    "Preset",
    "Quantize",
    "Question",
    "Quiet",
    "System",
    "TokenFile",
    "as_text",
    "load_meanwhile",
    "log_to_stderr",
    "make_reasoner",
    "require_used",
    "server_policy",
    "tell_what_it_is",
]

BELOW = 3  # exit code: there is an answer, and it is below what was asked for
MODEL = "Model"
SEARCH = "How the search works"
MEASURED = "What is measured besides"
PICTURES = "Which images may be opened"
RAY = "On Ray"


class Command(TyperCommand):
    """A command whose help shows flags as flags: without a type, for they take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Give the parameters, as Typer does."""
        params: list[Any] = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class Level(StrEnum):
    """Names of budgets."""

    quick = "quick"
    standard = "standard"
    thorough = "thorough"


Quantize = Annotated[
    Literal["8bit", "4bit"] | None,
    typer.Option(help="Quantize the weights as they are loaded; needs the extra quantize.", rich_help_panel=MODEL),
]


Compile = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(
        help="Compile the passes after image and question; the first questions take longer. auto: on CUDA.",
        rich_help_panel=MODEL,
    ),
]


class Log(StrEnum):
    """From which level on a server writes its log."""

    error = "error"
    warning = "warning"
    info = "info"
    debug = "debug"


Model = Annotated[
    str, typer.Option(help="Checkpoint directory or hub id; the model that ships with the package by default.")
]
Device = Annotated[
    str, typer.Option(help="For example cpu or cuda:0; auto takes a GPU if there is one.", rich_help_panel=MODEL)
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)]
Budget = Annotated[Level, typer.Option(help="How much work at most.")]
System = Annotated[str | None, typer.Option(help="System text before the question.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Makes the confidence a probability; 'embedded' for the embedded model's. Questions with another budget "
        "or a system text are then refused.",
    ),
]


def _confidence_wanted(text: object) -> float | str:
    """A number from 0 to 1, or the calibration's own threshold."""
    if text == "calibrated":
        return "calibrated"
    try:
        wanted = float(str(text))
    except ValueError:
        wanted = math.nan
    if not 0 <= wanted <= 1:
        raise typer.BadParameter("must be a number from 0 to 1, or 'calibrated'")
    return wanted


MinConfidence = Annotated[
    Any,
    typer.Option(
        metavar="C",
        parser=_confidence_wanted,
        help="Abstain below this confidence, 0 to 1, or below the calibration's own threshold: calibrated.",
    ),
]
CheckDomain = Annotated[
    bool,
    typer.Option(
        "--check-domain/--no-check-domain",
        help="Refuse questions that are unlike those of the calibration (or unlike what the embedded model knows).",
    ),
]
Attention = Annotated[
    bool,
    typer.Option("--attention", help="Measure the attention to every image cell.", rich_help_panel=MEASURED),
]
Grounding = Annotated[
    bool, typer.Option("--grounding", help="Measure how each token depends on the image.", rich_help_panel=MEASURED)
]
Controls = Annotated[
    bool,
    typer.Option("--controls", help="Answer again without latents, and on a noised image.", rich_help_panel=MEASURED),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]

# Data sets.
Data = Annotated[
    str,
    typer.Argument(
        help="A .jsonl, .csv, .json, .tsv (VLMEvalKit) or .parquet file, a folder of images with a labels file, "
        "easy-vqa[:test|train], or scenes[:held_out|hard|train[:first-last]] (seeds, one question each)."
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The benchmark that the file holds, with its columns, rule and groups: mmstar, mmvp, pope, vstar, "
        "hrbench, chartqa, textvqa or mathvista.",
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of a benchmark's pictures; by default that of its file."),
]
Question = Annotated[str | None, typer.Option(help="Asked where a row has no question of its own.")]
Limit = Annotated[
    int | None, typer.Option(metavar="N", help="At most N questions, drawn from the data set (always the same).")
]
Batch = Annotated[int, typer.Option(min=1, help="Questions answered together.")]
KeepGoing = Annotated[
    bool, typer.Option("--keep-going", help="Record rows that cannot be used as errors, and answer the others.")
]

# Servers.
TokenFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File with the bearer token; or set LATENT_TOOL_TOKEN.")
]
LogLevel = Annotated[Log, typer.Option(help="What to log on standard error; info: every request, without secrets.")]
Folder = Annotated[
    list[Path] | None,
    typer.Option(metavar="DIR", help="Folder whose images may be opened; may be repeated.", rich_help_panel=PICTURES),
]
DownloadFrom = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST", help="Host of https URLs that may be opened; may be repeated.", rich_help_panel=PICTURES
    ),
]
MaxMegabytes = Annotated[
    float, typer.Option(min=0.001, max=100, help="Size of an image at most.", rich_help_panel=PICTURES)
]
Isolate = Annotated[
    bool,
    typer.Option("--isolate/--no-isolate", help="Decode images in processes of their own.", rich_help_panel=PICTURES),
]


def as_text(argument: str) -> str:
    """Read an argument as UTF-8 where the locale knows less (``LC_ALL=C``); names of files stay as they came."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode(errors="surrogateescape")
    return argument


def require_used(context: typer.Context, where: str, *names: str) -> None:
    """Refuse options that were given and would change nothing.

    Args:
        where: when they change something, such as ``"with --ray"``.
        names: of their parameters.
    """
    for param in context.command.params:
        given = context.get_parameter_source(str(param.name))
        if param.name in names and given is not None and given.name == "COMMANDLINE":
            flag = max(param.opts, key=len)
            raise SettingsError(f"{flag} changes something {where} alone.", f"Leave {flag} out, or use it {where}.")


def server_policy(
    folder: list[Path] | None, download_from: list[str] | None, max_megabytes: float, isolate: bool
) -> ImagePolicy:
    """Make the image policy of a server. Raises ``SettingsError`` for a folder that is none."""
    from latent_tool.settings import ImagePolicy

    for each in folder or []:
        if not each.is_dir():
            raise SettingsError(f"{str(each)!r} is no folder.", "Name a folder that exists.")
    return ImagePolicy.untrusted(
        folders=tuple(each.absolute() for each in folder or []),
        hosts=tuple(download_from or []),
        max_bytes=round(max_megabytes * 1_000_000),
        isolate=isolate,
    )


def log_to_stderr(level: Log) -> None:
    """Write the package's log to standard error from ``level`` on."""
    import logging

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("latent_tool").setLevel(level.value.upper())


def make_reasoner(
    *,
    model: str,
    device: str,
    dtype: str,
    quantize: str | None,
    compile: str = "auto",
    budget: Budget_ | str,
    min_confidence: float | Literal["calibrated"] | None = None,
    calibration: str | None = None,
    check_domain: bool = True,
    **fields: Any,
) -> LatentReasoner:
    """Make the reasoner of a command from the options that all commands that ask share, and ``fields`` of its own."""
    from latent_tool.langchain.reasoner import LatentReasoner

    return LatentReasoner(
        model=model,
        device=device,
        dtype=dtype,
        quantization_config=quantize,
        compile={"on": True, "off": False}.get(compile, compile),
        budget=budget,
        min_confidence=min_confidence,
        calibration=calibration,
        check_domain=check_domain,
        **fields,
    )


def load_meanwhile(reasoner: LatentReasoner) -> None:
    """Load the model; for a thread beside a server that answers already."""
    try:
        reasoner.engine()
    except LatentToolError as error:  # and every question gets the same answer
        print(f"error: {error}", file=sys.stderr)


def tell_what_it_is(model: str) -> None:
    """Say on standard error what the embedded model is, when it is the one that answers."""
    from latent_tool.about import what_it_is

    said = what_it_is(model)
    if said is not None:
        print(f"note: {said}", file=sys.stderr, flush=True)
