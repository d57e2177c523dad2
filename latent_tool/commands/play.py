"""``latent-tool play``: a page on this machine to try a model on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Annotated, cast

import typer

from latent_tool.commands import options
from latent_tool.errors import MissingExtraError

if TYPE_CHECKING:
    from latent_tool.settings import BudgetLevel

__all__ = ["play"]

HOST = "127.0.0.1"  # and nothing else: a page for strangers is what `latent-tool serve` is for


def play(
    model: options.Model = "embedded",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    compile: options.Compile = "auto",
    budget: Annotated[str, typer.Option(help="What the page begins with: quick, standard or thorough.")] = "standard",
    min_confidence: options.MinConfidence = 0.5,
    calibration: options.Calibration = None,
    check_domain: options.CheckDomain = True,
    attention: options.Attention = False,
    grounding: options.Grounding = False,
    controls: options.Controls = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")] = 8766,
    log_level: options.LogLevel = options.Log.warning,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open the page in a browser.")] = False,
) -> None:
    """Try a model on a page: drop a picture, ask, watch the search.

    Only programs on this machine can reach it. Ctrl-C ends it.
    """
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("The playground", "serve") from error

    from latent_tool.integrations.http_server import ServerLimits, bind, serve_app

    options.log_to_stderr(log_level)
    with bind(HOST, port) as listener:  # before what takes time
        listener.listen(64)  # a page that is opened at once is not refused
        from latent_tool.integrations.playground import create_playground
        from latent_tool.settings import Budget

        reasoner = options.make_reasoner(
            model=model,
            device=device,
            dtype=dtype,
            quantize=quantize,
            compile=compile,
            budget=Budget.level(cast("BudgetLevel", budget)),
            min_confidence=min_confidence,
            calibration=calibration,
            check_domain=check_domain,
            attention=attention,
            grounding=grounding,
            controls=controls,
        )
        app = create_playground(reasoner)
        url = f"http://{HOST}:{listener.getsockname()[1]}/"
        print(url, flush=True)
        options.tell_what_it_is(model)
        # The page is there at once; a question waits for the model.
        threading.Thread(target=options.load_meanwhile, args=(reasoner,), daemon=True).start()
        if not no_open:
            import webbrowser

            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        serve_app(app, listener, gate=app.state.gate, limits=ServerLimits(grace_s=2))
