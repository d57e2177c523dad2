"""``latent-tool mcp``: the tool for every client that speaks the Model Context Protocol."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from latent_tool.errors import LatentToolError, SettingsError

if TYPE_CHECKING:
    from latent_tool.langchain.reasoner import LatentReasoner
    from latent_tool.settings import BudgetLevel

__all__ = ["mcp"]

TOKEN = "LATENT_TOOL_TOKEN"


def mcp(
    http: Annotated[
        bool, typer.Option("--http", help="Serve streamable HTTP, at /mcp, instead of standard input and output.")
    ] = False,
    host: Annotated[str, typer.Option(help="With --http: address to listen at; other than loopback needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="With --http: port to listen at.")] = 8765,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"With --http: file with the bearer token; or set {TOKEN}."),
    ] = None,
    folder: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Folder whose images may be opened; may be repeated.")
    ] = None,
    download_from: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="Host of https URLs that may be opened; may be repeated.")
    ] = None,
    max_megabytes: Annotated[float, typer.Option(min=0.001, max=100, help="Size of an image at most.")] = 10,
    isolate: Annotated[
        bool, typer.Option("--isolate/--no-isolate", help="Decode images in processes of their own.")
    ] = True,
    model: Annotated[
        str, typer.Option(help="Checkpoint directory or hub id; the model that ships with the package by default.")
    ] = "embedded",
    device: Annotated[str, typer.Option(help="For example cpu or cuda:0; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    budget: Annotated[str, typer.Option(help="quick, standard or thorough.")] = "standard",
    deadline: Annotated[float | None, typer.Option(metavar="SECONDS", help="For one question at most.")] = None,
    min_confidence: Annotated[
        float, typer.Option(min=0, max=1, metavar="C", help="Below it an answer is marked as not reliable, 0 to 1.")
    ] = 0.5,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Makes the confidence a probability; 'embedded' for the embedded model's. Questions with another "
            "budget or a system text are then refused.",
        ),
    ] = None,
) -> None:
    """Serve the tool to MCP clients.

    Over standard input and output, files are opened in --folder and in the client's roots; over HTTP in --folder only.

    Example of a client's configuration: {"command": "latent-tool", "args": ["mcp", "--folder", "/home/me/pictures"]}
    """
    from latent_tool.integrations.mcp import run_http, run_stdio
    from latent_tool.langchain.image_tool import ImageTool
    from latent_tool.langchain.reasoner import LatentReasoner
    from latent_tool.settings import Budget, ImagePolicy

    for each in folder or []:
        if not each.is_dir():
            raise SettingsError(f"{str(each)!r} is no folder.", "Name a folder that exists.")
    reasoner = LatentReasoner(
        model=model,
        device=device,
        dtype=dtype,
        budget=Budget.level(cast("BudgetLevel", budget)).but(deadline_s=deadline),
        calibration=calibration,
    )
    tool = ImageTool(
        reasoner=reasoner,
        min_confidence=min_confidence,
        image_policy=ImagePolicy.untrusted(
            folders=tuple(each.absolute() for each in folder or []),
            hosts=tuple(download_from or []),
            max_bytes=round(max_megabytes * 1_000_000),
            isolate=isolate,
        ),
    )
    if http:
        run_http(tool, host=host, port=port, token=_token(token_file))
        return
    # Clients wait for the first reply, not for the model: it is loaded meanwhile.
    threading.Thread(target=_load, args=(reasoner,), daemon=True).start()
    run_stdio(tool)


def _load(reasoner: LatentReasoner) -> None:
    try:
        reasoner.engine()
    except LatentToolError as error:  # and every question gets the same answer
        print(f"error: {error}", file=sys.stderr)


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN)
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise SettingsError(f"{str(file)!r} cannot be read.", "Name a text file that holds the token.") from None
