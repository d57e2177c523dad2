"""A reasoner that takes its time, for tests of queues; importable in other processes."""

from __future__ import annotations

import asyncio
from typing import Any

from langchain_core.runnables import RunnableLambda

from latent_tool import ReasoningResult


class SlowReasoner(RunnableLambda[Any, Any]):
    """Answers after some seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(lambda request: request)
        self.seconds = seconds

    async def ainvoke(self, input: Any, config: Any = None, **kwargs: Any) -> ReasoningResult:
        await asyncio.sleep(self.seconds)
        return ReasoningResult(answer="late", raw_text="late", confidence=None, confidence_source="unscored")
