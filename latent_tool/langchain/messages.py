"""Between LangChain messages and requests: which images a conversation shows, what it asks, and how a request reads
as messages for another chat model.

This module knows how messages are built. It opens no image and knows nothing of models.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.prompt_values import PromptValue

from latent_tool.errors import InputError, QuestionError
from latent_tool.langchain.attachments import Conversation, Part, Unreadable, read_blocks
from latent_tool.schema import ReasoningRequest
from latent_tool.words import redact

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "as_request",
    "asked_text",
    "conversation",
    "image_block",
    "messages_from_request",
    "request_from_messages",
    "shown_input",
    "transcript",
]


def as_request(value: Any) -> ReasoningRequest:
    """Return a request from whatever may stand before a reasoner: a request, its fields, a prompt or messages.

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
    """Return what a run records of its input: everything but the images and the credentials in URLs."""
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
    """Return the last human message as a question about the newest images that the conversation shows.

    These are the images of the newest message that shows any. System and developer messages become the system text.
    Earlier turns stand before the question as a transcript, each with its role's name; an image of theirs that is not
    asked about is there as a word.

    Args:
        messages: the conversation; its last message asks.
        image: the image the question is about when the messages show none.

    Raises ``QuestionError`` when the last message asks nothing, ``ImageDecodeError`` when the conversation attaches
    what cannot be read, ``InputError`` when there is no image.
    """
    read = [(_role(message), _parts(message)) for message in messages]
    turns = [(role, parts) for role, parts in read if role != _SYSTEM]
    if not turns or turns[-1][0] != _USER or not _text(turns[-1][1]).strip():
        raise QuestionError("The conversation does not end with a question.", "Add a HumanMessage that asks something.")
    for part in (part for _, parts in read for part in parts):
        if isinstance(part, Unreadable):
            raise part.error()
    asked = next((parts for _, parts in reversed(read) if any(map(_is_picture, parts))), ())
    images = [part for part in asked if _is_picture(part)] or ([] if image is None else [image])
    if not images:
        raise InputError(
            "There is no image in the conversation.",
            "Put an image content block into a message, for example {'type': 'image', 'base64': ..., "
            "'mime_type': 'image/png'}.",
        )
    lines = [f"{role}: {text}" for role, parts in turns[:-1] if (text := _text(parts, parts is asked)).strip()]
    system = [text for role, parts in read if role == _SYSTEM and (text := _text(parts, parts is asked)).strip()]
    question = _text(turns[-1][1], turns[-1][1] is asked)
    return ReasoningRequest.parse(
        {"images": images, "question": "\n".join([*lines, question]), "system": "\n".join(system) or None}
    )


_USER, _SYSTEM = "User", "System"
_ROLES = {
    "ai": "Assistant",
    "assistant": "Assistant",
    "developer": _SYSTEM,
    "human": _USER,
    "system": _SYSTEM,
    "user": _USER,
}


def _role(message: BaseMessage) -> str:
    """Who speaks, as a transcript names them."""
    role = message.role if isinstance(message, ChatMessage) else message.type.removesuffix("MessageChunk")
    role = " ".join(role.split())[:40]
    return _ROLES.get(role.lower(), role[:1].upper() + role[1:])


def _parts(message: BaseMessage) -> tuple[Part, ...]:
    """What a message shows, in its order; of what models and tools return only blocks of known types."""
    if isinstance(message, AIMessage):  # what a model attaches was not shown to it
        shown = [part for part in read_blocks(message.content_blocks, known_only=True) if not isinstance(part, str)]
        # Its sentences may be spread over blocks, for example between citations: these are no lines.
        return (str(message.text), *(part for part in shown if not isinstance(part, Unreadable) or part.image))
    return tuple(read_blocks(message.content, known_only=isinstance(message, ToolMessage | FunctionMessage)))


def _is_picture(part: Part) -> bool:
    return isinstance(part, Mapping)


def _text(parts: Sequence[Part], asked: bool = False) -> str:
    """The texts of a turn, one below the other, and words where its images stand.

    Those asked about are shown before the text; they are numbered there where it matters which stands where.
    """
    pictures = [i for i, part in enumerate(parts) if _is_picture(part)]
    texts = [i for i, part in enumerate(parts) if isinstance(part, str)]
    mixed = len(pictures) > 1 and any(pictures[0] < i < pictures[-1] for i in texts)
    lines: list[str] = []
    number = 0
    for part in parts:
        if isinstance(part, str):
            lines.append(part)
        elif _is_picture(part) and (mixed or not asked):
            number += 1
            lines.append(f"[image {number}]" if asked else "[earlier image]")
    return "\n".join(lines)


def transcript(messages: Iterable[BaseMessage]) -> list[str]:
    """Return every message as a line of text with its role's name, its images left out."""
    read = ((_role(message), _parts(message)) for message in messages)
    return [f"{role}: {_text([part for part in parts if isinstance(part, str)])}" for role, parts in read]


def conversation(messages: Iterable[BaseMessage], without: str | None = None) -> Conversation:
    """Return the images that messages show, by message, without those that the tool of the name ``without`` has
    returned.
    """
    theirs = (each for each in messages if not (isinstance(each, ToolMessage) and each.name == without))
    return Conversation(tuple(tuple(part for part in _parts(each) if not isinstance(part, str)) for each in theirs))


def image_block(image: Image) -> dict[str, Any]:
    """Return a picture as an image content block."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"type": "image", "base64": base64.b64encode(buffer.getvalue()).decode(), "mime_type": "image/png"}


def asked_text(request: ReasoningRequest) -> str:
    """Return the question in words, for whoever cannot be asked for the probabilities of options."""
    if request.all_options is None:
        return request.question
    listed = "\n".join(f"- {option}" for option in request.all_options)
    return f"{request.question}\nAnswer with one of these, and nothing else:\n{listed}"


def messages_from_request(request: ReasoningRequest, images: Sequence[Image]) -> list[BaseMessage]:
    """Return the request for a chat model; ``images`` are its images, opened."""
    content: list[str | dict[Any, Any]] = [*(image_block(image) for image in images)]
    content.append({"type": "text", "text": asked_text(request)})
    question = HumanMessage(content)
    return [SystemMessage(request.system), question] if request.system else [question]
