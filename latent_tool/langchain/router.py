"""``ConfidenceRouter``: accept an answer that is sure enough, else spend more budget, else ask another model, else
abstain.

A question climbs the rungs until an answer is accepted; what was tried, and why it did not do, is written into the
result. Nothing here is decided by exceptions, and a rung's run is never traced as an error for being unsure. This
module knows Runnables and results, not how an answer is found.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from langchain_core.callbacks import BaseCallbackManager
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.base import RunnableBindingBase, coerce_to_runnable
from langchain_core.runnables.config import run_in_executor
from langchain_core.runnables.utils import ConfigurableFieldSpec, get_unique_config_specs
from pydantic import ConfigDict, Field, SkipValidation, ValidationError, field_validator, model_validator

from latent_tool.errors import CancelledError, InputError, LatentToolError, ModelError, RungError
from latent_tool.images.picture import Picture
from latent_tool.langchain.call import (
    OPTIONS_KEY,
    CallOptions,
    Settled,
    Threshold,
    first_given,
    split_options,
    stricter,
)
from latent_tool.langchain.messages import as_request
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.langchain.rungs import Scorer, as_result, input_for, quiet, scored
from latent_tool.langchain.runnable import (
    Handover,
    Item,
    Question,
    RequestRunnable,
    first_step,
    refuse_tools,
    with_images,
)
from latent_tool.schema import ReasoningRequest, ReasoningResult, ReasoningStep, RouteStep
from latent_tool.settings import Budget, BudgetLevel, ImagePolicy
from latent_tool.validation import settings_error

__all__ = ["ConfidenceRouter"]

RungThreshold = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | Literal["calibrated"]
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass
class _Climber:
    """One question on its way up: what was tried, and what it ended with."""

    handover: Handover
    options: CallOptions
    question: Question
    route: list[RouteStep] = field(default_factory=list)
    best: ReasoningResult | None = None
    error: Exception | None = None
    end: ReasoningResult | Exception | None = None

    @property
    def named(self) -> Threshold:
        """The threshold that the request or the call names, which stands for all of the router's."""
        own: Threshold = self.handover.request.min_confidence
        return self.options.min_confidence if own is None else own

    def request_for(self, rung: int) -> ReasoningRequest:
        """Return the request as a rung sees it: a budget of its own holds for the first rung alone, the others have
        theirs.
        """
        changes: dict[str, Any] = {"min_confidence": None}
        return self.handover.request.model_copy(update=changes if rung == 0 else {**changes, "budget": None})

    def config_for(self, rung: int, threshold: Threshold) -> RunnableConfig:
        """Return the config of a rung: a child of this run, with the options of the call that concern it."""
        named = threshold if threshold == "calibrated" else self.named
        options = {**self.options.given, "min_confidence": named, **({"budget": None} if rung else {})}
        _, rest = split_options(self.question.config)
        configurable = {**rest.get("configurable", {}), OPTIONS_KEY: Settled(**options)}
        callbacks: BaseCallbackManager = self.question.run_manager.get_child(f"rung:{rung}")
        return {**self.question.config, "callbacks": callbacks, "configurable": configurable}


@dataclass
class _Turn:
    """The questions that one rung is asked together, and its answers in the same order."""

    rung: int
    questions: list[_Climber]
    answers: list[Any] = field(default_factory=list)


