"""``latent-tool serve``: a reasoner as an HTTP service, in this process or on Ray."""

from __future__ import annotations

import sys
from typing import Annotated, Any, cast

import typer

from latent_tool.commands import options
from latent_tool.errors import SettingsError
from latent_tool.settings import Budget, BudgetLevel

__all__ = ["serve"]

TOKEN = "LATENT_TOOL_TOKEN"


def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen at; other than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    token_file: options.TokenFile = None,
    folder: options.Folder = None,
    download_from: options.DownloadFrom = None,
    max_megabytes: options.MaxMegabytes = 20,
    isolate: options.Isolate = True,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests in hand at most (each replica with --ray); more are refused: 503.")
    ] = 64,
    max_iterations: Annotated[int, typer.Option(min=0, help="Rounds of the search a client may ask for.")] = 100,
    max_seconds: Annotated[float, typer.Option(min=0.001, help="Deadline of a question at most.")] = 60,
    grace: Annotated[
        float, typer.Option(min=0.1, max=3600, metavar="SECONDS", help="For requests in hand when it is stopped.")
    ] = 20,
    model: options.Model = "embedded",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    compile: options.Compile = "auto",
    budget: Annotated[str, typer.Option(help="When a client names none: quick, standard or thorough.")] = "standard",
    min_confidence: options.MinConfidence = None,
    calibration: options.Calibration = None,
    log_level: options.LogLevel = options.Log.warning,
    check_domain: options.CheckDomain = True,
    on_ray: Annotated[
        bool, typer.Option("--ray", help="Run on Ray: the cluster of RAY_ADDRESS, or this machine alone.")
    ] = False,
    replicas: Annotated[int, typer.Option(min=1, help="With --ray: engines at least.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="With --ray: engines at most; Ray chooses by the load.")
    ] = None,
    num_cpus: Annotated[float, typer.Option(min=0, help="With --ray: processors of a replica.")] = 1,
    num_gpus: Annotated[float, typer.Option(min=0, help="With --ray: GPUs of a replica, also a fraction.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="With --ray: questions gathered at most.")] = 8,
) -> None:
    """Serve questions over HTTP. Ctrl-C ends it.

    Example: curl -F image=@chart.png -F question="Which bar is tallest?" http://127.0.0.1:8000/v1/ask/form
    """
    from latent_tool.integrations.http_server import ServerLimits, bind, in_url, is_loopback, read_token, serve_app

    options.log_to_stderr(log_level)
    if not on_ray:
        options.require_used(context, "with --ray", "replicas", "max_replicas", "num_cpus", "num_gpus", "batch_size")
    token = read_token(token_file)
    if token is None and not is_loopback(host):
        raise SettingsError(
            f"Whoever reaches {host} could ask.", f"Set {TOKEN} or give --token-file, or listen at 127.0.0.1."
        )
    policy = options.server_policy(folder, download_from, max_megabytes, isolate)
    from latent_tool.integrations.http_service import LOOPBACK, ServiceLimits, create_app

    own = Budget.level(cast(BudgetLevel, budget))
    reasoner = options.make_reasoner(
        model=model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        budget=own,
        min_confidence=min_confidence,
        calibration=calibration,
        check_domain=check_domain,
    )
    service: dict[str, Any] = {
        "policy": policy,
        "token": token,
        "limits": ServiceLimits(
            budget=Budget(
                iterations=max_iterations, max_patches=64, max_views=32, max_new_tokens=1024, deadline_s=max_seconds
            ),
            # base64 takes four characters for three bytes; and there may be several images.
            max_body_bytes=round(max_megabytes * 1_600_000) + 1_000_000,
            max_requests=max_requests,
        ),
        "hosts": (*LOOPBACK, in_url(host)),
    }
    if on_ray:
        from latent_tool.integrations import ray_serve

        print(
            "note: Ray opens ports of its own on every interface, whatever --host is: let a firewall close them.",
            file=sys.stderr,
            flush=True,
        )
        found = ray_serve.application(
            reasoner,
            **service,
            replicas=replicas if max_replicas is None else (replicas, max_replicas),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            batch_size=batch_size,
            max_ongoing=max_requests,
        )
        ray_serve.run(found, host=host, port=port, num_cpus=num_cpus, num_gpus=num_gpus)
        return
    app = create_app(reasoner, **service)
    with bind(host, port) as listener:
        reasoner.engine()  # what is wrong with the model is said before anybody asks
        listener.listen(64)
        print(f"Listening at http://{in_url(host)}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        options.tell_what_it_is(model)
        serve_app(app, listener, gate=app.state.gate, limits=ServerLimits(grace_s=grace))
