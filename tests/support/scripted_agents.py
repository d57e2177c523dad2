"""What the tests of the LangChain surface share: a scripted agent model, messages with a picture, a small reasoner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from PIL import Image

from latent_tool import Budget, LatentReasoner, ReasoningResult, SearchSettings
from latent_tool.langchain.messages import image_block

CIRCLE = "what color is the circle?"
SQUARE = "what color is the square?"
TINY = SearchSettings(search_below=None, latents=2, samples=4, patches_per_latent=2)


def small_reasoner(iterations: int = 1, **fields: Any) -> LatentReasoner:
    """A reasoner that searches just enough to have everything in its result."""
    return LatentReasoner(**{"budget": Budget(iterations=iterations, max_patches=4), "settings": TINY, **fields})


class Close(float):
    """A number that equals its neighbours: in a batch, float32 sums are taken in another order."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int | float) and abs(float(self) - float(other)) < 1e-4

    __hash__ = float.__hash__


def plain(value: Any) -> Any:
    """JSON without what it took (a picture that is in a cache is not encoded), its numbers to be compared to 1e-4."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items() if key not in ("seconds", "vision_passes")}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return Close(value) if isinstance(value, float) else value


def essence(result: ReasoningResult) -> Any:
    """A result without what time it took, its numbers to be compared to 1e-4."""
    return plain(result.model_dump(mode="json"))


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
