"""Strands: the result reaches the agent as text, and its code as structured content."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import page
import pytest
from strands.models.model import Model


class Scripted(Model):
    """Calls the tool, then says what it was told."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def update_config(self, **config: Any) -> None:
        pass

    def get_config(self) -> dict[str, Any]:
        return {"context_window_limit": 8000}

    async def structured_output(self, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
        raise NotImplementedError
        yield

    async def stream(self, messages: Any, tool_specs: Any = None, *further: Any, **options: Any) -> AsyncIterator[Any]:
        results = [part["toolResult"] for part in messages[-1]["content"] if "toolResult" in part]
        yield {"messageStart": {"role": "assistant"}}
        if results:
            self.read = [part["text"] for part in results[0]["content"] if "text" in part]
            yield {"contentBlockStart": {"start": {}}}
            yield {"contentBlockDelta": {"delta": {"text": self.read[0]}}}
        else:
            assert [spec["name"] for spec in tool_specs] == [page.TOOL]
            yield {"contentBlockStart": {"start": {"toolUse": {"toolUseId": "1", "name": page.TOOL}}}}
            yield {"contentBlockDelta": {"delta": {"toolUse": {"input": json.dumps(page.ASKED)}}}}
        yield {"contentBlockStop": {}}
        yield {"messageStop": {"stopReason": "end_turn" if results else "tool_use"}}


@pytest.mark.parametrize("threshold", page.THRESHOLDS)
def test_the_agent_reads_what_may_be_relied_on(threshold: float) -> None:
    model = Scripted()
    ran = page.run("Strands", 'OpenAIModel(model_id="gpt-5")', model, threshold)
    page.check(str(ran["said"]), threshold)
    (reply,) = ran["replies"]
    result = reply["structuredContent"]
    assert result["answer"] == "green triangle" and 0.9 < result["confidence"] < 1
    assert result["accepted"] is (threshold < 1) and result["min_confidence"] == threshold
