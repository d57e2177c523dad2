"""A Haystack agent asks about a picture and goes on by the confidence."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest
from asked import BRANCHES, CIRCLE, GREEN, NAME, OUTSIDE, URI, base64_png, decided, is_overlay, png, said, small_tool
from haystack.components.agents import Agent
from haystack.components.generators.chat import MockChatGenerator
from haystack.dataclasses import ChatMessage, ImageContent, TextContent, ToolCall, ToolCallResult

from latent_tool import ReasoningResult
from latent_tool.integrations.haystack import image_tool

pytestmark = pytest.mark.disable_socket


def look(*pictures: str) -> ChatMessage:
    images = [ImageContent(each, mime_type="image/png") for each in pictures]
    return ChatMessage.from_user(content_parts=["Look.", *images])


def run(
    *calls: dict[str, Any], given: list[ChatMessage], threshold: float = 0.5, run_async: bool = False
) -> tuple[dict[str, Any], list[ToolCallResult]]:
    """The end of an agent whose model calls the tool as told, and what the tool has answered."""
    turns = [
        ChatMessage.from_assistant(tool_calls=[ToolCall(tool_name=NAME, arguments=call, id=str(number))])
        for number, call in enumerate(calls)
    ]
    agent = Agent(
        chat_generator=MockChatGenerator(responses=[*turns, "Done."]),
        tools=[image_tool(small_tool(threshold), state_key="look")],
        state_schema={"look": {"type": ReasoningResult}},
    )
    end = asyncio.run(agent.run_async(messages=given)) if run_async else agent.run(messages=given)
    return end, [each for message in end["messages"] for each in message.tool_call_results]


@pytest.mark.parametrize("run_async", [False, True])
@pytest.mark.parametrize(("threshold", "ends"), BRANCHES)
@pytest.mark.parametrize("image", [{}, {"image": URI}])
def test_an_agent_goes_on_by_the_confidence(
    threshold: float, ends: str, image: dict[str, str], run_async: bool
) -> None:
    end, (reply,) = run(
        {"question": CIRCLE, **image}, given=[look(base64_png())], threshold=threshold, run_async=run_async
    )
    (text,) = reply.result
    assert isinstance(text, TextContent) and said(text.text) == ends
    assert decided(end["look"]) == ends


def test_the_picture_is_shown_and_is_not_asked_about_itself() -> None:
    end, (first, _) = run({"question": CIRCLE, "overlay": True}, {"question": CIRCLE}, given=[look(base64_png())])
    _, picture = first.result
    assert isinstance(picture, ImageContent) and is_overlay(base64.b64decode(picture.base64_image))
    assert end["look"].image_sizes == [(200, 150)]


def test_the_newest_picture_counts() -> None:
    green = base64.b64encode(png(GREEN)).decode()
    end, _ = run({"question": CIRCLE}, given=[look(base64_png()), ChatMessage.from_assistant("Yes?"), look(green)])
    assert end["look"].answer == "green"


def test_errors_say_what_to_do() -> None:
    wrong = [{"question": CIRCLE, "image": OUTSIDE}, {"question": "", "image": URI}, {"image": 1}, {"question": CIRCLE}]
    _, replies = run(*wrong, given=[look()])
    parts = ("Files may not be opened", "at least 1 character", "Field required", "no image")
    for reply, part in zip(replies, parts, strict=True):
        assert reply.error and part in str(reply.result)


def test_without_a_key_nothing_is_kept() -> None:
    assert image_tool(small_tool()).outputs_to_state is None
