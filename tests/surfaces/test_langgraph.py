"""Confidence gates in graphs and agents."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware.types import ToolCallRequest
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from PIL import Image
from scripted_agents import CIRCLE, calls, scripted, shows, small_reasoner

from latent_tool import ImagePolicy, LatentReasoningTool, ReasoningResult
from latent_tool.cannot_tell import CANNOT_TELL_REASON
from latent_tool.errors import ImageNotAllowedError, InputError, SettingsError
from latent_tool.integrations.langgraph import ConfidenceMiddleware, confidence_edge, reasoning_node
from latent_tool.langchain.messages import image_block

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


class Looking(TypedDict, total=False):
    """State of a graph that looks, and then answers or asks a person."""

    question: str
    image: Any
    messages: list[Any]
    result: Any
    said: str


def looking(threshold: float, **node: Any) -> Any:
    graph = StateGraph(Looking)
    graph.add_node("look", reasoning_node(small_reasoner(), **node))
    graph.add_node("report", lambda state: {"said": state["result"]["answer"]})
    graph.add_node("ask_a_person", lambda state: {"said": "Who knows?"})
    graph.add_edge(START, "look")
    graph.add_conditional_edges("look", confidence_edge("report", "ask_a_person", threshold=threshold))
    graph.add_edge("report", END)
    graph.add_edge("ask_a_person", END)
    return graph.compile(checkpointer=InMemorySaver())


@pytest.mark.parametrize("run_async", [False, True])
@pytest.mark.parametrize(("threshold", "said"), [(0.5, "red"), (1.0, "Who knows?")])
def test_a_graph_looks_and_goes_on_by_the_confidence(
    picture: Image.Image, threshold: float, said: str, run_async: bool
) -> None:
    block = image_block(picture)
    for state in (
        {"question": CIRCLE, "image": block},
        {"question": CIRCLE, "image": [block]},
        {"messages": [shows(picture, text=CIRCLE)]},
    ):
        graph, config = looking(threshold), {"configurable": {"thread_id": "1"}}
        end = asyncio.run(graph.ainvoke(state, config)) if run_async else graph.invoke(state, config)
        assert end["said"] == said
        assert ReasoningResult.model_validate(graph.get_state(config).values["result"]).answer == "red"


def test_a_node_tells_its_steps_and_opens_what_is_allowed(picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    state, config = {"question": CIRCLE, "image": str(tmp_path / "a.png")}, {"configurable": {"thread_id": "1"}}
    with pytest.raises(ImageNotAllowedError):
        looking(0.5).invoke(state, config)
    allowed = looking(0.5, image_policy=ImagePolicy.untrusted(folders=(tmp_path,)))
    steps = [each["latent_step"]["phase"] for each in allowed.stream(state, config, stream_mode="custom")]
    assert steps[0] == "prefill" and steps[-1] == "decode"
    for wrong in ({"question": CIRCLE}, {"image": "x"}, {}):
        with pytest.raises(InputError):
            looking(0.5).invoke(wrong, config)


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


# ---------------------------------------------------------------------- what fails destroys no answer


def broken(request: Any) -> Any:
    raise ZeroDivisionError("secret address")


@pytest.mark.parametrize("run_async", [False, True])
@pytest.mark.parametrize("fallback", [broken, scripted(AIMessage("", response_metadata={"finish_reason": "error"}))])
def test_a_fallback_that_fails_leaves_the_tools_answer(picture: Image.Image, fallback: Any, run_async: bool) -> None:
    message = agent_reply(ConfidenceMiddleware(threshold=1.0, budgets=(), fallback=fallback), picture, run_async)
    assert (message.artifact["answer"], message.artifact["accepted"]) == ("red", False)
    assert "NOT RELIABLE" in message.content and "secret" not in str(message.artifact)
    first, failed = message.artifact["route"]
    assert (first["decision"], failed["decision"]) == ("unsure", "failed") and "RungError" in failed["reason"]


def test_a_picture_that_only_the_tool_may_open_leaves_the_tools_answer(picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    tool = LatentReasoningTool(
        reasoner=small_reasoner(iterations=0), image_policy=ImagePolicy.untrusted(folders=(tmp_path,))
    )
    model = scripted(calls({"question": CIRCLE, "image": str(tmp_path / "a.png")}), AIMessage("Done."))
    middleware = ConfidenceMiddleware(threshold=1.0, budgets=(), fallback=scripted(AIMessage("crimson")))
    agent = create_agent(model, tools=[tool], middleware=[middleware])
    (message,) = (
        each for each in agent.invoke({"messages": [("human", "Look.")]})["messages"] if isinstance(each, ToolMessage)
    )
    assert message.artifact["answer"] == "red" and message.artifact["accepted"] is False
    assert "ImageNotAllowedError" in message.artifact["route"][-1]["reason"]


def tool_calls(middleware: ConfidenceMiddleware, picture: Image.Image, *replies: Any) -> Any:
    """What the middleware makes of these replies of the tool and of the fallback."""
    call = {"name": "ask_about_image", "args": {"question": CIRCLE}, "id": "1"}
    request = ToolCallRequest(tool_call=call, tool=None, state={"messages": [shows(picture)]}, runtime=None)
    asked = middleware._calls(request)
    step, given = next(asked), []
    for reply in replies:
        given.append(step)
        try:
            step = asked.send(reply)
        except StopIteration as end:
            return end.value, given
    raise AssertionError(f"it asks once more: {step}")


def said(answer: str, confidence: float, **fields: Any) -> ToolMessage:
    result = scored(confidence).model_copy(update={"answer": answer, **fields})
    return ToolMessage(answer, tool_call_id="1", artifact=result.model_dump(mode="json"))


def test_an_answer_that_cannot_be_accepted_does_not_win_by_its_confidence(picture: Image.Image) -> None:
    untold = said("cannot tell", 0.95, accepted=False, abstained=True, abstain_reason=CANNOT_TELL_REASON)
    message, _ = tool_calls(ConfidenceMiddleware(threshold=0.8), picture, untold, said("blue", 0.9))
    assert message.artifact["answer"] == "blue" and message.artifact["accepted"]
    assert message.artifact["route"][0]["reason"] == CANNOT_TELL_REASON


def test_the_fallback_is_held_to_what_the_tool_was_held_to(picture: Image.Image) -> None:
    middleware = ConfidenceMiddleware(threshold=0.8, budgets=(), fallback=scripted(AIMessage("x")))
    strict = said("red", 0.9, accepted=False, abstained=True, min_confidence=0.95)
    _, given = tool_calls(middleware, picture, strict, scored(0.85, accepted=False, abstained=True))
    assert given[1].min_confidence == 0.95


def test_a_reply_that_cannot_be_gated_is_no_answer(picture: Image.Image) -> None:
    foreign = ToolMessage("red", tool_call_id="1", artifact={"structured_content": {"confidence": 0.01}})
    message, _ = tool_calls(ConfidenceMiddleware(), picture, foreign)
    assert message.status == "error" and "red" not in message.content


def test_wrong_middleware_is_refused_when_it_is_made() -> None:
    for wrong in (
        {"budgets": ("turbo",)},
        {"budgets": "turbo"},
        {"budgets": (3,)},
        {"budgets": ("quick", None)},
        {"threshold": "0.8"},
        {"threshold": True},
        {"fallback": 7},
    ):
        with pytest.raises(SettingsError):
            ConfidenceMiddleware(**wrong)
    assert ConfidenceMiddleware(budgets="quick").budgets == ("quick",)


def test_no_search_is_repeated(picture: Image.Image) -> None:
    tool = LatentReasoningTool(reasoner=small_reasoner(budget={"iterations": 0, "max_candidates": 12}))
    model = scripted(calls({"question": CIRCLE, "budget": "thorough"}), AIMessage("Done."))
    agent = create_agent(model, tools=[tool], middleware=[ConfidenceMiddleware(threshold=1.0)])
    (message,) = (
        each for each in agent.invoke({"messages": [shows(picture)]})["messages"] if isinstance(each, ToolMessage)
    )
    assert len(message.artifact["route"]) == 1
    assert "NOT RELIABLE" in message.content and "thorough" not in message.content


def test_the_stricter_of_two_thresholds_decides(picture: Image.Image) -> None:
    tool = LatentReasoningTool(reasoner=small_reasoner(iterations=0), min_confidence=1.0)
    agent = create_agent(
        scripted(calls({"question": CIRCLE}), AIMessage("Done.")),
        tools=[tool],
        middleware=[ConfidenceMiddleware(threshold=0.1, budgets=())],
    )
    (message,) = (
        each for each in agent.invoke({"messages": [shows(picture)]})["messages"] if isinstance(each, ToolMessage)
    )
    assert (message.artifact["accepted"], message.artifact["min_confidence"]) == (False, 1.0)
    assert confidence_edge("go", "stop", threshold=0.5)({"result": scored(0.9, accepted=False)}) == "stop"


def test_steps_of_two_calls_can_be_told_apart(picture: Image.Image) -> None:
    tool = LatentReasoningTool(reasoner=small_reasoner(iterations=0))
    model = scripted(calls({"question": CIRCLE}, {"question": "what color is the square?"}), AIMessage("Done."))
    steps = list(create_agent(model, tools=[tool]).stream({"messages": [shows(picture)]}, stream_mode="custom"))
    assert {each["tool_call_id"] for each in steps} == {"0", "1"}
    assert len({(each["tool_call_id"], each["run_id"]) for each in steps}) == 2
