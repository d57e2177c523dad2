"""What the commands print: the result alone on standard output, everything else on standard error."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from latent_tool.errors import InputError, LatentToolError, ModelError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["as_flags", "fail", "note", "print_out", "reaching_stdout", "stderr"]


@contextmanager
def reaching_stdout() -> Iterator[None]:
    """Make sure that what is printed inside gets out. Raises ``LatentToolError`` if not, for example on a full disk."""
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


def print_out(text: str) -> None:
    """Print a line that must get out."""
    with reaching_stdout():
        print(text)


def stderr() -> Console:
    """Make a console on standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def note(message: str) -> None:
    """Tell something beside the result."""
    from rich.text import Text

    from latent_tool.views.terminal import plain

    stderr().print(Text(f"note: {plain(message)}", style="yellow"), soft_wrap=True)


def as_flags(text: str, flags: Mapping[str, str]) -> str:
    """Say names of Python arguments as the flags of a command: ``min_confidence='calibrated'``, ``calibration=``.

    ``flags``: by the name of the argument. A name that is a plain word is one only where an equals sign follows.
    """
    for name, flag in flags.items():
        text = re.sub(rf"(?<![\w.'-]){name}=(?=[\w'\"])", f"{flag} ", text)
        text = re.sub(rf"(?<![\w.'-]){name}=", flag, text)
        if "_" in name:
            text = re.sub(rf"(?<![\w.'-]){name}(?![\w'-])", flag, text)
    return text


def fail(error: LatentToolError, flags: Mapping[str, str] | None = None) -> NoReturn:
    """Say what is wrong and what to do, and leave: code 2 for what the caller can change, 1 for anything else.

    ``flags``: those of the command that failed, by the name of the argument in Python.
    """
    from rich.text import Text

    from latent_tool.views.terminal import plain

    console = stderr()
    console.print(Text.assemble(("error: ", "bold red"), plain(as_flags(error.message, flags or {}))), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble(("what to do: ", "bold"), plain(as_flags(error.hint, flags or {}))), soft_wrap=True)
    sys.exit(2 if isinstance(error, InputError | ModelError) else 1)
