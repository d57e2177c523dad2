"""A model for lmms-eval (0.7 or newer) whose answers carry confidence.

    lmms_eval --model latent_tool --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,confidences=out/c.jsonl \\
        --tasks mmstar --log_samples --output_path out

lmms-eval finds it by the entry point of this package. Every answer appends a line with its task, document and
confidence to ``confidences``, from which ``latent_tool.evaluation.columns.lmms_eval_columns`` makes AUROC, ECE and
coverage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_tool.errors import MissingExtraError, UnsupportedError
from latent_tool.files import expanded, make_folder
from latent_tool.integrations.evaluators import as_question, make_reasoner, record
from latent_tool.schema import ReasoningRequest, ReasoningResult

try:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise MissingExtraError("The model for lmms-eval", "lmms-eval") from error

__all__ = ["LatentTool"]


class LatentTool(lmms):
    """Answers the requests of lmms-eval with a ``LatentReasoner``.

    Args:
        pretrained: checkpoint directory, hub id, or ``"embedded"``.
        budget: ``"quick"``, ``"standard"`` or ``"thorough"``.
        batch_size: requests answered together.
        confidences: file that gets a line for every answer.
        system_prompt: system text before every question.
        device, dtype, quantize, compile, calibration, seed: as ``LatentReasoner`` takes them (``quantize``: ``8bit``,
            ``4bit``; ``compile``: ``auto``, ``on``, ``off``).

    Errors of a question end the run: no error text is ever an answer.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "embedded",
        budget: str = "standard",
        batch_size: int | str = 1,
        confidences: str = "latent_tool_confidences.jsonl",
        system_prompt: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        compile: bool | str | None = None,
        calibration: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 1
        self.system_prompt = system_prompt
        self.confidences = Path(expanded(confidences))
        self.reasoner = make_reasoner(
            pretrained,
            budget,
            device=device,
            dtype=dtype,
            quantization_config=quantize,
            compile=compile,
            calibration=calibration,
            seed=None if seed is None else int(seed),
        )
        make_folder(self.confidences.parent)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, in their order; each answer's confidence is written down as soon as it is there."""
        answers: list[Any] = []
        for start in range(0, len(requests), self.batch_size):
            part = [request.args for request in requests[start : start + self.batch_size]]
            results = self.reasoner.batch([self._question(arguments) for arguments in part])
            with self.confidences.open("a", encoding="utf-8") as file:
                for (context, _, options, document, task, split), result in zip(part, results, strict=True):
                    text = _until(result.answer, options)
                    facts = {"task": task, "split": split, "doc_id": document, "answer": text, **record(result)}
                    file.write(json.dumps(facts, ensure_ascii=True) + "\n")
                    answers.append(GenerationResult(text=text, token_counts=_counts(result)))
                    self.cache_hook.add_partial("generate_until", (context, options), text)
        return answers

    def _question(self, arguments: tuple[Any, ...]) -> ReasoningRequest:
        _, to_messages, options, document, task, split = arguments
        parts: list[tuple[str, Any]] = []
        system = self.system_prompt
        for message in to_messages(self.task_dict[task][split][document]):
            if message["role"] == "assistant":
                raise UnsupportedError("Earlier answers in the prompt are not taken.", "Use --num_fewshot 0.")
            said = message["content"]
            listed = [{"type": "text", "text": said}] if isinstance(said, str) else said
            if message["role"] == "system":
                system = "\n".join(part["text"] for part in listed)
                continue
            parts += [(part["type"], part["text"] if part["type"] == "text" else part.get("url")) for part in listed]
        most = options.get("max_new_tokens")
        return as_question(parts, system, None if most is None else int(most), self.reasoner.budget)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: the method generates."""
        raise UnsupportedError("Log-likelihoods of given texts are not computed.", "Use a task that generates.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Refuse: a question is asked once."""
        raise UnsupportedError("Tasks of several rounds are not supported.", "Use a task of one round.")


def _until(text: str, options: Mapping[str, Any]) -> str:
    """The text up to the first of the strings that end it."""
    given = options.get("until") or []
    for end in [given] if isinstance(given, str) else given:
        text = text.partition(end)[0] if end else text
    return text


def _counts(result: ReasoningResult) -> Any:
    usage = result.usage
    if usage is None:
        return None
    return TokenCounts(input_tokens=usage.prompt_tokens, output_tokens=usage.generated_tokens)
