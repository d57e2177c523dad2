"""A LlamaIndex agent asks about a picture and goes on by the confidence."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from asked import BRANCHES, CIRCLE, GREEN, NAME, OUTSIDE, URI, decided, is_overlay, png, said, small_tool
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.agent.workflow.workflow_events import ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock, ToolCallBlock
from llama_index.core.llms.mock import MockFunctionCallingLLM

from latent_tool.integrations.llama_index import image_tool


def look(*pictures: bytes) -> ChatMessage:
    blocks = [ImageBlock(image=each, image_mimetype="image/png") for each in pictures]
    return ChatMessage(role=MessageRole.USER, blocks=[TextBlock(text="Look."), *blocks])


async def run(
    *calls: dict[str, Any], given: list[ChatMessage], threshold: float = 0.5
) -> tuple[str, list[ToolCallResult]]:
    """What an agent says whose model calls the tool as told, and what the tool has answered."""
    turns = iter(calls)

    def script(messages: list[ChatMessage], **options: Any) -> ChatMessage:
        call = next(turns, None)
        if call is None:
            return ChatMessage(role=MessageRole.ASSISTANT, content=said(str(messages[-1].content)))
        block = ToolCallBlock(tool_call_id="1", tool_name=NAME, tool_kwargs=call)
        return ChatMessage(role=MessageRole.ASSISTANT, blocks=[block])

    llm = MockFunctionCallingLLM(response_generator=script)
    agent = FunctionAgent(tools=[image_tool(small_tool(threshold))], llm=llm, streaming=False)
    handler = agent.run(user_msg=given[-1], chat_history=given[:-1])
    found = [event async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
    return str(await handler), found


@pytest.mark.parametrize(("threshold", "ends"), BRANCHES)
@pytest.mark.parametrize("image", [{}, {"image": URI}])
async def test_an_agent_goes_on_by_the_confidence(threshold: float, ends: str, image: dict[str, str]) -> None:
    words, (event,) = await run({"question": CIRCLE, **image}, given=[look(png())], threshold=threshold)
    assert words == ends
    assert decided(event.tool_output.raw_output) == ends


async def test_the_picture_is_shown_and_is_not_asked_about_itself() -> None:
    _, (first, second) = await run({"question": CIRCLE, "overlay": True}, {"question": CIRCLE}, given=[look(png())])
    text, picture = first.tool_output.blocks
    assert said(text.text) == "red" and is_overlay(base64.b64decode(picture.image))
    for event in (first, second):
        assert event.tool_output.raw_output.image_sizes == [(200, 150)]


async def test_the_newest_picture_counts() -> None:
    answer = ChatMessage(role=MessageRole.ASSISTANT, content="Yes?")
    words, _ = await run({"question": CIRCLE}, given=[look(png()), answer, look(png(GREEN))])
    assert words == "green"


async def test_errors_say_what_to_do() -> None:
    wrong = [{"question": CIRCLE, "image": OUTSIDE}, {"question": "", "image": URI}, {"image": 1}, {"question": CIRCLE}]
    _, events = await run(*wrong, given=[look()])
    parts = ("Files may not be opened", "at least 1 character", "Field required", "no image")
    for event, part in zip(events, parts, strict=True):
        assert event.tool_output.is_error and part in event.tool_output.content


async def test_files_of_image_blocks_are_not_opened() -> None:
    block = ImageBlock(path=OUTSIDE, image_mimetype="image/png")
    given = ChatMessage(role=MessageRole.USER, blocks=[TextBlock(text="Look."), block])
    _, (event,) = await run({"question": CIRCLE}, given=[given])
    assert event.tool_output.is_error and "Files may not be opened" in event.tool_output.content
