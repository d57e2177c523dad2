"""Confidence gates in graphs and agents."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from PIL import Image
from scripted_agents import CIRCLE, calls, scripted, shows, small_reasoner

from latent_tool import LatentReasoningTool, ReasoningResult
from latent_tool.errors import InputError, SettingsError
from latent_tool.integrations.langgraph import ConfidenceMiddleware, confidence_edge

pytestmark = pytest.mark.disable_socket


def scored(confidence: float | None, **fields: Any) -> ReasoningResult:
    source = "unscored" if confidence is None else "answer_probability"
    return ReasoningResult(answer="x", raw_text="x", confidence=confidence, confidence_source=source, **fields)


def test_the_edge_reads_results_and_their_plain_form() -> None:
    edge = confidence_edge("go", "stop", threshold=0.8)
    for confidence, node in ((0.8, "go"), (0.79, "stop"), (None, "stop")):
        assert edge({"result": scored(confidence)}) == node
        assert edge({"result": scored(confidence).model_dump(mode="json")}) == node
    decided = confidence_edge("go", "stop", key="seen")
    assert decided({"seen": scored(0.1, accepted=True)}) == "go"
    assert decided({"seen": scored(0.9, accepted=False)}) == "stop"


def test_an_edge_without_a_result_or_a_decision() -> None:
    for state in ({}, {"result": None}, {"result": "red"}):
        with pytest.raises(InputError, match="no result under 'result'"):
            confidence_edge("go", "stop", threshold=0.5)(state)
    with pytest.raises(InputError, match="Nothing has decided"):
        confidence_edge("go", "stop")({"result": scored(0.5)})
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(SettingsError):
            confidence_edge("go", "stop", threshold=threshold)
        with pytest.raises(SettingsError):
            ConfidenceMiddleware(threshold=threshold)


def agent_reply(middleware: ConfidenceMiddleware, picture: Image.Image, run_async: bool = False) -> ToolMessage:
    """What an agent with this middleware reads after one call of the tool."""
    tool = LatentReasoningTool(reasoner=small_reasoner(budget={"iterations": 0, "max_candidates": 12}))
    model = scripted(calls({"question": CIRCLE}), AIMessage("Done."))
    agent = create_agent(model, tools=[tool], middleware=[middleware], checkpointer=InMemorySaver())
    given, config = {"messages": [shows(picture)]}, {"configurable": {"thread_id": "1"}}
    state = asyncio.run(agent.ainvoke(given, config)) if run_async else agent.invoke(given, config)
    (message,) = (each for each in state["messages"] if isinstance(each, ToolMessage))
    return message


@pytest.mark.parametrize("run_async", [False, True])
def test_a_sure_answer_is_left_alone(picture: Image.Image, run_async: bool) -> None:
    message = agent_reply(ConfidenceMiddleware(threshold=0.9), picture, run_async)
    assert [step["decision"] for step in message.artifact["route"]] == ["accepted"]
    assert "NOT RELIABLE" not in message.content and message.artifact["accepted"] is True


@pytest.mark.parametrize("run_async", [False, True])
def test_an_unsure_answer_gets_more_budget_and_then_another_model(picture: Image.Image, run_async: bool) -> None:
    strong = scripted(AIMessage("crimson"))
    message = agent_reply(ConfidenceMiddleware(threshold=1.0, fallback=strong), picture, run_async)
    route = [(step["rung"], step["name"], step["decision"]) for step in message.artifact["route"]]
    assert route == [(0, "the agent's own budget", "unsure"), (1, "thorough", "unsure"), (2, "Scripted", "accepted")]
    assert message.content.startswith("Answer: crimson\nConfidence: not measured.")


def test_without_another_model_it_is_marked(picture: Image.Image) -> None:
    message = agent_reply(ConfidenceMiddleware(threshold=1.0, budgets=("quick", "thorough")), picture)
    assert [step["name"] for step in message.artifact["route"]][1:] == ["quick", "thorough"]
    assert "NOT RELIABLE: the confidence is below the threshold of 1.00" in message.content
    assert message.artifact["abstained"] is True
    best = max(step["confidence"] for step in message.artifact["route"])
    assert message.artifact["confidence"] == best


def test_errors_and_other_tools_pass_through(picture: Image.Image) -> None:
    tool = LatentReasoningTool(reasoner=small_reasoner())

    def clock() -> str:
        """The time."""
        return "noon"

    turn = AIMessage(
        "",
        tool_calls=[
            {"name": "clock", "args": {}, "id": "1"},
            {"name": tool.name, "args": {"question": CIRCLE, "image": "x.png"}, "id": "2"},
        ],
    )
    agent = create_agent(
        scripted(turn, AIMessage("Done.")), tools=[tool, clock], middleware=[ConfidenceMiddleware(threshold=1.0)]
    )
    messages = agent.invoke({"messages": [shows(picture)]})["messages"]
    noon, failed = (each for each in messages if isinstance(each, ToolMessage))
    assert noon.content == "noon" and failed.status == "error" and failed.artifact is None
