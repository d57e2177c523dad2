"""Between LangChain messages and requests: which images a conversation shows, what it asks, and how a request reads
as messages for another chat model.

This module knows how messages are built. It opens no image and knows nothing of models.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.prompt_values import PromptValue

from latent_tool.errors import InputError, QuestionError
from latent_tool.redact import redact
from latent_tool.schema import ReasoningRequest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "as_request",
    "image_block",
    "messages_from_request",
    "newest_images",
    "request_from_messages",
    "shown_input",
]

# Content blocks that hold an image although LangChain does not normalise them.
_FOREIGN_IMAGES = ("image", "image_url", "input_image", "media")


def as_request(value: Any) -> ReasoningRequest:
    """A request from whatever may stand before a reasoner: a request, its fields, a prompt or messages.

    Raises ``InputError``.
    """
    if isinstance(value, PromptValue):
        return request_from_messages(value.to_messages())
    if isinstance(value, BaseMessage):
        return request_from_messages([value])
    if isinstance(value, list) and value and all(isinstance(each, BaseMessage) for each in value):
        return request_from_messages(value)
    return ReasoningRequest.parse(value)


def shown_input(value: Any) -> Any:
    """What a run records of its input: everything but the images and the credentials in URLs."""
    if isinstance(value, ReasoningRequest):
        return value.shown()
    if isinstance(value, PromptValue):
        return shown_input(value.to_messages())
    if isinstance(value, BaseMessage):
        return {"type": value.type, "content": redact(value.content)}
    if isinstance(value, list):
        return [shown_input(each) for each in value]
    return redact(value)


def request_from_messages(messages: Sequence[BaseMessage], image: Any = None) -> ReasoningRequest:
    """The last human message as a question about all images the conversation shows, in their order.

    System messages become the system text. Earlier turns stand before the question as a transcript.

    Args:
        messages: the conversation; its last message asks.
        image: the image the question is about when the messages show none.

    Raises ``QuestionError`` when the last message asks nothing, ``InputError`` when there is no image.
    """
    system = [message.text for message in messages if isinstance(message, SystemMessage)]
    turns = [message for message in messages if not isinstance(message, SystemMessage)]
    if not turns or not isinstance(turns[-1], HumanMessage) or not turns[-1].text.strip():
        raise QuestionError("The conversation does not end with a question.", "Add a HumanMessage that asks something.")
    question = str(turns[-1].text)
    if len(turns) > 1:
        question = "\n".join([*(_as_line(turn) for turn in turns[:-1] if turn.text.strip()), question])
    images = [block for message in messages for block in image_blocks(message)] or ([] if image is None else [image])
    if not images:
        raise InputError(
            "There is no image in the conversation.",
            "Put an image content block into a message, for example {'type': 'image', 'base64': ..., "
            "'mime_type': 'image/png'}.",
        )
    return ReasoningRequest.parse({"images": images, "question": question, "system": "\n".join(system) or None})


def _as_line(message: BaseMessage) -> str:
    return f"{'Assistant' if isinstance(message, AIMessage) else 'User'}: {message.text}"


def image_blocks(message: BaseMessage) -> list[Mapping[str, Any]]:
    """The image content blocks of a message, in every form LangChain normalises and a few that it does not."""
    found: list[Mapping[str, Any]] = []
    for block in message.content_blocks:
        content: Any = block["value"] if block["type"] == "non_standard" else block
        if isinstance(content, Mapping) and content.get("type") in _FOREIGN_IMAGES and _is_picture(content):
            found.append(content)
    return found


def _is_picture(block: Mapping[str, Any]) -> bool:
    """Whether a block is an image; ``media`` may also be sound or video."""
    return block["type"] != "media" or str(block.get("mime_type", "image/")).startswith("image/")


def newest_images(messages: Iterable[BaseMessage]) -> list[Mapping[str, Any]]:
    """The images of the newest message that shows any."""
    return next((found for message in reversed(list(messages)) if (found := image_blocks(message))), [])


def image_block(image: Image) -> dict[str, Any]:
    """A picture as an image content block."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"type": "image", "base64": base64.b64encode(buffer.getvalue()).decode(), "mime_type": "image/png"}


def messages_from_request(request: ReasoningRequest, images: Sequence[Image]) -> list[BaseMessage]:
    """The request for a chat model; ``images`` are its images, opened."""
    content: list[str | dict[Any, Any]] = [*(image_block(image) for image in images)]
    content.append({"type": "text", "text": request.question})
    question = HumanMessage(content)
    return [SystemMessage(request.system), question] if request.system else [question]
