"""``ConfidenceRouter``: accept an answer that is sure enough, else spend more budget, else ask another model, else
abstain.

A question climbs the rungs until an answer is accepted; what was tried, and why it did not do, is written into the
result. Nothing here is decided by exceptions, and a rung's run is never traced as an error for being unsure. This
module knows Runnables and results, not how an answer is found.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from langchain_core.callbacks import (
    AsyncCallbackManagerForChainRun,
    BaseCallbackManager,
    CallbackManagerForChainRun,
)
from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import BaseMessage
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.base import RunnableBindingBase, coerce_to_runnable
from langchain_core.runnables.config import patch_config, run_in_executor
from langchain_core.runnables.utils import ConfigurableFieldSpec, get_unique_config_specs
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from latent_tool.errors import CancelledError, InputError, LatentToolError, ModelError, RungError
from latent_tool.images.picture import Picture, open_pictures
from latent_tool.langchain.messages import as_request, messages_from_request, shown_input
from latent_tool.langchain.reasoner import OPTIONS_KEY, CallOptions, LatentReasoner
from latent_tool.langchain.runnable import Handover, RequestRunnable, first_step, with_images
from latent_tool.schema import ReasoningRequest, ReasoningResult, ReasoningStep, RouteStep
from latent_tool.settings import ImagePolicy, settings_error

__all__ = ["ConfidenceRouter"]

Threshold = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | Literal["calibrated"]
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass
class _Question:
    """One question on its way up: what was tried, and what it ended with."""

    handover: Handover
    options: CallOptions
    config: RunnableConfig
    run_manager: CallbackManagerForChainRun | AsyncCallbackManagerForChainRun
    route: list[RouteStep] = field(default_factory=list)
    best: ReasoningResult | None = None
    error: Exception | None = None
    end: ReasoningResult | Exception | None = None

    def request_for(self, rung: int) -> ReasoningRequest:
        """The request as a rung sees it: a budget of its own holds for the first rung alone, the others have theirs."""
        changes: dict[str, Any] = {"min_confidence": None}
        return self.handover.request.model_copy(update=changes if rung == 0 else {**changes, "budget": None})

    def config_for(self, rung: int, calibrated: bool) -> RunnableConfig:
        """The config of a rung: a child of this run, with the options of the call that concern it.

        ``calibrated``: whether the rung is to judge its answer by its own calibration.
        """
        changes: dict[str, Any] = {"min_confidence": "calibrated" if calibrated else None}
        options = self.options.but(**(changes if rung == 0 else {**changes, "budget": None}))
        callbacks: BaseCallbackManager = self.run_manager.get_child(f"rung:{rung}")
        return patch_config(self.config, callbacks=callbacks, configurable={OPTIONS_KEY: options})


@dataclass
class _Turn:
    """The questions that one rung is asked together, and its answers in the same order."""

    rung: int
    questions: list[_Question]
    answers: list[Any] = field(default_factory=list)


class ConfidenceRouter(RequestRunnable):
    """Asks one rung after another until an answer is sure enough.

        ConfidenceRouter(rungs=[reasoner, reasoner.with_budget("thorough"), chat_model], thresholds=0.8)

    A rung is a ``LatentReasoner``, a chat model (it is given messages with the images in them), a chain that begins
    with a prompt (it is given the request's fields as a dict) or any other Runnable or function that takes a
    ``ReasoningRequest``. It answers with a ``ReasoningResult``, a message or a text.

    An answer is accepted when its confidence, whatever its source, reaches the rung's threshold. An answer without a
    confidence, such as a chat model's, cannot be compared and is accepted unless it is empty. With the threshold
    ``"calibrated"`` the calibration of the rung's own reasoner decides, and a confidence that is not calibrated is not
    accepted. When no rung is left the result is that of the most confident rung, with ``accepted=False`` and
    ``abstained=True``. ``result.route`` tells what was tried, why it was not accepted, and what it cost.

    A request's own ``min_confidence`` stands for all thresholds; its ``budget`` holds for the first rung. The same goes
    for the options of a call (see ``LatentReasoner``). The caller's request is never changed. ``batch`` asks a rung all
    questions that are still open together.

    Raises:
        SettingsError: there are no rungs, or thresholds or costs are out of range or not one for every rung.

    Calls raise ``RungError`` when a rung fails with an error that is not this package's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    rungs: list[Runnable[Any, Any]] = Field(min_length=1, description="Who is asked, in this order.")
    thresholds: Threshold | list[Threshold | None] = Field(
        0.8,
        description="Confidence an answer must reach, one for all rungs or one for each; None accepts any, "
        "'calibrated' is the threshold of the rung's own calibration.",
    )
    costs: list[Cost] | None = Field(None, description="Cost of asking each rung, in units of your own; None: 1 each.")
    max_cost: Cost | None = Field(None, description="A rung that would take a question beyond this is skipped.")
    max_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="No rung is begun this many seconds after the call."
    )
    abstain: str | None = Field(
        None, description="Answer in place of an unsure one when nothing was accepted; None: the most confident one."
    )
    on_error: Literal["raise", "next"] = Field(
        "raise", description="A rung that fails: raise its error, or go on to the next. A wrong request always raises."
    )
    stream_steps: bool = Field(
        False, description="stream also yields the search steps of rungs whose answer may not be accepted."
    )
    image_policy: ImagePolicy = Field(
        ImagePolicy.local(), description="Which images may be opened for a chat model; reasoners have their own."
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise settings_error(type(self), error) from None

    @field_validator("rungs", mode="before")
    @classmethod
    def _coerce_rungs(cls, value: Any) -> Any:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError("must be a list of Runnables")
        try:
            return [coerce_to_runnable(rung) for rung in value]
        except TypeError:
            raise ValueError("every rung must be a Runnable or a function") from None

    @model_validator(mode="after")
    def _one_for_every_rung(self) -> Self:
        for name in ("thresholds", "costs"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != len(self.rungs):
                raise ValueError(f"there are {len(self.rungs)} rungs but {len(value)} {name}")
        thresholds = self.thresholds if isinstance(self.thresholds, list) else [self.thresholds] * len(self.rungs)
        for number, (rung, threshold) in enumerate(zip(self.rungs, thresholds, strict=True)):
            reasoner = first_step(rung)
            if threshold == "calibrated" and isinstance(reasoner, LatentReasoner):
                if reasoner.calibration is None:
                    raise ValueError(f"rung {number} has no calibration; give its reasoner one with calibration=")
                reasoner.calibration.require_threshold()
        return self

    # ------------------------------------------------------------------ what LangChain asks of a Runnable

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        return {"image_policy": self.image_policy.model_dump(mode="json")}

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        return get_unique_config_specs(spec for rung in self.rungs for spec in rung.config_specs)

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> ReasoningResult:
        """Route one question."""

        def route(value: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig) -> ReasoningResult:
            question = _question(input, config, run_manager)
            for _ in self._drive([question]):
                pass
            return _ended(question)

        return self._call_with_config(route, shown_input(input), config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> ReasoningResult:
        """``invoke`` through the rungs' async methods."""

        async def route(
            value: Any, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
        ) -> ReasoningResult:
            question = _question(input, config, run_manager)
            async for _ in self._adrive([question]):
                pass
            return _ended(question)

        return await self._acall_with_config(route, shown_input(input), config, **kwargs)

    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[ReasoningResult]:
        """Route several questions; every rung is asked those that are still open, together."""

        def route(
            values: list[Any], run_manager: list[CallbackManagerForChainRun], config: list[RunnableConfig]
        ) -> list[Exception | ReasoningResult]:
            questions = [_try_question(*each) for each in zip(inputs, config, run_manager, strict=True)]
            for _ in self._drive([each for each in questions if isinstance(each, _Question)]):
                pass
            return [_end_of(each) for each in questions]

        return self._batch_with_config(
            route, shown_input(inputs), config, return_exceptions=return_exceptions, **kwargs
        )

    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[ReasoningResult]:
        """``batch`` through the rungs' async methods."""

        async def route(
            values: list[Any], run_manager: list[AsyncCallbackManagerForChainRun], config: list[RunnableConfig]
        ) -> list[Exception | ReasoningResult]:
            questions = [_try_question(*each) for each in zip(inputs, config, run_manager, strict=True)]
            async for _ in self._adrive([each for each in questions if isinstance(each, _Question)]):
                pass
            return [_end_of(each) for each in questions]

        return await self._abatch_with_config(
            route, shown_input(inputs), config, return_exceptions=return_exceptions, **kwargs
        )

    def stream(  # type: ignore[override]  # steps come before the result, which is what the type parameter names
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[ReasoningStep | ReasoningResult]:
        """Yield the final result alone or, with ``stream_steps``, the steps of every rung before it."""

        def route(
            values: Iterator[Any], run_manager: CallbackManagerForChainRun, config: RunnableConfig
        ) -> Iterator[Any]:
            question = _question(input, config, run_manager)
            yield from self._drive([question], self.stream_steps)
            yield _ended(question)

        yield from self._transform_stream_with_config(iter([shown_input(input)]), route, config, **kwargs)

    async def astream(  # type: ignore[override]
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[ReasoningStep | ReasoningResult]:
        """``stream`` through the rungs' async methods."""

        async def route(
            values: AsyncIterator[Any], run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
        ) -> AsyncIterator[Any]:
            question = _question(input, config, run_manager)
            async for step in self._adrive([question], self.stream_steps):
                yield step
            yield _ended(question)

        async def only() -> AsyncIterator[Any]:
            yield shown_input(input)

        async for step in self._atransform_stream_with_config(only(), route, config, **kwargs):
            yield step

    # ------------------------------------------------------------------ asking

    def _drive(self, questions: list[_Question], steps: bool = False) -> Iterator[ReasoningStep]:
        """Ask the rungs until every question has its end, yielding the steps of single questions if wanted."""
        for turn in self._climb(questions):
            rung = self.rungs[turn.rung]
            inputs, configs = self._inputs(turn), self._configs(turn)
            if len(inputs) == 1:
                try:
                    if steps and _streams_steps(rung):
                        for answer in rung.stream(inputs[0], configs[0]):
                            if isinstance(answer, ReasoningStep):
                                yield answer
                    else:
                        answer = rung.invoke(inputs[0], configs[0])
                except Exception as error:
                    answer = error
                turn.answers = [answer]
            elif inputs:
                turn.answers = rung.batch(inputs, configs, return_exceptions=True)

    async def _adrive(self, questions: list[_Question], steps: bool = False) -> AsyncIterator[ReasoningStep]:
        """``_drive`` through the rungs' async methods."""
        for turn in self._climb(questions):
            rung = self.rungs[turn.rung]
            inputs = await run_in_executor(turn.questions[0].config, self._inputs, turn)
            configs = self._configs(turn)
            if len(inputs) == 1:
                try:
                    if steps and _streams_steps(rung):
                        async for answer in rung.astream(inputs[0], configs[0]):
                            if isinstance(answer, ReasoningStep):
                                yield answer
                    else:
                        answer = await rung.ainvoke(inputs[0], configs[0])
                except Exception as error:
                    answer = error
                turn.answers = [answer]
            elif inputs:
                turn.answers = await rung.abatch(inputs, configs, return_exceptions=True)

    def _configs(self, turn: _Turn) -> list[RunnableConfig]:
        return [each.config_for(turn.rung, self._threshold(each, turn.rung) == "calibrated") for each in turn.questions]

    def _inputs(self, turn: _Turn) -> list[Any]:
        """What the rung is given; a question whose images cannot be opened ends here and leaves the turn."""
        first = first_step(self.rungs[turn.rung])
        inputs: list[Any] = []
        for question in list(turn.questions):
            request = question.request_for(turn.rung)
            try:
                if isinstance(first, RequestRunnable):
                    inputs.append(request)
                elif isinstance(first, BaseLanguageModel):
                    opened = open_pictures(request.image_references, self.image_policy)
                    inputs.append(messages_from_request(request, [each.image for each in opened]))
                else:
                    request = self._for_strangers(request)
                    inputs.append(dict(request) if isinstance(first, BasePromptTemplate) else request)
            except LatentToolError as error:
                question.end = error
                turn.questions.remove(question)
        return inputs

    def _for_strangers(self, request: ReasoningRequest) -> ReasoningRequest:
        """The request for a rung that knows no policies: the caller's references, or pictures where a policy holds."""
        if not any(isinstance(each, Picture) and each.policy for each in request.image_references):
            images = [each.reference if isinstance(each, Picture) else each for each in request.image_references]
        else:
            images = [each.image for each in open_pictures(request.image_references, self.image_policy)]
        return with_images(request, images)

    # ------------------------------------------------------------------ deciding

    def _climb(self, questions: list[_Question]) -> Iterator[_Turn]:
        """One turn after another, to be answered before the next is taken; then every question has its end."""
        began = time.monotonic()
        for rung in range(len(self.rungs)):
            late = self.max_seconds is not None and time.monotonic() - began >= self.max_seconds
            turn = _Turn(rung, [each for each in questions if each.end is None and not self._skip(each, rung, late)])
            if turn.questions:
                before = time.monotonic()
                yield turn
                seconds = time.monotonic() - before
                for question, answer in zip(turn.questions, turn.answers, strict=True):
                    self._judge(question, rung, answer, seconds)
        for question in questions:
            if question.end is None:
                question.end = self._abstained(question)

    def _skip(self, question: _Question, rung: int, late: bool) -> bool:
        """Whether the rung would be more than the question may cost; says so in the route."""
        spent = sum(step.cost for step in question.route)
        if late:
            reason = f"more than {self.max_seconds:g} seconds have passed"
        elif self.max_cost is not None and spent + self._cost(rung) > self.max_cost:
            reason = f"its cost of {self._cost(rung):g} would go beyond {self.max_cost:g}; {spent:g} is spent"
        else:
            return False
        question.route.append(RouteStep(rung=rung, name=self.rungs[rung].get_name(), decision="skipped", reason=reason))
        return True

    def _judge(self, question: _Question, rung: int, answer: Any, seconds: float) -> None:
        """Accept an answer, or write down why not."""
        name, threshold = self.rungs[rung].get_name(), self._threshold(question, rung)
        tried: dict[str, Any] = {"rung": rung, "name": name, "cost": self._cost(rung), "seconds": seconds}
        result = answer if isinstance(answer, Exception) else _as_result(answer, rung, name)
        if isinstance(result, ReasoningResult):
            result = question.handover.with_warnings(result)
        if isinstance(result, Exception):
            question.error = _typed(result, rung, name)
            if self.on_error == "raise" or _is_the_callers(result):
                question.end = question.error
            reason = type(result).__name__
            if isinstance(result, LatentToolError):  # what others' errors say may hold addresses and keys
                reason += f": {result}"
            question.route.append(RouteStep(**tried, decision="failed", reason=reason))
            return
        accepted, reason = _decide(result, threshold)
        at = result.min_confidence if threshold == "calibrated" else threshold
        question.route.append(
            RouteStep(
                **tried,
                decision="accepted" if accepted else "unsure",
                reason=reason,
                answer=result.answer,
                confidence=result.confidence,
                confidence_source=result.confidence_source,
                threshold=at,
            )
        )
        if accepted:
            decided = {"accepted": True, "abstained": False, "min_confidence": at, "route": question.route}
            question.end = result.model_copy(update=decided)
        elif question.best is None or (result.confidence or 0) > (question.best.confidence or 0):
            question.best = result.model_copy(update={"min_confidence": at})

    def _abstained(self, question: _Question) -> ReasoningResult | Exception:
        """The end of a question that no rung answered well enough: its error if none answered at all."""
        best = question.best
        if best is None and question.error is not None:
            return question.error
        if best is None:
            best = ReasoningResult(answer="", raw_text="", confidence=None, confidence_source="unscored")
        decided: dict[str, Any] = {"accepted": False, "abstained": True, "route": question.route}
        if self.abstain is not None:
            decided["answer"] = self.abstain
        return best.model_copy(update=decided)

    def _threshold(self, question: _Question, rung: int) -> float | Literal["calibrated"] | None:
        for own in (question.handover.request.min_confidence, question.options.min_confidence):
            if own is not None:
                return own
        return self.thresholds[rung] if isinstance(self.thresholds, list) else self.thresholds

    def _cost(self, rung: int) -> float:
        return 1.0 if self.costs is None else self.costs[rung]


def _question(
    value: Any,
    config: RunnableConfig,
    run_manager: CallbackManagerForChainRun | AsyncCallbackManagerForChainRun,
) -> _Question:
    request = as_request(value)
    pictures = [each if isinstance(each, Picture) else Picture(each) for each in request.image_references]
    handover = Handover(with_images(request, [*pictures]), tuple(pictures))
    return _Question(handover, CallOptions.of(config), config, run_manager)


def _try_question(
    value: Any,
    config: RunnableConfig,
    run_manager: CallbackManagerForChainRun | AsyncCallbackManagerForChainRun,
) -> _Question | Exception:
    try:
        return _question(value, config, run_manager)
    except LatentToolError as error:
        return error


def _end_of(question: _Question | Exception) -> ReasoningResult | Exception:
    if isinstance(question, Exception):
        return question
    assert question.end is not None
    return question.end


def _ended(question: _Question) -> ReasoningResult:
    end = _end_of(question)
    if isinstance(end, Exception):
        raise end
    return end


def _streams_steps(rung: Runnable[Any, Any]) -> bool:
    return isinstance(rung, RunnableBindingBase | LatentReasoner | ConfidenceRouter) and isinstance(
        first_step(rung), LatentReasoner | ConfidenceRouter
    )


def _as_result(answer: Any, rung: int, name: str) -> ReasoningResult | Exception:
    """A rung's answer as a result; a chat model's reply has no confidence unless its metadata holds one."""
    if isinstance(answer, ReasoningResult):
        return answer
    if isinstance(answer, BaseMessage):
        metadata = answer.response_metadata
        own = metadata.get("model_provider") == "latent_tool"
        scored = own and metadata.get("confidence") is not None
        return ReasoningResult(
            answer=answer.text.strip(),
            raw_text=answer.text,
            confidence=metadata["confidence"] if scored else None,
            confidence_source=metadata["confidence_source"] if scored else "unscored",
            **{name: metadata.get(name) if own else None for name in ("accepted", "abstained", "min_confidence")},
            model=metadata.get("model_name") or name,
        )
    if isinstance(answer, str):
        return ReasoningResult(
            answer=answer.strip(), raw_text=answer, confidence=None, confidence_source="unscored", model=name
        )
    return RungError(
        f"Rung {rung} ({name}) answered with {type(answer).__name__}.",
        "A rung must answer with a ReasoningResult, a message or a text; put a parser behind it.",
    )


def _decide(result: ReasoningResult, threshold: float | Literal["calibrated"] | None) -> tuple[bool, str]:
    """Whether a result is accepted, and why, in words."""
    if not result.answer.strip():
        return False, "the answer is empty"
    if result.confidence is None:
        if result.abstained:
            return False, "the rung abstained"
        return True, "the answer has no confidence to compare"
    if threshold is None:
        return True, "any confidence is accepted here"
    if threshold == "calibrated":
        if result.confidence_source != "calibrated" or result.accepted is None or result.min_confidence is None:
            return False, "the confidence is not calibrated"
        compared = "reaches" if result.accepted else "is below"
        return (
            result.accepted,
            f"the confidence {result.confidence:.3f} {compared} {result.min_confidence:g}, calibrated",
        )
    if result.confidence >= threshold:
        return True, f"the confidence {result.confidence:.3f} reaches {threshold:g}"
    return False, f"the confidence {result.confidence:.3f} is below {threshold:g}"


def _is_the_callers(error: Exception) -> bool:
    """Whether no other rung could do better: the request is wrong, or was given up; not so a short context."""
    return isinstance(error, CancelledError) or (isinstance(error, InputError) and not isinstance(error, ModelError))


def _typed(error: Exception, rung: int, name: str) -> Exception:
    """An error of this package as it is, any other as the cause of a ``RungError``."""
    if isinstance(error, LatentToolError):
        return error
    wrapped = RungError(
        f"Rung {rung} ({name}) failed: {type(error).__name__}.",
        "Mend the rung, give it with_retry() or with_fallbacks(), or use on_error='next'.",
    )
    wrapped.__cause__ = error
    return wrapped
