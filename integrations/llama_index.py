"""The tool for LlamaIndex agents.

    agent = FunctionAgent(tools=[image_tool()], llm=llm)

The agent's model reads the text and, when it asked for them, sees the pictures; code finds the ``ReasoningResult`` in
the tool output's ``raw_output``. The images in the agent's memory are numbered; without ``image`` the newest is asked
about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latent_tool.errors import MissingExtraError
from latent_tool.langchain.attachments import Conversation, Unreadable, read_blocks
from latent_tool.langchain.image_tool import DESCRIPTION, NAME, ImageTool, ToolReply

try:
    from llama_index.core.base.llms.types import (
        AudioBlock,
        ChatMessage,
        ContentBlock,
        DocumentBlock,
        ImageBlock,
        MessageRole,
        TextBlock,
        VideoBlock,
    )
    from llama_index.core.tools import FunctionTool, ToolOutput
    from llama_index.core.workflow import Context
except ImportError as error:
    raise MissingExtraError("The LlamaIndex integration", "llama-index") from error

__all__ = ["image_tool"]


def image_tool(tool: ImageTool | None = None) -> FunctionTool:
    """Return the tool; ``tool`` says who answers, from which threshold on, and which images may be opened."""
    asked = tool or ImageTool()

    async def ask(ctx: Context, **arguments: Any) -> ToolReply:
        memory = await ctx.store.get("memory", default=None)
        messages = [] if memory is None else await memory.aget_all()
        return await asked.aask(arguments, shown=_conversation(messages))

    ask.__annotations__["ctx"] = Context  # not its name, which LlamaIndex would not recognise
    return FunctionTool.from_defaults(
        async_fn=ask, name=NAME, description=DESCRIPTION, fn_schema=asked.arguments(), callback=_output
    )


def _output(reply: ToolReply) -> ToolOutput:
    pictures = [ImageBlock(image=png, image_mimetype="image/png") for png in reply.pictures]
    blocks: list[ContentBlock] = [TextBlock(text=reply.text), *pictures]
    return ToolOutput(tool_name=NAME, blocks=blocks, raw_input={}, raw_output=reply.result)


def _conversation(messages: Sequence[ChatMessage]) -> Conversation:
    """The images of the user's messages, by message."""
    users = (message.blocks for message in messages if message.role == MessageRole.USER)
    return Conversation(tuple(tuple(shown for block in blocks for shown in _shown(block)) for blocks in users))


def _shown(block: ContentBlock) -> list[Any]:
    """What a block attaches; LlamaIndex itself would open any file or URL."""
    if isinstance(block, ImageBlock):
        if block.image is not None:
            return [{"base64": block.image.decode("ascii")} if isinstance(block.image, bytes) else block.image]
        return [block.path if block.path is not None else str(block.url)]
    if isinstance(block, DocumentBlock):
        data = block.data.decode("ascii") if isinstance(block.data, bytes) else None
        path = None if block.path is None else str(block.path)
        file = {"type": "file", "mime_type": block.document_mimetype, "base64": data, "path": path, "url": block.url}
        return list(read_blocks(file))
    if isinstance(block, AudioBlock | VideoBlock):
        return [Unreadable("sound" if isinstance(block, AudioBlock) else "a video")]
    return []
