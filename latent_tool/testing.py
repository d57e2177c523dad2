"""A scripted reasoner for tests of your own code: it answers what it is told to, without a model.

    ScriptedReasoner(Reply("blue", 0.95))                                   # to every question
    ScriptedReasoner([Reply("blue", 0.95), Reply("red", 0.2)])              # in this order
    ScriptedReasoner({"What colour?": Reply("blue", boxes=[(0, 0, 10, 10)])})   # for each question
    ScriptedReasoner(Reply(error=DeadlineError("Too late.")))               # raise instead of answering
    ScriptedReasoner(feed := Feed())                                        # what the test says, when it says it

It stands wherever a ``LatentReasoner`` does (tools, agents, routers, chat models, services) and treats a request in the
same way: the request is validated, its images are opened under the image policy, options of a call are merged,
thresholds and deadlines hold, steps go out as events. It loads neither torch nor a model.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field, field_validator, model_validator

from latent_tool.cannot_tell import CANNOT_TELL_REASON, PHRASES_OF_ALL, says_cannot_tell
from latent_tool.engine.signals import AnyOf
from latent_tool.errors import CancelledError, DeadlineError, SettingsError, UnsupportedError
from latent_tool.images.picture import open_pictures
from latent_tool.langchain.call import first_given
from latent_tool.langchain.messages import as_request
from latent_tool.langchain.progress import announce, announce_async
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.langchain.runnable import Item, Question
from latent_tool.schema import (
    Box,
    ConfidenceSource,
    InjectedCell,
    Patch,
    ReasoningRequest,
    ReasoningResult,
    ReasoningStep,
    TraceRow,
)
from latent_tool.validation import Settings
from latent_tool.views.notebook import remember

__all__ = ["Feed", "Reply", "ScriptedReasoner"]

_NAP = 0.005  # seconds after which a waiting question looks again whether it may go on or was given up


class Reply(Settings):
    """What one question is answered with."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    answer: str = Field("", description="The answer.")
    confidence: float | None = Field(
        1.0, ge=0, le=1, allow_inf_nan=False, description="How sure, in [0, 1]; None: not scored."
    )
    confidence_source: ConfidenceSource = "pooled_probability"
    boxes: tuple[Box, ...] = Field(
        (), description="Boxes of the patches, in pixels of the upright image, in the order of injection."
    )
    steps: int = Field(1, ge=0, le=10_000, description="Rounds of the search that a stream shows before the result.")
    seconds: float = Field(0.0, ge=0, allow_inf_nan=False, description="How long the answer takes.")
    error: Exception | None = Field(None, description="Raised in the place of the result, after the steps.")
    result: ReasoningResult | None = Field(
        None, description="A whole result, in the place of answer, confidence and boxes; the threshold decides anew."
    )

    def __init__(self, answer: str = "", confidence: float | None = 1.0, **values: Any) -> None:
        super().__init__(answer=answer, confidence=confidence, **values)


class Feed:
    """A reply that the test gives piece by piece, while the question waits: for pages and streams that show progress.

    ``cancelled`` is set when a question is given up before its result.
    """

    def __init__(self) -> None:
        self._items: deque[Item | Exception] = deque()
        self.cancelled = threading.Event()

    def say(self, *items: Item | Exception) -> None:
        """Add steps, results or errors; a result, given as it is, or an error ends a question."""
        self._items.extend(items)

    def clear(self) -> None:
        """Forget what was not taken yet, and that a question was given up."""
        self._items.clear()
        self.cancelled.clear()

    def take(self) -> Item | Exception | None:
        """Take what comes next; ``None`` if nothing was said yet."""
        return self._items.popleft() if self._items else None


Replies = Reply | Feed | Sequence[Reply] | Mapping[str, Reply] | Callable[[ReasoningRequest], Reply]


