"""LatentReasoner as LangChain sees it: every way to call it, options, events, cancellation, serialisation."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import random
import threading
import uuid
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.load import dumpd, load
from langchain_core.messages import SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langgraph.graph import END, START, StateGraph
from PIL import Image
from recorder import Recorder, options
from scripted_agents import CIRCLE, SQUARE, essence, shows, small_reasoner

import latent_tool
from latent_tool import Budget, ImagePolicy, LatentReasoner, ReasoningRequest, ReasoningResult, SearchSettings
from latent_tool.engine import engine as engine_module
from latent_tool.engine.engine import InStep, Job
from latent_tool.errors import (
    CancelledError,
    DeadlineError,
    ImageNotAllowedError,
    ImageNotFoundError,
    InputError,
    QuestionError,
    SettingsError,
)
from latent_tool.langchain.reasoner import OPTIONS_KEY
from latent_tool.schema import ReasoningStep

pytestmark = pytest.mark.disable_socket


@pytest.fixture
def reasoner() -> LatentReasoner:
    return small_reasoner()


@pytest.fixture
def request_(picture: Image.Image) -> dict[str, Any]:
    return {"image": picture, "question": CIRCLE}


def test_the_public_names_are_pinned() -> None:
    assert latent_tool.__all__ == [
        "Budget",
        "ChatLatentReasoner",
        "ConfidenceRouter",
        "ImagePolicy",
        "LatentReasoner",
        "LatentReasoningTool",
        "Patch",
        "ReasoningRequest",
        "ReasoningResult",
        "RemoteReasoner",
        "SearchSettings",
    ]
    assert set(latent_tool.__all__) <= set(dir(latent_tool))
    assert all(getattr(latent_tool, name).__name__ == name for name in latent_tool.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Reasoner'"):
        _ = latent_tool.Reasoner


# ---------------------------------------------------------------------- every way to call it


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
    rewards = [
        [row.mean_sampled_reward for row in reasoner.invoke({**request_, "seed": seed}).trace[1:]] for seed in (0, 1)
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


# ---------------------------------------------------------------------- batches


def test_errors_in_a_batch_take_their_place(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    bad = [{**request_, "image": "nowhere.png"}, {"question": CIRCLE}, {**request_, "question": "  "}]
    answers = reasoner.batch([request_, *bad, request_], return_exceptions=True)
    kinds = [type(each) for each in answers]
    assert kinds == [ReasoningResult, ImageNotFoundError, InputError, QuestionError, ReasoningResult]
    with pytest.raises(ImageNotFoundError):
        reasoner.batch([request_, bad[0]])
    assert reasoner.batch(bad[:2], return_exceptions=True)[1].hint.startswith("Pass a dict")
    assert reasoner.batch([]) == []


async def test_batches_are_fused_up_to_max_concurrency(
    reasoner: LatentReasoner, request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: set[int] = set()
    step = InStep.step

    def counted(self: InStep) -> Any:
        sizes.add(len(self.members))
        return step(self)

    monkeypatch.setattr(InStep, "step", counted)
    reasoner.batch([request_] * 5, {"max_concurrency": 2})
    assert max(sizes) == 2
    sizes.clear()
    await reasoner.abatch([request_] * 5, {"max_concurrency": 2})
    assert max(sizes) == 2
    sizes.clear()
    await reasoner.abatch([request_] * 3)
    assert max(sizes) == 3


WHO = ContextVar("WHO", default="nobody")


class Together(os.PathLike[str]):
    """A file that can be opened only while another one is being opened, too; notes who opens it."""

    def __init__(self, path: Path, meeting: threading.Barrier) -> None:
        self.path, self.meeting, self.opened_by = path, meeting, ""

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        self.meeting.wait(20)
        self.opened_by = WHO.get()
        return str(self.path)


async def test_the_images_of_a_batch_are_opened_together(
    reasoner: LatentReasoner, picture: Image.Image, tmp_path: Path
) -> None:
    """So that a slow one does not use up the time of the others."""
    picture.save(tmp_path / "a.png")
    meeting = threading.Barrier(3)
    images = [Together(tmp_path / "a.png", meeting) for _ in range(3)]
    asked = [{"image": image, "question": CIRCLE} for image in images]
    WHO.set("me")
    for answers in (reasoner.batch(asked), await reasoner.abatch(asked)):
        assert [each.answer for each in answers] == ["red"] * 3
        assert [each.opened_by for each in images] == ["me"] * 3


def test_options_of_a_batch_belong_to_their_question(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    one, two = reasoner.batch([request_] * 2, [options(seed=1), options(seed=2)])
    assert (one.seed, two.seed) == (1, 2)
    assert essence(two) == essence(reasoner.invoke({**request_, "seed": 2}))


# ---------------------------------------------------------------------- options


def test_request_before_call_before_reasoner(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    plain = small_reasoner(seed=1, min_confidence=0.1)
    result = plain.invoke(request_)
    assert (result.seed, result.min_confidence, result.budget) == (1, 0.1, plain.budget)

    call = options(seed=2, min_confidence=1.0, budget={"iterations": 0})
    result = plain.invoke(request_, call)
    assert (result.seed, result.min_confidence, result.budget) == (2, 1.0, Budget(iterations=0))
    assert result.accepted is False and result.abstained is True

    result = plain.invoke({**request_, "seed": 3, "min_confidence": 0.5, "budget": Budget(iterations=2)}, call)
    assert (result.seed, result.min_confidence, result.budget) == (3, 0.5, Budget(iterations=2))
    assert result.accepted is True


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
    [
        {"modle": "x"},
        {"model": ""},
        {"seed": -1},
        {"min_confidence": 1.01},
        {"min_confidence": float("nan")},
        {"budget": "huge"},
        {"budget": {"iterations": -1}},
        {"settings": {"latents": -1}},
        {"confidence": "feeling"},
        {"confidence": "reward", "settings": {"latents": 0}},
        {"confidence": "reward", "settings": {"reward": "neg_log_probability"}},
        {"device": "cpu", "device_map": "auto"},
        {"grounding": "yes, please"},
    ],
)
def test_wrong_fields_are_settings_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        LatentReasoner(**wrong)
    assert caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [None, 7, "a question", [], {}, {"question": CIRCLE}, {"image": "a.png", "images": ["a.png"], "question": CIRCLE}],
)
def test_wrong_requests_are_input_errors(reasoner: LatentReasoner, wrong: Any) -> None:
    with pytest.raises(InputError):
        reasoner.invoke(wrong)


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_the_device_is_chosen_where_the_model_is_loaded() -> None:
    """So that what was saved on one machine, and a calibration, hold on another."""
    for device in ("auto", None, "cuda:0"):
        saved = dumpd(LatentReasoner(device=device))
        assert load(saved, allowed_objects=[LatentReasoner], valid_namespaces=["latent_tool"]).device == device
    assert LatentReasoner(device_map="auto").device == "auto"
    assert LatentReasoner().configuration() == LatentReasoner(device="cuda:0").configuration()


def test_the_image_policy_is_enforced(picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    request = {"image": tmp_path / "a.png", "question": CIRCLE}
    assert small_reasoner().invoke(request).answer == "red"
    with pytest.raises(ImageNotAllowedError):
        small_reasoner(image_policy=ImagePolicy.untrusted()).invoke(request)


def test_grounding_controls_and_reward_confidence(request_: dict[str, Any]) -> None:
    result = small_reasoner(grounding=True, controls=True, confidence="reward").invoke(request_)
    assert result.confidence_source == "reward"
    assert result.grounding is not None and result.grounding.mean > 0  # the answer depends on the image
    assert result.controls is not None and result.controls.latents_off.answer == "red"


def test_tokens_spell_what_was_decoded(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    result = reasoner.invoke({**request_, "question": "what is left of the blue square?"})
    assert [token.token for token in result.tokens] == [" red", " circle", "<|end|>"]
    product = 1.0
    for token in result.tokens:
        assert token.in_answer
        product *= token.probability
    assert product == pytest.approx(result.scores.answer_probability, rel=1e-6)


# ---------------------------------------------------------------------- events and traces


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


# ---------------------------------------------------------------------- limits


def test_a_deadline_that_has_passed_is_an_error(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    with pytest.raises(DeadlineError):
        reasoner.with_budget({"deadline_s": 1e-9}).invoke(request_)


def test_deadlines_count_from_the_call(request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening images takes 5 seconds of the deadline; loading the model, 100 seconds, takes none."""
    now = 1000.0
    asked: list[Job] = []

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    def open_slowly(reference: Any, policy: Any, *, deadline: float) -> Any:
        assert deadline == 1030.0
        wait(5.0)
        return SimpleNamespace(image=reference, warnings=("slow",))

    class Nobody:
        def run(self, job: Job) -> Any:
            asked.append(job)
            raise CancelledError("enough")

    def load_slowly(self: LatentReasoner) -> Any:
        wait(100.0)
        return Nobody()

    monkeypatch.setattr("latent_tool.langchain.reasoner.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("latent_tool.images.load.load_image", open_slowly)
    monkeypatch.setattr(LatentReasoner, "engine", load_slowly)
    with pytest.raises(CancelledError):
        LatentReasoner(budget={"deadline_s": 30}).invoke(request_)
    (job,) = asked
    assert job.deadline == 1000 + 100 + 30
    assert (job.image_seconds, job.queue_seconds, job.warnings) == (5.0, 0.0, ("slow",))


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


def assert_no_thread_is_left(before: set[threading.Thread]) -> None:
    """The scheduler's thread ends at its next step when there is nothing left to do."""
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    assert set(threading.enumerate()) <= before


def test_cancelling_a_task_stops_its_search(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    """A search that would take hours, and a batch of them."""

    async def main() -> int:
        loop, searching = asyncio.get_running_loop(), asyncio.Event()

        def on_step() -> None:
            if len(recorder.steps) == 3:
                loop.call_soon_threadsafe(searching.set)

        recorder = Recorder(on_step)
        long = reasoner.with_budget({"iterations": 10_000})
        for ask in (
            lambda config: asyncio.create_task(long.ainvoke(request_, config)),
            lambda config: asyncio.create_task(anext_until_end(long.astream(request_, config))),
        ):
            task = ask({"callbacks": [recorder]})
            await searching.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            searching.clear()
            recorder.steps.clear()
        batch = asyncio.create_task(long.abatch([request_] * 3))
        await asyncio.sleep(0)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        return len(recorder.errors)

    async def anext_until_end(steps: Any) -> None:
        async for _ in steps:
            pass

    before = set(threading.enumerate())
    assert asyncio.run(main()) == 2
    assert_no_thread_is_left(before)


def test_many_at_once_with_a_third_cancelled(picture: Image.Image) -> None:
    """32 concurrent questions, 11 cancelled at random moments: the others' results equal their sequential ones."""
    reasoner = small_reasoner(iterations=1)
    requests = [{"image": picture, "question": (CIRCLE, SQUARE)[i % 2], "seed": i % 4} for i in range(32)]
    expected = [essence(reasoner.invoke(requests[i])) for i in range(4)]
    rng = random.Random(0)
    doomed = {i: rng.randrange(1, 60) for i in rng.sample(range(32), 11)}  # which, and after how many steps of all

    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        lock, steps = threading.Lock(), 0

        def on_step() -> None:
            nonlocal steps
            with lock:
                steps += 1
                for i, moment in doomed.items():
                    if moment == steps:
                        loop.call_soon_threadsafe(tasks[i].cancel)

        config = {"callbacks": [Recorder(on_step)]}
        tasks = [asyncio.create_task(reasoner.ainvoke(each, config)) for each in requests]
        return await asyncio.gather(*tasks, return_exceptions=True)

    before = set(threading.enumerate())
    answers = asyncio.run(main())
    assert_no_thread_is_left(before)
    for i, answer in enumerate(answers):
        if i in doomed and isinstance(answer, asyncio.CancelledError):
            continue
        assert isinstance(answer, ReasoningResult), answer
        assert essence(answer) == expected[i % 4]
    assert sum(isinstance(each, asyncio.CancelledError) for each in answers) >= 8  # few had ended before their moment


# ---------------------------------------------------------------------- composition and serialisation


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


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_saved_and_loaded_again() -> None:
    reasoner = LatentReasoner(
        model="some/model",
        budget="quick",
        settings=SearchSettings.paper(latents=6),
        grounding={"strength": 0.5},
        image_policy=ImagePolicy.untrusted(hosts=("example.org",)),
        seed=3,
    )
    saved = dumpd(reasoner)
    assert "not_implemented" not in str(saved)
    assert load(saved, allowed_objects=[LatentReasoner], valid_namespaces=["latent_tool"]) == reasoner
    secret = LatentReasoner(token="hf_secret")
    assert "hf_secret" not in f"{dumpd(secret)} {secret!r}"


def test_with_budget_changes_the_budget_alone(reasoner: LatentReasoner) -> None:
    for value in ("thorough", Budget.level("thorough"), dict(Budget.level("thorough"))):
        assert reasoner.with_budget(value) == reasoner.model_copy(update={"budget": Budget.level("thorough")})
    with pytest.raises(SettingsError):
        reasoner.with_budget("endless")


def test_a_model_is_loaded_once(request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load_for_real = engine_module.load

    def counted(spec: Any) -> Any:
        loaded.append(spec)
        return load_for_real(spec)

    monkeypatch.setattr(engine_module, "load", counted)
    monkeypatch.setattr(engine_module, "_engines", {})
    reasoner = small_reasoner(iterations=0)
    twins = [reasoner, copy.deepcopy(reasoner), reasoner.with_budget("quick"), reasoner.with_config(tags=["x"])]
    threads = [threading.Thread(target=twin.invoke, args=(request_,)) for twin in twins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reasoner.with_config(options(seed=3)).batch([request_] * 2)
    assert len(loaded) == 1
