"""AUROC, ECE and coverage of confidences that another evaluator's run has, as columns beside its accuracy.

``lmms_eval_columns`` and ``vlmevalkit_columns`` read what those write with the plug-ins of ``integrations``.
This module knows their files and no models.
"""

from __future__ import annotations

import ast
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_tool import statistics
from latent_tool.errors import DatasetError
from latent_tool.evaluation.datasets.formats import long_cells
from latent_tool.files import expanded, reason

__all__ = ["confidence_columns", "lmms_eval_columns", "vlmevalkit_columns"]


def confidence_columns(
    confidences: Sequence[float | None], correct: Sequence[bool], target_error: float = 0.05
) -> dict[str, Any]:
    """Tell how well confidences tell right answers from wrong ones.

    ``auroc`` (``None`` if all are right, or all wrong), ``ece``, ``coverage``: the share of all answers that a
    threshold on them accepts at ``target_error``; ``n``, ``accuracy``, and ``missing``: answers without a confidence,
    which no threshold accepts.

    Raises ``InputError`` for confidences outside [0, 1], ``MissingExtraError`` without scipy.
    """
    pairs = [(value, right) for value, right in zip(confidences, correct, strict=True) if value is not None]
    found: dict[str, Any] = {
        "n": len(correct),
        "missing": len(correct) - len(pairs),
        "accuracy": sum(correct) / len(correct) if correct else None,
        "auroc": None,
        "ece": None,
        "coverage": None,
    }
    if not pairs:
        return found
    values, right = [value for value, _ in pairs], [flag for _, flag in pairs]
    if 0 < sum(right) < len(right):
        found["auroc"] = statistics.auroc(values, right)
    found["ece"] = statistics.ece(values, right)
    found["coverage"] = statistics.coverage_at_risk(values, right, target_error) * len(pairs) / len(correct)
    return found


def lmms_eval_columns(
    samples: str | Path, confidences: str | Path, metric: str, target_error: float = 0.05
) -> dict[str, Any]:
    """Return columns of one task of lmms-eval.

    Args:
        samples: the ``..._samples_TASK.jsonl`` that ``--log_samples`` writes.
        confidences: the file that the plug-in writes.
        metric: the sample's field that says whether it is right: a number, or a mapping with a ``score``; from 0.5 on.
        target_error: of the coverage.

    Raises ``DatasetError`` for files that do not fit.
    """
    task = expanded(samples).name.partition("samples_")[2].removesuffix(".jsonl")
    known = {str(row.get("doc_id")): row for row in _lines(confidences) if row.get("task") == task}
    values, correct = [], []
    for line, sample in enumerate(_lines(samples), start=1):
        score = sample.get(metric)
        score = score.get("score") if isinstance(score, Mapping) else score
        if not isinstance(score, int | float):
            raise DatasetError(f"Line {line} of the samples has no number in {metric!r}.", "Name one of its metrics.")
        row = known.get(str(sample.get("doc_id")))
        values.append(None if row is None else row.get("confidence"))
        correct.append(score >= 0.5)
    if not any(value is not None for value in values):
        raise DatasetError(f"No confidence belongs to the task {task!r}.", "Give the file that this very run wrote.")
    return confidence_columns(values, correct, target_error)


def vlmevalkit_columns(result: str | Path, metric: str = "hit", target_error: float = 0.05) -> dict[str, Any]:
    """Return columns of a detailed result of VLMEvalKit, a ``.tsv``, ``.csv`` or ``.json`` file.

    Args:
        result: has the columns ``extra_records``, which the plug-in fills, and ``metric``.
        metric: the column that says whether an answer is right: a number, from 0.5 on.
        target_error: of the coverage.

    Raises ``DatasetError`` for a file that does not fit.
    """
    values, correct = [], []
    for line, row in enumerate(_table(expanded(result)), start=1):
        try:
            score = float(row[metric])
            records = row["extra_records"]
            records = ast.literal_eval(records) if isinstance(records, str) else records
            confidence = records["confidence"]
        except (KeyError, TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
            raise DatasetError(
                f"Row {line} of the result has no {metric!r} or no confidence in 'extra_records'.",
                "Give the file with both columns; PRED_FORMAT=tsv and EVAL_FORMAT=csv keep them readable.",
            ) from None
        values.append(confidence)
        correct.append(score >= 0.5)
    return confidence_columns(values, correct, target_error)


def _lines(path: str | Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in expanded(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"{str(path)[:200]!r} cannot be read ({reason(error)}).",
            "Give a file of JSON lines.",
        ) from None
    if not all(isinstance(row, dict) for row in rows):
        raise DatasetError(f"{str(path)[:200]!r} has lines that are no JSON objects.", "Give a file of JSON lines.")
    return rows


def _table(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            read = json.loads(text)
            if not isinstance(read, list) or not all(isinstance(row, dict) for row in read):
                raise ValueError("a list of rows was expected")
            return read
        with long_cells(len(text)):
            lines = io.StringIO(text, newline="")
            return list(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DatasetError(
            f"{path.name[:200]!r} cannot be read ({reason(error)}).",
            "Give a .tsv, .csv or .json file.",
        ) from None
