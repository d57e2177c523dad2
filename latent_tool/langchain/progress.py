"""Steps of a search on their way to whoever listens: the callbacks of the run, and a LangGraph run's stream writer.

Several calls at once can be told apart by what goes with every step: the id of the reasoner's run and, below a tool,
the id of the tool call. This module knows callbacks and graphs; it knows nothing of how a step comes about.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

from langchain_core.callbacks import adispatch_custom_event, dispatch_custom_event
from langchain_core.runnables import RunnableConfig, ensure_config

from latent_tool.schema import ReasoningStep

__all__ = ["TOOL_CALL_ID", "announce", "announce_async", "graph_writer"]

# Key of the metadata under which a tool says which of the agent's calls it answers.
TOOL_CALL_ID = "tool_call_id"


def announce(step: ReasoningStep, config: RunnableConfig) -> None:
    """Send a step to the callbacks of the run and, inside a LangGraph run, to its stream writer."""
    data = step.model_dump(mode="json")
    dispatch_custom_event("latent_step", data, config=ensure_config(config))
    _write_to_graph(data, config)


async def announce_async(step: ReasoningStep, config: RunnableConfig) -> None:
    """``announce`` inside an event loop."""
    data = step.model_dump(mode="json")
    await adispatch_custom_event("latent_step", data, config=ensure_config(config))
    _write_to_graph(data, config)


def _write_to_graph(data: dict[str, Any], config: RunnableConfig) -> None:
    writer = graph_writer()
    if writer is None:
        return
    run_id = getattr(config.get("callbacks"), "parent_run_id", None)
    call_id = (config.get("metadata") or {}).get(TOOL_CALL_ID)
    ids = {"run_id": None if run_id is None else str(run_id), TOOL_CALL_ID: call_id}
    writer({"latent_step": data, **{name: value for name, value in ids.items() if value is not None}})


def graph_writer() -> Callable[[Any], None] | None:
    """Return the stream writer of the LangGraph run this is called in."""
    langgraph = sys.modules.get("langgraph.config")  # loaded whenever a graph is running
    if langgraph is None:
        return None
    try:
        return cast(Callable[[Any], None], langgraph.get_stream_writer())
    except (RuntimeError, KeyError):  # not inside a graph
        return None
