"""What a conversation shows: text, pictures and attachments that cannot be read, from content blocks of any provider.

Understood are LangChain's standard blocks and their older forms, and those of OpenAI (Chat Completions and Responses),
Anthropic, Google and Bedrock. What a block declares decides, not what LangChain makes of it: its conversion calls every
OpenAI file a PDF. This module opens no image and knows nothing of messages or frameworks.
"""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latent_tool.errors import ImageDecodeError, InputError

__all__ = ["Chosen", "Conversation", "Part", "Unreadable", "is_left_out", "is_media", "read_blocks"]


@dataclass(frozen=True)
class Unreadable:
    """An attachment that is no image that can be read.

    Attributes:
        what: what it is, in words: ``"a PDF"``.
        image: whether it poses as an image.
    """

    what: str
    image: bool = False

    def error(self, remedy: str = "") -> ImageDecodeError:
        """Return what to raise when somebody wants to look at it."""
        hint = "Attach a picture as PNG or JPEG instead, in the message itself."
        return ImageDecodeError(
            f"The conversation's attachment is {self.what}, no image that can be read.", remedy or hint
        )


Picture = Mapping[str, Any]  # an image content block in the one form that images are loaded from
Part = str | Picture | Unreadable

_TEXTS = {"text", "input_text", "output_text", "text-plain"}
_IMAGES = {"image", "image_url", "input_image", "computer_screenshot"}
_FILES = {"file", "input_file", "document", "media", "inline_data", "inlineData", "file_data", "fileData"}
_SOUNDS = {"audio", "input_audio", "audio_url"}
_VIDEOS = {"video", "input_video", "video_url"}
_KINDS = _IMAGES | _FILES | _SOUNDS | _VIDEOS

# Blocks that show nothing: what a model thinks and calls, and marks for caches.
_SILENT = {
    "annotation",
    "cachePoint",
    "cache_point",
    "citation",
    "citations",
    "function_call",
    "invalid_tool_call",
    "non_standard_annotation",
    "reasoning",
    "reasoningContent",
    "reasoning_content",
    "redacted_thinking",
    "refusal",
    "server_tool_call",
    "server_tool_call_chunk",
    "server_tool_use",
    "thinking",
    "toolUse",
    "tool_call",
    "tool_call_chunk",
    "tool_use",
}
_CONTAINERS = ("content", "output", "toolResult", "tool_result", "source")

# Where the facts about an attachment are, and where they may be nested.
_NESTED = (*sorted(_KINDS), "source", "value", "extras", "metadata")
_TYPES = ("mime_type", "media_type", "mimeType", "mediaType")
_NAMES = ("filename", "file_name", "name", "title")
_PLACES = {
    "base64": "base64",
    "data": "base64",
    "bytes": "bytes",
    "file_data": "base64",
    "url": "url",
    "image_url": "url",
    "video_url": "url",
    "audio_url": "url",
    "file_url": "url",
    "file_uri": "url",
    "fileUri": "url",
    "uri": "url",
    "path": "path",
    "image": "image",
}
_UNTOLD = ("", "application/octet-stream", "binary/octet-stream", "*/*")
_WORDS = {"application/pdf": "a PDF", "text/plain": "a text file"}


def read_blocks(content: object, *, known_only: bool = False) -> Iterator[Part]:
    """Yield what the content of a message holds, in its order.

    Args:
        content: text, a content block, or a list of both.
        known_only: leave out blocks of a type that is not known, as models and tools return them; of what a user
            attaches nothing is left out.
    """
    if isinstance(content, list | tuple):
        for block in content:
            yield from read_blocks(block, known_only=known_only)
    elif isinstance(content, str):
        if content:
            yield content
    elif not isinstance(content, Mapping):
        yield Unreadable(f"a {type(content).__name__}")
    else:
        yield from _read_block(content, known_only)


def is_media(value: object) -> bool:
    """Tell whether a value is a content block, and no other dict that happens to hold one."""
    if not isinstance(value, Mapping):
        return False
    return value.get("type") in _KINDS | _TEXTS | {"non_standard"}


