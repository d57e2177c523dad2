"""The command line, assembled. The result goes to stdout, everything else to stderr.

Exit codes: 0 answered, 3 below ``--min-confidence``, 2 bad usage or input, 1 anything else.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from latent_tool.commands.ask import ask
from latent_tool.commands.calibrate import calibrate
from latent_tool.commands.doctor import doctor
from latent_tool.commands.evaluate import evaluate
from latent_tool.commands.mcp import mcp
from latent_tool.commands.models import models
from latent_tool.commands.options import Command
from latent_tool.commands.output import fail
from latent_tool.commands.play import play
from latent_tool.commands.serve import serve
from latent_tool.commands.study import study
from latent_tool.errors import LatentToolError

__all__ = ["app", "main"]

app = typer.Typer(
    name="latent-tool",
    help="Ask questions about images; get an answer, a confidence to gate on, and the patches it rests on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"latent-tool {version('latent-tool')}")
        raise typer.Exit


@app.callback()
def _main(
    _version_wanted: Annotated[
        bool, typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


_COMMANDS: dict[str, Callable[..., None]] = {
    "ask": ask,
    "models": models,
    "doctor": doctor,
    "play": play,
    "eval": evaluate,
    "calibrate": calibrate,
    "study": study,
    "mcp": mcp,
    "serve": serve,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, cls=Command)(_command)


# What an argument of the Python interface is called on the command line, where the names differ.
_OTHER_NAMES = {"deadline_s": "deadline", "image_policy.folders": "folder"}


def _flags(command: str) -> dict[str, str]:
    """The flags of a command by the names of the arguments that they stand for."""
    known: dict[str, str] = {}
    found = getattr(typer.main.get_command(app), "commands", {}).get(command)
    for param in [] if found is None else found.params:
        flag = max(param.opts, key=len, default="")
        if flag.startswith("--"):
            known[str(param.name)] = flag
    return known | {python: known[own] for python, own in _OTHER_NAMES.items() if own in known}


def main() -> None:
    """Run the ``latent-tool`` command."""
    # Read when torch is loaded: on a busy machine, threads that spin make a small model twenty times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a question mark for what an encoding lacks, not a traceback
    try:
        app()
    except LatentToolError as error:
        fail(error, _flags(sys.argv[1] if len(sys.argv) > 1 else ""))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
