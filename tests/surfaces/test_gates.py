"""A threshold that was set is never lost: the table of precedence, every way to bind options, and what rungs answer."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
import threading
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableConfig, RunnableLambda, RunnablePassthrough
from langchain_core.tracers import BaseTracer
from PIL import Image
from recorder import options
from scripted_agents import CIRCLE, scripted, small_reasoner

from latent_tool import (
    Budget,
    ChatLatentReasoner,
    ConfidenceRouter,
    LatentReasoner,
    LatentReasoningTool,
    ReasoningRequest,
    ReasoningResult,
    RemoteReasoner,
)
from latent_tool.errors import CancelledError, RungError, SettingsError
from latent_tool.integrations.langgraph import ConfidenceMiddleware, reasoning_node
from latent_tool.langchain.call import CallOptions, stricter
from latent_tool.langchain.image_tool import ImageTool, describe
from latent_tool.langchain.rungs import PROMPT_VARIABLES

pytestmark = pytest.mark.disable_socket

DOCS = (Path(__file__).parents[2] / "docs" / "langchain.md").read_text()


@pytest.fixture
def request_(picture: Image.Image) -> dict[str, Any]:
    return {"image": picture, "question": CIRCLE}


def quick(**fields: Any) -> LatentReasoner:
    return small_reasoner(iterations=0, **fields)


# ---------------------------------------------------------------------- the table of the documentation

ROW = re.compile(r"^\| `(\w+)` \| (.+) \|$", re.MULTILINE)


def precedence() -> dict[str, dict[str, str]]:
    """Option -> place -> rank, as the documentation has it."""
    head = re.search(r"^\| option \| (.+) \|$", DOCS, re.MULTILINE)
    assert head is not None
    places = head[1].split(" | ")
    return {
        name: dict(zip(places, ranks.split(" | "), strict=True))
        for name, ranks in ROW.findall(DOCS[head.start() :])
        if name in CallOptions.model_fields
    }


VALUES: dict[str, tuple[Any, Any]] = {
    "seed": (3, 4),
    "min_confidence": (0.25, 0.75),
    "budget": (Budget(iterations=0, patience=1), Budget(iterations=0, patience=2)),
}


def ask(reasoner: Any, request: dict[str, Any], option: str, named: dict[str, Any]) -> Any:
    """What the question was asked with, when the option is named in these places."""
    field = {"thresholds": "min_confidence", "first_budget": "budget"}
    own = {
        name: named["constructor"]
        for name in type(reasoner).model_fields
        if "constructor" in named and field.get(name, name) == option
    }
    reasoner = type(reasoner)(**{**dict(reasoner), **own})
    if "bound" in named:
        reasoner = reasoner.with_config(options(**{option: named["bound"]}))
    config = options(**{option: named["config"]}) if "config" in named else {}
    request = {**request, option: named["request"]} if "request" in named else request
    keywords = {option: named["keyword"]} if "keyword" in named else {}
    return getattr(reasoner.invoke(request, config, **keywords), option)


@pytest.mark.parametrize("kind", ["reasoner", "router"])
@pytest.mark.parametrize("option", list(VALUES))
def test_the_table_of_precedence(kind: str, option: str, request_: dict[str, Any]) -> None:
    reasoner: Any = quick() if kind == "reasoner" else ConfidenceRouter(rungs=[quick()], thresholds=None)
    table = precedence()[option]
    assert set(table) == {"request", "keyword", "config", "bound", "constructor"}
    for one, other in combinations(table, 2):
        for values in (VALUES[option], VALUES[option][::-1]):
            named = dict(zip((one, other), values, strict=True))
            if "stricter" in table[one] and "stricter" in table[other]:
                expected = max(values)
            else:
                expected = named[min((one, other), key=lambda place: table[place])]
            assert ask(reasoner, request_, option, named) == expected, (one, other, values)


def test_the_table_knows_every_option() -> None:
    assert set(precedence()) == set(CallOptions.model_fields)
    assert re.findall(r"^\| `(image\w*|messages)` \| (.+) \|$", DOCS, re.MULTILINE) == list(PROMPT_VARIABLES.items())


def test_an_event_stops_the_call_wherever_it_is_named(request_: dict[str, Any]) -> None:
    stop, other = threading.Event(), threading.Event()
    stop.set()
    for ask in (
        lambda: quick().invoke(request_, cancelled=stop),
        lambda: quick().invoke(request_, options(cancelled=stop)),
        lambda: quick().with_config(options(cancelled=stop)).invoke(request_, options(seed=1)),
        lambda: quick().bind(cancelled=stop).with_config(tags=["x"]).invoke(request_, options(seed=1)),
        lambda: quick().with_config(options(cancelled=other)).invoke(request_, options(cancelled=stop)),
    ):
        with pytest.raises(CancelledError):
            ask()


# ---------------------------------------------------------------------- no way to push a threshold out

GATE = {"min_confidence": 1.0}
BIND = {
    "with_config": lambda reasoner: reasoner.with_config(configurable={"latent_reasoner": GATE}),
    "options": lambda reasoner: reasoner.with_config(options(min_confidence=1.0, seed=9)),
    "single key": lambda reasoner: reasoner.with_config(configurable={"latent_reasoner_min_confidence": 1.0}),
    "bind": lambda reasoner: reasoner.bind(min_confidence=1.0),
    "twice": lambda reasoner: reasoner.with_config(options(**GATE)).with_config(options(seed=2)),
    "tags before": lambda reasoner: reasoner.with_config(tags=["x"]).with_config(options(**GATE)),
    "tags after": lambda reasoner: reasoner.with_config(options(**GATE)).with_config(tags=["x"]),
    "other keys after": lambda r: r.with_config(options(**GATE)).with_config(configurable={"thread_id": "1"}),
    "weaker after": lambda reasoner: reasoner.with_config(options(**GATE)).with_config(options(min_confidence=0.1)),
    "none after": lambda reasoner: reasoner.bind(min_confidence=1.0).bind(min_confidence=None),
    "retry": lambda reasoner: reasoner.with_config(options(**GATE)).with_retry(stop_after_attempt=1),
    "retry before": lambda reasoner: reasoner.with_retry(stop_after_attempt=1).with_config(options(**GATE)),
    "fallbacks before": lambda reasoner: reasoner.with_fallbacks([reasoner]).with_config(options(**GATE)),
    "listeners before": lambda reasoner: reasoner.with_listeners().with_config(options(**GATE)),
    "types before": lambda reasoner: reasoner.with_types().with_config(options(**GATE)),
    "in a chain": lambda reasoner: RunnablePassthrough() | reasoner.with_config(options(**GATE)),
    "a chain": lambda r: (RunnablePassthrough() | r).with_config(configurable={"latent_reasoner_min_confidence": 1.0}),
    "configurable": lambda reasoner: reasoner.with_config(options(**GATE)).bound.configurable_fields(
        seed=ConfigurableField(id="seed")
    ),
    "pickled": lambda reasoner: pickle.loads(pickle.dumps(reasoner.with_config(options(**GATE)))),
    "constructor": lambda reasoner: type(reasoner)(**{**dict(reasoner), "min_confidence": 1.0}),
}


@pytest.mark.parametrize("way", list(BIND))
async def test_a_partial_dict_drops_no_threshold(way: str, request_: dict[str, Any]) -> None:
    gated = BIND[way](quick())
    call: RunnableConfig = {"configurable": {"latent_reasoner": {"seed": 5}}}
    results = [
        gated.invoke(request_, call),
        await gated.ainvoke(request_, call),
        *gated.batch([request_] * 2, [call, {"tags": ["y"]}]),
        *await gated.abatch([request_], call),
        list(gated.stream(request_, call))[-1],
        [each async for each in gated.astream(request_, call)][-1],
        RunnableLambda(lambda each: gated.invoke(each, call)).invoke(request_),
    ]
    for result in results:
        assert (result.accepted, result.min_confidence) == (False, 1.0)
    assert results[0].seed == 5
    named = gated.invoke(request_, options(min_confidence=0.0))  # who names it may lower it
    lowered = (False, 1.0) if way == "a chain" else (True, 0.0)  # two keys of one config: the stricter
    assert (named.accepted, named.min_confidence) == lowered
    assert gated.invoke({**request_, "min_confidence": 0.0}).accepted is True


def test_a_threshold_of_the_run_around_holds(request_: dict[str, Any]) -> None:
    """A function in a run that passes a config of its own replaces LangChain's ``configurable`` whole."""
    inner = RunnableLambda(lambda each: quick().invoke(each, options(seed=5)))
    result = inner.invoke(request_, options(min_confidence=1.0, seed=6))
    assert (result.accepted, result.seed) == (False, 5)
    weaker = RunnableLambda(lambda each: quick().invoke(each, options(min_confidence=0.1)))
    assert weaker.invoke(request_, options(min_confidence=1.0)).accepted is False


