"""The tool for LlamaIndex agents.

    agent = FunctionAgent(tools=[image_tool()], llm=llm)

The agent's model reads the text and, when it asked for them, sees the pictures; code finds the ``ReasoningResult`` in
the tool output's ``raw_output``. Without ``image`` the newest image in the agent's memory is asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latent_tool.errors import MissingExtraError
from latent_tool.langchain.image_tool import DESCRIPTION, NAME, ImageTool, ToolArguments, ToolReply

try:
    from llama_index.core.base.llms.types import ChatMessage, ContentBlock, ImageBlock, MessageRole, TextBlock
    from llama_index.core.tools import FunctionTool, ToolOutput
    from llama_index.core.workflow import Context
except ImportError as error:
    raise MissingExtraError("The LlamaIndex integration", "llama-index") from error

__all__ = ["image_tool"]


def image_tool(tool: ImageTool | None = None) -> FunctionTool:
    """The tool; ``tool`` says who answers, from which threshold on, and which images may be opened."""
    asked = tool or ImageTool()

    async def ask(ctx: Context, **arguments: Any) -> ToolReply:
        memory = await ctx.store.get("memory", default=None)
        messages = [] if memory is None else await memory.aget_all()
        return await asked.aask(arguments, shown=_newest_images(messages))

    ask.__annotations__["ctx"] = Context  # not its name, which LlamaIndex would not recognise
    return FunctionTool.from_defaults(
        async_fn=ask, name=NAME, description=DESCRIPTION, fn_schema=ToolArguments, callback=_output
    )


def _output(reply: ToolReply) -> ToolOutput:
    pictures = [ImageBlock(image=png, image_mimetype="image/png") for png in reply.pictures]
    blocks: list[ContentBlock] = [TextBlock(text=reply.text), *pictures]
    return ToolOutput(tool_name=NAME, blocks=blocks, raw_input={}, raw_output=reply.result)


def _newest_images(messages: Sequence[ChatMessage]) -> list[bytes]:
    """The images of the newest message of the user that shows any."""
    for message in reversed(messages):
        if message.role == MessageRole.USER:
            found = [_reference(block) for block in message.blocks if isinstance(block, ImageBlock)]
            if found:
                return found
    return []


def _reference(block: ImageBlock) -> Any:
    """What a block refers to; LlamaIndex itself would open any file or URL."""
    if block.image is not None:
        return {"base64": block.image.decode("ascii")} if isinstance(block.image, bytes) else block.image
    return block.path if block.path is not None else str(block.url)
