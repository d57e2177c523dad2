"""The tool for AutoGen agents.

    agent = AssistantAgent("looker", model_client=client, tools=[AskAboutImage()], reflect_on_tool_use=True)

The agent's model reads a JSON object with answer, confidence, evidence and advice, which is what code finds in the
execution event too. AutoGen's tools return no pictures; the image must be named: a path, a URL or a data URI.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from pydantic import RootModel

from latent_tool.errors import MissingExtraError
from latent_tool.langchain.image_tool import DESCRIPTION, NAME, ImageTool, ToolArguments

try:
    from autogen_core import CancellationToken
    from autogen_core.tools import BaseTool
except ImportError as error:
    raise MissingExtraError("The AutoGen integration", "autogen") from error

__all__ = ["AskAboutImage"]


class _Brief(RootModel[dict[str, Any]]):
    """What the agent's model reads."""


class AskAboutImage(BaseTool[ToolArguments, _Brief]):
    """The tool; ``tool`` says who answers, from which threshold on, and which images may be opened."""

    def __init__(self, tool: ImageTool | None = None) -> None:
        self.tool = tool or ImageTool()
        super().__init__(self.tool.arguments(named=True), _Brief, NAME, DESCRIPTION)

    async def run(self, args: ToolArguments, cancellation_token: CancellationToken) -> _Brief:
        """Answer; what goes wrong is raised, and says what to do. Cancelling the token stops the search."""
        asking = asyncio.ensure_future(self.tool.aask(args))
        cancellation_token.link_future(asking)
        return _Brief((await asking).brief)

    def return_value_as_string(self, value: Any) -> str:
        return json.dumps(value.root if isinstance(value, _Brief) else value)
