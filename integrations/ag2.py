"""The tool for AG2 agents.

    agent = Agent("looker", config=config, tools=[image_tool()])

The agent's model reads the text and, when it asked for them, sees the pictures; code finds the whole result in the
tool result's ``metadata["latent_tool"]``. The image must be named: a path, a URL or a data URI.
"""

from __future__ import annotations

from typing import Literal

from latent_tool.errors import MissingExtraError
from latent_tool.langchain.image_tool import DESCRIPTION, FIXABLE, NAME, ImageTool

try:
    from ag2 import tool as ag2_tool
    from ag2.events import ImageInput
    from ag2.tools import ToolResult
    from ag2.tools.final import FunctionTool
except ImportError as error:
    raise MissingExtraError("The AG2 integration", "ag2") from error

__all__ = ["RESULT_KEY", "image_tool"]

RESULT_KEY = "latent_tool"


def image_tool(tool: ImageTool | None = None) -> FunctionTool:
    """Return the tool; ``tool`` says who answers, from which threshold on, and which images may be opened."""
    asked = tool or ImageTool()
    schema = asked.arguments(named=True)

    async def ask(
        question: str,
        image: str,
        options: list[str] | None = None,
        budget: Literal["quick", "standard", "thorough"] | None = None,
        overlay: bool = False,
    ) -> ToolResult:
        given = {"question": question, "image": image, "options": options, "budget": budget, "overlay": overlay}
        try:
            reply = await asked.aask(schema.parse(given))
        except FIXABLE as error:  # raised, its whole traceback would be shown to the model
            return ToolResult(f"Error: {error}")
        pictures = [ImageInput(data=png, media_type="image/png") for png in reply.pictures]
        return ToolResult(reply.text, *pictures, metadata={RESULT_KEY: reply.data})

    return ag2_tool(ask, name=NAME, description=DESCRIPTION, schema=schema.model_json_schema())
