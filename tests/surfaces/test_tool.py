"""LatentReasoningTool: what the agent's model reads, what code gets, and real agents that use it."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from pictures import draw_shapes
from PIL import Image
from scripted_agents import CIRCLE, SQUARE, calls, scripted, shows, small_reasoner
from tiny_checkpoints import checkpoint

from latent_tool import (
    Budget,
    ConfidenceRouter,
    ImagePolicy,
    LatentReasoner,
    LatentReasoningTool,
    Patch,
    ReasoningRequest,
    ReasoningResult,
)
from latent_tool.errors import (
    DeadlineError,
    ImageNotAllowedError,
    ImageTooLargeError,
    ModelNotFoundError,
    SettingsError,
)
from latent_tool.langchain.image_tool import ImageTool, ToolReply, describe
from latent_tool.langchain.messages import image_block

pytestmark = pytest.mark.disable_socket


@pytest.fixture
def tool() -> LatentReasoningTool:
    return LatentReasoningTool(reasoner=small_reasoner())


def data_uri(image: Image.Image) -> str:
    return "data:image/png;base64," + str(image_block(image)["base64"])


def call(tool: LatentReasoningTool, **arguments: Any) -> ToolMessage:
    message = tool.invoke({"name": tool.name, "args": arguments, "id": "1", "type": "tool_call"})
    assert isinstance(message, ToolMessage)
    return message


def test_the_model_sees_five_arguments_with_descriptions(tool: LatentReasoningTool) -> None:
    schema = tool.tool_call_schema.model_json_schema()
    assert set(schema["properties"]) == {"question", "image", "options", "budget", "overlay"}
    assert schema["required"] == ["question"]
    assert all(field["description"] for field in schema["properties"].values())
    assert "confidence" in tool.description


def test_content_for_the_model_and_artifact_for_code(tool: LatentReasoningTool, picture: Image.Image) -> None:
    message = call(tool, question=CIRCLE, image=data_uri(picture))
    assert message.status == "success"
    assert message.content.startswith("Answer: red\nConfidence: high, 1.00 of 1 (pooled_probability).\nEvidence: ")
    assert "NOT RELIABLE" not in message.content
    assert json.loads(json.dumps(message.artifact)) == message.artifact
    result = ReasoningResult.model_validate(message.artifact)
    assert result.answer == "red" and result.accepted is True and result.min_confidence == 0.5
    # Without a tool call there is the content alone.
    assert tool.invoke({"question": CIRCLE, "image": data_uri(picture)}) == message.content


def test_below_the_threshold_it_says_so_and_what_to_do(picture: Image.Image) -> None:
    tool = LatentReasoningTool(reasoner=small_reasoner(), min_confidence=1.0)
    message = call(tool, question=CIRCLE, image=data_uri(picture))
    assert "NOT RELIABLE: the confidence is below the threshold of 1.00" in message.content
    assert "budget='thorough'" in message.content
    assert message.artifact["accepted"] is False


def test_the_embedded_model_says_what_it_is() -> None:
    result = ReasoningResult(
        answer="red", raw_text="red", confidence=0.4, confidence_source="reward", accepted=False, model="embedded"
    )
    advice = describe(result).partition("Do not state this answer as a fact. ")[2]
    assert advice.startswith("The embedded model is a small model of synthetic scenes; ")
    assert describe(result).count("synthetic scenes") == 1
    sure = result.model_copy(update={"accepted": True})
    assert describe(sure).endswith(
        "Note: The embedded model is a small model of synthetic scenes; for other pictures "
        "the developer should name a real one."
    )
    assert "synthetic" not in describe(result.model_copy(update={"model": "Qwen/Qwen2.5-VL-7B-Instruct"}))


def test_an_image_that_the_model_s_processor_refuses_is_for_the_agent_to_mend() -> None:
    """Too thin for the family's processors: the agent reads what to do about it, and its run goes on."""
    reasoner = LatentReasoner(model=str(checkpoint("qwen2_5_vl")), budget=Budget(iterations=0, max_new_tokens=1))
    message = call(
        LatentReasoningTool(reasoner=reasoner), question=CIRCLE, image=data_uri(Image.new("RGB", (4000, 10)))
    )
    assert message.status == "error"
    assert "4000 x 10" in message.content and "Crop" in message.content


