"""``latent-tool serve``: a reasoner as an HTTP service, in this process or on Ray."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from latent_tool.errors import MissingExtraError, SettingsError
from latent_tool.settings import Budget, BudgetLevel, ImagePolicy

__all__ = ["serve"]

TOKEN = "LATENT_TOOL_TOKEN"
TOKEN_LENGTH = 16  # characters; a shorter one can be guessed


def serve(
    host: Annotated[str, typer.Option(help="Address to listen at; other than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"File with the bearer token; or set {TOKEN}.")
    ] = None,
    folder: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Folder whose images may be opened; may be repeated.")
    ] = None,
    download_from: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="Host of https URLs that may be opened; may be repeated.")
    ] = None,
    max_megabytes: Annotated[float, typer.Option(min=0.001, max=100, help="Size of an image at most.")] = 20,
    isolate: Annotated[
        bool, typer.Option("--isolate/--no-isolate", help="Decode images in processes of their own.")
    ] = True,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests in hand at most (each replica with --ray); more are refused: 503.")
    ] = 64,
    max_iterations: Annotated[int, typer.Option(min=0, help="Rounds of the search a client may ask for.")] = 100,
    max_seconds: Annotated[float, typer.Option(min=0.001, help="Deadline of a question at most.")] = 60,
    model: Annotated[
        str, typer.Option(help="Checkpoint directory or hub id; the model that ships with the package by default.")
    ] = "embedded",
    device: Annotated[str, typer.Option(help="For example cpu or cuda:0; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    budget: Annotated[str, typer.Option(help="When a client names none: quick, standard or thorough.")] = "standard",
    min_confidence: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="C", help="Abstain below it unless a client says otherwise.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Makes the confidence a probability; 'embedded' for the embedded model's. Questions with another "
            "budget or a system text are then refused.",
        ),
    ] = None,
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
    token = _token(token_file)
    if token is None and not _is_loopback(host):
        raise SettingsError(
            f"Whoever reaches {host} could ask.", f"Set {TOKEN} or give --token-file, or listen at 127.0.0.1."
        )
    for each in folder or []:
        if not each.is_dir():
            raise SettingsError(f"{str(each)!r} is no folder.", "Name a folder that exists.")
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("The HTTP service", "serve") from error

    from latent_tool.integrations.http_service import LOOPBACK, ServiceLimits, create_app
    from latent_tool.langchain.reasoner import LatentReasoner

    own = Budget.level(cast(BudgetLevel, budget))
    reasoner = LatentReasoner(
        model=model,
        device=device,
        dtype=dtype,
        budget=own,
        min_confidence=min_confidence,
        calibration=calibration,
    )
    service: dict[str, Any] = {
        "policy": ImagePolicy.untrusted(
            folders=tuple(each.absolute() for each in folder or []),
            hosts=tuple(download_from or []),
            max_bytes=round(max_megabytes * 1_000_000),
            isolate=isolate,
        ),
        "token": token,
        "limits": ServiceLimits(
            budget=Budget(iterations=max_iterations, max_patches=64, max_new_tokens=1024, deadline_s=max_seconds),
            # base64 takes four characters for three bytes; and there may be several images.
            max_body_bytes=round(max_megabytes * 1_600_000) + 1_000_000,
            max_requests=max_requests,
        ),
        "hosts": (*LOOPBACK, _in_url(host)),
    }
    if on_ray:
        from latent_tool.integrations import ray_serve

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
    with _listening(host, port) as listener:
        reasoner.engine()  # what is wrong with the model is said before anybody asks
        print(f"Listening at http://{_in_url(host)}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listener])


def _token(file: Path | None) -> str | None:
    if file is None:
        token = os.environ.get(TOKEN, "")
        if not token:
            return None
    else:
        try:
            token = file.read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise SettingsError(f"{str(file)!r} cannot be read.", "Name a text file that holds the token.") from None
    if len(token) < TOKEN_LENGTH:
        raise SettingsError(
            f"The token is shorter than {TOKEN_LENGTH} characters.",
            "Make one with: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listening(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ``SettingsError``."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SettingsError(
            f"{host}, port {port}, cannot be listened at ({error.strerror}).",
            "Name another --host or --port; port 0 takes a free one.",
        ) from None
