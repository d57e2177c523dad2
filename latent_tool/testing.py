"""A scripted reasoner for tests of your own code: it answers what it is told to, without a model.

    reasoner = ScriptedReasoner([Reply("blue", 0.95), Reply("red", 0.2)])              # in this order
    reasoner = ScriptedReasoner({"What colour?": Reply("blue", boxes=[(0, 0, 10, 10)])})  # for each question
    reasoner = ScriptedReasoner([Reply(error=DeadlineError("Too late."))])             # raise instead of answering

It stands wherever a ``LatentReasoner`` does (tools, agents, routers, services) and treats a request in the same way: it
is validated, its images are opened under the image policy, thresholds decide, steps go out as events. This module
knows requests and results; it loads neither torch nor a model.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from latent_tool.errors import CancelledError, DeadlineError, SettingsError
from latent_tool.langchain.messages import as_request, shown_input
from latent_tool.langchain.reasoner import CallOptions, announce, announce_async
from latent_tool.langchain.runnable import RequestRunnable
from latent_tool.schema import (
    Box,
    ConfidenceSource,
    Patch,
    ReasoningRequest,
    ReasoningResult,
    ReasoningStep,
    TraceRow,
)
from latent_tool.settings import Budget, ImagePolicy, Settings, settings_error

__all__ = ["Reply", "ScriptedReasoner"]

# Sleeping is interrupted this often to see whether the call was cancelled or its deadline passed.
_NAP = 0.01


class Reply(Settings):
    """What one question is answered with.

    Args:
        answer: the answer.
        confidence: in [0, 1]; ``None``: not scored.
        boxes: of the patches, in pixels of the upright image, in the order of injection.
        steps: rounds of the search that ``stream`` shows before the result.
        seconds: how long the answer takes.
        error: raised in the place of an answer.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    answer: str = ""
    confidence: float | None = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    confidence_source: ConfidenceSource = "answer_probability"
    boxes: tuple[Box, ...] = ()
    steps: int = Field(1, ge=0, le=10_000)
    seconds: float = Field(0.0, ge=0, allow_inf_nan=False)
    error: Exception | None = None

    def __init__(self, answer: str = "", confidence: float | None = 1.0, **values: Any) -> None:
        super().__init__(answer=answer, confidence=confidence, **values)


class ScriptedReasoner(RequestRunnable):
    """Answers with prepared replies in the place of a model.

    Args:
        replies: one ``Reply`` for everything, a list of them in the order of the questions, or a mapping from questions
            to replies.
        budget: as a ``LatentReasoner`` has it; its deadline holds.
        min_confidence: abstain below it; a request's own and that of a call's options win, as they do there.
        image_policy: which images may be opened.

    ``asked`` lists the requests so far. Calls raise what a ``LatentReasoner`` raises for a wrong request or image, the
    error of the reply, and ``SettingsError`` when nothing is scripted for a question.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    replies: Reply | Sequence[Reply] | Mapping[str, Reply] = Field(repr=False)
    budget: Budget = Budget()
    min_confidence: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    image_policy: ImagePolicy = ImagePolicy.local()

    _asked: list[ReasoningRequest] = PrivateAttr(default_factory=list)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    def __init__(self, replies: Any, **values: Any) -> None:
        try:
            super().__init__(replies=replies, **values)
        except ValidationError as error:
            raise settings_error(type(self), error) from None

    @field_validator("budget", mode="before")
    @classmethod
    def _coerce_budget(cls, value: Any) -> Budget:
        return Budget.coerce(value)

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        private = {**(state["__pydantic_private__"] or {}), "_lock": None}  # a lock cannot go to another process
        return {**state, "__pydantic_private__": private}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()

    @property
    def asked(self) -> list[ReasoningRequest]:
        """The requests so far, in their order."""
        return list(self._asked)

    def with_budget(self, budget: Budget | str | Mapping[str, Any]) -> ScriptedReasoner:
        """Return the same script under another budget, with a count of its own."""
        return type(self)(**{**dict(self), "budget": budget})

    # ------------------------------------------------------------------ what LangChain asks of a Runnable

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> ReasoningResult:
        """Answer one question."""

        def answer(_value: Any, run_manager: Any, config: RunnableConfig) -> Any:
            for item in self._items(input, config):
                if isinstance(item, ReasoningStep):
                    announce(item, config)
            return item

        return self._call_with_config(answer, shown_input(input), config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> ReasoningResult:
        """Answer one question without holding up the event loop."""

        async def answer(_value: Any, run_manager: Any, config: RunnableConfig) -> Any:
            async for item in self._aitems(input, config):
                last = item
            return last

        return await self._acall_with_config(answer, shown_input(input), config, **kwargs)

    def stream(  # type: ignore[override]
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[ReasoningStep | ReasoningResult]:
        """Yield the steps of the reply, then the result."""

        def steps(_values: Iterator[Any], run_manager: Any, config: RunnableConfig) -> Iterator[Any]:
            for item in self._items(input, config):
                if isinstance(item, ReasoningStep):
                    announce(item, config)
                yield item

        yield from self._transform_stream_with_config(iter([shown_input(input)]), steps, config, **kwargs)

    async def astream(  # type: ignore[override]
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[ReasoningStep | ReasoningResult]:
        """``stream`` in an event loop."""

        async def steps(_values: AsyncIterator[Any], run_manager: Any, config: RunnableConfig) -> AsyncIterator[Any]:
            async for item in self._aitems(input, config):
                yield item

        async def only() -> AsyncIterator[Any]:
            yield shown_input(input)

        async for item in self._atransform_stream_with_config(only(), steps, config, **kwargs):
            yield item

    def batch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Answer questions one after another, so that a list of replies keeps its order."""
        answers: list[Any] = []
        for value, own in zip(inputs, get_config_list(config, len(inputs)), strict=True):
            try:
                answers.append(self.invoke(value, own, **kwargs))
            except Exception as error:
                if not return_exceptions:
                    raise
                answers.append(error)
        return answers

    async def abatch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """``batch`` in an event loop."""
        answers: list[Any] = []
        for value, own in zip(inputs, get_config_list(config, len(inputs)), strict=True):
            try:
                answers.append(await self.ainvoke(value, own, **kwargs))
            except Exception as error:
                if not return_exceptions:
                    raise
                answers.append(error)
        return answers

    # ------------------------------------------------------------------ the script

    def _items(self, value: Any, config: RunnableConfig) -> Iterator[ReasoningStep | ReasoningResult]:
        question = _Question(self, value, config)
        while question.waits():
            time.sleep(_NAP)
        yield from question.items()

    async def _aitems(self, value: Any, config: RunnableConfig) -> AsyncIterator[ReasoningStep | ReasoningResult]:
        question = await asyncio.to_thread(_Question, self, value, config)
        while question.waits():
            await asyncio.sleep(_NAP)
        for item in question.items():
            if isinstance(item, ReasoningStep):
                await announce_async(item, config)
            yield item

    def _reply(self, request: ReasoningRequest) -> Reply:
        with self._lock:
            place = len(self._asked)
            self._asked.append(request)
        if isinstance(self.replies, Reply):
            return self.replies
        if isinstance(self.replies, Mapping):
            reply = self.replies.get(request.question)
        else:
            reply = self.replies[place] if place < len(self.replies) else None
        if reply is None:
            raise SettingsError(
                f"No reply is scripted for question {place + 1}, {request.question[:100]!r}.",
                "Give one reply for everything, a list that is long enough, or a mapping with this question.",
            )
        return reply


