"""Agents of smolagents, calling tools and writing code, ask about a picture and go on by the confidence."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from asked import BRANCHES, CIRCLE, NAME, OUTSIDE, UNSURE, URI, decided, is_overlay, png, said, small_tool
from PIL import Image
from smolagents import ChatMessage, CodeAgent, MessageRole, Model, ToolCallingAgent
from smolagents.models import ChatMessageToolCall, ChatMessageToolCallFunction

from latent_tool.errors import InputError
from latent_tool.integrations.smolagents import image_tools

pytestmark = pytest.mark.disable_socket
CODE = f"""r = {NAME}(image=picture, question="{CIRCLE}")
final_answer(r["answer"] if r["accepted"] and r["confidence"] >= threshold else "{UNSURE}")"""


class Scripted(Model):
    """Says what it is told to say; a function is called with what the agent has seen last."""

    def __init__(self, *turns: Any) -> None:
        super().__init__(model_id="scripted")
        self.turns = iter(turns)

    def generate(self, messages: list[ChatMessage], *positional: Any, **named: Any) -> ChatMessage:
        turn = next(self.turns)
        return turn(str(messages[-1].content)) if callable(turn) else turn


def calls(name: str, **arguments: Any) -> ChatMessage:
    function = ChatMessageToolCallFunction(name=name, arguments=arguments)
    call = ChatMessageToolCall(id="1", type="function", function=function)
    return ChatMessage(role=MessageRole.ASSISTANT, content="", tool_calls=[call])


def picture() -> Image.Image:
    return Image.open(io.BytesIO(png()))


@pytest.mark.parametrize(("threshold", "ends"), BRANCHES)
def test_an_agent_that_writes_code(threshold: float, ends: str) -> None:
    ask, show = image_tools(small_tool(threshold))
    model = Scripted(ChatMessage(role=MessageRole.ASSISTANT, content=f"Thought: look\n<code>\n{CODE}\n</code>"))
    agent = CodeAgent(tools=[ask, show], model=model, verbosity_level=0)
    assert agent.run("Look.", additional_args={"picture": picture(), "threshold": threshold}) == ends
    assert ask.last is not None and decided(ask.last.data) == ends


@pytest.mark.parametrize(("threshold", "ends"), BRANCHES)
@pytest.mark.parametrize("image", ["picture", URI])
def test_an_agent_that_calls_tools(threshold: float, ends: str, image: str) -> None:
    ask, _ = image_tools(small_tool(threshold))
    model = Scripted(
        calls(NAME, image=image, question=CIRCLE),
        lambda seen: calls("final_answer", answer=UNSURE if "NOT RELIABLE" in seen else "red"),
    )
    agent = ToolCallingAgent(tools=[ask], model=model, verbosity_level=0)
    assert agent.run("Look.", additional_args={"picture": picture()}) == ends
    assert ask.last is not None and said(ask.last.text) == ends


def test_the_evidence_is_shown() -> None:
    ask, show = image_tools(small_tool())
    code = f'{NAME}(image=picture, question="{CIRCLE}")\nfinal_answer(show_evidence())'
    model = Scripted(ChatMessage(role=MessageRole.ASSISTANT, content=f"Thought: look\n<code>\n{code}\n</code>"))
    shown = CodeAgent(tools=[ask, show], model=model, verbosity_level=0).run(
        "Look.", additional_args={"picture": picture()}
    )
    stream = io.BytesIO()
    shown.to_raw().save(stream, "PNG") if hasattr(shown, "to_raw") else shown.save(stream, "PNG")
    assert is_overlay(stream.getvalue())


def test_where_no_pictures_are_returned_questions_are_answered_all_the_same() -> None:
    ask, show = image_tools(small_tool().but(allow_overlay=False))
    assert ask(image=picture(), question=CIRCLE)["answer"] == "red"
    assert ask.last is not None and ask.last.pictures == ()
    with pytest.raises(InputError, match="not returned"):
        show()


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    ask, show = image_tools(small_tool())
    seen: list[str] = []

    def note(then: ChatMessage) -> Any:
        return lambda text: seen.append(text) or then

    model = Scripted(
        calls("show_evidence"),
        note(calls(NAME, image=OUTSIDE, question=CIRCLE)),
        note(calls(NAME, image=URI, question="")),
        note(calls(NAME, image=URI, question=CIRCLE, budget="huge")),
        note(calls("final_answer", answer="none")),
    )
    agent = ToolCallingAgent(tools=[ask, show], model=model, verbosity_level=0)
    assert agent.run("Look.") == "none"
    parts = ("Nothing has been answered", "Files may not be opened", "at least 1 character", "'quick', 'standard'")
    for text, part in zip(seen, parts, strict=True):
        assert part in text