def test_a_bound_budget_stays(request_: dict[str, Any]) -> None:
    bound = small_reasoner().with_config(options(budget={"iterations": 0, "max_new_tokens": 9}))
    assert bound.invoke(request_, options(seed=1)).budget == Budget(iterations=0, max_new_tokens=9)
    level = bound.invoke(request_, options(budget="quick")).budget
    assert level == Budget.level("quick").but(max_new_tokens=9)


@pytest.mark.parametrize("wrong", [{"sed": 1}, {"stop": ["x"]}, {"seed": -1}, {"min_confidence": 2}])
def test_wrong_keywords_are_settings_errors(wrong: dict[str, Any], request_: dict[str, Any]) -> None:
    for reasoner in (quick(), ConfidenceRouter(rungs=[quick()]), RemoteReasoner("http://host")):
        with pytest.raises(SettingsError):
            reasoner.bind(**wrong)
        with pytest.raises(SettingsError):
            reasoner.invoke(request_, **wrong)
        with pytest.raises(SettingsError):
            asyncio.run(reasoner.ainvoke(request_, **wrong))
        with pytest.raises(SettingsError):
            reasoner.batch([request_], **wrong)
        with pytest.raises(SettingsError):
            reasoner.with_config(options(**wrong) if "stop" not in wrong else options(sed=1))
    assert quick().bind(seed=4).invoke(request_).seed == 4


