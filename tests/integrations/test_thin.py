"""Agents of Google's ADK, AG2 and AutoGen ask about a picture and go on by the confidence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from ag2 import Agent as Ag2Agent
from ag2.events import ToolCallEvent, ToolResultsEvent
from ag2.testing import TestConfig as Ag2Script
from asked import BRANCHES, CIRCLE, NAME, OUTSIDE, UNSURE, URI, decided, is_overlay, png, said, small_tool
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import ToolCallExecutionEvent
from autogen_core import CancellationToken, FunctionCall
from autogen_core.models import CreateResult, ModelFamily, RequestUsage
from autogen_ext.models.replay import ReplayChatCompletionClient
from google.adk.agents import LlmAgent
from google.adk.models.base_llm import BaseLlm
from google.adk.models.llm_request import LlmRequest
from google.adk.models.llm_response import LlmResponse
from google.adk.runners import InMemoryRunner
from google.genai import types

from latent_tool.integrations.ag2 import RESULT_KEY
from latent_tool.integrations.ag2 import image_tool as ag2_tool
from latent_tool.integrations.autogen import AskAboutImage as AutogenTool
from latent_tool.integrations.google_adk import STATE_KEY
from latent_tool.integrations.google_adk import AskAboutImage as AdkTool
from latent_tool.langchain.image_tool import ImageTool

WRONG = [{"question": CIRCLE, "image": OUTSIDE}, {"question": "", "image": URI}, {"question": CIRCLE}]
FOUND = ["Files may not be opened", "at least 1 character"]

# --- Google ADK -------------------------------------------------------------------------------------------------------


class Scripted(BaseLlm):
    """Calls the tool as told, then says what it has read."""

    model: str = "scripted"
    calls: list[dict[str, Any]]

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        assert list(llm_request.tools_dict) == [NAME]
        if self.calls:
            call = types.FunctionCall(name=NAME, args=self.calls.pop(0))
            part = types.Part(function_call=call)
        else:
            read = llm_request.contents[-1].parts[-1].function_response.response
            part = types.Part(text=read.get("error") or (read["answer"] if read["accepted"] else UNSURE))
        yield LlmResponse(content=types.Content(role="model", parts=[part]))


async def adk(
    *calls: dict[str, Any], tool: ImageTool, picture: bytes | None = None
) -> tuple[str, Any, list[str], list[Any]]:
    """The agent's last words, its state, its artifacts, and what the tool has answered."""
    agent = LlmAgent(name="looker", model=Scripted(calls=list(calls)), tools=[AdkTool(tool)])
    runner = InMemoryRunner(agent, app_name="app")
    session = await runner.session_service.create_session(app_name="app", user_id="u")
    parts = [types.Part(text="Look.")]
    if picture is not None:
        parts.append(types.Part.from_bytes(data=picture, mime_type="image/png"))
    message = types.Content(role="user", parts=parts)
    events = [each async for each in runner.run_async(user_id="u", session_id=session.id, new_message=message)]
    kept = await runner.session_service.get_session(app_name="app", user_id="u", session_id=session.id)
    names = await runner.artifact_service.list_artifact_keys(app_name="app", user_id="u", session_id=session.id)
    if names:
        part = await runner.artifact_service.load_artifact(
            app_name="app", user_id="u", session_id=session.id, filename=names[0]
        )
        assert is_overlay(part.inline_data.data)
    replies = [each.response for event in events for each in event.get_function_responses()]
    return events[-1].content.parts[0].text, kept.state.get(STATE_KEY), names, replies


@pytest.mark.parametrize(("threshold", "ends"), BRANCHES)
@pytest.mark.parametrize("image", [{}, {"image": URI}])
async def test_adk(threshold: float, ends: str, image: dict[str, str]) -> None:
    words, state, names, _ = await adk({"question": CIRCLE, **image}, tool=small_tool(threshold), picture=png())
    assert words == ends and decided(state) == ends and names == []