class Script:
    """Replies and the requests they were given to; shared by a reasoner and the copies that options are bound to."""

    def __init__(self, replies: Replies) -> None:
        entries: list[Any] = []
        if isinstance(replies, Mapping):
            entries = list(replies.values())
        elif isinstance(replies, Sequence) and not isinstance(replies, str):
            entries = list(replies)
        elif not isinstance(replies, Reply | Feed) and not callable(replies):
            entries = [replies]
        if not all(isinstance(entry, Reply) for entry in entries):
            raise SettingsError(
                "The script of a reasoner holds something that is no Reply.",
                "Give a Reply, a list of them, a dict from questions to them, a function of the request, or a Feed.",
            )
        self.replies = replies
        self.asked: list[ReasoningRequest] = []
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}  # a lock cannot go to another process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def reply(self, request: ReasoningRequest) -> Reply | Feed:
        """Write the request down and find its reply. Raises ``SettingsError`` when there is none."""
        with self._lock:
            place = len(self.asked)
            self.asked.append(request)
        replies = self.replies
        reply: Any = None
        if isinstance(replies, Reply | Feed):
            reply = replies
        elif isinstance(replies, Mapping):
            reply = replies.get(request.question)
        elif callable(replies):
            reply = replies(request)
        elif place < len(replies):
            reply = replies[place]
        if not isinstance(reply, Reply | Feed):
            raise SettingsError(
                f"No reply is scripted for question {place + 1}, {request.question[:100]!r}.",
                "Give one reply for everything, a list that is long enough, or a dict with this question.",
            )
        return reply


class _NoEngine:
    """In the place of an engine: whoever only wants to load it early may."""

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError("A scripted reasoner has no model.", "Use a LatentReasoner where the model is needed.")


