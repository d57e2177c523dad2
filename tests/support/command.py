"""The command line in this process, where the model is loaded already; ``apart`` is a process of its own."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from latent_tool.cli import main


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder as ``apart`` does. What it raises, a process would print as a traceback: it fails
    the test."""
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")  # as Python's own
    code: object = 0
    with (
        patch.dict(os.environ, environment),
        patch.object(sys, "argv", ["latent-tool", *arguments]),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stopped:
            code = 0 if stopped.code is None else stopped.code
    assert isinstance(code, int), code
    printed = []
    for stream in (out, err):
        stream.flush()
        stream.seek(0)
        printed.append(stream.read())
    return subprocess.CompletedProcess(["latent-tool", *arguments], code, *printed)


def apart(
    *arguments: str, folder: Path, stdout: Any = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "latent_tool.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding=environment.get("PYTHONIOENCODING", "utf-8"),
        timeout=120,
    )
