"""What holds for every reasoner, wherever it runs: tests that the files of each of them import beside their fixture.

The fixtures ``reasoner`` and ``request_`` are the importing file's own.
"""

from __future__ import annotations

import copy
import pickle
import threading
import uuid
from typing import Any

import pytest
from langchain_core.messages import SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langgraph.graph import END, START, StateGraph
from PIL import Image
from recorder import Recorder, options
from scripted_agents import CIRCLE, SQUARE, essence, shows

from latent_tool import Budget, LatentReasoner, ReasoningRequest, ReasoningResult
from latent_tool.errors import (
    CancelledError,
    DeadlineError,
    ImageNotFoundError,
    InputError,
    QuestionError,
    SettingsError,
)
from latent_tool.langchain.reasoner import OPTIONS_KEY
from latent_tool.schema import ReasoningStep


async def test_the_same_answer_however_it_is_asked(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    alone = reasoner.invoke(request_)
    assert alone.answer == "red" and alone.confidence is not None and alone.confidence > 0.9
    expected = essence(alone)
    other = {**request_, "question": SQUARE, "seed": 5}

    assert essence(reasoner.invoke(ReasoningRequest(**request_))) == expected
    assert essence(await reasoner.ainvoke(request_)) == expected
    assert [essence(each) for each in reasoner.batch([request_, other, request_])][::2] == [expected] * 2
    assert essence((await reasoner.abatch([other, request_]))[1]) == expected
    assert essence(list(reasoner.stream(request_))[-1]) == expected
    assert essence([step async for step in reasoner.astream(request_)][-1]) == expected
    assert {i: each.answer for i, each in reasoner.batch_as_completed([request_, other])} == {0: "red", 1: "blue"}
    assert {i: each.answer async for i, each in reasoner.abatch_as_completed([other, request_])} == {
        0: "blue",
        1: "red",
    }
    assert essence(reasoner.with_config(tags=["x"]).invoke(request_)) == expected


def test_another_seed_searches_elsewhere(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    searched = {"iterations": 2, "target_confidence": None}  # also where the plain answer is sure
    rewards = [
        [row.mean_sampled_reward for row in reasoner.invoke({**request_, "budget": searched, "seed": seed}).trace[1:]]
        for seed in (0, 1)
    ]
    assert rewards[0] != rewards[1]


def test_the_request_is_left_as_it_was(reasoner: LatentReasoner, picture: Image.Image) -> None:
    request = {"image": picture, "question": CIRCLE, "budget": {"iterations": 0}}
    pixels = picture.tobytes()
    reasoner.invoke(request)
    assert request == {"image": picture, "question": CIRCLE, "budget": {"iterations": 0}}
    assert picture.tobytes() == pixels


def test_prompts_and_messages_are_requests_too(reasoner: LatentReasoner, picture: Image.Image) -> None:
    assert reasoner.invoke([SystemMessage("Be brief."), shows(picture, text=SQUARE)]).answer == "blue"
    prompt = ChatPromptTemplate.from_messages([("placeholder", "{shown}"), ("human", "what color is the {shape}?")])
    chain = prompt | reasoner | RunnableLambda(lambda result: result.answer.upper())
    assert chain.invoke({"shown": [shows(picture, text=" ")], "shape": "circle"}) == "RED"


def test_streams_end_in_the_result(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    *steps, result = reasoner.stream(request_)
    assert all(isinstance(step, ReasoningStep) for step in steps) and isinstance(result, ReasoningResult)
    assert [step.phase for step in steps] == ["prefill", "search", "search", "decode"]
    assert [step.trace.round for step in steps if step.trace] == [0, 1]
    assert [step.trace for step in steps if step.trace] == result.trace
    injected = [cell for step in steps if step.phase == "search" for cell in step.injected]
    assert [cell.cell for cell in injected] == [cell for row in result.trace for cell in row.accepted]
    places = {cell.cell: (cell.image, cell.box) for cell in injected}
    assert all(places[patch.cell] == (patch.image, patch.box) for patch in result.patches)
    # What stands behind a stream of steps gets the last item alone.
    assert list((reasoner | RunnableLambda(lambda each: each.answer)).stream(request_)) == ["red"]


def test_schemas_name_the_classes(reasoner: LatentReasoner) -> None:
    assert reasoner.get_input_schema() is ReasoningRequest
    assert reasoner.get_output_schema() is ReasoningResult
    schema = reasoner.config_schema().model_json_schema()
    assert set(schema["$defs"]["CallOptions"]["properties"]) == {"budget", "seed", "min_confidence"}


def test_errors_in_a_batch_take_their_place(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    bad = [{**request_, "image": "nowhere.png"}, {"question": CIRCLE}, {**request_, "question": "  "}]
    answers = reasoner.batch([request_, *bad, request_], return_exceptions=True)
    kinds = [type(each) for each in answers]
    assert kinds == [ReasoningResult, ImageNotFoundError, InputError, QuestionError, ReasoningResult]
    with pytest.raises(ImageNotFoundError):
        reasoner.batch([request_, bad[0]])
    assert reasoner.batch(bad[:2], return_exceptions=True)[1].hint.startswith("Pass a dict")
    assert reasoner.batch([]) == []


def test_options_of_a_batch_belong_to_their_question(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    one, two = reasoner.batch([request_] * 2, [options(seed=1), options(seed=2)])
    assert (one.seed, two.seed) == (1, 2)
    assert essence(two) == essence(reasoner.invoke({**request_, "seed": 2}))


def test_what_others_put_into_configurable_is_left_alone(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    config = {"configurable": {"thread_id": "7", "seed": 99, OPTIONS_KEY: {"seed": 4}}}
    assert reasoner.invoke(request_, config).seed == 4
    assert config == {"configurable": {"thread_id": "7", "seed": 99, OPTIONS_KEY: {"seed": 4}}}


@pytest.mark.parametrize(
    "wrong", [{"sed": 1}, {"seed": -1}, {"min_confidence": 1.5}, {"budget": "huge"}, {"budget": {"rounds": 1}}, "quick"]
)
def test_wrong_options_are_errors(reasoner: LatentReasoner, request_: dict[str, Any], wrong: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        reasoner.invoke(request_, {"configurable": {OPTIONS_KEY: wrong}})
    assert caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [None, 7, "a question", [], {}, {"question": CIRCLE}, {"image": "a.png", "images": ["a.png"], "question": CIRCLE}],
)
def test_wrong_requests_are_input_errors(reasoner: LatentReasoner, wrong: Any) -> None:
    with pytest.raises(InputError):
        reasoner.invoke(wrong)


async def test_steps_go_out_as_events(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    phases = ["prefill", "search", "search", "decode"]
    for ask in (reasoner.invoke, lambda *given: list(reasoner.stream(*given))):
        recorder = Recorder()
        ask(request_, {"callbacks": [recorder]})
        assert [step["phase"] for step in recorder.steps] == phases
    recorder = Recorder()
    await reasoner.ainvoke(request_, {"callbacks": [recorder]})
    assert [step["phase"] for step in recorder.steps] == phases

    seen = [(each["event"], each["data"]) async for each in reasoner.astream_events(request_, version="v2")]
    custom = [data for event, data in seen if event == "on_custom_event"]
    assert [each["phase"] for each in custom] == phases
    assert [event for event, _ in seen].count("on_chain_stream") == len(phases) + 1
    assert isinstance(seen[-1][1]["output"], ReasoningResult)


def test_names_tags_and_parents_reach_the_callbacks(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    recorder, run_id = Recorder(), uuid.uuid4()
    chain = RunnableLambda(lambda each: each) | reasoner.with_config(run_name="look", tags=["eye"])
    chain.invoke(request_, {"callbacks": [recorder], "run_id": run_id, "tags": ["outer"], "metadata": {"user": "u"}})
    look = next(each for each in recorder.starts if each["name"] == "look")
    assert look["parent_run_id"] == run_id
    assert {"eye", "outer"} <= set(look["tags"]) and look["metadata"]["user"] == "u"
    assert len(recorder.steps) == 4 and not recorder.errors


def test_a_graph_streams_the_steps(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    graph = StateGraph(dict)
    graph.add_node("look", lambda state: {"answer": reasoner.invoke(state).answer})
    graph.add_edge(START, "look")
    graph.add_edge("look", END)
    steps = list(graph.compile().stream(request_, stream_mode="custom"))
    assert [each["latent_step"]["phase"] for each in steps] == ["prefill", "search", "search", "decode"]


def test_a_deadline_that_has_passed_is_an_error(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    with pytest.raises(DeadlineError):
        reasoner.with_budget({"deadline_s": 1e-9}).invoke(request_)


def test_a_sync_call_can_be_stopped(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    stop = threading.Event()
    recorder = Recorder(on_step=lambda: len(recorder.steps) == 3 and stop.set())
    config = {"callbacks": [recorder], **options(cancelled=stop, budget={"iterations": 10_000})}
    with pytest.raises(CancelledError):
        reasoner.invoke(request_, config)
    assert len(recorder.steps) == 3  # no step was begun after the event was set
    with pytest.raises(CancelledError):
        reasoner.batch([request_] * 2, options(cancelled=stop))
    assert reasoner.invoke(request_).answer == "red"


def test_a_closed_stream_stops(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    recorder = Recorder()
    stream = reasoner.with_budget({"iterations": 10_000}).stream(request_, {"callbacks": [recorder]})
    next(stream)
    stream.close()
    assert len(recorder.steps) == 1


def test_retries_and_fallbacks_compose(reasoner: LatentReasoner, picture: Image.Image) -> None:
    request = {"image": picture, "question": CIRCLE, "budget": {"deadline_s": 1e-9}}
    patient = RunnableLambda(lambda each: reasoner.invoke({**each, "budget": None}))
    assert reasoner.with_fallbacks([patient]).invoke(request).answer == "red"
    recorder = Recorder()
    with pytest.raises(DeadlineError):
        reasoner.with_retry(
            retry_if_exception_type=(DeadlineError,), stop_after_attempt=3, wait_exponential_jitter=False
        ).invoke(request, {"callbacks": [recorder]})
    assert len(recorder.errors) == 4  # three attempts and the retry itself


def test_copies_and_pickles_are_equal(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    answer = essence(reasoner.invoke(request_))
    for twin in (pickle.loads(pickle.dumps(reasoner)), copy.deepcopy(reasoner), reasoner.model_copy()):
        assert twin == reasoner and hash(twin) == hash(reasoner)
        assert essence(twin.invoke(request_)) == answer


def test_with_budget_changes_the_budget_alone(reasoner: LatentReasoner) -> None:
    for value in ("thorough", Budget.level("thorough"), dict(Budget.level("thorough"))):
        assert reasoner.with_budget(value) == reasoner.model_copy(update={"budget": Budget.level("thorough")})
    with pytest.raises(SettingsError):
        reasoner.with_budget("endless")
