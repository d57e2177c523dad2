"""``latent-tool play``: a page on this machine to try a model on."""

from __future__ import annotations

import socket
import sys
import threading
from typing import TYPE_CHECKING, Annotated, cast

import typer

from latent_tool.errors import LatentToolError, MissingExtraError, SettingsError

if TYPE_CHECKING:
    from latent_tool.langchain.reasoner import LatentReasoner
    from latent_tool.settings import BudgetLevel

__all__ = ["play"]

HOST = "127.0.0.1"  # and nothing else: a page for strangers is what `latent-tool serve` is for


def play(
    model: Annotated[
        str, typer.Option(help="Checkpoint directory or hub id; the model that ships with the package by default.")
    ] = "embedded",
    device: Annotated[str, typer.Option(help="For example cpu or cuda:0; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    budget: Annotated[str, typer.Option(help="What the page begins with: quick, standard or thorough.")] = "standard",
    min_confidence: Annotated[
        float, typer.Option(min=0, max=1, metavar="C", help="Where the threshold begins, 0 to 1.")
    ] = 0.5,
    attention: Annotated[bool, typer.Option("--attention", help="Measure the attention to every image cell.")] = False,
    grounding: Annotated[
        bool, typer.Option("--grounding", help="Measure how each token depends on the image.")
    ] = False,
    controls: Annotated[
        bool, typer.Option("--controls", help="Answer again without latents, and on a noised image.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")] = 8766,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open the page in a browser.")] = False,
) -> None:
    """Try a model on a page: drop a picture, ask, watch the search.

    Only programs on this machine can reach it. Ctrl-C ends it.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("The playground", "serve") from error

    with _listening(port) as listener:  # before what takes time
        from latent_tool.integrations.playground import create_playground
        from latent_tool.langchain.reasoner import LatentReasoner
        from latent_tool.settings import Budget

        reasoner = LatentReasoner(
            model=model,
            device=device,
            dtype=dtype,
            budget=Budget.level(cast("BudgetLevel", budget)),
            min_confidence=min_confidence,
            attention=attention,
            grounding=grounding,
            controls=controls,
        )
        app = create_playground(reasoner)
        url = f"http://{HOST}:{listener.getsockname()[1]}/"
        print(url, flush=True)
        # The page is there at once; a question waits for the model.
        threading.Thread(target=_load, args=(reasoner,), daemon=True).start()
        if not no_open:
            import webbrowser

            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listener])


def _listening(port: int) -> socket.socket:
    """A listening socket, so that a page that is opened at once is not refused. Raises ``SettingsError``."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"Port {port} cannot be used ({error.strerror}).", "Name another --port; 0 takes a free one."
        ) from None
    return listener


def _load(reasoner: LatentReasoner) -> None:
    try:
        reasoner.engine()
    except LatentToolError as error:  # and every question gets the same answer
        print(f"error: {error}", file=sys.stderr)
