"""The tool for Google's Agent Development Kit.

    agent = LlmAgent(name="looker", model=model, tools=[AskAboutImage()])

The agent's model reads a dict with answer, confidence, evidence and advice; code finds the whole result in the session
state under ``latent_tool``, and the pictures, when the model asked for them, among the artifacts. The images of the
conversation are numbered; without ``image`` the newest is asked about.
"""

from __future__ import annotations

from typing import Any

from latent_tool.errors import MissingExtraError
from latent_tool.langchain.attachments import Conversation
from latent_tool.langchain.image_tool import DESCRIPTION, FIXABLE, NAME, ImageTool

try:
    from google.adk.tools.base_tool import BaseTool
    from google.adk.tools.tool_context import ToolContext
    from google.genai import types
except ImportError as error:
    raise MissingExtraError("The Google ADK integration", "google-adk") from error

__all__ = ["STATE_KEY", "AskAboutImage"]

STATE_KEY = "latent_tool"


class AskAboutImage(BaseTool):
    """The tool; ``tool`` says who answers, from which threshold on, and which images may be opened."""

    def __init__(self, tool: ImageTool | None = None) -> None:
        super().__init__(name=NAME, description=DESCRIPTION)
        self.tool = tool or ImageTool()

    def _get_declaration(self) -> types.FunctionDeclaration:
        return types.FunctionDeclaration(
            name=self.name,
            description=self.description,
            parameters_json_schema=self.tool.arguments().model_json_schema(),
        )

    async def run_async(self, *, args: dict[str, Any], tool_context: ToolContext) -> dict[str, Any]:
        """Answer as a dict; what the model can fix as ``{"error": ...}``."""
        try:
            reply = await self.tool.aask(args, shown=_conversation(tool_context))
        except FIXABLE as error:
            return {"error": str(error)}
        tool_context.state[STATE_KEY] = reply.data
        for number, png in enumerate(reply.pictures):
            part = types.Part.from_bytes(data=png, mime_type="image/png")
            await tool_context.save_artifact(f"overlay-{number}.png", part)
        return reply.brief


def _conversation(context: ToolContext) -> Conversation:
    """The images of the user's messages, by message."""
    contents = [event.content for event in context.session.events if event.author == "user"]
    if context.user_content is not None and context.user_content not in contents:
        contents.append(context.user_content)
    return Conversation.read(
        [_block(part) for part in (content.parts or [] if content else [])] for content in contents
    )


def _block(part: types.Part) -> Any:
    """A part as a content block: text, what is in it, or what it refers to."""
    if part.inline_data is not None:
        return {"type": "media", "mime_type": part.inline_data.mime_type, "data": part.inline_data.data or b""}
    if part.file_data is not None:
        return {"type": "media", "mime_type": part.file_data.mime_type, "file_uri": part.file_data.file_uri}
    return part.text or ""
