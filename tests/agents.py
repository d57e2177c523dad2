"""What the tests of the LangChain surface share: a scripted agent model, messages with a picture, a small reasoner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from PIL import Image

from latent_tool import Budget, LatentReasoner, ReasoningResult, SearchSettings
from latent_tool.messages import image_block

CIRCLE = "what color is the circle?"
SQUARE = "what color is the square?"
TINY = SearchSettings(latents=2, samples=4, patches_per_latent=2)


def small_reasoner(iterations: int = 1, **fields: Any) -> LatentReasoner:
    """A reasoner that searches just enough to have everything in its result."""
    return LatentReasoner(**{"budget": Budget(iterations=iterations, max_patches=4), "settings": TINY, **fields})


def essence(result: ReasoningResult) -> dict[str, Any]:
    """A result without what time it took."""
    values = result.model_dump(mode="json")
    values["usage"].pop("seconds")
    for row in values["trace"]:
        row.pop("seconds")
    return values


class Scripted(GenericFakeChatModel):
    """The agent's own model: says what it is told to say, and accepts tools."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def scripted(*replies: AIMessage) -> Scripted:
    return Scripted(messages=iter(replies))


def calls(*arguments: dict[str, Any], name: str = "ask_about_image") -> AIMessage:
    """One turn of the agent's model that calls the tool, once for each of the arguments."""
    return AIMessage("", tool_calls=[{"name": name, "args": each, "id": str(i)} for i, each in enumerate(arguments)])


def shows(*images: Image.Image, text: str = "Look at this.") -> HumanMessage:
    content: list[str | dict[Any, Any]] = [*map(image_block, images), {"type": "text", "text": text}]
    return HumanMessage(content)


def texts(messages: Sequence[Any]) -> list[str]:
    return [message.text for message in messages]