class ConfidenceRouter(RequestRunnable):
    """Asks one rung after another until an answer is sure enough.

        ConfidenceRouter(rungs=[reasoner, reasoner.with_budget("thorough"), chat_model], thresholds=0.8)

    A rung is a ``LatentReasoner``, a chat model (it is given messages with the images in them), a chain that begins
    with a prompt (it is given the request's fields and the images as text: see docs/langchain.md) or any other Runnable
    or function that takes a ``ReasoningRequest``. It answers with a ``ReasoningResult``, a message or a text. A tool is
    refused: its errors come back as text.

    An answer is accepted when its confidence, whatever its source, reaches the rung's threshold and the rung itself did
    not abstain. A message with log-probabilities has the probability of its text as its confidence; ``scorers`` give
    others one. An answer without a confidence cannot be compared: by default it is accepted unless it is empty, and
    route and warnings say that the threshold was not applied. With the threshold ``"calibrated"`` the calibration of
    the rung's own reasoner decides, and a confidence that is not calibrated is not accepted. Whatever the threshold, an
    answer that says that it cannot be told, or about a question that a domain check refused, is not accepted. When no
    rung is left the result is that of the most confident rung, with ``accepted=False`` and ``abstained=True``.
    ``result.route`` tells what was tried, why it was not accepted, and what it cost.

    A request's own ``min_confidence`` stands for all thresholds; its ``budget`` holds for the first rung. The same goes
    for the options of a call (see ``LatentReasoner``). The caller's request is never changed. ``batch`` asks a rung all
    questions that are still open together.

    Raises:
        SettingsError: there are no rungs, or thresholds or costs are out of range or not one for every rung.

    Calls raise ``RungError`` when a rung fails with an error that is not this package's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    rungs: list[Runnable[Any, Any]] = Field(min_length=1, description="Who is asked, in this order.")
    thresholds: RungThreshold | list[RungThreshold | None] | None = Field(
        0.8,
        description="Confidence an answer must reach, one for all rungs or one for each; None accepts any, "
        "'calibrated' is the threshold of the rung's own calibration.",
    )
    costs: list[Cost] | None = Field(None, description="Cost of asking each rung, in units of your own; None: 1 each.")
    scorers: list[SkipValidation[Scorer | None]] | None = Field(
        None,
        exclude=True,
        description="For each rung, what gives the confidence of an answer that has none: a function of the request "
        "and the result that returns a number from 0 to 1, or None; 'logprobs' or None: the reply's log-probabilities.",
    )
    unscored: Literal["accept", "unsure"] = Field(
        "accept", description="An answer without any confidence, where there is a threshold: accept it, or go on."
    )
    first_budget: Budget | BudgetLevel | None = Field(
        None, description="Budget of the first rung, as a request may name one; None: the rung's own."
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Seed for all rungs; None: their own.")
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
            rungs = [coerce_to_runnable(rung) for rung in value]
        except TypeError:
            raise ValueError("every rung must be a Runnable or a function") from None
        for rung in rungs:
            refuse_tools(rung)
        return [quiet(rung) for rung in rungs]

    @field_validator("scorers")
    @classmethod
    def _callable_scorers(cls, value: list[Any] | None) -> list[Any] | None:
        if value is not None and not all(each in (None, "logprobs") or callable(each) for each in value):
            raise ValueError("every scorer must be a function, 'logprobs' or None")
        return value

    @model_validator(mode="after")
    def _one_for_every_rung(self) -> Self:
        for name in ("thresholds", "costs", "scorers"):
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

    _saved_as: ClassVar[tuple[str, ...]] = ("latent_tool", "router")

    def to_json(self) -> Any:
        """Describe the router for a dump; one with scorers has none, for without them it would accept more."""
        return self.to_json_not_implemented() if any(self.scorers or ()) else super().to_json()

    @property
    def lc_attributes(self) -> dict[str, Any]:
        attributes: dict[str, Any] = {"image_policy": self.image_policy.model_dump(mode="json")}
        if isinstance(self.first_budget, Budget):
            attributes["first_budget"] = self.first_budget.model_dump(mode="json", exclude_defaults=True)
        return attributes

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        return get_unique_config_specs(
            [*super().config_specs, *(spec for rung in self.rungs for spec in rung.config_specs)]
        )

    def _with_options(self, options: CallOptions) -> Self:
        thresholds = self.thresholds
        if options.min_confidence is not None:
            own = thresholds if isinstance(thresholds, list) else [thresholds] * len(self.rungs)
            thresholds = [stricter(each, options.min_confidence) for each in own]
        changes = {
            "thresholds": thresholds,
            "first_budget": _replaced(self.first_budget, options.budget),
            "seed": first_given(options.seed, self.seed),
        }
        return type(self)(**{**dict(self), **changes})

    def _begin(self) -> None:
        """Nothing is kept of a call."""

    def _items(self, question: Question) -> Iterator[Item]:
        """The result alone or, with ``stream_steps``, the steps of every rung before it."""
        climber = self._climber(question)
        yield from self._drive([climber], question.streaming and self.stream_steps)
        yield _ended(climber)

    async def _aitems(self, question: Question) -> AsyncGenerator[Item, None]:
        climber = self._climber(question)
        async with aclosing(self._adrive([climber], question.streaming and self.stream_steps)) as steps:
            async for step in steps:
                yield step
        yield _ended(climber)

    def _answer_all(self, questions: Sequence[Question]) -> list[Exception | ReasoningResult]:
        """Every rung is asked the questions that are still open, together."""
        climbers = [self._try_climber(question) for question in questions]
        for _ in self._drive([each for each in climbers if isinstance(each, _Climber)]):
            pass
        return [_end_of(each) for each in climbers]

    async def _aanswer_all(self, questions: Sequence[Question]) -> list[Exception | ReasoningResult]:
        climbers = [self._try_climber(question) for question in questions]
        async for _ in self._adrive([each for each in climbers if isinstance(each, _Climber)]):
            pass
        return [_end_of(each) for each in climbers]

    def _climber(self, question: Question) -> _Climber:
        request, options = as_request(question.value), question.options()
        pictures = [each if isinstance(each, Picture) else Picture(each) for each in request.image_references]
        if request.budget is None and options.budget is None and self.first_budget is not None:
            options = options.but(budget=self.first_budget)
        elif isinstance(options.budget, str) and isinstance(self.first_budget, Budget):
            options = options.but(budget=self.first_budget.replaced_by(options.budget))
        options = options.but(seed=first_given(options.seed, self.seed))
        return _Climber(Handover(with_images(request, [*pictures]), tuple(pictures)), options, question)

    def _try_climber(self, question: Question) -> _Climber | Exception:
        try:
            return self._climber(question)
        except LatentToolError as error:
            return error

    # ------------------------------------------------------------------ asking

    def _drive(self, questions: list[_Climber], steps: bool = False) -> Iterator[ReasoningStep]:
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

    async def _adrive(self, questions: list[_Climber], steps: bool = False) -> AsyncGenerator[ReasoningStep, None]:
        """``_drive`` through the rungs' async methods."""
        for turn in self._climb(questions):
            rung = self.rungs[turn.rung]
            inputs = await run_in_executor(turn.questions[0].question.config, self._inputs, turn)
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
        return [each.config_for(turn.rung, self._threshold(each, turn.rung)) for each in turn.questions]

    def _inputs(self, turn: _Turn) -> list[Any]:
        """What the rung is given; a question whose images cannot be opened ends here and leaves the turn."""
        inputs: list[Any] = []
        for climber in list(turn.questions):
            try:
                inputs.append(input_for(self.rungs[turn.rung], climber.request_for(turn.rung), self.image_policy))
            except LatentToolError as error:
                turn.questions.remove(climber)
                self._judge(climber, turn.rung, error, 0.0)
                if isinstance(error, InputError):
                    climber.end = error
        return inputs

    # ------------------------------------------------------------------ deciding

    def _climb(self, questions: list[_Climber]) -> Iterator[_Turn]:
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

    def _skip(self, question: _Climber, rung: int, late: bool) -> bool:
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

    def _judge(self, question: _Climber, rung: int, answer: Any, seconds: float) -> None:
        """Accept an answer, or write down why not."""
        name, threshold = self.rungs[rung].get_name(), self._threshold(question, rung)
        tried: dict[str, Any] = {"rung": rung, "name": name, "cost": self._cost(rung), "seconds": seconds}
        result = answer if isinstance(answer, Exception) else as_result(answer, question.handover.request, rung, name)
        if isinstance(result, ReasoningResult):
            scorer = None if self.scorers is None else self.scorers[rung]
            result = scored(question.handover.with_warnings(result), answer, question.request_for(rung), scorer)
        if isinstance(result, Exception):
            question.error = _typed(result, rung, name)
            if self.on_error == "raise" or _is_the_callers(result):
                question.end = question.error
            reason = type(result).__name__
            if isinstance(result, LatentToolError):  # what others' errors say may hold addresses and keys
                reason += f": {result}"
            question.route.append(RouteStep(**tried, decision="failed", reason=reason))
            return
        accepted, reason = _decide(result, threshold, self.unscored == "accept")
        at: Any = result.min_confidence
        if threshold != "calibrated" and result.confidence is not None:
            at = stricter(threshold, at if result.accepted is False else None)
        if accepted and result.confidence is None and threshold is not None and not result.accepted:
            unscored = f"The answer of rung {rung} ({name}) has no confidence: its threshold was not applied."
            result = result.model_copy(update={"warnings": [*result.warnings, unscored]})
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
            decided = {"accepted": True, "abstained": False, "abstain_reason": None, "min_confidence": at}
            question.end = result.model_copy(update={**decided, "route": question.route})
        elif question.best is None or _rank(result) > _rank(question.best):
            question.best = result.model_copy(update={"min_confidence": at})

    def _abstained(self, question: _Climber) -> ReasoningResult | Exception:
        """The end of a question that no rung answered well enough: its error if none answered at all."""
        best = question.best
        if best is None and question.error is not None:
            return question.error
        if best is None:
            best = ReasoningResult(answer="", raw_text="", confidence=None, confidence_source="unscored")
        tried = [step.reason for step in question.route if step.answer == best.answer and step.decision == "unsure"]
        reason = best.barred or best.abstain_reason or next(iter(tried), "no rung gave an answer")
        decided: dict[str, Any] = {
            "accepted": False,
            "abstained": True,
            "abstain_reason": reason,
            "route": question.route,
        }
        if self.abstain is not None:
            decided["answer"] = self.abstain
        return best.model_copy(update=decided)

    def _threshold(self, question: _Climber, rung: int) -> Threshold:
        if question.named is not None:
            return question.named
        return self.thresholds[rung] if isinstance(self.thresholds, list) else self.thresholds

    def _cost(self, rung: int) -> float:
        return 1.0 if self.costs is None else self.costs[rung]


