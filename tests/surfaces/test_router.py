"""ConfidenceRouter: who is asked, what is accepted, what the route says, and what a trace of it looks like."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from PIL import Image
from recorder import Recorder, options
from scripted_agents import CIRCLE, SQUARE, essence, scripted, small_reasoner

from latent_tool import Budget, ChatLatentReasoner, ConfidenceRouter, LatentReasoner, ReasoningRequest, ReasoningResult
from latent_tool.engine.in_step import InStep
from latent_tool.engine.job import Job
from latent_tool.errors import ContextLengthError, ImageNotFoundError, InputError, RungError, SettingsError
from latent_tool.schema import ReasoningStep

pytestmark = pytest.mark.disable_socket


@pytest.fixture
def request_(picture: Image.Image) -> dict[str, Any]:
    return {"image": picture, "question": CIRCLE}


def says(answer: str, confidence: float | None, seen: list[Any] | None = None, **fields: Any) -> Any:
    """A rung that always gives one answer."""

    def rung(request: ReasoningRequest) -> ReasoningResult:
        if seen is not None:
            seen.append(request)
        source = "unscored" if confidence is None else "answer_probability"
        return ReasoningResult(
            answer=answer, raw_text=answer, confidence=confidence, confidence_source=source, **fields
        )

    return RunnableLambda(rung, name=answer or "nothing")


def decisions(result: ReasoningResult) -> list[tuple[str, str]]:
    return [(step.name, step.decision) for step in result.route]


def never(request: Any) -> Any:
    raise AssertionError("this rung must not be asked")


# ---------------------------------------------------------------------- climbing


def test_a_sure_answer_ends_the_climb(request_: dict[str, Any]) -> None:
    reasoner = small_reasoner()
    result = ConfidenceRouter(rungs=[reasoner, never], thresholds=0.9).invoke(request_)
    assert (result.answer, result.accepted, result.abstained, result.min_confidence) == ("red", True, False, 0.9)
    (step,) = result.route
    assert (step.rung, step.decision, step.confidence, step.cost) == (0, "accepted", result.confidence, 1.0)
    assert step.reason.endswith("reaches 0.9")
    changed = {"route", "accepted", "abstained", "abstain_reason", "min_confidence"}
    alone = essence(reasoner.invoke(request_))
    assert {key: value for key, value in essence(result).items() if key not in changed} == {
        key: value for key, value in alone.items() if key not in changed
    }


def test_more_budget_then_another_model(request_: dict[str, Any]) -> None:
    small = small_reasoner(iterations=0)
    strong = scripted(AIMessage("crimson"))
    router = ConfidenceRouter(rungs=[small, small.with_budget({"iterations": 1}), strong], thresholds=[1, 1, None])
    result = router.invoke(request_)
    assert decisions(result) == [
        ("LatentReasoner", "unsure"),
        ("LatentReasoner", "unsure"),
        ("Scripted", "accepted"),
    ]
    assert (result.answer, result.confidence, result.confidence_source) == ("crimson", None, "unscored")
    assert [step.answer for step in result.route] == ["red", "red", "crimson"]


def test_the_most_confident_answer_is_abstained_with() -> None:
    rungs = [says("a", 0.3), says("b", 0.6), says("c", 0.5)]
    request = {"image": "a.png", "question": "?"}
    result = ConfidenceRouter(rungs=rungs, thresholds=0.9).invoke(request)
    assert (result.answer, result.confidence, result.accepted, result.abstained) == ("b", 0.6, False, True)
    told = ConfidenceRouter(rungs=rungs, thresholds=0.9, abstain="I cannot tell.").invoke(request)
    assert (told.answer, told.raw_text, told.abstained) == ("I cannot tell.", "b", True)


def test_each_rung_has_its_threshold() -> None:
    request = {"image": "a.png", "question": "?"}
    rungs = [says("a", 0.7), says("b", 0.7), says("c", 0.1)]
    assert ConfidenceRouter(rungs=rungs, thresholds=[0.8, 0.7, 0.9]).invoke(request).answer == "b"
    assert ConfidenceRouter(rungs=rungs, thresholds=[0.8, 0.71, None]).invoke(request).answer == "c"
    # The request's own threshold stands for all of them, and so does that of the call.
    router = ConfidenceRouter(rungs=rungs, thresholds=[0.8, 0.7, 0.9])
    assert router.invoke({**request, "min_confidence": 0.5}).answer == "a"
    assert router.invoke(request, options(min_confidence=0.05)).answer == "a"


def test_empty_and_abstained_answers_are_not_accepted() -> None:
    request = {"image": "a.png", "question": "?"}
    result = ConfidenceRouter(rungs=[says(" ", 1.0), says("", None), says("c", None)]).invoke(request)
    assert decisions(result) == [(" ", "unsure"), ("nothing", "unsure"), ("c", "accepted")]
    inner = ConfidenceRouter(rungs=[says("", None)], abstain="No idea.")
    result = ConfidenceRouter(rungs=[inner, says("d", None)]).invoke(request)
    assert result.route[0].reason == "the rung abstained"
    assert result.answer == "d"


def test_costs_limit_the_climb() -> None:
    request = {"image": "a.png", "question": "?"}
    rungs = [says("a", 0.1), says("b", 0.9), says("c", 0.8)]
    router = ConfidenceRouter(rungs=rungs, thresholds=0.7, costs=[1, 50, 3], max_cost=5)
    result = router.invoke(request)
    assert decisions(result) == [("a", "unsure"), ("b", "skipped"), ("c", "accepted")]
    assert sum(step.cost for step in result.route) == 4
    nothing = ConfidenceRouter(rungs=rungs, max_cost=0.5).invoke(request)
    assert (nothing.answer, nothing.confidence, nothing.abstained) == ("", None, True)


def test_no_rung_is_begun_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    moments = iter([0.0, 0.0, 0.0, 7.0, 10.0, 10.0])  # begin; first rung: late?, before, after; second, third: late?
    monkeypatch.setattr("latent_tool.langchain.router.time", SimpleNamespace(monotonic=lambda: next(moments)))
    router = ConfidenceRouter(rungs=[says("a", 0.1), never, never], max_seconds=8)
    result = router.invoke({"image": "a.png", "question": "?"})
    assert [step.decision for step in result.route] == ["unsure", "skipped", "skipped"]
    assert result.route[0].seconds == 7.0 and result.answer == "a"


def test_recorded_answers_are_routed_like_real_ones(picture: Image.Image) -> None:
    """What the routing table of the documentation rests on: a decision depends on the confidences alone."""
    questions = (CIRCLE, "what is right of the circle?", "Hello")
    rungs = [small_reasoner(0), small_reasoner(1)]
    requests = [ReasoningRequest(image=picture, question=question) for question in questions]
    recorded = [dict(zip(questions, rung.batch(requests), strict=True)) for rung in rungs]
    confidences = sorted(result.confidence or 0.0 for result in recorded[0].values())
    for threshold in (confidences[1], confidences[2]):
        real = ConfidenceRouter(rungs=[*rungs, says("c", None)], thresholds=threshold)
        replayed = ConfidenceRouter(
            rungs=[*((lambda request, i=i: recorded[i][request.question]) for i in range(2)), says("c", None)],
            thresholds=threshold,
        )
        routes = [[step.decision for step in each.route] for each in real.batch(requests)]
        assert routes == [[step.decision for step in each.route] for each in replayed.batch(requests)]
        assert {len(route) for route in routes} > {1}


# ---------------------------------------------------------------------- what a rung is given


def test_a_budget_of_the_request_holds_for_the_first_rung(request_: dict[str, Any]) -> None:
    own = small_reasoner(iterations=1)
    seen: list[ReasoningRequest] = []
    router = ConfidenceRouter(rungs=[own, own, says("c", None, seen)], thresholds=1.0)
    budgets: list[Budget] = []

    class Watch(Recorder):
        def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
            if kwargs["parent_run_id"] is not None and isinstance(outputs, ReasoningResult) and outputs.budget:
                budgets.append(outputs.budget)

    for request, config in (
        ({**request_, "budget": {"iterations": 0}}, {}),
        (request_, options(budget={"iterations": 0}, seed=3)),
    ):
        before = copy.deepcopy(request)
        router.invoke(request, {**config, "callbacks": [Watch()]})
        assert request["question"] == before["question"] and request.keys() == before.keys()
        assert [each.iterations for each in budgets] == [0, 1]
        assert seen[-1].budget is None and seen[-1].min_confidence is None
        budgets.clear()


def test_chat_models_get_messages_and_prompts_get_fields(request_: dict[str, Any]) -> None:
    given: list[Any] = []

    def note(value: Any) -> Any:
        given.append(value)
        return value

    class Watching(type(scripted())):  # type: ignore[misc]
        def _generate(self, messages: Any, *rest: Any, **kwargs: Any) -> Any:
            given.append(messages)
            return super()._generate(messages, *rest, **kwargs)

    chat = Watching(messages=iter([AIMessage("one"), AIMessage("two"), AIMessage("three")]))
    for rung in (chat, chat.with_retry(), chat | StrOutputParser()):
        ConfidenceRouter(rungs=[rung]).invoke({**request_, "system": "Be brief."})
        system, human = given.pop()
        assert system.text == "Be brief." and isinstance(human, HumanMessage) and human.text == CIRCLE
        assert [block["type"] for block in human.content_blocks] == ["image", "text"]

    prompt = ChatPromptTemplate.from_template("Answer: {question}")
    result = ConfidenceRouter(rungs=[prompt | (lambda value: note(value).to_string())]).invoke(request_)
    assert result.answer == f"Human: Answer: {CIRCLE}"


def test_a_latent_chat_model_keeps_its_confidence(request_: dict[str, Any]) -> None:
    chat = ChatLatentReasoner(reasoner=small_reasoner())
    result = ConfidenceRouter(rungs=[chat, never], thresholds=0.9).invoke(request_)
    assert result.confidence is not None and result.confidence_source == "pooled_probability"


# ---------------------------------------------------------------------- batch, async, stream


async def test_only_the_unsure_ones_go_on_together(
    request_: dict[str, Any], picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str]] = []
    join = InStep.join

    def noted(self: InStep, job: Job, *arguments: Any, **named: Any) -> Any:
        asked.append((job.budget.iterations, job.question))
        return join(self, job, *arguments, **named)

    monkeypatch.setattr(InStep, "join", noted)
    small = small_reasoner(iterations=0)
    router = ConfidenceRouter(rungs=[small, small.with_budget({"iterations": 1}), says("c", None)], thresholds=0.9)
    sure = {"image": picture, "question": CIRCLE}
    unsure = [{"image": picture, "question": q, "min_confidence": 1.0} for q in (CIRCLE, SQUARE)]
    bad = [{"image": "nowhere.png", "question": CIRCLE}, {"question": CIRCLE}]
    for run_async in (False, True):
        given = [sure, *unsure, *bad]
        answers: list[Any] = (
            await router.abatch(given, return_exceptions=True)
            if run_async
            else router.batch(given, return_exceptions=True)
        )
        assert sorted(asked) == [(0, CIRCLE), (0, CIRCLE), (0, SQUARE), (1, CIRCLE), (1, SQUARE)]
        asked.clear()
        assert [type(each) for each in answers[3:]] == [ImageNotFoundError, InputError]
        assert [each.answer for each in answers[:3]] == ["red", "c", "c"]
        assert [len(each.route) for each in answers[:3]] == [1, 3, 3]
    with pytest.raises(ImageNotFoundError):
        router.batch([sure, bad[0]])


async def test_sync_and_async_agree(request_: dict[str, Any]) -> None:
    router = ConfidenceRouter(rungs=[small_reasoner(0), small_reasoner(1)], thresholds=1.0)

    expected = essence(router.invoke(request_))
    assert essence(await router.ainvoke(request_)) == expected
    assert essence((await router.abatch([request_]))[0]) == expected
    assert essence([each async for each in router.astream(request_)][-1]) == expected


async def test_nothing_is_streamed_before_it_is_accepted_unless_asked(request_: dict[str, Any]) -> None:
    rungs = [small_reasoner(0), small_reasoner(0), says("c", None)]
    (only,) = ConfidenceRouter(rungs=rungs, thresholds=1.0).stream(request_)
    assert only.answer == "c"
    asked = ConfidenceRouter(rungs=rungs, thresholds=1.0, stream_steps=True)
    for items in (list(asked.stream(request_)), [each async for each in asked.astream(request_)]):
        *steps, result = items
        assert all(isinstance(step, ReasoningStep) for step in steps)
        assert [step.phase for step in steps] == ["prefill", "search", "decode"] * 2
        assert result.answer == "c"


def test_the_trace_is_clean(request_: dict[str, Any]) -> None:
    recorder = Recorder()
    rungs = [small_reasoner(0), says("b", 0.2), says("c", 0.3)]
    ConfidenceRouter(rungs=rungs, thresholds=1.0).invoke(request_, {"callbacks": [recorder]})
    assert not recorder.errors
    router, *below = recorder.starts
    assert router["name"] == "ConfidenceRouter"
    assert {each["parent_run_id"] for each in below} == {router["run_id"]}
    assert [each["tags"] for each in below] == [["rung:0"], ["rung:1"], ["rung:2"]]


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"rungs": []},
        {"rungs": ["a"]},
        {"rungs": LatentReasoner()},
        {"rungs": [never], "thresholds": 1.1},
        {"rungs": [never], "thresholds": -0.1},
        {"rungs": [never], "thresholds": float("nan")},
        {"rungs": [never], "thresholds": [0.5, 0.5]},
        {"rungs": [never], "costs": [1, 2]},
        {"rungs": [never], "costs": [-1]},
        {"rungs": [never], "max_seconds": 0},
        {"rungs": [never], "on_error": "ignore"},
        {"rungs": [never], "treshold": 0.5},
    ],
)
def test_wrong_fields_are_settings_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        ConfidenceRouter(**wrong)


async def test_a_rung_that_raises(request_: dict[str, Any]) -> None:
    def broken(request: Any) -> Any:
        raise ZeroDivisionError("1/0")

    router = ConfidenceRouter(rungs=[broken, says("b", None)])
    with pytest.raises(RungError, match=r"Rung 0 \(broken\) failed: ZeroDivisionError") as caught:
        router.invoke(request_)
    assert isinstance(caught.value.__cause__, ZeroDivisionError) and "with_retry" in caught.value.hint
    with pytest.raises(RungError):
        await router.ainvoke(request_)
    assert router.with_fallbacks([says("d", None)]).invoke(request_).answer == "d"

    patient = ConfidenceRouter(rungs=[broken, says("b", None)], on_error="next")
    result = patient.invoke(request_)
    assert decisions(result) == [("broken", "failed"), ("b", "accepted")]
    assert result.route[0].reason == "ZeroDivisionError"  # not what it says: that may hold a key
    with pytest.raises(RungError):
        ConfidenceRouter(rungs=[broken, broken], on_error="next").invoke(request_)


def test_a_rung_with_retries_and_fallbacks(request_: dict[str, Any]) -> None:
    tries = []

    def shaky(request: Any) -> str:
        tries.append(request)
        if len(tries) < 3:
            raise ConnectionError("not now")
        return "at last"

    rung = RunnableLambda(shaky).with_retry(stop_after_attempt=3, wait_exponential_jitter=False)
    assert ConfidenceRouter(rungs=[rung]).invoke(request_).answer == "at last"

    def broken(request: Any) -> Any:
        raise ConnectionError("never")

    spare = RunnableLambda(broken).with_fallbacks([says("spare", 0.95)])
    assert ConfidenceRouter(rungs=[spare]).invoke(request_).answer == "spare"


def test_a_wrong_request_is_wrong_for_all_rungs(request_: dict[str, Any]) -> None:
    router = ConfidenceRouter(rungs=[small_reasoner(), never], on_error="next")
    with pytest.raises(ImageNotFoundError):
        router.invoke({**request_, "image": "nowhere.png"})
    with pytest.raises(InputError):
        router.invoke({"question": CIRCLE})

    def short(request: Any) -> Any:  # but another model may have a longer context
        raise ContextLengthError("too long")

    assert ConfidenceRouter(rungs=[short, says("b", None)], on_error="next").invoke(request_).answer == "b"


def test_a_rung_that_answers_with_something_else(request_: dict[str, Any]) -> None:
    with pytest.raises(RungError, match="answered with int"):
        ConfidenceRouter(rungs=[lambda request: 7]).invoke(request_)