class ScriptedReasoner(LatentReasoner):
    """Answers with prepared replies, in the place of a model.

    Args:
        script: one ``Reply`` for everything, a list in the order of the questions, a dict from questions to replies, a
            function from the request to a reply, or a ``Feed``.
        values: fields of a ``LatentReasoner``: ``budget``, ``min_confidence``, ``seed`` and ``image_policy`` have their
            effect; a calibration is refused.

    ``asked`` lists the requests so far, also those asked through copies with bound options. The questions of a batch
    are answered one after another, so that a list of replies keeps its order.

    Calls raise what a ``LatentReasoner`` raises for a wrong request or image, the error of the reply, and
    ``SettingsError`` when nothing is scripted for a question.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    script: Script = Field(repr=False, exclude=True)  # what shows or saves a reasoner has no use for it
    model: str = Field("scripted", min_length=1, description="The name that results and servers show.")

    def __init__(self, script: Replies | Script, **values: Any) -> None:
        super().__init__(script=script, **values)

    @field_validator("script", mode="before")
    @classmethod
    def _as_script(cls, value: Any) -> Script:
        return value if isinstance(value, Script) else Script(value)

    @model_validator(mode="after")
    def _without_calibration(self) -> ScriptedReasoner:
        if self.calibration is not None:
            raise ValueError("a scripted reasoner has no scores to calibrate; script confidences instead")
        return self

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return False

    @property
    def asked(self) -> list[ReasoningRequest]:
        """The requests so far, in their order."""
        return list(self.script.asked)

    def engine(self) -> Any:
        """Give something that stands where an engine does; any use of it raises ``UnsupportedError``."""
        return _NoEngine()

    # ------------------------------------------------------------------ the work

    def _items(self, question: Question) -> Iterator[Item]:
        asked = _Asked(self, question)
        try:
            for item in asked.items():
                if item is None:
                    time.sleep(_NAP)
                    continue
                if isinstance(item, ReasoningStep):
                    announce(item, question.config)
                yield item
        finally:
            asked.end()

    async def _aitems(self, question: Question) -> AsyncGenerator[Item, None]:
        asked = await run_in_executor(question.config, _Asked, self, question)
        try:
            for item in asked.items():
                if item is None:
                    await asyncio.sleep(_NAP)
                    continue
                if isinstance(item, ReasoningStep):
                    await announce_async(item, question.config)
                yield item
        finally:
            asked.end()

    def _answer_all(self, questions: Sequence[Question]) -> list[Exception | ReasoningResult]:
        answers: list[Any] = []
        for question in questions:
            try:
                answers.append(list(self._items(question))[-1])
            except Exception as error:
                answers.append(error)
        return answers

    async def _aanswer_all(self, questions: Sequence[Question]) -> list[Exception | ReasoningResult]:
        answers: list[Exception | ReasoningResult] = []
        for question in questions:
            try:
                answers.append(await self._aanswer(question))
            except Exception as error:
                answers.append(error)
        return answers


class _Asked:
    """One question under way, merged as a ``LatentReasoner`` merges it."""

    def __init__(self, reasoner: ScriptedReasoner, question: Question) -> None:
        request, options = as_request(question.value), question.options()
        self.cancelled = AnyOf((question.call.cancelled, options.cancelled))
        self.budget = reasoner.budget.replaced_by(options.budget).replaced_by(request.budget)
        self.seed = first_given(request.seed, options.seed, reasoner.seed)
        self.threshold = first_given(request.min_confidence, options.min_confidence, reasoner.min_confidence)
        if self.threshold == "calibrated":
            reasoner._require_threshold()
        self.deadline = question.call.deadline(self.budget)
        self.model = reasoner.model
        self.phrases = PHRASES_OF_ALL if reasoner.cannot_tell is None else reasoner.cannot_tell
        self._give_up_if_late()
        self.references = request.image_references
        self.policy = reasoner.image_policy
        loaded = open_pictures(request.image_references, reasoner.image_policy, deadline=self.deadline)
        self.sizes = [each.image.size for each in loaded]
        self.warnings = [warning for each in loaded for warning in each.warnings]
        self.reply = reasoner.script.reply(request)
        self.ended = False

    def end(self) -> None:
        """Say that nobody follows this question any more."""
        if isinstance(self.reply, Feed) and not self.ended:
            self.reply.cancelled.set()

    def items(self) -> Iterator[Item | None]:
        """Yield steps and the result; ``None`` where there is nothing yet, so that the caller waits in its own way."""
        reply = self.reply
        if isinstance(reply, Feed):
            yield from self._fed(reply)
            return
        ready = time.monotonic() + reply.seconds
        while time.monotonic() < ready:
            self._give_up_if_late()
            yield None
        rounds = self.budget.iterations
        yield ReasoningStep(phase="prefill", iterations=rounds)
        trace = [_row(number) for number in range(reply.steps)]
        for row in trace:
            self._give_up_if_late()
            cells = [InjectedCell(image=0, cell=cell, box=reply.boxes[cell]) for cell in range(len(reply.boxes))]
            yield ReasoningStep(
                phase="search", trace=row, iterations=rounds, injected=cells if row.round == reply.steps - 1 else []
            )
        if reply.error is not None:
            raise reply.error
        yield ReasoningStep(phase="decode", iterations=rounds)
        yield remember(self._result(reply, trace), self.references, self.policy)

    def _fed(self, feed: Feed) -> Iterator[Item | None]:
        while not self.ended:
            self._give_up_if_late()
            item = feed.take()
            self.ended = isinstance(item, ReasoningResult | Exception)
            if isinstance(item, Exception):
                raise item
            yield item

    def _give_up_if_late(self) -> None:
        if self.cancelled.is_set():
            raise CancelledError("The question was cancelled.")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineError("The deadline passed before anything was scored.", "Allow more time.")

    def _result(self, reply: Reply, trace: list[TraceRow]) -> ReasoningResult:
        confidence = reply.confidence if reply.result is None else reply.result.confidence
        accepted = None if self.threshold is None else confidence is not None and confidence >= self.threshold
        if reply.result is not None:
            return reply.result if self.threshold is None else self._gated(reply.result, accepted)
        found = ReasoningResult(
            answer=reply.answer,
            raw_text=reply.answer,
            confidence=confidence,
            confidence_source="unscored" if confidence is None else reply.confidence_source,
            patches=[
                Patch(rank=rank, image=0, cell=rank, box=box, attention=0.1, gain=0.01, latent=0)
                for rank, box in enumerate(reply.boxes)
            ],
            image_sizes=self.sizes,
            trace=trace,
            stop_reason="iterations",
            finish_reason="stop",
            model=self.model,
            budget=self.budget,
            seed=self.seed,
            warnings=self.warnings,
        )
        return self._gated(found, accepted)

    def _gated(self, result: ReasoningResult, accepted: bool | None) -> ReasoningResult:
        """The result with the verdict that a ``LatentReasoner`` would give it."""
        if self.threshold is not None:
            result = result.decided(accepted, None if isinstance(self.threshold, str) else self.threshold)
        if says_cannot_tell(result.answer, self.phrases):
            return result.abstaining(CANNOT_TELL_REASON)
        barred = None if self.threshold is None else result.barred
        return result if barred is None else result.abstaining(barred)


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