def _end_of(question: _Climber | Exception) -> ReasoningResult | Exception:
    if isinstance(question, Exception):
        return question
    assert question.end is not None
    return question.end


def _ended(question: _Climber) -> ReasoningResult:
    end = _end_of(question)
    if isinstance(end, Exception):
        raise end
    return end


def _streams_steps(rung: Runnable[Any, Any]) -> bool:
    return isinstance(rung, RunnableBindingBase | LatentReasoner | ConfidenceRouter) and isinstance(
        first_step(rung), LatentReasoner | ConfidenceRouter
    )


def _decide(result: ReasoningResult, threshold: Threshold, accepts_unscored: bool) -> tuple[bool, str]:
    """Whether a result is accepted, and why, in words."""
    if not result.answer.strip():
        return False, "the answer is empty"
    if (barred := result.barred) is not None:
        return False, barred
    if result.confidence is None:
        if result.abstained or result.accepted is False:
            return False, "the rung abstained"
        if threshold is None or result.accepted:
            return True, "the answer has no confidence to compare"
        applied = f"the threshold {threshold if isinstance(threshold, str) else format(threshold, 'g')} was not applied"
        return accepts_unscored, f"the answer has no confidence to compare: it was not scored, and {applied}"
    if (result.abstained or result.accepted is False) and threshold != "calibrated":
        own = "" if result.min_confidence is None else f": the confidence {result.confidence:.3f} is below its own "
        return False, "the rung abstained" + (own and f"{own}{result.min_confidence:g}")
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


def _rank(result: ReasoningResult) -> tuple[bool, float]:
    """The order of answers of which none was accepted: one that is barred says less than any other."""
    return result.barred is None, result.confidence or 0.0


def _is_the_callers(error: Exception) -> bool:
    """Whether no other rung could do better: the request is wrong, or was given up; not so a short context."""
    return isinstance(error, CancelledError) or (isinstance(error, InputError) and not isinstance(error, ModelError))


def _typed(error: Exception, rung: int, name: str) -> Exception:
    """An error of this package as it is, any other as the cause of a ``RungError``."""
    if isinstance(error, LatentToolError):
        return error
    wrapped = RungError(
        f"Rung {rung} ({name}) failed: {type(error).__name__}.",
        "Fix the rung, give it with_retry() or with_fallbacks(), or use on_error='next'.",
    )
    wrapped.__cause__ = error
    return wrapped


def _replaced(own: Budget | BudgetLevel | None, wanted: Budget | BudgetLevel | None) -> Budget | BudgetLevel | None:
    """The budget after another was asked for: a level keeps the limits of a budget."""
    return own.replaced_by(wanted) if isinstance(own, Budget) else first_given(wanted, own)