def test_tools_and_chat_models_keep_what_is_bound_to_them(request_: dict[str, Any], picture: Image.Image) -> None:
    from latent_tool.langchain.messages import image_block

    tool = LatentReasoningTool(reasoner=quick())
    asked = {"question": CIRCLE, "image": "data:image/png;base64," + image_block(picture)["base64"]}
    call = {"type": "tool_call", "name": tool.name, "id": "1", "args": asked}
    gated = (
        tool.with_config(options(**GATE)),
        LatentReasoningTool(reasoner=quick().with_config(options(**GATE))),
        LatentReasoningTool(reasoner=quick(), min_confidence=1.0),
    )
    for each in gated:
        assert each.invoke(call, options(seed=3)).artifact["accepted"] is False
        assert each.invoke(call, options(min_confidence=0.1)).artifact["accepted"] is True
    strict = LatentReasoningTool(reasoner=quick(), min_confidence=0.1)
    assert strict.invoke(call, options(**GATE)).artifact["accepted"] is False  # the run's own word counts
    chat = ChatLatentReasoner(reasoner=quick())
    message = [("human", [image_block(picture), {"type": "text", "text": CIRCLE}])]
    for each in (chat.with_config(options(**GATE)), chat.bind(**GATE)):
        assert each.invoke(message, options(seed=3)).response_metadata["accepted"] is False


def test_a_router_keeps_the_stricter_threshold_of_every_rung(request_: dict[str, Any]) -> None:
    router = ConfidenceRouter(rungs=[quick(), quick(), quick()], thresholds=[0.2, None, 0.9])
    assert router.bind(min_confidence=0.5).bound.thresholds == [0.5, 0.5, 0.9]
    gated = router.with_config(options(**GATE))
    assert gated.invoke(request_, options(seed=5)).accepted is False
    result = gated.with_config(options(seed=7)).invoke(request_, options(min_confidence=0.0))
    assert (result.accepted, result.seed, len(result.route)) == (True, 7, 1)


def test_stricter() -> None:
    assert stricter(None, None) is None
    assert stricter(0.2, None) == stricter(None, 0.2) == 0.2
    assert stricter(0.2, 0.3) == stricter(0.3, 0.2) == 0.3
    assert stricter("calibrated", 0.5, 0.4) == 0.5 and stricter(0.5, "calibrated", 0.6) == "calibrated"
    assert stricter("calibrated", "calibrated") == stricter(None, "calibrated") == "calibrated"
    for pair in (("calibrated", 0.5), (0.5, "calibrated")):
        with pytest.raises(SettingsError, match="calibration is not known"):
            stricter(*pair)


