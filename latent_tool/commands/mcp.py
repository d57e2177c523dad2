"""``latent-tool mcp``: the tool for every client that speaks the Model Context Protocol."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Annotated, cast

import typer

from latent_tool.commands import options

if TYPE_CHECKING:
    from latent_tool.settings import BudgetLevel

__all__ = ["mcp"]


def mcp(
    context: typer.Context,
    http: Annotated[
        bool, typer.Option("--http", help="Serve streamable HTTP, at /mcp, instead of standard input and output.")
    ] = False,
    host: Annotated[str, typer.Option(help="With --http: address to listen at; other than loopback needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="With --http: port to listen at; 0 takes a free one.")
    ] = 8765,
    token_file: options.TokenFile = None,
    folder: options.Folder = None,
    download_from: options.DownloadFrom = None,
    max_megabytes: options.MaxMegabytes = 10,
    isolate: options.Isolate = True,
    model: options.Model = "embedded",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    compile: options.Compile = "auto",
    budget: Annotated[str, typer.Option(help="quick, standard or thorough.")] = "standard",
    deadline: Annotated[float | None, typer.Option(metavar="SECONDS", help="For one question at most.")] = None,
    min_confidence: options.MinConfidence = 0.5,
    calibration: options.Calibration = None,
    log_level: options.LogLevel = options.Log.warning,
    check_domain: options.CheckDomain = True,
) -> None:
    """Serve the tool to MCP clients.

    Over standard input and output, files are opened in --folder and in the client's roots; over HTTP in --folder only.

    Example of a client's configuration: {"command": "latent-tool", "args": ["mcp", "--folder", "/home/me/pictures"]}
    """
    from latent_tool.settings import Budget

    options.log_to_stderr(log_level)
    if not http:
        options.require_used(context, "with --http", "host", "port", "token_file")
    policy = options.server_policy(folder, download_from, max_megabytes, isolate)
    reasoner = options.make_reasoner(
        model=model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        budget=Budget.level(cast("BudgetLevel", budget)).but(deadline_s=deadline),
        min_confidence=min_confidence,
        calibration=calibration,
        check_domain=check_domain,
    )
    from latent_tool.integrations.mcp import run_http, run_stdio
    from latent_tool.langchain.image_tool import ImageTool

    tool = ImageTool(reasoner=reasoner, image_policy=policy)
    if http:
        from latent_tool.integrations.http_server import read_token

        run_http(tool, host=host, port=port, token=read_token(token_file))
        return
    # Clients wait for the first reply, not for the model: it is loaded meanwhile.
    threading.Thread(target=options.load_meanwhile, args=(reasoner,), daemon=True).start()
    run_stdio(tool)
