"""The tool for Pydantic AI agents.

    agent = Agent(model, tools=[image_tool()])

The agent's model reads the text; code finds the whole result, as plain JSON types, in the tool return's ``metadata``.
The images of the conversation are numbered; without ``image`` the newest is asked about. Pictures follow the tool
return as user content.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latent_tool.errors import MissingExtraError
from latent_tool.langchain.attachments import Conversation, Unreadable
from latent_tool.langchain.image_tool import DESCRIPTION, FIXABLE, NAME, ImageTool

try:
    from pydantic_ai import BinaryContent, ImageUrl, RunContext, Tool, ToolFailed, ToolReturn
    from pydantic_ai.messages import (
        AudioUrl,
        DocumentUrl,
        ModelMessage,
        ModelRequest,
        UploadedFile,
        UserContent,
        UserPromptPart,
        VideoUrl,
    )
except ImportError as error:
    raise MissingExtraError("The Pydantic AI integration", "pydantic-ai") from error

__all__ = ["image_tool"]


def image_tool(tool: ImageTool | None = None) -> Tool[Any]:
    """Return the tool; ``tool`` says who answers, from which threshold on, and which images may be opened."""
    asked = tool or ImageTool()

    async def ask(context: RunContext[Any], **arguments: Any) -> ToolReturn[str]:
        try:
            reply = await asked.aask(arguments, shown=_conversation(context.messages))
        except FIXABLE as error:
            raise ToolFailed(str(error)) from error
        pictures = [
            BinaryContent(png, media_type="image/png", identifier=f"{NAME}-{context.tool_call_id}-{number}")
            for number, png in enumerate(reply.pictures)
        ]
        return ToolReturn(reply.text, content=pictures or None, metadata=reply.data)

    return Tool.from_schema(ask, NAME, DESCRIPTION, asked.arguments().model_json_schema(), takes_ctx=True)


def _conversation(messages: Sequence[ModelMessage]) -> Conversation:
    """The images of the prompts, by prompt, without those that this tool has returned."""
    parts = (part for message in messages if isinstance(message, ModelRequest) for part in message.parts)
    prompts = (part.content for part in parts if isinstance(part, UserPromptPart) and not isinstance(part.content, str))
    return Conversation(tuple(tuple(shown for item in prompt for shown in _shown(item)) for prompt in prompts))


def _shown(item: UserContent) -> list[bytes | str | Unreadable]:
    if isinstance(item, BinaryContent):
        if item.identifier.startswith(NAME):
            return []
        return [item.data if item.is_image else Unreadable(f"a file ({item.media_type})")]
    if isinstance(item, ImageUrl):
        return [item.url]
    if isinstance(item, AudioUrl | DocumentUrl | VideoUrl | UploadedFile):
        return [Unreadable(_OTHERS[item.kind])]
    return []  # text, and marks for caches


_OTHERS = {
    "audio-url": "sound",
    "document-url": "a document",
    "uploaded-file": "a file that a provider keeps",
    "video-url": "a video",
}