def test_the_description_of_a_result() -> None:
    def patch(rank: int, image: int = 0) -> Patch:
        box = (10.0 * rank, 0.0, 10.0 * rank + 10, 10.0)
        return Patch(rank=rank, image=image, cell=rank, box=box, attention=0.1, gain=0.01, latent=0)

    result = ReasoningResult(
        answer="",
        raw_text="",
        confidence=None,
        confidence_source="unscored",
        patches=[patch(i) for i in range(7)],
        image_sizes=[(200, 150)],
        warnings=["The picture was cut."],
    )
    assert describe(result) == (
        "Answer: (none)\nConfidence: not measured.\n"
        "Evidence: regions (left, top, right, bottom) in pixels of 200 x 150: "
        "(0, 0, 10, 10); (10, 0, 20, 10); (20, 0, 30, 10); (30, 0, 40, 10); (40, 0, 50, 10), and 2 more.\n"
        "Note: The picture was cut."
    )
    two = result.model_copy(update={"patches": [patch(1, image=1)], "image_sizes": [(200, 150), (9, 9)]})
    assert "200 x 150, 9 x 9: image 2 (10, 0, 20, 10)." in describe(two)
    for confidence, words in ((0.95, "high, 0.95"), (0.7, "moderate, 0.70"), (0.1, "low, 0.10")):
        scored = result.model_copy(update={"confidence": confidence, "confidence_source": "calibrated"})
        assert f"Confidence: {words} of 1 (calibrated)." in describe(scored)


def test_the_overlay_comes_as_an_image_block(tool: LatentReasoningTool, picture: Image.Image) -> None:
    message = call(tool, question=CIRCLE, image=data_uri(picture), overlay=True)
    text, block = message.content
    assert text["type"] == "text" and text["text"].startswith("Answer: red")
    drawn = Image.open(io.BytesIO(base64.b64decode(block["base64"])))
    assert drawn.format == "PNG" and drawn.width > picture.width


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"question": CIRCLE}, "Name one with the argument 'image'"),
        ({"question": CIRCLE, "image": "/etc/hostname"}, "Files may not be opened here"),
        ({"question": CIRCLE, "image": "https://example.org/a.png"}, "Downloads are not allowed"),
        ({"question": CIRCLE, "image": "data:image/png;base64,AAAA"}, "not an image"),
        ({"question": ""}, "question: String should have at least 1 character. Give 'question'"),
        ({"image": "x"}, "question: Field required. Give 'question' as text"),
        ({"question": CIRCLE, "budget": "huge"}, "budget: Input should be 'quick', 'standard' or 'thorough'"),
    ],
)
def test_what_the_model_can_mend_comes_back_to_it(
    tool: LatentReasoningTool, arguments: dict[str, Any], remedy: str
) -> None:
    message = call(tool, **arguments)
    assert message.status == "error" and remedy in message.content
    assert message.artifact is None


def test_a_deadline_that_is_too_short_comes_back_too(picture: Image.Image) -> None:
    tool = LatentReasoningTool(reasoner=small_reasoner(budget={"deadline_s": 1e-9}))
    message = call(tool, question=CIRCLE, image=data_uri(picture))
    assert message.status == "error" and "deadline passed" in message.content


def test_what_the_model_cannot_mend_is_raised(picture: Image.Image) -> None:
    tool = LatentReasoningTool(reasoner=small_reasoner(model="/no/such/model"))
    with pytest.raises(ModelNotFoundError):
        call(tool, question=CIRCLE, image=data_uri(picture))


def test_the_tool_has_an_image_policy_of_its_own(tmp_path: Path, picture: Image.Image) -> None:
    """A reasoner that may read every file does not read one for an agent."""
    picture.save(tmp_path / "a.png")
    reasoner = small_reasoner(image_policy=ImagePolicy.local())
    asked = {"question": CIRCLE, "image": str(tmp_path / "a.png")}
    assert call(LatentReasoningTool(reasoner=reasoner), **asked).status == "error"
    allowed = LatentReasoningTool(reasoner=reasoner, image_policy=ImagePolicy.untrusted(folders=(tmp_path,)))
    assert call(allowed, **asked).artifact["answer"] == "red"


