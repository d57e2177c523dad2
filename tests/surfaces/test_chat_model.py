"""ChatLatentReasoner: images in every form, turns, tokens, metadata, options, and runs below its own run."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.load import dumpd, load
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from pictures import draw_shapes
from PIL import Image
from recorder import Recorder, options
from scripted_agents import CIRCLE, SQUARE, shows, small_reasoner

from latent_tool import ChatLatentReasoner, ImagePolicy, LatentReasoner, ReasoningResult
from latent_tool.errors import ImageDecodeError, ImageNotAllowedError, InputError, QuestionError, SettingsError
from latent_tool.images.load import load_image
from latent_tool.langchain.messages import image_block, messages_from_request, request_from_messages
from latent_tool.schema import GeneratedToken

pytestmark = pytest.mark.disable_socket

LEFT = "what is left of the blue square?"  # an answer of two tokens


@pytest.fixture
def chat() -> ChatLatentReasoner:
    reasoner = ChatLatentReasoner().reasoner.model_copy(
        update=dict(small_reasoner()) | {"image_policy": ChatLatentReasoner().reasoner.image_policy}
    )
    return ChatLatentReasoner(reasoner=reasoner)


def forms(data: str) -> list[dict[str, Any]]:
    """One picture in every form LangChain knows."""
    uri = f"data:image/png;base64,{data}"
    return [
        {"type": "image", "base64": data, "mime_type": "image/png"},
        {"type": "image", "url": uri},
        {"type": "image", "source_type": "base64", "data": data, "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": uri},
        {"type": "input_image", "image_url": uri},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
        {"type": "media", "mime_type": "image/png", "data": data},
    ]


def test_every_form_of_an_image_is_the_same_image(picture: Image.Image) -> None:
    for block in forms(image_block(picture)["base64"]):
        request = request_from_messages([HumanMessage([block, {"type": "text", "text": CIRCLE}])])
        (reference,) = request.image_references
        assert load_image(reference, ImagePolicy.untrusted()).image.tobytes() == picture.tobytes(), block
        assert request.question == CIRCLE


def test_sound_is_no_picture(picture: Image.Image) -> None:
    sound = {"type": "media", "mime_type": "audio/wav", "data": "AAAA"}
    with pytest.raises(InputError, match="no image"):
        request_from_messages([HumanMessage([sound, {"type": "text", "text": CIRCLE}])])


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ({"type": "image", "url": "https://example.org/a.png"}, ImageNotAllowedError),
        ({"type": "image", "url": "file:///etc/hostname"}, ImageNotAllowedError),
        ({"type": "image", "file_id": "file-1"}, ImageDecodeError),
        ({"type": "image", "base64": "AAAA", "mime_type": "image/png"}, ImageDecodeError),
    ],
)
def test_images_that_are_not_in_the_message(chat: ChatLatentReasoner, block: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        chat.invoke([HumanMessage([block, {"type": "text", "text": CIRCLE}])])


def test_the_reply_carries_its_confidence(chat: ChatLatentReasoner, picture: Image.Image) -> None:
    reply = chat.invoke([shows(picture, text=LEFT)])
    metadata = reply.response_metadata
    assert reply.content == "red circle"
    assert metadata["confidence"] > 0.9 and metadata["confidence_source"] == "pooled_probability"
    assert metadata["model_name"] == "embedded" and metadata["finish_reason"] == "stop"
    assert isinstance(metadata["patches"], list) and metadata["accepted"] is None
    tokens = metadata["logprobs"]["content"]
    assert [each["token"] for each in tokens] == ["red", " circle"]
    assert bytes(tokens[1]["bytes"]) == b" circle"
    assert all(each["logprob"] <= 0 for each in tokens)
    # The token that ends the answer is part of its probability, not of the content.
    assert math.exp(sum(each["logprob"] for each in tokens)) >= metadata["scores"]["answer_probability"]
    usage = reply.usage_metadata
    assert usage is not None and usage["output_tokens"] == 3 and usage["total_tokens"] == usage["input_tokens"] + 3


async def test_streaming_yields_tokens_and_adds_up_to_the_reply(chat: ChatLatentReasoner, picture: Image.Image) -> None:
    messages = [shows(picture, text=LEFT)]
    reply = chat.invoke(messages)
    chunks = list(chat.stream(messages))
    assert [chunk.content for chunk in chunks] == ["red", " circle", ""]
    assert not any(chunk.response_metadata for chunk in chunks[:-1])
    whole = chunks[0] + chunks[1] + chunks[2]
    assert isinstance(whole, AIMessageChunk) and whole.content == reply.content
    assert whole.usage_metadata == reply.usage_metadata
    assert {**whole.response_metadata} == reply.response_metadata
    assert [chunk.content async for chunk in chat.astream(messages)] == ["red", " circle", ""]
    assert (await chat.ainvoke(messages)).response_metadata == reply.response_metadata


def test_earlier_turns_are_part_of_the_question(chat: ChatLatentReasoner, picture: Image.Image) -> None:
    messages = [SystemMessage("Be brief."), shows(picture, text=CIRCLE), AIMessage("red"), HumanMessage(SQUARE)]
    request = request_from_messages(messages)
    assert request.system == "Be brief."
    assert request.question == f"User: {CIRCLE}\nAssistant: red\n{SQUARE}"
    assert len(request.image_references) == 1
    assert chat.invoke(messages).content == chat.reasoner.invoke(request).answer


@pytest.mark.parametrize("messages", [[], [AIMessage("Hello.")], [SystemMessage("Be brief.")], [HumanMessage("  ")]])
def test_conversations_that_ask_nothing(messages: list[Any]) -> None:
    with pytest.raises(QuestionError):
        request_from_messages(messages)


def test_without_an_image_there_is_an_error_unless_the_model_has_one(
    chat: ChatLatentReasoner, picture: Image.Image
) -> None:
    with pytest.raises(InputError, match="no image in the conversation"):
        chat.invoke("What is this?")
    own = ChatLatentReasoner(reasoner=chat.reasoner, image=picture)
    chain = ChatPromptTemplate.from_template("what color is the {shape}?") | own | StrOutputParser()
    assert chain.batch([{"shape": "circle"}, {"shape": "square"}]) == ["red", "blue"]


def test_a_request_reads_as_messages_and_back(picture: Image.Image) -> None:
    request = request_from_messages([SystemMessage("Be brief."), shows(picture, text=CIRCLE)])
    messages = messages_from_request(request, [picture])
    assert [message.text for message in messages] == ["Be brief.", CIRCLE]
    assert request_from_messages(messages).question == CIRCLE


# ---------------------------------------------------------------------- options


def test_options_by_keyword_by_bind_and_by_config(chat: ChatLatentReasoner, picture: Image.Image) -> None:
    messages = [shows(picture, text=LEFT)]
    strict = {"min_confidence": 1.0}
    assert chat.invoke(messages, **strict).response_metadata["abstained"] is True
    assert chat.bind(**strict).invoke(messages).response_metadata["accepted"] is False
    assert chat.invoke(messages, options(**strict)).response_metadata["accepted"] is False
    assert list(chat.stream(messages, options(**strict)))[-1].response_metadata["accepted"] is False
    assert chat.invoke(messages, options(**strict), min_confidence=0.0).response_metadata["accepted"] is True


def test_wrong_options_are_errors(chat: ChatLatentReasoner, picture: Image.Image) -> None:
    messages = [shows(picture, text=LEFT)]
    with pytest.raises(SettingsError):
        chat.invoke(messages, temperature=0.5)
    with pytest.raises(SettingsError):
        chat.invoke(messages, options(sed=1))
    for wrong in ({"temperature": 0.5}, {"max_tokens": 0}, {"timeout": -1}, {"reasoner": "me"}):
        with pytest.raises(SettingsError):
            ChatLatentReasoner(**wrong)


def test_stop_and_max_tokens_cut_the_answer(chat: ChatLatentReasoner, picture: Image.Image) -> None:
    messages = [shows(picture, text=LEFT)]
    assert chat.invoke(messages, stop=[" circle"]).content == "red"
    assert ChatLatentReasoner(reasoner=chat.reasoner, stop=["circle"]).invoke(messages).content == "red "
    cut = chat.invoke(messages, max_tokens=1)
    assert cut.content == "red" and cut.response_metadata["finish_reason"] == "length"


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_saved_and_loaded_again(chat: ChatLatentReasoner) -> None:
    chat = ChatLatentReasoner(reasoner=chat.reasoner, max_tokens=7, stop=["."])
    again = load(dumpd(chat), allowed_objects=[ChatLatentReasoner, LatentReasoner], valid_namespaces=["latent_tool"])
    assert again == chat


def test_tools_are_not_pretended(chat: ChatLatentReasoner) -> None:
    with pytest.raises(NotImplementedError, match="LatentReasoningTool"):
        chat.bind_tools([])
    assert chat.profile is not None and chat.profile["tool_calling"] is False
    assert chat.profile["image_inputs"] is True and chat.profile["max_input_tokens"] > 100
    assert chat.profile["image_url_inputs"] is False


# ---------------------------------------------------------------------- conversations

GREEN = (20, 150, 40)


@pytest.mark.parametrize(
    "block",
    [
        lambda data: {"type": "file", "base64": data, "mime_type": "image/png"},
        lambda data: {"type": "file", "file": {"file_data": f"data:image/png;base64,{data}", "filename": "a.png"}},
        lambda data: {"inline_data": {"mime_type": "image/png", "data": data}},
        lambda data: {"type": "media", "mime_type": "IMAGE/PNG", "data": data},
    ],
)
def test_the_newest_picture_is_asked_about_whatever_its_form(
    chat: ChatLatentReasoner, picture: Image.Image, block: Callable[[str], dict[str, Any]]
) -> None:
    newest = block(image_block(draw_shapes(colour=GREEN))["base64"])
    messages = [
        shows(picture, text=CIRCLE),
        AIMessage("red"),
        HumanMessage([newest, {"type": "text", "text": CIRCLE}]),
    ]
    request = request_from_messages(messages)
    assert request.question == f"User: [earlier image]\n{CIRCLE}\nAssistant: red\n{CIRCLE}"
    (asked,) = request.image_references
    assert load_image(asked, ImagePolicy.untrusted()).image.tobytes() == draw_shapes(colour=GREEN).tobytes()


def test_pictures_of_earlier_turns_are_said_not_to_be_looked_at(chat: ChatLatentReasoner, picture: Image.Image) -> None:
    messages = [shows(picture, text="Look."), AIMessage("ok"), shows(draw_shapes(colour=GREEN), text=CIRCLE)]
    reply = chat.invoke(messages)
    assert "earlier messages were not looked at: 1" in reply.response_metadata["warnings"][0]
    (patch, *_) = reply.response_metadata["patches"] or [{"image": 0}]
    assert patch["image"] == 0


@pytest.mark.parametrize(
    "block",
    [
        {"type": "file", "base64": "AAAA", "mime_type": "application/pdf"},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "video", "url": "https://example.org/a.mp4"},
        {"type": "image", "file_id": "file-1"},
        {"type": "hologram", "value": 3},
    ],
)
def test_an_attachment_that_cannot_be_read_is_an_error(
    chat: ChatLatentReasoner, picture: Image.Image, block: dict[str, Any]
) -> None:
    asks = HumanMessage([block, {"type": "text", "text": CIRCLE}])
    for messages in ([shows(picture), AIMessage("ok"), asks], [asks, shows(picture, text=CIRCLE)]):
        with pytest.raises(ImageDecodeError, match="no image that can be read"):
            chat.invoke(messages)
    with pytest.raises(ImageDecodeError):
        ChatLatentReasoner(reasoner=chat.reasoner, image=picture).invoke([asks])


def test_blocks_keep_their_order_and_lines(picture: Image.Image) -> None:
    image, text = image_block(picture), "What is this?"
    lines = HumanMessage([{"type": "text", "text": text}, image, {"type": "text", "text": "Answer in one word."}])
    assert request_from_messages([lines]).question == f"{text}\nAnswer in one word."
    captions = HumanMessage(["Before:", image, {"type": "text", "text": "After:"}, image, "What changed?"])
    assert request_from_messages([captions]).question == "Before:\n[image 1]\nAfter:\n[image 2]\nWhat changed?"
    later = request_from_messages([captions, AIMessage("Nothing."), HumanMessage("Sure?")])
    assert later.question.startswith("User: Before:\n[image 1]\nAfter:") and len(later.image_references) == 2
    # A model's sentences come in pieces, which are no lines.
    cited = AIMessage([{"type": "text", "text": "It is "}, {"type": "text", "text": "red."}])
    assert "Assistant: It is red.\n" in request_from_messages([shows(picture), cited, HumanMessage("Sure?")]).question


def test_roles_keep_their_names(picture: Image.Image) -> None:
    request = request_from_messages(
        [
            ChatMessage("Be brief.", role="developer"),
            SystemMessage("Be kind."),
            shows(picture, text="Look."),
            ToolMessage("42 degrees", tool_call_id="1"),
            ChatMessage("I doubt it.", role="critic"),
            ChatMessage("Fine.", role="assistant"),
            ChatMessage(CIRCLE, role="user"),
        ]
    )
    assert request.system == "Be brief.\nBe kind."
    assert request.question == f"User: Look.\nTool: 42 degrees\nCritic: I doubt it.\nAssistant: Fine.\n{CIRCLE}"


def test_the_chat_model_has_an_image_policy_of_its_own(picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    shown = [HumanMessage([{"type": "image", "url": (tmp_path / "a.png").as_uri()}, {"type": "text", "text": CIRCLE}])]
    reasoner = small_reasoner(image_policy=ImagePolicy.local())
    with pytest.raises(ImageNotAllowedError):
        ChatLatentReasoner(reasoner=reasoner).invoke(shown)
    allowed = ChatLatentReasoner(reasoner=reasoner, image_policy=ImagePolicy.untrusted(folders=(tmp_path,)))
    assert allowed.invoke(shown).content == "red"
    assert ChatLatentReasoner(reasoner=reasoner, image=tmp_path / "a.png").invoke(CIRCLE).content == "red"


def test_a_text_is_one_stop(chat: ChatLatentReasoner, picture: Image.Image) -> None:
    messages = [shows(picture, text=LEFT)]
    assert chat.invoke(messages, stop="circle").content == "red "
    assert chat.bind(stop="circle").invoke(messages).content == "red "
    assert ChatLatentReasoner(reasoner=chat.reasoner, stop="square").invoke(messages).content == "red circle"
    with pytest.raises(SettingsError):
        chat.invoke(messages, stop=["red", 3])


def test_parameters_that_every_chat_model_takes(chat: ChatLatentReasoner, picture: Image.Image) -> None:
    standard = {"temperature": 0, "max_tokens": 9, "timeout": 60, "stop": [], "max_retries": 2, "api_key": "s3cret"}
    made = ChatLatentReasoner(reasoner=chat.reasoner, **standard)
    assert made.invoke([shows(picture, text=CIRCLE)], temperature=0.0, timeout=60).content == "red"
    assert "s3cret" not in repr(made) + str(dumpd(made)) + str(made.model_dump())
    with pytest.raises(SettingsError, match="greedy"):
        ChatLatentReasoner(reasoner=chat.reasoner, temperature=0.7)


def test_tokens_are_the_model_s_own(chat: ChatLatentReasoner, picture: Image.Image) -> None:
    text = HumanMessage(CIRCLE)
    assert 0 < chat.get_num_tokens(CIRCLE) < len(CIRCLE)
    usage = chat.invoke([shows(picture, text=CIRCLE)]).usage_metadata
    counted = chat.get_num_tokens_from_messages([shows(picture, text=CIRCLE)])
    cells = counted - chat.get_num_tokens_from_messages([text])
    assert usage is not None and cells > 50 and abs(counted - usage["input_tokens"]) < 20
    messages = [shows(picture, text="An old one."), AIMessage("ok"), HumanMessage("a"), AIMessage("b"), text]
    kept = trim_messages(messages, token_counter=chat, max_tokens=cells, start_on="human", include_system=True)
    assert kept == messages[2:]


# ---------------------------------------------------------------------- runs


async def test_the_reasoner_runs_below_the_chat_model(chat: ChatLatentReasoner, picture: Image.Image) -> None:
    messages = [shows(picture, text=CIRCLE)]
    phases = ["prefill", "search", "search", "decode"]
    recorder = Recorder()
    chat.invoke(messages, {"callbacks": [recorder], "tags": ["outer"]})
    (run,) = recorder.starts
    assert run["name"] == "LatentReasoner" and run["parent_run_id"] is not None and "outer" in run["tags"]
    assert [step["phase"] for step in recorder.steps] == phases
    recorder = Recorder()
    await chat.ainvoke(messages, {"callbacks": [recorder]})
    assert [step["phase"] for step in recorder.steps] == phases


# ---------------------------------------------------------------------- LangChain's cache


@pytest.fixture
def cache() -> Iterator[InMemoryCache]:
    cache = InMemoryCache()
    set_llm_cache(cache)
    yield cache
    set_llm_cache(None)


def as_bytes(image: Image.Image) -> bytes:
    return base64.b64decode(image_block(image)["base64"])


@pytest.mark.parametrize("form", [lambda image: image, as_bytes], ids=["picture", "bytes"])
async def test_another_image_never_gets_a_cached_answer(
    chat: ChatLatentReasoner, cache: InMemoryCache, form: Callable[[Image.Image], Any]
) -> None:
    red, green = (
        ChatLatentReasoner(reasoner=chat.reasoner, image=form(draw_shapes(colour=colour)))
        for colour in ((220, 25, 25), (20, 150, 40))
    )
    assert [red.invoke(CIRCLE).content, green.invoke(CIRCLE).content] == ["red", "green"]
    assert [(await each.ainvoke(CIRCLE)).content for each in (red, green)] == ["red", "green"]
    assert [each.content for each in green.batch([CIRCLE, CIRCLE])] == ["green"] * 2
    assert not cache._cache  # what can never be found again is not kept


async def test_a_file_that_changed_never_gets_a_cached_answer(cache: InMemoryCache, tmp_path: Path) -> None:
    path = tmp_path / "shapes.png"
    reasoner = small_reasoner()
    own = ChatLatentReasoner(reasoner=reasoner, image=path, image_policy=ImagePolicy.local())
    shown = [HumanMessage([{"type": "image", "url": path.as_uri()}, {"type": "text", "text": CIRCLE}])]
    answers = []
    for colour in ((220, 25, 25), (20, 150, 40)):
        draw_shapes(colour=colour).save(path)
        answers.append([own.invoke(CIRCLE).content, own.invoke(shown).content])
        answers.append([(await own.ainvoke(CIRCLE)).content, (await own.ainvoke(shown)).content])
    assert answers == [["red"] * 2] * 2 + [["green"] * 2] * 2


async def test_a_conversation_that_holds_its_images_is_cached(
    chat: ChatLatentReasoner, cache: InMemoryCache, picture: Image.Image
) -> None:
    recorder, messages = Recorder(), [shows(picture, text=CIRCLE)]
    first = chat.invoke(messages, {"callbacks": [recorder]})
    again = [chat.invoke(messages, {"callbacks": [recorder]}), await chat.ainvoke(messages, {"callbacks": [recorder]})]
    assert [each.response_metadata for each in again] == [first.response_metadata] * 2
    assert len(recorder.starts) == 1
    other = chat.invoke([shows(draw_shapes(colour=(20, 150, 40)), text=CIRCLE)])
    assert other.content == "green"
    assert chat.invoke(messages, max_tokens=1, config={"callbacks": [recorder]}).content == "red"
    assert len(recorder.starts) == 2  # another call


def test_a_stop_text_must_not_be_empty(chat: ChatLatentReasoner, picture: Image.Image) -> None:
    with pytest.raises(SettingsError, match="empty"):
        chat.invoke([shows(picture, text=LEFT)], stop=["x", ""])
    with pytest.raises(SettingsError, match="empty"):
        ChatLatentReasoner(reasoner=chat.reasoner, stop=[""])


def test_an_answer_too_improbable_for_a_float_has_a_log_probability(chat: ChatLatentReasoner) -> None:
    tokens = [GeneratedToken(token="\ufffd", probability=p, in_answer=True) for p in [1e-9] * 100 + [0.0]]
    result = ReasoningResult(
        answer="é", raw_text="é", confidence=0.0, confidence_source="answer_probability", tokens=tokens
    )
    (piece,) = chat._reply(result, None).generations[0].message.response_metadata["logprobs"]["content"]
    assert piece["token"] == "é" and -math.inf < piece["logprob"] < 100 * math.log(1e-9)
