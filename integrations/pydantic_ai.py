"""The tool for Pydantic AI agents.

    agent = Agent(model, tools=[image_tool()])

The agent's model reads the text; code finds the whole result, as plain JSON types, in the tool return's ``metadata``.
Without ``image`` the newest image of the conversation is asked about. Pictures follow the tool return as user content.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latent_tool.errors import MissingExtraError
from latent_tool.langchain.image_tool import DESCRIPTION, MENDABLE, NAME, ImageTool, ToolArguments

try:
    from pydantic_ai import BinaryContent, ImageUrl, RunContext, Tool, ToolFailed, ToolReturn
    from pydantic_ai.messages import ModelMessage, ModelRequest, UserPromptPart
except ImportError as error:
    raise MissingExtraError("The Pydantic AI integration", "pydantic-ai") from error

__all__ = ["image_tool"]


def image_tool(tool: ImageTool | None = None) -> Tool[Any]:
    """The tool; ``tool`` says who answers, from which threshold on, and which images may be opened."""
    asked = tool or ImageTool()

    async def ask(context: RunContext[Any], **arguments: Any) -> ToolReturn[str]:
        try:
            reply = await asked.aask(arguments, shown=_newest_images(context.messages))
        except MENDABLE as error:
            raise ToolFailed(str(error)) from error
        pictures = [
            BinaryContent(png, media_type="image/png", identifier=f"{NAME}-{context.tool_call_id}-{number}")
            for number, png in enumerate(reply.pictures)
        ]
        return ToolReturn(reply.text, content=pictures or None, metadata=reply.data)

    return Tool.from_schema(ask, NAME, DESCRIPTION, ToolArguments.model_json_schema(), takes_ctx=True)


def _newest_images(messages: Sequence[ModelMessage]) -> list[bytes | str]:
    """The images of the newest prompt that shows any, without those this tool has returned."""
    for message in reversed(messages):
        if not isinstance(message, ModelRequest):
            continue
        for part in reversed(message.parts):
            if not isinstance(part, UserPromptPart) or isinstance(part.content, str):
                continue
            found: list[bytes | str] = []
            for item in part.content:
                if isinstance(item, BinaryContent) and item.is_image and not item.identifier.startswith(NAME):
                    found.append(item.data)
                elif isinstance(item, ImageUrl):
                    found.append(item.url)
            if found:
                return found
    return []
