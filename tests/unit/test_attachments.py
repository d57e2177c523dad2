"""What a conversation shows: images in every provider's form, what is none, and which one a name means."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latent_tool.errors import ImageDecodeError, InputError
from latent_tool.images.load import load_image
from latent_tool.langchain.attachments import Conversation, Unreadable, is_left_out, read_blocks
from latent_tool.settings import ImagePolicy

STREAM = io.BytesIO()
Image.new("RGB", (9, 7), (200, 30, 30)).save(STREAM, "PNG")
PNG = STREAM.getvalue()
DATA = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{DATA}"

IMAGES: list[dict[str, Any]] = [
    # LangChain, version 1 and before
    {"type": "image", "base64": DATA, "mime_type": "image/png"},
    {"type": "image", "base64": DATA},
    {"type": "image", "url": URI},
    {"type": "file", "base64": DATA, "mime_type": "image/png"},
    {"type": "file", "base64": DATA, "mime_type": "IMAGE/PNG; charset=binary"},
    {"type": "file", "url": URI},
    {"type": "file", "base64": DATA, "extras": {"filename": "chart.PNG"}},
    {"type": "image", "source_type": "base64", "data": DATA, "mime_type": "image/png"},
    {"type": "file", "source_type": "base64", "data": DATA, "mime_type": "Image/Png"},
    {"type": "non_standard", "value": {"type": "input_image", "image_url": URI}},
    # OpenAI, Chat Completions and Responses
    {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
    {"type": "image_url", "image_url": URI},
    {"type": "input_image", "image_url": URI, "detail": "auto"},
    {"type": "file", "file": {"file_data": URI, "filename": "a.png"}},
    {"type": "file", "file": {"file_data": DATA, "filename": "a.png"}},
    {"type": "input_file", "file_data": URI, "filename": "a.png"},
    {"type": "computer_screenshot", "image_url": URI},
    # Anthropic
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}},
    {"type": "document", "source": {"type": "base64", "media_type": "image/png", "data": DATA}},
    {"type": "tool_result", "content": [{"type": "image", "source": {"type": "base64", "data": DATA}}]},
    # Google
    {"type": "media", "mime_type": "image/png", "data": DATA},
    {"type": "media", "mime_type": "IMAGE/PNG", "data": PNG},
    {"type": "media", "data": DATA},
    {"inline_data": {"mime_type": "image/png", "data": DATA}},
    {"inlineData": {"mimeType": "image/png", "data": DATA}},
    # Bedrock
    {"image": {"format": "png", "source": {"bytes": PNG}}},
]  # fmt: skip

OTHERS: list[tuple[Any, str]] = [
    ({"type": "file", "base64": DATA, "mime_type": "application/pdf"}, "a PDF"),
    ({"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA", "filename": "a.pdf"}}, "a PDF"),
    ({"type": "file", "file": {"file_data": "AAAA", "filename": "a.pdf"}}, "a PDF"),
    ({"type": "file", "file_id": "f1"}, "only named"),
    ({"type": "input_file", "file_url": "https://example.org/a.pdf"}, "a PDF"),
    ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": DATA}}, "a PDF"),
    ({"document": {"format": "pdf", "name": "x", "source": {"bytes": b"abc"}}}, "a PDF"),
    ({"type": "media", "mime_type": "video/mp4", "file_uri": "gs://bucket/clip"}, "video/mp4"),
    ({"file_data": {"mime_type": "application/pdf", "file_uri": "gs://bucket/paper"}}, "a PDF"),
    ({"type": "video", "base64": DATA}, "a video"),
    ({"type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}}, "a video"),
    ({"type": "audio", "base64": DATA, "mime_type": "audio/wav"}, "sound"),
    ({"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}}, "sound"),
    ({"type": "text-plain", "url": "https://example.org/a.txt", "mime_type": "text/plain"}, "a text file"),
    ({"type": "image", "file_id": "f1"}, "only named"),
    ({"type": "image", "source": {"type": "file", "file_id": "f1"}}, "only named"),
    ({"type": "image", "base64": DATA, "url": URI}, "more than one"),
    ({"type": "hologram", "file_id": "f1"}, "hologram"),
    (7, "int"),
]


@pytest.mark.parametrize("block", IMAGES, ids=str)
def test_every_form_of_an_image_is_read(block: dict[str, Any]) -> None:
    before = repr(block)
    (part,) = read_blocks([block])
    loaded = load_image(part, ImagePolicy.untrusted())
    assert loaded.image.size == (9, 7) and loaded.image.getpixel((0, 0)) == (200, 30, 30)
    assert repr(block) == before


@pytest.mark.parametrize(("block", "what"), OTHERS, ids=str)
def test_what_is_no_image_is_never_skipped(block: Any, what: str) -> None:
    parts = list(read_blocks([block]))
    shown = Conversation.read([[IMAGES[0]], [block]])
    assert [type(part) for part in parts] == [Unreadable] and what in parts[0].what  # type: ignore[union-attr]
    with pytest.raises(ImageDecodeError, match=r"no image that can be read.*image='1'"):
        shown.choose(None)
    assert shown.choose("1").numbers == (1,)
    with pytest.raises(ImageDecodeError, match="PNG or JPEG"):
        Conversation.read([[block]]).choose(None)


def test_text_is_kept_in_its_order_and_silence_is_silent() -> None:
    content = [
        "a",
        {"type": "text", "text": "b"},
        IMAGES[0],
        {"type": "input_text", "text": "c"},
        {"text": "d"},
        {"type": "text-plain", "text": "e", "mime_type": "text/plain"},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "f"}},
        {"type": "thinking", "thinking": "x"},
        {"cachePoint": {"type": "default"}},
        {"type": "tool_use", "id": "1", "name": "n", "input": {"url": URI}},
    ]
    parts = list(read_blocks(content))
    assert [part for part in parts if isinstance(part, str)] == list("abcdef")
    assert [isinstance(part, str) for part in parts].index(False) == 2
    assert list(read_blocks("")) == [] and list(read_blocks("hi")) == ["hi"]


def test_of_a_tool_s_reply_unknown_blocks_are_left_out() -> None:
    link = {"type": "resource_link", "uri": "https://example.org/a"}
    assert list(read_blocks([link], known_only=True)) == []
    assert len(list(read_blocks([link]))) == 1
    assert len(list(read_blocks([IMAGES[0], link, OTHERS[0][0]], known_only=True))) == 2


# ---------------------------------------------------------------------- numbers

THREE = Conversation((("a",), (), ("b", "c"), ()))


@pytest.mark.parametrize(
    ("named", "numbers"),
    [
        (None, (2, 3)),
        ("1", (1,)),
        (" 2 ", (2,)),
        ("#3", (3,)),
        ("image 1", (1,)),
        ("Image_2", (2,)),
        ("image1", (1,)),
        ("the picture 3", (3,)),
        ("1,3", (1, 3)),
        ("images 3 and 1", (3, 1)),
        ("1, 2 & 1", (1, 2)),
        ("first", (1,)),
        ("the second image", (2,)),
        ("last", (3,)),
        ("newest image", (3,)),
    ],
)
def test_an_image_is_named_by_its_number(named: str | None, numbers: tuple[int, ...]) -> None:
    chosen = THREE.choose(named)
    assert chosen.numbers == numbers
    assert list(chosen.references) == ["abc"[number - 1] for number in numbers]


@pytest.mark.parametrize("named", ["0", "4", "1,4", "tenth"])
def test_a_number_that_no_image_has(named: str) -> None:
    with pytest.raises(InputError, match=r"shows 3 images: there is no image \d+.*image='1' to image='3'"):
        THREE.choose(named)


@pytest.mark.parametrize("named", ["chart.png", "image1.png", "/1", "1.png", "https://example.org/1", URI, "2024-11"])
def test_other_names_are_references(named: str) -> None:
    assert THREE.choose(named).references == (named,) and THREE.choose(named).numbers == ()
    assert Conversation.of(()).choose("1").references == ("1",)  # no conversation can be seen: a file, perhaps


def test_a_conversation_without_images() -> None:
    for shown in (Conversation(), Conversation(((), ()))):
        with pytest.raises(InputError, match="no image in the conversation"):
            shown.choose(None)
    with pytest.raises(InputError, match="no image in the conversation"):
        Conversation(((), ())).choose("1")


@given(st.lists(st.lists(st.sampled_from(["picture", "broken"]), max_size=3), max_size=6))
def test_never_an_older_image(kinds: list[list[str]]) -> None:
    """Against a naive twin: what is chosen is all of the newest message that attaches anything, or an error."""
    names = iter(range(1, 100))
    turns = tuple(tuple(next(names) if kind == "picture" else Unreadable("x") for kind in turn) for turn in kinds)
    shown = Conversation(turns)
    attached = [turn for turn in turns if turn]
    if attached and not any(isinstance(each, Unreadable) for each in attached[-1]):
        chosen = shown.choose(None)
        assert chosen.references == attached[-1] == chosen.numbers
    else:
        with pytest.raises(InputError):
            shown.choose(None)
    for number, picture in enumerate(shown.pictures, 1):
        assert shown.choose(str(number)).references == (picture,)


def test_words_for_nothing() -> None:
    assert all(map(is_left_out, [None, "", " ", "null", "None", "NONE", "undefined", "n/a"]))
    assert not any(map(is_left_out, ["0", "no.png", 0, False, "quick"]))