def test_a_level_keeps_the_developers_limits(picture: Image.Image) -> None:
    own = Budget(iterations=1, deadline_s=500, max_new_tokens=9, max_candidates=6)
    tool = LatentReasoningTool(reasoner=small_reasoner(budget=own))
    budget = call(tool, question=CIRCLE, image=data_uri(picture), budget="thorough").artifact["budget"]
    limits = {"deadline_s": 500, "max_new_tokens": 9, "max_candidates": 6}
    assert Budget(**budget) == Budget.level("thorough").but(**limits)


OWN = Budget(iterations=1, deadline_s=500, max_new_tokens=9, max_candidates=6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda reasoner: ConfidenceRouter(rungs=[reasoner], thresholds=0.0),
        lambda reasoner: reasoner.with_retry(),
        lambda reasoner: reasoner.with_fallbacks([reasoner]),
        lambda reasoner: RunnableLambda(reasoner.invoke),
        lambda reasoner: small_reasoner().with_config(configurable={"latent_reasoner": {"budget": OWN}}),
    ],
    ids=["router", "retry", "fallbacks", "function", "config"],
)
async def test_no_wrapping_lifts_the_developers_limits(wrap: Any, picture: Image.Image) -> None:
    tool = ImageTool(reasoner=wrap(small_reasoner(budget=OWN)))
    asked = {"question": CIRCLE, "budget": "thorough"}
    limits = {"deadline_s": 500, "max_new_tokens": 9, "max_candidates": 6}
    expected = Budget.level("thorough").but(**limits)
    replies = [tool.ask(asked, shown=[picture]), await tool.aask(asked, shown=[picture])]
    replies += [each async for each in tool.steps(asked, shown=[picture]) if isinstance(each, ToolReply)]
    assert [reply.result.budget for reply in replies] == [expected] * 3