def _read_block(block: Mapping[str, Any], known_only: bool) -> Iterator[Part]:
    kind = str(block.get("type") or next((key for key in block if key in _KINDS | _SILENT), ""))
    if kind == "non_standard":
        yield from read_blocks(block.get("value"), known_only=known_only)
    elif kind in _TEXTS or (not kind and isinstance(block.get("text"), str)):
        text = block.get("text")
        yield from (
            [text] if isinstance(text, str) and text else [] if kind != "text-plain" else [Unreadable("a text file")]
        )
    elif kind in _SILENT:
        return
    elif nested := _contained(block):
        yield from read_blocks(nested, known_only=known_only)
    elif kind in _KINDS or not known_only:
        yield _attachment(kind, block)


def _contained(block: Mapping[str, Any]) -> list[Any]:
    """The blocks inside a tool's result, a search result or a document of blocks or text."""
    for key in _CONTAINERS:
        value = block.get(key)
        if isinstance(value, list):
            return value
        if key == "source" and isinstance(value, Mapping) and value.get("type") == "text":
            return [value.get("data") or ""]
        if isinstance(value, Mapping) and (nested := _contained(value)):
            return nested
    return []


def _attachment(kind: str, block: Mapping[str, Any]) -> Picture | Unreadable:
    places: list[tuple[str, Any]] = []
    told: dict[str, str] = {}
    pictured = _gather(block, places, told) or kind in _IMAGES
    media = _media_type(places, told)
    pictured = pictured or media.startswith("image/")
    if not pictured and (kind in _SOUNDS | _VIDEOS or media not in _UNTOLD):
        word = "sound" if kind in _SOUNDS else "a video" if kind in _VIDEOS else _WORDS.get(media, "a file")
        return Unreadable(f"{word} ({media})" if media not in (*_UNTOLD, *_WORDS) else word)
    if len(places) == 1:
        key, value = places[0]
        return {"type": "image", key: value}
    if not places:
        return Unreadable(f"only named ({_short(kind)} without its bytes or a URL)", image=pictured)
    return Unreadable("a block with more than one image", image=pictured)


def _gather(block: Mapping[str, Any], places: list[tuple[str, Any]], told: dict[str, str], depth: int = 0) -> bool:
    """Collect where the bytes of an attachment are and what is told of it; whether its keys call it an image."""
    pictured = False
    for key, value in block.items():
        if isinstance(value, Mapping):
            if key in _NESTED and depth < 3:
                pictured |= _gather(value, places, told, depth + 1) or key in _IMAGES
        elif value is None:
            continue
        elif key in _PLACES and not (key == "url" and value == ""):
            pictured |= key in ("image", "image_url")
            as_uri = isinstance(value, str) and value.lstrip()[:5].lower() == "data:"
            place = "url" if as_uri else "base64" if key == "bytes" and isinstance(value, str) else _PLACES[key]
            places.append(("bytes" if isinstance(value, bytes | bytearray) else place, value))
        elif isinstance(value, str):
            if key in _TYPES:
                told.setdefault("type", value)
            elif key in _NAMES:
                told.setdefault("name", value)
            elif key == "format":
                told["name"] = f"file.{value}"
    return pictured


def _media_type(places: Sequence[tuple[str, Any]], told: Mapping[str, str]) -> str:
    """The media type an attachment declares, in lower case; empty if it declares none."""
    declared = [told.get("type", "")]
    for _, value in places:
        if isinstance(value, str) and (uri := _DATA_URI.match(value)):
            declared.append(uri[1])
    names = [
        told.get("name", ""),
        *(value for key, value in places if key in ("url", "path") and len(str(value)) < 2000),
    ]
    declared += [mimetypes.guess_type(str(name))[0] or "" for name in names if not str(name).startswith("data:")]
    plain = (each.partition(";")[0].strip().lower() for each in declared)
    return next((each for each in plain if each not in _UNTOLD), "")


_DATA_URI = re.compile(r"\s*data:([^,;]{1,100})", re.IGNORECASE)


def _short(kind: str) -> str:
    return f"a block of type {kind[:30]!r}" if kind else "a block of no type"


# ---------------------------------------------------------------------- which picture is meant


