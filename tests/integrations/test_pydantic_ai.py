"""A Pydantic AI agent asks about a picture and goes on by the confidence."""

from __future__ import annotations

from typing import Any

import pytest
from asked import BRANCHES, CIRCLE, GREEN, NAME, OUTSIDE, URI, decided, is_overlay, png, said, small_tool
from pydantic_ai import Agent, BinaryContent
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_core import to_json

from latent_tool.integrations.pydantic_ai import image_tool

pytestmark = pytest.mark.disable_socket
SEEN = BinaryContent(png(), media_type="image/png")


def agent(*calls: dict[str, Any], threshold: float = 0.5) -> Agent[None, str]:
    """An agent whose model calls the tool as told, and then says what it has read."""
    turns = iter(calls)

    def script(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        assert [tool.name for tool in info.function_tools] == [NAME]
        call = next(turns, None)
        if call is not None:
            return ModelResponse(parts=[ToolCallPart(NAME, call)])
        return ModelResponse(parts=[TextPart(said(str(returned(messages)[-1].content)) or "Done.")])

    return Agent(FunctionModel(script), tools=[image_tool(small_tool(threshold))])


def returned(messages: list[ModelMessage]) -> list[ToolReturnPart]:
    return [part for message in messages for part in message.parts if isinstance(part, ToolReturnPart)]


@pytest.mark.parametrize(("threshold", "ends"), BRANCHES)
@pytest.mark.parametrize("image", [{}, {"image": URI}])
def test_an_agent_goes_on_by_the_confidence(threshold: float, ends: str, image: dict[str, str]) -> None:
    run = agent({"question": CIRCLE, **image}, threshold=threshold).run_sync(["Look.", SEEN])
    assert run.output == ends
    (reply,) = returned(run.all_messages())
    assert decided(reply.metadata) == ends
    assert run.all_messages_json() and to_json(reply.metadata)


async def test_the_picture_follows_and_is_not_asked_about_itself() -> None:
    asking = agent({"question": CIRCLE, "overlay": True}, {"question": CIRCLE})
    messages = (await asking.run(["Look.", SEEN])).all_messages()
    shown = [
        item
        for message in messages
        for part in message.parts
        if isinstance(part, UserPromptPart) and not isinstance(part.content, str)
        for item in part.content
        if isinstance(item, BinaryContent)
    ]
    assert len(shown) == 2 and is_overlay(shown[1].data)
    first, second = returned(messages)
    assert first.metadata["image_sizes"] == second.metadata["image_sizes"] == [[200, 150]]


async def test_the_newest_picture_counts() -> None:
    asking = agent({"question": CIRCLE})
    history = (
        await Agent(FunctionModel(lambda m, i: ModelResponse(parts=[TextPart("ok")]))).run([SEEN])
    ).all_messages()
    green = BinaryContent(png(GREEN), media_type="image/png")
    assert (await asking.run(["And this?", green], message_history=history)).output == "green"


def test_errors_say_what_to_do() -> None:
    run = agent(
        {"question": CIRCLE, "image": OUTSIDE}, {"question": "", "image": URI}, {"image": 1}, {"question": CIRCLE}
    )
    messages = run.run_sync("Look.").all_messages()
    texts = [str(each.content) for each in returned(messages)]
    for text, part in zip(
        texts, ("Files may not be opened", "at least 1 character", "Field required", "no image"), strict=True
    ):
        assert part in text