async def test_adk_keeps_the_picture_as_an_artifact() -> None:
    _, state, names, _ = await adk(
        {"question": CIRCLE, "overlay": True}, {"question": CIRCLE}, tool=small_tool(), picture=png()
    )
    assert names == ["overlay-0.png"] and state["image_sizes"] == [[200, 150]]


async def test_adk_errors_say_what_to_do() -> None:
    *_, replies = await adk(*WRONG, tool=small_tool())
    for reply, part in zip(replies, [*FOUND, "no image"], strict=True):
        assert part in reply["error"]


# --- AG2 --------------------------------------------------------------------------------------------------------------


async def ag2(*calls: dict[str, Any], tool: ImageTool) -> list[Any]:
    """What the tool has answered."""
    turns = [ToolCallEvent(name=NAME, arguments=json.dumps(call)) for call in calls]
    agent = Ag2Agent("looker", config=Ag2Script(*turns, "Done."), tools=[ag2_tool(tool)])
    reply = await agent.ask("Look.")
    assert reply.body == "Done."
    events = [each for each in await reply.history.get_events() if isinstance(each, ToolResultsEvent)]
    return [each for event in events for each in event.results]


@pytest.mark.parametrize(("threshold", "ends"), BRANCHES)
async def test_ag2(threshold: float, ends: str) -> None:
    (reply,) = await ag2({"question": CIRCLE, "image": URI, "overlay": True}, tool=small_tool(threshold))
    text, picture = reply.result.parts
    assert said(text.content) == ends and is_overlay(picture.data)
    assert decided(reply.result.metadata[RESULT_KEY]) == ends


async def test_ag2_errors_say_what_to_do() -> None:
    replies = await ag2(*WRONG[:2], tool=small_tool())
    for reply, part in zip(replies, FOUND, strict=True):
        assert reply.result.parts[0].content.startswith("Error: ") and part in reply.result.parts[0].content


# --- AutoGen ----------------------------------------------------------------------------------------------------------


async def autogen(call: dict[str, Any], tool: ImageTool) -> tuple[Any, bool]:
    """What the tool has answered, and whether it was an error."""
    calls = [FunctionCall(id="1", name=NAME, arguments=json.dumps(call))]
    usage = RequestUsage(prompt_tokens=1, completion_tokens=1)
    turn = CreateResult(finish_reason="function_calls", content=calls, usage=usage, cached=False)
    client = ReplayChatCompletionClient(
        [turn, "Done."],
        model_info={
            "vision": True,
            "function_calling": True,
            "json_output": True,
            "family": ModelFamily.UNKNOWN,
            "structured_output": True,
        },
    )
    agent = AssistantAgent("looker", model_client=client, tools=[AutogenTool(tool)], reflect_on_tool_use=True)
    run = await agent.run(task="Look.")
    assert run.messages[-1].content == "Done."
    (event,) = (each for each in run.messages if isinstance(each, ToolCallExecutionEvent))
    return event.content[0].content, event.content[0].is_error


@pytest.mark.parametrize(("threshold", "ends"), BRANCHES)
async def test_autogen(threshold: float, ends: str) -> None:
    content, failed = await autogen({"question": CIRCLE, "image": URI}, small_tool(threshold))
    brief = json.loads(content)
    assert not failed and (brief["answer"] if brief["confidence"] >= threshold else UNSURE) == ends
    assert brief["accepted"] is (ends != UNSURE) and said(brief["advice"]) == ends


async def test_autogen_errors_say_what_to_do() -> None:
    for call, part in zip(WRONG[:2], FOUND, strict=True):
        content, failed = await autogen(call, small_tool())
        assert failed and part in content


async def test_autogen_stops_the_search() -> None:
    token = CancellationToken()
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await AutogenTool(small_tool()).run_json({"question": CIRCLE, "image": URI}, token)