class _Question:
    """One question under way."""

    def __init__(self, reasoner: ScriptedReasoner, value: Any, config: RunnableConfig) -> None:
        from latent_tool.images.picture import open_pictures

        began = time.monotonic()
        request, options = as_request(value), CallOptions.of(config)
        self.cancelled = options.cancelled
        self.budget = reasoner.budget.replaced_by(options.budget).replaced_by(request.budget)
        self.seed = next((seed for seed in (request.seed, options.seed) if seed is not None), 0)
        wanted = (request.min_confidence, options.min_confidence, reasoner.min_confidence)
        self.threshold = next((each for each in wanted if each is not None), None)
        if self.threshold == "calibrated":
            raise SettingsError("A scripted reasoner has no calibration.", "Give min_confidence as a number.")
        limit = self.budget.deadline_s
        self.deadline = None if limit is None else began + limit
        loaded = open_pictures(request.image_references, reasoner.image_policy, deadline=self.deadline)
        self.sizes = [each.image.size for each in loaded]
        self.warnings = [warning for each in loaded for warning in each.warnings]
        self.reply = reasoner._reply(request)
        self.ready = time.monotonic() + self.reply.seconds

    def waits(self) -> bool:
        """Whether the answer is still to come. Raises when the call was cancelled or its deadline has passed."""
        if self.cancelled is not None and self.cancelled.is_set():
            raise CancelledError("The question was cancelled.")
        now = time.monotonic()
        if self.deadline is not None and now > self.deadline:
            raise DeadlineError("The deadline passed before anything was scored.", "Allow more time.")
        return now < self.ready

    def items(self) -> Iterator[ReasoningStep | ReasoningResult]:
        rounds = self.budget.iterations
        yield ReasoningStep(phase="prefill", iterations=rounds)
        trace = [_row(number) for number in range(self.reply.steps)]
        for row in trace:
            yield ReasoningStep(phase="search", trace=row, iterations=rounds)
        if self.reply.error is not None:
            raise self.reply.error
        yield ReasoningStep(phase="decode", iterations=rounds)
        yield self._result(trace)

    def _result(self, trace: list[TraceRow]) -> ReasoningResult:
        confidence, threshold = self.reply.confidence, self.threshold
        accepted = None if threshold is None else confidence is not None and confidence >= float(threshold)
        return ReasoningResult(
            answer=self.reply.answer,
            raw_text=self.reply.answer,
            confidence=confidence,
            confidence_source="unscored" if confidence is None else self.reply.confidence_source,
            accepted=accepted,
            abstained=None if accepted is None else not accepted,
            min_confidence=None if threshold is None else float(threshold),
            patches=[
                Patch(rank=rank, image=0, cell=rank, box=box, attention=0.1, gain=0.01, latent=0)
                for rank, box in enumerate(self.reply.boxes)
            ],
            image_sizes=self.sizes,
            trace=trace,
            model="scripted",
            budget=self.budget,
            seed=self.seed,
            warnings=self.warnings,
        )


def _row(number: int) -> TraceRow:
    return TraceRow(
        round=number,
        reward=0.5,
        best_reward=0.5,
        mean_sampled_reward=None,
        top_k_mass=0.9,
        sigma=None,
        accepted=[],
        candidates=number + 1,
        seconds=0.0,
    )
