"""``latent-tool doctor``: what holds of a model on this machine, line by line, with what to do about the rest."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from latent_tool.commands import options
from latent_tool.commands.output import print_out, stderr

if TYPE_CHECKING:
    from latent_tool.checkup import Finding

__all__ = ["doctor"]

_COLOURS = {"ok": "green", "off": "yellow", "failed": "bold red"}


def doctor(
    model: options.Model = "embedded",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    compile: options.Compile = "auto",
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the hub.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Examine a model on this machine: exactness, boxes, memory, speed, and what to do about what is off.

    Exit code 1 if something failed. Example: latent-tool doctor --model Qwen/Qwen2.5-VL-3B-Instruct
    """
    from rich.console import Console
    from rich.text import Text

    from latent_tool.checkup import doctor as examine
    from latent_tool.views.terminal import plain

    console = stderr() if as_json else Console(highlight=False)

    def tell(finding: Finding) -> None:
        if as_json and quiet:
            return
        line = Text.assemble(
            (f"{finding.status:7}", _COLOURS[finding.status]), f"{finding.check:17}", plain(finding.said)
        )
        console.print(line, soft_wrap=True)
        if finding.status != "ok" and finding.remedy:
            console.print(Text(f"{'':24}{plain(finding.remedy)}", style="dim"), soft_wrap=True)

    report = examine(
        model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        local_files_only=offline,
        tell=tell,
    )
    if as_json:
        print_out(report.model_dump_json(indent=2))
    sys.exit(0 if report.ok else 1)
