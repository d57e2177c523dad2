"""The tool for the OpenAI Agents SDK.

    agent = Agent(name="looker", tools=[image_tool()])

The agent's model reads the text and, when it asked for them, sees the pictures; code finds the whole result, as plain
JSON types, in the output item's ``custom_data["latent_tool"]``. The images of the run's input are
numbered; without ``image`` the newest is asked about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from latent_tool.errors import InputError, MissingExtraError
from latent_tool.langchain.attachments import Conversation
from latent_tool.langchain.image_tool import DESCRIPTION, FIXABLE, NAME, ImageTool

try:
    from agents import FunctionTool, ToolOutputImage, ToolOutputText
    from agents.tool import FunctionToolCustomDataContext
    from agents.tool_context import ToolContext
except ImportError as error:
    raise MissingExtraError("The OpenAI Agents integration", "openai-agents") from error

__all__ = ["RESULT_KEY", "image_tool"]

RESULT_KEY = "latent_tool"


def image_tool(tool: ImageTool | None = None) -> FunctionTool:
    """Return the tool; ``tool`` says who answers, from which threshold on, and which images may be opened."""
    asked = tool or ImageTool()
    results: WeakKeyDictionary[ToolContext[Any], dict[str, Any]] = WeakKeyDictionary()

    async def ask(context: ToolContext[Any], arguments: str) -> Any:
        try:
            reply = await asked.aask(_parsed(arguments), shown=_conversation(context.turn_input))
        except FIXABLE as error:
            return f"Error: {error}"
        results[context] = reply.data
        if not reply.pictures:
            return reply.text
        return [ToolOutputText(text=reply.text), *(ToolOutputImage(image_url=uri) for uri in reply.picture_uris)]

    def result_of(call: FunctionToolCustomDataContext) -> Mapping[str, Any] | None:
        data = results.pop(call.tool_context, None)
        return None if data is None else {RESULT_KEY: data}

    return FunctionTool(
        name=NAME,
        description=DESCRIPTION,
        params_json_schema=asked.arguments().model_json_schema(),
        on_invoke_tool=ask,
        strict_json_schema=False,  # strict mode has no optional arguments
        custom_data_extractor=result_of,
    )


def _parsed(arguments: str) -> dict[str, Any]:
    try:
        values = json.loads(arguments or "{}")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError("The arguments are not a JSON object.", "Give 'question' as text.")
    return values


def _conversation(items: Sequence[Any]) -> Conversation:
    """The images of the input's messages, by message."""
    users = (item for item in items if isinstance(item, Mapping) and item.get("role") == "user")
    return Conversation.read(item.get("content") for item in users)