# ---------------------------------------------------------------------- rungs


def test_a_rung_that_abstains_is_not_accepted(request_: dict[str, Any]) -> None:
    strict = quick(min_confidence=1.0)
    result = ConfidenceRouter(rungs=[strict], thresholds=0.5).invoke(request_)
    assert (result.accepted, result.min_confidence) == (False, 1.0)
    assert "its own 1" in result.route[0].reason
    inner = ConfidenceRouter(rungs=[quick()], thresholds=1.0, abstain="I cannot tell.")
    outer = ConfidenceRouter(rungs=[inner, RunnableLambda(lambda request: "red")], thresholds=0.5)
    assert [step.decision for step in outer.invoke(request_).route] == ["unsure", "accepted"]
    assert ConfidenceRouter(rungs=[strict]).invoke({**request_, "min_confidence": 0.5}).accepted is True


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tool: tool,
        lambda tool: tool.with_retry(),
        lambda tool: tool.with_config(tags=["x"]),
        lambda tool: tool.with_fallbacks([tool]),
        lambda tool: tool | StrOutputParser(),
        lambda tool: RunnableLambda(lambda request: {"question": "?"}) | tool,
        lambda tool: quick().with_fallbacks([tool]),
    ],
)
def test_a_tool_is_no_rung_and_no_reasoner(wrap: Any) -> None:
    wrong = wrap(LatentReasoningTool(reasoner=quick()))
    for make in (
        lambda: ConfidenceRouter(rungs=[wrong]),
        lambda: ConfidenceMiddleware(fallback=wrong),
        lambda: reasoning_node(wrong),
        lambda: ImageTool(reasoner=wrong),
        lambda: LatentReasoningTool(reasoner=wrong),
    ):
        with pytest.raises(SettingsError, match="is a tool"):
            make()


@pytest.mark.parametrize(
    "answer",
    [
        ToolMessage("The arguments are not valid.", tool_call_id="1", status="error"),
        ToolMessage("The arguments are not valid.", tool_call_id="1"),
        AIMessage("I cannot help.", response_metadata={"finish_reason": "content_filter"}),
        AIMessage("I cannot help.", additional_kwargs={"refusal": "no"}),
    ],
)
def test_an_error_text_is_no_answer(answer: Any, request_: dict[str, Any]) -> None:
    rungs = [RunnableLambda(lambda request: answer), RunnableLambda(lambda request: "red")]
    result = ConfidenceRouter(rungs=rungs, on_error="next").invoke(request_)
    assert [step.decision for step in result.route] == ["failed", "accepted"] and result.answer == "red"
    with pytest.raises(RungError):
        ConfidenceRouter(rungs=rungs).invoke(request_)


def logprobs(*values: Any, text: str = "red") -> AIMessage:
    content = [{"token": text, "logprob": value} for value in values]
    return AIMessage(text, response_metadata={"logprobs": {"content": content}})


def test_log_probabilities_are_a_confidence(request_: dict[str, Any]) -> None:
    for message, expected in ((logprobs(-3.0, -0.1), 0.045), (logprobs(-0.01), 0.990), (logprobs(0.3), 1.0)):
        result = ConfidenceRouter(rungs=[scripted(message)], thresholds=0.9).invoke(request_)
        assert result.confidence == pytest.approx(expected, abs=1e-3)
        assert result.accepted is (expected > 0.9) and result.confidence_source == "answer_probability"
    for odd in (logprobs(), logprobs(None), logprobs("x"), logprobs(float("nan")), logprobs(True)):
        result = ConfidenceRouter(rungs=[scripted(odd)], thresholds=0.9).invoke(request_)
        assert result.confidence is None and any("threshold was not applied" in each for each in result.warnings)


