"""The tool for Haystack agents.

    agent = Agent(chat_generator=generator, tools=[image_tool(state_key="look")],
                  state_schema={"look": {"type": ReasoningResult}})

The agent's model reads the text and, when it asked for them, sees the pictures; code finds the newest
``ReasoningResult`` in the agent's state. The images of the conversation are numbered; without ``image`` the newest is
asked about.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from latent_tool.errors import MissingExtraError
from latent_tool.langchain.attachments import Conversation, Unreadable
from latent_tool.langchain.image_tool import DESCRIPTION, NAME, ImageTool, ToolReply

try:
    from haystack.dataclasses import ChatMessage, ChatRole, ImageContent, TextContent
    from haystack.tools.tool import Tool
except ImportError as error:
    raise MissingExtraError("The Haystack integration", "haystack") from error

__all__ = ["image_tool"]


def image_tool(tool: ImageTool | None = None, *, state_key: str | None = None) -> Tool:
    """Return the tool.

    Args:
        tool: who answers, from which threshold on, and which images may be opened.
        state_key: where the agent's state keeps the newest result; the agent's ``state_schema`` must name it.
    """
    asked = tool or ImageTool()

    def ask(messages: Sequence[ChatMessage] = (), **arguments: Any) -> dict[str, Any]:
        reply = asked.ask(arguments, shown=_conversation(messages))
        return {"reply": reply, "result": reply.result}

    async def ask_async(messages: Sequence[ChatMessage] = (), **arguments: Any) -> dict[str, Any]:
        reply = await asked.aask(arguments, shown=_conversation(messages))
        return {"reply": reply, "result": reply.result}

    return Tool(
        name=NAME,
        description=DESCRIPTION,
        parameters=asked.arguments().model_json_schema(),
        function=ask,
        async_function=ask_async,
        inputs_from_state={"messages": "messages"},
        outputs_to_string={"source": "reply", "handler": _content, "raw_result": True},
        outputs_to_state=None if state_key is None else {state_key: {"source": "result"}},
    )


def _content(reply: ToolReply) -> list[TextContent | ImageContent]:
    pictures = [ImageContent(base64.b64encode(png).decode("ascii"), mime_type="image/png") for png in reply.pictures]
    return [TextContent(reply.text), *pictures]


def _conversation(messages: Sequence[ChatMessage]) -> Conversation:
    """The images of the user's messages, by message; files are none."""
    turns = []
    for message in messages:
        if message.is_from(ChatRole.USER):
            files = [Unreadable(f"a file ({file.mime_type or 'of a type that is not told'})") for file in message.files]
            turns.append((*({"base64": image.base64_image} for image in message.images), *files))
    return Conversation(tuple(turns))
