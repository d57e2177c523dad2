"""Evaluation: methods and confidences measured side by side on labelled questions.

    items = load_dataset("questions.jsonl")
    run = evaluate(LatentReasoner(), items, ["greedy", "search", "self-consistency"], "out")

The names are resolved when they are first used; metrics and reports need the extra ``evaluation``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_tool.evaluation.datasets import Item, load_dataset
    from latent_tool.evaluation.matching import Match
    from latent_tool.evaluation.methods import METHODS, Method, parse_method
    from latent_tool.evaluation.runner import evaluate
    from latent_tool.evaluation.runs import Row, Run, load_run
    from latent_tool.evaluation.summary import summarise
    from latent_tool.scores import COMPARED as SCORES

__all__ = [
    "METHODS",
    "SCORES",
    "Item",
    "Match",
    "Method",
    "Row",
    "Run",
    "evaluate",
    "load_dataset",
    "load_run",
    "parse_method",
    "summarise",
]

_HOMES = {
    "METHODS": "methods",
    "Item": "datasets",
    "Match": "matching",
    "Method": "methods",
    "Row": "runs",
    "Run": "runs",
    "evaluate": "runner",
    "load_dataset": "datasets",
    "load_run": "runs",
    "parse_method": "methods",
    "summarise": "summary",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "SCORES":
        from latent_tool.scores import COMPARED as value
    else:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