def test_scorers_give_a_rung_a_confidence(request_: dict[str, Any]) -> None:
    def half(request: ReasoningRequest, result: ReasoningResult) -> float:
        assert request.question == CIRCLE and result.answer == "red"
        return 0.5

    def routed(scorer: Any, **fields: Any) -> ReasoningResult:
        rungs = [RunnableLambda(lambda request: "red")]
        return ConfidenceRouter(rungs=rungs, thresholds=0.9, scorers=[scorer], **fields).invoke(request_)

    assert (routed(half).accepted, routed(half).confidence) == (False, 0.5)
    told = routed(lambda request, result: None)
    assert told.accepted is True and "the threshold 0.9 was not applied" in told.route[0].reason
    assert told.warnings and routed(None, unscored="unsure").accepted is False
    for broken in (lambda request, result: 2.0, lambda request, result: "sure", lambda request, result: 1 / 0):
        with pytest.raises(RungError, match="scorer"):
            routed(broken)
    for wrong in ([half, half], [7], ["words"]):
        with pytest.raises(SettingsError):
            ConfidenceRouter(rungs=[quick()], scorers=wrong)


IMAGE = {"type": "image", "base64": "{image_base64}", "mime_type": "{image_mime_type}"}
URI = {"type": "image_url", "image_url": {"url": "{image}"}}


@pytest.mark.parametrize(
    "prompt",
    [
        ChatPromptTemplate.from_messages([("human", [{"type": "text", "text": "{question}"}, IMAGE])]),
        ChatPromptTemplate.from_messages([("human", [{"type": "text", "text": "{question}"}, URI])]),
        ChatPromptTemplate.from_messages([("system", "Be brief."), ("placeholder", "{messages}")]),
    ],
)
def test_prompts_show_the_picture(prompt: Any, request_: dict[str, Any], picture: Image.Image) -> None:
    seen: list[Any] = []
    rung = prompt | (lambda value: seen.append(value.to_messages()) or "red")
    assert ConfidenceRouter(rungs=[rung]).invoke(request_).answer == "red"
    result = small_reasoner(iterations=0).invoke(seen[0])  # what the prompt shows is the picture
    assert result.answer == "red" and result.image_sizes == [picture.size]
    assert "PIL" not in str(seen)


def test_a_text_prompt_never_shows_an_object(request_: dict[str, Any]) -> None:
    rung = PromptTemplate.from_template("{question} {image} {images}") | (lambda value: value.to_string())
    answer = ConfidenceRouter(rungs=[rung]).invoke(request_).answer
    assert "data:image/png;base64," in answer and "<PIL" not in answer and "Picture" not in answer
    one = PromptTemplate.from_template("{question} {image}") | (lambda value: value.to_string())
    two = {"images": [request_["image"]] * 2, "question": CIRCLE}
    with pytest.raises(RungError, match="shows one image"):
        ConfidenceRouter(rungs=[one]).invoke(two)


