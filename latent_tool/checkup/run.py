"""Load a model, make every check of it, and report. What a check raises is its finding; the others are still made."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from latent_tool.errors import LatentToolError

if TYPE_CHECKING:
    from latent_tool.models.vlm import VisionLanguageModel

__all__ = ["Finding", "Report", "doctor", "examine"]


class Finding(BaseModel):
    """What one check found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str = Field(description="Name of the check.")
    status: Literal["ok", "off", "failed"] = Field(
        description="'off': not available here, and nothing is wrong without it; 'failed': do not rely on it."
    )
    said: str = Field(description="What was found, in a line.")
    remedy: str = Field("", description="What to do about it; empty if there is nothing to do.")
    figures: dict[str, float] = Field({}, description="The figures it rests on: logits, bytes, milliseconds, counts.")
    seconds: float = Field(ge=0)


class Report(BaseModel):
    """What holds of one model on one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    family: str | None = Field(None, description="The checkpoint's model type; None if it could not be loaded.")
    ok: bool = Field(description="No check failed.")
    findings: list[Finding]

    def finding(self, check: str) -> Finding:
        """Return the finding of a check. Raises ``KeyError``."""
        return {each.check: each for each in self.findings}[check]


# Told of every finding as it is made.
Tell = Callable[[Finding], None]


def doctor(
    model: str = "embedded",
    *,
    device: str | None = "auto",
    dtype: str = "auto",
    quantize: Literal["8bit", "4bit"] | None = None,
    compile: Literal["auto", "on", "off"] | bool = "auto",
    tell: Tell | None = None,
    **loading: Any,
) -> Report:
    """Examine any checkpoint on this machine: what holds, what is off, and what to do about it.

    Args:
        model: checkpoint directory, hub id, or ``"embedded"``.
        device, dtype, quantize, compile: how it is loaded, as by the command line.
        tell: called with every finding as it is made.
        loading: further fields of ``latent_tool.models.loading.ModelSpec``.

    What is wrong with the model becomes a finding; nothing about it is raised. ``SettingsError`` is, for options that
    there are not.
    """
    from latent_tool.errors import InputError, MissingExtraError
    from latent_tool.models.loading import ModelSpec, load
    from latent_tool.models.static_pass import as_compile

    began = time.perf_counter()
    try:
        spec = ModelSpec(
            model=model,
            device=device,
            dtype=dtype,
            quantization_config=quantize,
            compile=as_compile(compile),
            **loading,
        )
        vlm = load(spec)
    except (InputError, MissingExtraError):
        raise
    except LatentToolError as error:
        seconds = time.perf_counter() - began
        finding = Finding(check="loading", status="failed", said=error.message, remedy=error.hint, seconds=seconds)
        if tell is not None:
            tell(finding)
        return Report(model=model, ok=False, findings=[finding])
    said = f"{type(vlm.model).__name__}, {sum(each.numel() for each in vlm.model.parameters()):,} parameters"
    first = Finding(check="loading", status="ok", said=said, seconds=time.perf_counter() - began)
    if tell is not None:
        tell(first)
    report = examine(vlm, tell)
    return report.model_copy(update={"findings": [first, *report.findings]})


def examine(vlm: VisionLanguageModel, tell: Tell | None = None) -> Report:
    """Examine a loaded model."""
    from latent_tool.checkup.checks import CHECKS, Found, Patient
    from latent_tool.models.memory import out_of_memory

    patient = Patient(vlm)
    findings = []
    with _quiet():
        for name, check in CHECKS.items():
            began = time.perf_counter()
            try:
                found = check(patient)
            except LatentToolError as error:
                found = Found("failed", error.message, error.hint)
            except Exception as error:  # a model is code of strangers
                if out_of_memory(error):
                    found = Found("failed", "memory ran out", "Load it with --quantize 8bit, or on a larger device.")
                else:
                    said = str(error).partition("\n")[0][:200]
                    found = Found("failed", f"{type(error).__name__}: {said}", "Report it with the whole output.")
            finding = Finding(
                check=name,
                status=found.status,
                said=found.said,
                remedy=found.remedy,
                figures=dict(found.figures),
                seconds=time.perf_counter() - began,
            )
            findings.append(finding)
            if tell is not None:
                tell(finding)
    kind = getattr(vlm.model.config, "model_type", None)
    return Report(model=vlm.name, family=kind, ok=all(each.status != "failed" for each in findings), findings=findings)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings about generation settings off stderr; the level is restored."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
