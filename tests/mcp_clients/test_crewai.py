"""CrewAI: the text reaches the agent's model."""

from __future__ import annotations

import json
from typing import Any

import page
import pytest
from crewai.llms.base_llm import BaseLLM
from pydantic import PrivateAttr


class Scripted(BaseLLM):
    """Calls the tool, then says what it was told."""

    _read: list[str] = PrivateAttr(default_factory=list)

    def call(self, messages: Any, tools: Any = None, *further: Any, **options: Any) -> Any:
        told = [str(message.get("content")) for message in messages if message.get("role") == "tool"]
        if told:
            self._read = told
            return told[-1]
        assert tools and [tool["function"]["name"] for tool in tools] == [page.TOOL]
        call = {"name": page.TOOL, "arguments": json.dumps(page.ASKED)}
        return [{"id": "1", "type": "function", "function": call}]

    async def acall(self, *arguments: Any, **options: Any) -> Any:
        return self.call(*arguments, **options)

    def supports_function_calling(self) -> bool:
        return True

    def supports_stop_words(self) -> bool:
        return False

    def get_context_window_size(self) -> int:
        return 8192


@pytest.mark.parametrize("threshold", page.THRESHOLDS)
def test_the_agent_reads_what_may_be_relied_on(threshold: float) -> None:
    model = Scripted(model="scripted")
    ran = page.run("CrewAI", '"openai/gpt-5"', model, threshold)
    page.check(str(ran["said"]), threshold)
    page.check(model._read[-1], threshold)