class Keeps(BaseTracer):
    """Keeps all that a run records."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[str] = []

    def _persist_run(self, run: Any) -> None:
        pass

    def _on_run_create(self, run: Any) -> None:
        raw = {
            key: each.model_dump() if isinstance(each, ReasoningRequest) else each for key, each in run.inputs.items()
        }
        self.inputs.append(str(raw))


async def test_the_run_of_a_function_rung_records_no_secret() -> None:
    seen: list[Any] = []
    router = ConfidenceRouter(rungs=[lambda request: seen.append(request.image) or "red"])
    tracer = Keeps()
    for image in ("https://user:secret@example.org/a.png?token=secret", b"secret bytes"):
        router.invoke({"image": image, "question": "?"}, {"callbacks": [tracer]})
        await router.ainvoke({"image": image, "question": "?"}, {"callbacks": [tracer]})
        router.batch([{"image": image, "question": "?"}] * 2, {"callbacks": [tracer]})
        assert seen == [image] * 4
        seen.clear()
    assert len(tracer.inputs) == 16 and "secret" not in str(tracer.inputs)


# ---------------------------------------------------------------------- saved objects

OLD = {
    "reasoner": '{"lc": 1, "type": "constructor", "id": ["latent_tool", "reasoner", "LatentReasoner"], '
    '"kwargs": {"model": "some/model", "seed": 3, "budget": {"iterations": 3}, "min_confidence": 0.7}}',
    "remote": '{"lc": 1, "type": "constructor", "id": ["latent_tool", "remote", "RemoteReasoner"], '
    '"kwargs": {"url": "http://host:1", "seed": 3, "image_policy": {"files": "any"}}}',
    "router": '{"lc": 1, "type": "constructor", "id": ["latent_tool", "router", "ConfidenceRouter"], "kwargs": '
    '{"rungs": [{"lc": 1, "type": "constructor", "id": ["latent_tool", "reasoner", "LatentReasoner"], "kwargs": '
    '{"seed": 3}}], "thresholds": 0.9, "image_policy": {"files": "any"}}}',
    "chat": '{"lc": 1, "type": "constructor", "id": ["latent_tool", "chat_model", "ChatLatentReasoner"], "kwargs": '
    '{"reasoner": {"lc": 1, "type": "constructor", "id": ["latent_tool", "reasoner", "LatentReasoner"], "kwargs": '
    '{"seed": 3}}}}',
}
SAVED = {
    "reasoner": LatentReasoner(model="some/model", seed=3, budget={"iterations": 3}, min_confidence=0.7),
    "remote": RemoteReasoner("http://host:1", seed=3),
    "router": ConfidenceRouter(rungs=[LatentReasoner(seed=3)], thresholds=0.9),
    "chat": ChatLatentReasoner(reasoner=LatentReasoner(seed=3)),
}


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
@pytest.mark.parametrize("kind", list(OLD))
def test_what_was_saved_before_the_modules_moved_is_loaded(kind: str) -> None:
    allowed = [LatentReasoner, RemoteReasoner, ConfidenceRouter, ChatLatentReasoner]
    assert load(json.loads(OLD[kind]), allowed_objects=allowed, valid_namespaces=["latent_tool"]) == SAVED[kind]
    again = dumpd(SAVED[kind])
    assert again["id"] == json.loads(OLD[kind])["id"]
    assert load(again, allowed_objects=allowed, valid_namespaces=["latent_tool"]) == SAVED[kind]


# ---------------------------------------------------------------------- the tool's advice


def test_only_what_is_left_is_advised() -> None:
    unsure = ReasoningResult(
        answer="red", raw_text="red", confidence=0.2, confidence_source="reward", accepted=False, min_confidence=0.5
    )
    assert "budget='thorough'" in describe(unsure)
    spent = unsure.model_copy(update={"budget": Budget.level("thorough").but(deadline_s=5)})
    assert "thorough" not in describe(spent) and "NOT RELIABLE" in describe(spent)
    assert "thorough" not in describe(unsure, spent=True)


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_beginning_of_an_answer_is_not_accepted(picture: Image.Image, tokens: int) -> None:
    """However sure it is: "can" may become "cannot tell", and "blue" may become "blue square"."""
    budget = Budget(max_new_tokens=tokens, iterations=1)
    result = LatentReasoner(budget=budget).invoke(
        {"image": picture, "question": "what is right of the circle?", "min_confidence": 0.01}
    )
    if tokens == 1:
        assert result.finish_reason == "length"
    assert result.accepted is (result.finish_reason == "stop")
    assert result.accepted or "cut" in (result.abstain_reason or "")


@pytest.mark.parametrize(("own", "strictest"), [(0.5, "calibrated"), (0.95, 0.95)])
def test_of_a_bound_calibrated_threshold_and_the_tools_number_the_stricter_stays(
    own: float, strictest: float | str
) -> None:
    tool = LatentReasoningTool(reasoner=LatentReasoner(calibration="embedded"), min_confidence=own)
    bound = tool._with_options(CallOptions(min_confidence="calibrated"))
    assert bound.min_confidence is None and bound.reasoner.min_confidence == strictest
    blind = LatentReasoningTool(reasoner=ConfidenceRouter(rungs=[tool.reasoner]), min_confidence=own)
    with pytest.raises(SettingsError, match="calibration is not known"):
        blind._with_options(CallOptions(min_confidence="calibrated"))


def test_a_rung_that_abstains_from_options_is_followed_by_the_next(picture: Image.Image) -> None:
    router = ConfidenceRouter(rungs=[RunnableLambda(lambda _: "I cannot tell."), RunnableLambda(lambda _: "red")])
    result = router.invoke({"image": picture, "question": CIRCLE, "options": ["red", "blue"]})
    assert result.answer == "red" and len(result.route) == 2


def test_a_router_that_scores_is_not_dumped_without_its_scores() -> None:
    router = ConfidenceRouter(rungs=[small_reasoner()], thresholds=0.9, scorers=[lambda _answer: 0.1])
    assert dumpd(router)["type"] == "not_implemented"
    assert dumpd(ConfidenceRouter(rungs=[small_reasoner()], thresholds=0.9))["type"] == "constructor"