@dataclass(frozen=True)
class Chosen:
    """The pictures that a question is about.

    Attributes:
        references: what to load, in the order of the question.
        numbers: their numbers in the conversation, from 1; empty when they are not part of it.
    """

    references: tuple[Any, ...]
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """The pictures that a conversation shows, by message, oldest first; they are numbered from 1 in that order.

    Attributes:
        turns: for every message, its images as references, and what else it attaches as ``Unreadable``.
    """

    turns: tuple[tuple[Any, ...], ...] = ()

    @classmethod
    def of(cls, shown: Conversation | Sequence[Any]) -> Conversation:
        """Return a conversation, or the one whose only message shows these references."""
        if isinstance(shown, Conversation):
            return shown
        return cls((tuple(shown),) if shown else ())

    @classmethod
    def read(cls, contents: Iterable[object]) -> Conversation:
        """Return the conversation of these contents of messages."""
        return cls(tuple(tuple(part for part in read_blocks(each) if not isinstance(part, str)) for each in contents))

    @property
    def pictures(self) -> tuple[Any, ...]:
        """All images, in the order of their numbers."""
        return tuple(each for turn in self.turns for each in turn if not isinstance(each, Unreadable))

    def newest(self) -> Chosen:
        """Return the images of the newest message that attaches anything.

        Raises ``ImageDecodeError`` when it attaches something that cannot be read: an older image is never taken for
        it. Without any attachment nothing is chosen.
        """
        behind = len(self.pictures)
        for turn in reversed(self.turns):
            broken = next((each for each in turn if isinstance(each, Unreadable)), None)
            if broken is not None:
                earlier = f"To ask about an image of the conversation, name its number: {self._named}."
                raise broken.error(earlier if self.pictures else "")
            behind -= len(turn)
            if turn:
                return Chosen(turn, tuple(range(behind + 1, behind + len(turn) + 1)))
        return Chosen(())

    def choose(self, named: str | None) -> Chosen:
        """Return the images that ``named`` means: a number, or several, in the conversation; a path, URL or data URI;
        and without it those of the newest message that attaches anything.

        Raises ``InputError`` when there is no such image, ``ImageDecodeError`` as ``newest`` does.
        """
        if named is None:
            chosen = self.newest()
            if not chosen.references:
                raise InputError("There is no image in the conversation.", "Name one with the argument 'image'.")
            return chosen
        total = len(self.pictures)
        numbers = _numbers(named, total) if self.turns else []
        if not numbers:
            return Chosen((named,))
        if not total:
            return self.choose(None)  # raises: there is nothing that has a number
        wrong = next((each for each in numbers if not 1 <= each <= total), None)
        if wrong is not None:
            shown = "one image" if total == 1 else f"{total} images"
            raise InputError(f"The conversation shows {shown}: there is no image {wrong}.", self.remedy)
        return Chosen(tuple(self.pictures[each - 1] for each in numbers), tuple(numbers))

    @property
    def remedy(self) -> str:
        """How an agent's model asks about an image of the conversation, in a sentence."""
        newest = "Leave the argument 'image' out to ask about the newest image of the conversation"
        return f"{newest}, or name one by its number: {self._named}." if self.pictures else f"{newest}."

    @property
    def _named(self) -> str:
        total = len(self.pictures)
        return "image='1'" if total == 1 else f"image='1' to image='{total}'"


_NUMBERED = re.compile(
    r"(?:the\s+)?(?:image|picture|photo|img|figure)?s?\s*(?:no\.?|number|nr\.?)?\s*[#_]?\s*"
    r"(\d{1,4}(?:\s*(?:,|and|&|\+)\s*#?\d{1,4})*)",
    re.IGNORECASE,
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_ORDINAL = re.compile(
    rf"(?:the\s+)?({'|'.join(_ORDINALS)}|last|latest|newest)(?:\s+(?:image|picture|photo))?", re.IGNORECASE
)


def _numbers(named: str, total: int) -> list[int]:
    """The numbers that a name of images gives, in its order and each once; none if it is no number."""
    text = named.strip()
    if match := _NUMBERED.fullmatch(text):
        return list(dict.fromkeys(int(each) for each in re.findall(r"\d+", match[1])))
    if match := _ORDINAL.fullmatch(text):
        word = match[1].lower()
        return [_ORDINALS.index(word) + 1 if word in _ORDINALS else max(total, 1)]
    return []


_FILLERS = ("", "null", "none", "nil", "undefined", "n/a", "na", "-", "''", '""', "<none>", "<null>")


def is_left_out(value: object) -> bool:
    """Tell whether an agent's model has written a word for nothing where it could have left an argument out."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _FILLERS)
