"""A model for VLMEvalKit whose predictions carry confidence.

    from latent_tool.integrations.vlmevalkit import register

    register("latent-tool-qwen", model="Qwen/Qwen2.5-VL-7B-Instruct")     # in a file that then runs VLMEvalKit's run.py

VLMEvalKit keeps what stands beside a prediction in the column ``extra_records``, from which
``latent_tool.evaluation.columns.vlmevalkit_columns`` makes AUROC, ECE and coverage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from latent_tool.errors import UnsupportedError
from latent_tool.integrations.evaluators import as_question, make_reasoner, record

__all__ = ["LatentToolVLM", "register"]


class LatentToolVLM:
    """Answers VLMEvalKit's messages with a ``LatentReasoner``; has what its inference asks of a local model.

    Args:
        model: checkpoint directory, hub id, or ``"embedded"``.
        budget: ``"quick"``, ``"standard"`` or ``"thorough"``.
        records: predictions are mappings with ``prediction`` and ``extra_records``, which newer versions take apart;
            otherwise texts.
        system: system text before every question.
        fields: further fields of ``LatentReasoner``.

    Errors of a question are raised: no error text is ever an answer.
    """

    INTERLEAVE = True
    is_api = False
    allowed_types = ("text", "image")

    def __init__(
        self,
        model: str = "embedded",
        budget: str = "standard",
        records: bool = True,
        system: str | None = None,
        **fields: Any,
    ) -> None:
        self.reasoner = make_reasoner(model, budget, **fields)
        self.records = records
        self.system = system
        self.dump_image: Callable[..., Any] | None = None

    def set_dump_image(self, dump_image: Callable[..., Any]) -> None:
        """Take the function that writes a row's pictures, which only prompts of a model's own need."""
        self.dump_image = dump_image

    def use_custom_prompt(self, _dataset: str) -> bool:
        """Leave prompts to the data set."""
        return False

    def generate(self, message: Any, dataset: str | None = None) -> Any:
        """Answer a message: a text, a part, or a list of either."""
        return self.generate_inner(_parts(message), dataset)

    def generate_inner(self, message: Sequence[Mapping[str, Any]], _dataset: str | None = None) -> Any:
        """Answer a message of parts with ``type`` and ``value``."""
        parts = [(str(part["type"]), part["value"]) for part in message]
        result = self.reasoner.invoke(as_question(parts, self.system, None))
        if not self.records:
            return result.answer
        return {"prediction": result.answer, "extra_records": dict(record(result))}


def _parts(message: Any) -> list[Mapping[str, Any]]:
    """A message as a list of parts; among bare texts, the names of files that exist are pictures."""
    listed = message if isinstance(message, list) else [message]
    if all(isinstance(part, Mapping) and {"type", "value"} <= set(part) for part in listed):
        return listed
    if not all(isinstance(part, str) for part in listed):
        raise UnsupportedError("The message is neither texts nor parts.", "Give parts with type and value.")
    return [{"type": "image" if _is_file(part) else "text", "value": part} for part in listed]


def _is_file(text: str) -> bool:
    from pathlib import Path

    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def register(name: str = "latent-tool", **fields: Any) -> None:
    """Add the model to VLMEvalKit's own under a name; ``fields`` are those of ``LatentToolVLM``.

    Raises ``UnsupportedError`` without VLMEvalKit.
    """
    try:
        from vlmeval import inference
        from vlmeval.config import supported_VLM
    except ImportError as error:
        raise UnsupportedError(
            "VLMEvalKit is not installed here.",
            "Install it from github.com/open-compass/VLMEvalKit.",
        ) from error
    # Older versions would take the text of the whole mapping for the prediction.
    structured = hasattr(inference, "_is_structured_record")
    supported_VLM[name] = partial(LatentToolVLM, **{"records": structured, **fields})