class Slow(os.PathLike[str]):
    """A file that takes its time to be opened."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds

    def __fspath__(self) -> str:
        time.sleep(self.seconds)
        return str(self.path)


@pytest.mark.parametrize(
    "wrap", [lambda reasoner: reasoner, lambda reasoner: reasoner.with_retry(stop_after_attempt=1)]
)
async def test_opening_the_image_counts_against_the_deadline(wrap: Any, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    tool = ImageTool(reasoner=wrap(small_reasoner(budget={"deadline_s": 1.0})), image_policy=ImagePolicy.local())
    slow = Slow(tmp_path / "a.png", 1.1)
    with pytest.raises(DeadlineError):
        tool.ask({"question": CIRCLE}, shown=[slow])
    with pytest.raises(DeadlineError):
        await tool.aask({"question": CIRCLE}, shown=[slow])
    with pytest.raises(DeadlineError):
        [each async for each in tool.steps({"question": CIRCLE}, shown=[slow])]


def test_the_time_that_older_callers_say_was_spent_is_ignored(picture: Image.Image) -> None:
    late = ReasoningRequest(image=picture, question=CIRCLE, elapsed_s=501)
    assert small_reasoner(budget=OWN).invoke(late).answer == "red"


class Counted(os.PathLike[str]):
    """A file that counts how often it is opened."""

    def __init__(self, path: Path) -> None:
        self.path, self.opened = path, 0

    def __fspath__(self) -> str:
        self.opened += 1
        return str(self.path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda reasoner: reasoner,
        lambda reasoner: ConfidenceRouter(
            rungs=[reasoner, reasoner, scripted(*[AIMessage("red")] * 2)], thresholds=1.0
        ),
        lambda reasoner: ConfidenceRouter(rungs=[reasoner, RunnableLambda(lambda request: "red")], thresholds=1.0),
        lambda reasoner: RunnableLambda(reasoner.invoke),
    ],
    ids=["reasoner", "chat model", "function rung", "function"],
)
async def test_a_picture_is_opened_once(wrap: Any, picture: Image.Image, tmp_path: Path) -> None:
    """However many look at it: rungs, a chat model, the overlay."""
    picture.save(tmp_path / "a.png")
    asked = {"question": CIRCLE, "overlay": True}
    tool = ImageTool(reasoner=wrap(small_reasoner()), image_policy=ImagePolicy.local())
    for image, run_async in ((Counted(tmp_path / "a.png"), False), (Counted(tmp_path / "a.png"), True)):
        reply = await tool.aask(asked, shown=[image]) if run_async else tool.ask(asked, shown=[image])
        assert reply.result.answer == "red" and len(reply.pictures) == 1
        assert image.opened == 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda reasoner: reasoner,
        lambda reasoner: reasoner.with_retry(stop_after_attempt=1),
        lambda reasoner: reasoner | RunnableLambda(lambda result: result),
        lambda reasoner: RunnableLambda(lambda request: request) | reasoner,
        lambda reasoner: RunnableLambda(reasoner.invoke),
        lambda reasoner: ConfidenceRouter(rungs=[reasoner], thresholds=0.0),
        lambda reasoner: ConfidenceRouter(rungs=[reasoner.invoke], thresholds=0.0),
        lambda reasoner: ConfidenceRouter(rungs=[scripted(AIMessage("red"))], image_policy=ImagePolicy.local()),
    ],
)
async def test_nothing_behind_a_tool_opens_what_the_tool_may_not(
    wrap: Any, picture: Image.Image, tmp_path: Path
) -> None:
    picture.save(tmp_path / "a.png")
    tool = ImageTool(reasoner=wrap(small_reasoner(image_policy=ImagePolicy.local())))
    for image in (str(tmp_path / "a.png"), (tmp_path / "a.png").as_uri()):
        asked = {"question": CIRCLE, "image": image}
        with pytest.raises(ImageNotAllowedError):
            tool.ask(asked)
        with pytest.raises(ImageNotAllowedError):
            await tool.aask(asked)
        with pytest.raises(ImageNotAllowedError):
            [each async for each in tool.steps(asked)]


def test_the_limits_of_tool_and_reasoner_both_hold(picture: Image.Image) -> None:
    small = {"max_pixels": 1000}
    for ours, theirs in ((small, {}), ({}, small)):
        reasoner = small_reasoner(image_policy=ImagePolicy.untrusted(**ours))
        with pytest.raises(ImageTooLargeError):
            ImageTool(reasoner=reasoner, image_policy=ImagePolicy.untrusted(**theirs)).ask(
                {"question": CIRCLE}, shown=[picture]
            )


def test_a_function_is_given_the_pictures(picture: Image.Image) -> None:
    seen: list[Any] = []
    tool = ImageTool(reasoner=RunnableLambda(lambda request: seen.append(request) or UNSURE_RESULT))
    tool.ask({"question": CIRCLE, "image": data_uri(picture)})
    (image,) = seen[0].images
    assert image.size == picture.size


UNSURE_RESULT = ReasoningResult(answer="red", raw_text="red", confidence=0.4, confidence_source="calibrated")


def test_a_threshold_of_the_reasoner_holds_and_without_one_it_is_a_half(picture: Image.Image) -> None:
    def accepted(reasoner: Any, **fields: Any) -> tuple[bool | None, float | None]:
        result = ImageTool(reasoner=reasoner, **fields).ask({"question": CIRCLE}, shown=[picture]).result
        assert result.abstained is (not result.accepted)
        return result.accepted, result.min_confidence

    router = ConfidenceRouter(rungs=[small_reasoner()], thresholds=1.0)
    assert accepted(router) == (False, 1.0)
    assert accepted(router.with_retry()) == (False, 1.0)
    assert accepted(router, min_confidence=0.25) == (True, 0.25)
    assert accepted(small_reasoner(min_confidence=1.0)) == (False, 1.0)
    assert accepted(small_reasoner()) == (True, 0.5)
    unsure = ReasoningResult(answer="red", raw_text="red", confidence=0.49, confidence_source="calibrated")
    assert accepted(RunnableLambda(lambda request: unsure)) == (False, 0.5)
    assert accepted(ConfidenceRouter(rungs=[small_reasoner()], thresholds=[None])) == (True, None)  # any will do


def test_wrong_fields_are_settings_errors() -> None:
    for wrong in ({"min_confidence": 2}, {"reasoner": "me"}, {"image_policy": {"files": "all"}}):
        with pytest.raises(SettingsError):
            LatentReasoningTool(**wrong)


# ---------------------------------------------------------------------- agents


def test_an_agent_with_a_checkpointer(tool: LatentReasoningTool, picture: Image.Image) -> None:
    """The image is found in the messages; content, artifact and a second turn survive the checkpointer."""
    model = scripted(calls({"question": CIRCLE}), AIMessage("Red."), calls({"question": SQUARE}), AIMessage("Blue."))
    agent = create_agent(model, tools=[tool], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    agent.invoke({"messages": [shows(picture)]}, config)
    agent.invoke({"messages": [("human", "And the square?")]}, config)
    messages = agent.get_state(config).values["messages"]
    kept = [message for message in messages if isinstance(message, ToolMessage)]
    assert [ReasoningResult.model_validate(each.artifact).answer for each in kept] == ["red", "blue"]
    assert messages[-1].text == "Blue."


def test_an_agent_that_runs_asynchronously_calls_twice_in_one_turn(
    tool: LatentReasoningTool, picture: Image.Image
) -> None:
    import asyncio

    model = scripted(calls({"question": CIRCLE}, {"question": SQUARE}), AIMessage("Red and blue."))
    messages = asyncio.run(create_agent(model, tools=[tool]).ainvoke({"messages": [shows(picture)]}))["messages"]
    found = {each.tool_call_id: each.artifact["answer"] for each in messages if isinstance(each, ToolMessage)}
    assert found == {"0": "red", "1": "blue"}


def test_parallel_calls_in_threads(tool: LatentReasoningTool, picture: Image.Image) -> None:
    model = scripted(calls(*({"question": q} for q in (CIRCLE, SQUARE, CIRCLE))), AIMessage("Done."))
    messages = create_agent(model, tools=[tool]).invoke({"messages": [shows(picture)]})["messages"]
    assert [each.artifact["answer"] for each in messages if isinstance(each, ToolMessage)] == ["red", "blue", "red"]


def test_an_agent_recovers_from_an_error(tool: LatentReasoningTool, picture: Image.Image) -> None:
    model = scripted(calls({"question": CIRCLE, "image": "image1.png"}), calls({"question": CIRCLE}), AIMessage("Red."))
    messages = create_agent(model, tools=[tool]).invoke({"messages": [shows(picture)]})["messages"]
    failed, answered = (each for each in messages if isinstance(each, ToolMessage))
    assert failed.status == "error" and "Leave the argument 'image' out" in failed.content
    assert answered.artifact["answer"] == "red"


def test_the_newest_picture_counts_but_not_the_tools_own(picture: Image.Image) -> None:
    tool = LatentReasoningTool(reasoner=small_reasoner())
    model = scripted(
        calls({"question": CIRCLE, "overlay": True}),
        calls({"question": CIRCLE}),
        AIMessage("The same."),
        calls({"question": CIRCLE}),
        AIMessage("Another."),
    )
    agent = create_agent(model, tools=[tool], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    agent.invoke({"messages": [shows(picture)]}, config)
    green = draw_shapes(colour=(20, 150, 40))
    messages = agent.invoke({"messages": [shows(green)]}, config)["messages"]
    answers = [each.artifact["answer"] for each in messages if isinstance(each, ToolMessage)]
    assert answers == ["red", "red", "green"]


GREEN = (20, 150, 40)


def asked_of(tool: LatentReasoningTool, messages: list[Any], **arguments: Any) -> ToolMessage:
    call = {"name": tool.name, "args": {"question": CIRCLE, **arguments, "state": {"messages": messages}}, "id": "1"}
    message = tool.invoke({**call, "type": "tool_call"})
    assert isinstance(message, ToolMessage)
    return message


@pytest.mark.parametrize(
    "block",
    [
        {"type": "file", "base64": "AAAA", "mime_type": "application/pdf"},
        {"type": "video", "url": "https://example.org/a.mp4"},
        {"type": "input_file", "file_id": "file-1"},
        {"type": "hologram", "data": 3},
    ],
)
def test_what_cannot_be_read_is_an_error_and_never_an_older_picture(
    tool: LatentReasoningTool, picture: Image.Image, block: dict[str, Any]
) -> None:
    messages = [shows(picture), AIMessage("Nice."), HumanMessage([block, {"type": "text", "text": "And this?"}])]
    message = asked_of(tool, messages)
    assert message.status == "error" and message.artifact is None
    assert asked_of(tool, messages, image="1").artifact["answer"] == "red"  # named, the older one may be asked about


def test_pictures_are_numbered(tool: LatentReasoningTool, picture: Image.Image) -> None:
    green = {"type": "file", "base64": image_block(draw_shapes(colour=GREEN))["base64"], "mime_type": "image/png"}
    messages = [shows(picture), AIMessage("Nice."), HumanMessage([green])]
    for image, answer, number in (
        (None, "green", 2),
        ("", "green", 2),
        ("1", "red", 1),
        ("the second image", "green", 2),
    ):
        message = asked_of(tool, messages, image=image)
        assert message.artifact["answer"] == answer and message.artifact["image_numbers"] == [number]
        assert f"Asked about: image {number} of the conversation." in message.content
    both = asked_of(tool, messages, image="1 and 2")
    assert both.artifact["image_numbers"] == [1, 2] and len(both.artifact["image_sizes"]) == 2
    missing = asked_of(tool, messages, image="3")
    assert missing.status == "error" and "shows 2 images" in missing.content


@pytest.mark.parametrize("filler", ["", " ", "null", "None", "undefined"])
def test_words_for_nothing_count_as_left_out(tool: LatentReasoningTool, picture: Image.Image, filler: str) -> None:
    message = asked_of(tool, [shows(picture)], image=filler, budget=filler, overlay=filler)
    assert message.artifact["answer"] == "red" and isinstance(message.content, str)
    assert asked_of(tool, [shows(picture)], image=1, budget=" Quick").artifact["answer"] == "red"


def test_the_description_follows_the_policy(tmp_path: Path) -> None:
    def image(**fields: Any) -> str:
        tool = LatentReasoningTool(reasoner=small_reasoner(), **fields)
        assert tool.args["image"] == tool.tool_call_schema.model_json_schema()["properties"]["image"]
        return str(tool.args["image"]["description"])

    assert "path" not in image() and "URL" not in image() and "number" in image()
    places = image(image_policy=ImagePolicy.untrusted(folders=(tmp_path,), hosts=("example.org",)))
    assert str(tmp_path) in places and "https URL of example.org" in places
    assert "the path of a file" in image(image_policy=ImagePolicy.local())
    named = ImageTool().arguments(named=True).model_json_schema()["properties"]["image"]["description"]
    assert named == "Which image: a data URI."


def test_the_developer_may_forbid_pictures(picture: Image.Image) -> None:
    tool = LatentReasoningTool(reasoner=small_reasoner(), allow_overlay=False)
    assert set(tool.args) == {"question", "image", "budget", "options"}
    assert asked_of(tool, [shows(picture)]).artifact["answer"] == "red"
    refused = asked_of(tool, [shows(picture)], overlay=True)
    assert refused.status == "error" and "Leave the argument 'overlay' out" in refused.content
    assert pickle.loads(pickle.dumps(tool)) == tool


def test_a_router_may_answer(picture: Image.Image) -> None:
    router = ConfidenceRouter(rungs=[small_reasoner(), lambda request: "crimson"], thresholds=0.5)
    tool = LatentReasoningTool(reasoner=router, min_confidence=1.0)
    artifact = call(tool, question=CIRCLE, image=data_uri(picture)).artifact
    assert artifact["answer"] == "crimson"
    assert [step["decision"] for step in artifact["route"]] == ["unsure", "accepted"]
