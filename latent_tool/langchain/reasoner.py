"""``LatentReasoner``: the method as a LangChain Runnable, from a request to a result.

A call opens the images, takes the process's engine of its model and searches in the calling thread (``invoke``,
``stream``, ``batch``), or hands the question to the engine's scheduler (``ainvoke``, ``astream``, ``abatch``), where
questions asked at the same time share the model's forward passes. Every step goes out as the custom event
``latent_step`` and, inside a LangGraph run, to its stream writer.

This module knows what LangChain wants of a Runnable. It knows nothing of tensors, and loads torch only when a question
is asked.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ContextThreadPoolExecutor, run_in_executor
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from latent_tool.about import EMBEDDED
from latent_tool.calibration.calibration import Calibration, embedded_domain
from latent_tool.calibration.configuration import configuration, is_folder
from latent_tool.calibration.domain import DomainCheck
from latent_tool.cannot_tell import CANNOT_TELL_REASON, PHRASES_OF_ALL
from latent_tool.engine.signals import AnyOf
from latent_tool.errors import CalibrationError, CalibrationMismatchError, CancelledError
from latent_tool.langchain.call import OPTIONS_KEY, CallOptions, Threshold, first_given, stricter
from latent_tool.langchain.messages import as_request
from latent_tool.langchain.progress import announce, announce_async
from latent_tool.langchain.runnable import Item, Question, RequestRunnable
from latent_tool.schema import KNOWN_PICTURES, MeasuredConfidence, ReasoningResult, ReasoningStep
from latent_tool.scores import RESULT_SCORES
from latent_tool.settings import (
    PREFIX_CACHE_BYTES,
    Budget,
    GenerationSettings,
    ImagePolicy,
    NoiseSettings,
    SearchSettings,
)
from latent_tool.validation import settings_error
from latent_tool.views.notebook import remember

if TYPE_CHECKING:
    from latent_tool.engine.engine import Engine
    from latent_tool.engine.job import Job, Outcome

__all__ = ["OPTIONS_KEY", "CallOptions", "LatentReasoner"]

# Questions opened and handed to the engine together when the caller sets no max_concurrency.
_BATCH_SIZE = 16

T = TypeVar("T")
Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Call:
    """One call of the reasoner: since when its deadlines count, and whether it was given up."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.cancelled = threading.Event()
        self._loading = threading.Lock()

    def engine(self, reasoner: LatentReasoner) -> Engine:
        """Return the reasoner's engine; the time it takes to load the model does not count."""
        with self._loading:  # the questions of a batch count it once
            before = time.monotonic()
            engine = reasoner.engine()
            self.began += time.monotonic() - before
        return engine

    def deadline(self, budget: Budget) -> float | None:
        """Tell when the answer must be there, in the time of ``time.monotonic``."""
        return None if budget.deadline_s is None else self.began + budget.deadline_s

    async def in_thread(self, config: RunnableConfig, function: Callable[..., T], *arguments: Any) -> T:
        """Run ``function`` in a worker thread; when the task is cancelled, the work stops at its next step."""
        try:
            return await run_in_executor(config, function, *arguments)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class LatentReasoner(RequestRunnable):
    """Answers questions about images with a frozen local vision-language model that thinks in optimised latents.

    Input is a ``ReasoningRequest`` or a dict of its fields; output is a ``ReasoningResult``. ``stream`` and ``astream``
    yield a ``ReasoningStep`` for every phase and round of the search, and then the result.

    The confidence is the probability of the whole answer, pooled over the model after it thought and the plain model
    (``Scores.pooled_probability``), unless ``confidence`` or ``calibration`` says otherwise; the result names it.

    The same question, seed and settings give the same answer however it is asked. The model is loaded once per process
    and shared by all reasoners that name it, when the first question is asked.

    Per call, ``config["configurable"]["latent_reasoner"]`` may hold ``budget``, ``seed``, ``min_confidence`` and
    ``cancelled`` (see ``CallOptions``).

    Raises:
        SettingsError: a field is out of its range or not known.

    Calls raise the errors of ``latent_tool.errors``: ``InputError`` for a request that is wrong, ``ModelError`` for a
    model that cannot be used, ``DeadlineError`` when nothing was scored in time, ``CancelledError`` when stopped,
    ``OverloadedError`` when too many concurrent calls wait already.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("embedded", min_length=1, description="Checkpoint directory, hub id, or 'embedded'.")
    dtype: str = Field("auto", description="'auto', 'float32', 'bfloat16' or 'float16'.")
    device: str | None = Field(
        "auto",
        description="For example 'cpu' or 'cuda:0'; 'auto': a GPU if torch can use one (not for the embedded model, "
        "nor with device_map or quantized weights); None leaves the model where it loads.",
    )
    device_map: str | dict[str, Any] | None = Field(None, description="Passed to from_pretrained; excludes device.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    local_files_only: bool = Field(False, description="Never ask the hub.")
    token: SecretStr | None = Field(None, description="Access token for the hub.")
    attn_implementation: str | None = Field(None, description="Passed to from_pretrained.")
    quantization_config: Any = Field(
        None, description="'8bit', '4bit', or what from_pretrained takes, for example a BitsAndBytesConfig."
    )
    allow_pickle: bool = Field(False, description="Also load pickled weights, which can run code.")
    trust_remote_code: bool = Field(False, description="Run code from the checkpoint's repository.")
    prefix_cache_bytes: int = Field(
        PREFIX_CACHE_BYTES,
        ge=0,
        description="Memory for prefixes of images that may be asked about again; 0: none is kept.",
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="Run the passes after image and question in fixed shapes, compiled by torch: the first questions "
        "take longer. 'auto': on CUDA.",
    )
    budget: Budget = Field(Budget(), description="How much work per question: a Budget, its fields, or a level's name.")
    settings: SearchSettings = Field(SearchSettings(), description="How the search works.")
    generation: GenerationSettings = Field(
        GenerationSettings(), description="What decoding changes of the model's own generation settings."
    )
    images_first: bool = Field(True, description="Images before the question, or after it.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Seed of the search.")
    min_confidence: Unit | Literal["calibrated"] | None = Field(
        None, description="Abstain below this confidence, or below the calibration's own threshold; None: never."
    )
    confidence: MeasuredConfidence = Field(
        "pooled_probability",
        description="Which score is the confidence, unless a calibration says: the answer's probability pooled over "
        "the model after and before it thought, that after it thought, or the reward; see Scores.",
    )
    calibration: Calibration | None = Field(
        None,
        description="Makes the confidence a probability: a Calibration, its file, or 'embedded' for that of the "
        "embedded model. Only for the very configuration it was made for.",
    )
    check_domain: bool = Field(
        True,
        description="Check whether a question is like those of the calibration (without one, like the pictures the "
        "embedded model knows), and do not accept an answer to one that is not. False leaves the check out; the "
        "result's warnings say so.",
    )
    cannot_tell: tuple[str, ...] | None = Field(
        None,
        description="Answers that mean that it cannot be told, which are abstentions; one that ends in '...' stands "
        "for all that begin so. None: those of latent_tool.cannot_tell.PHRASES, every language.",
    )
    attention: bool = Field(
        False, description="Measure how much the latents of the decoded state attend to every image cell."
    )
    grounding: bool | NoiseSettings = Field(False, description="Measure the visual dependency of every token.")
    controls: bool = Field(False, description="Also answer without latents, and with the image noised.")
    image_policy: ImagePolicy = Field(ImagePolicy.local(), description="Which images may be opened.")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise settings_error(type(self), error) from None

    @field_validator("budget", mode="before")
    @classmethod
    def _coerce_budget(cls, value: Any) -> Budget:
        return Budget.coerce(value)

    @field_validator("calibration", mode="before")
    @classmethod
    def _load_calibration(cls, value: Any) -> Calibration | None:
        return None if value is None else Calibration.load(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.device not in (None, "auto") and self.device_map is not None:
            raise ValueError("give device or device_map, not both")
        if self.confidence == "reward" and not self.settings.latents:
            raise ValueError("without latents there is no reward; use confidence='pooled_probability'")
        if self.confidence == "reward" and self.settings.reward == "neg_log_probability":
            raise ValueError("the reward neg_log_probability has no upper bound, so it is no confidence")
        if self.min_confidence == "calibrated":
            self._require_threshold()
        if self.calibration is not None:
            if self.calibration.score not in RESULT_SCORES or (
                self.confidence == "reward" and self.calibration.score != "reward"
            ):
                raise CalibrationMismatchError(
                    f"The calibration is one of the score {self.calibration.score!r}, which is not measured here.",
                    f"Calibrate one of: {', '.join(RESULT_SCORES)}.",
                )
            if self.model == "embedded":
                known = self.calibration.configuration
                self._require_calibrated(self.budget, None if known is None else known.get("system"))
        return self

    def with_budget(self, budget: Budget | Literal["quick", "standard", "thorough"] | Mapping[str, Any]) -> Self:
        """Return the same reasoner with another budget: a ``Budget``, its fields, or the name of a level."""
        return type(self)(**{**dict(self), "budget": budget})

    def _with_options(self, options: CallOptions) -> Self:
        calibrated = 1.0
        if self.calibration is not None and self.calibration.threshold is not None:
            calibrated = self.calibration.threshold.probability
        changes = {
            "budget": self.budget.replaced_by(options.budget),
            "seed": first_given(options.seed, self.seed),
            "min_confidence": stricter(self.min_confidence, options.min_confidence, calibrated),
        }
        return type(self)(**{**dict(self), **changes})

    # ------------------------------------------------------------------ what LangChain asks of a Runnable

    _saved_as: ClassVar[tuple[str, ...]] = ("latent_tool", "reasoner")

    @property
    def lc_secrets(self) -> dict[str, str]:
        return {"token": "HF_TOKEN"}

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """The settings as plain JSON, from which the constructor makes them again."""
        values = {
            name: getattr(self, name)
            for name in ("budget", "settings", "generation", "grounding", "image_policy", "calibration")
        }
        return {
            name: value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, BaseModel) else value
            for name, value in values.items()
        }

    # ------------------------------------------------------------------ calibration

    def configuration(self, budget: Budget | None = None, system: str | None = None) -> dict[str, Any]:
        """Return what a calibration of the confidence belongs to; see ``latent_tool.calibration.configuration``."""
        score = self.confidence if self.calibration is None else self.calibration.score
        return configuration(
            score=score,
            model=self.model,
            revision=self.revision,
            dtype=self.dtype,
            quantization_config=self.quantization_config,
            system=system,
            images_first=self.images_first,
            settings=self.settings,
            budget=self.budget if budget is None else budget,
            generation=self.generation,
            noise=self._noise() if score == "visual_dependency" else None,
        )

    def _require_calibrated(self, budget: Budget, system: str | None) -> None:
        """Raise ``CalibrationMismatchError`` if there is a calibration, but not one for this."""
        if self.calibration is not None:
            self.calibration.require(self.configuration(budget, system))

    def _require_threshold(self) -> None:
        if self.calibration is None:
            raise CalibrationError(
                "min_confidence='calibrated' needs a calibration.", "Give one with calibration=, or use a number."
            )
        self.calibration.require_threshold()

    # ------------------------------------------------------------------ the work

    def engine(self) -> Engine:
        """Return the process's engine of this model; loads torch and the model when it is asked for first."""
        from latent_tool.engine.engine import get_engine
        from latent_tool.models.loading import ModelSpec

        return get_engine(
            ModelSpec(
                model=self.model,
                dtype=self.dtype,
                device=self.device,
                device_map=self.device_map,
                revision=self.revision,
                local_files_only=self.local_files_only,
                token=None if self.token is None else self.token.get_secret_value(),
                attn_implementation=self.attn_implementation,
                quantization_config=self.quantization_config,
                allow_pickle=self.allow_pickle,
                trust_remote_code=self.trust_remote_code,
                prefix_cache_bytes=self.prefix_cache_bytes,
                compile=self.compile,
            )
        )

    def _job(self, question: Question) -> tuple[Engine, Job, Threshold]:
        """The engine, what it is asked and from when on to accept: request, options of the call, own fields."""
        from latent_tool.images.picture import open_pictures

        request, options, call = as_request(question.value), question.options(), question.call
        question.pictures = request.image_references
        cancelled = AnyOf((call.cancelled, options.cancelled))
        if cancelled.is_set():
            raise CancelledError("The question was cancelled.")
        budget = self.budget.replaced_by(options.budget).replaced_by(request.budget)
        wanted: Threshold = first_given(request.min_confidence, options.min_confidence, self.min_confidence)
        if wanted == "calibrated":
            self._require_threshold()
        if self.calibration is not None:
            if not is_folder(self.model):
                call.engine(self)
            self._require_calibrated(budget, request.system)
        began = time.monotonic()
        queued = began - call.began
        loaded = open_pictures(request.image_references, self.image_policy, deadline=call.deadline(budget))
        image_seconds = time.monotonic() - began
        engine = call.engine(self)

        from latent_tool.engine.job import Job  # loads torch, which counts as loading the model

        job = Job(
            images=tuple(each.image for each in loaded),
            question=request.question,
            system=request.system,
            options=request.all_options,
            unsure=request.unsure,
            settings=self.settings,
            generation=self.generation,
            images_first=self.images_first,
            budget=budget,
            seed=first_given(request.seed, options.seed, self.seed),
            # A calibration was made from answers that were pooled and found as the default finds them.
            confidence=self.confidence if self.calibration is None else "pooled_probability",
            min_confidence=None if isinstance(wanted, str) or self.calibration is not None else wanted,
            attention=self.attention,
            grounding=self._noise(),
            controls=self.controls,
            cannot_tell=PHRASES_OF_ALL if self.cannot_tell is None else self.cannot_tell,
            deadline=call.deadline(budget),
            cancelled=cancelled,
            image_seconds=image_seconds,
            queue_seconds=queued,
            warnings=tuple(warning for each in loaded for warning in each.warnings),
        )
        return engine, job, wanted

    def _result(self, engine: Engine, outcome: Outcome, wanted: Threshold, question: Question) -> ReasoningResult:
        """The outcome as a result; with a calibration, its confidence is a probability."""
        result = self._checked(engine.result(outcome), outcome, wanted)
        return remember(result, question.pictures, self.image_policy)

    def _checked(self, result: ReasoningResult, outcome: Outcome, wanted: Threshold) -> ReasoningResult:
        """The result with the verdicts of the domain check and of the calibration."""
        check = self._domain_check()
        if check is not None:
            result = result.model_copy(update={"domain": check.verdict(outcome.pictures)})
        if self.calibration is not None:
            return self.calibration.apply(result, wanted, check_domain=self.check_domain)
        if check is None and self.calibration is None and self.check_domain and self.model == EMBEDDED:
            missing = f"With dtype {self.dtype!r} there is no check whether this model knows such pictures."
            result = result.model_copy(update={"warnings": [*result.warnings, missing]})
        if not self.check_domain and self.model == EMBEDDED:
            off = "The check whether this model knows such pictures is switched off."
            result = result.model_copy(update={"warnings": [*result.warnings, off]})
        if result.domain is None or not result.domain.refused:
            return result
        told = result.domain.unlike(KNOWN_PICTURES)
        if result.accepted is not None:  # a threshold is for pictures that the model knows
            result = result if result.abstain_reason == CANNOT_TELL_REASON else result.abstaining(told)
        return result.model_copy(update={"warnings": [*result.warnings, f"This picture is {told}."]})

    def _domain_check(self) -> DomainCheck | None:
        """The check of the calibration; without one, that of the embedded model's own pictures."""
        if not self.check_domain:
            return None
        if self.calibration is not None:
            return self.calibration.domain
        return embedded_domain(self.dtype) if self.model == EMBEDDED else None

    def _noise(self) -> NoiseSettings | None:
        if isinstance(self.grounding, NoiseSettings):
            return self.grounding
        return NoiseSettings() if self.grounding else None

    def _begin(self) -> _Call:
        return _Call()

    def _items(self, question: Question) -> Iterator[Item]:
        """Every step of one question, then its result; steps also go out as events."""
        engine, job, wanted = self._job(question)
        run = engine.run(job)
        while True:
            try:
                step = next(run)
            except StopIteration as end:
                outcome: Outcome = end.value
                yield self._result(engine, outcome, wanted, question)
                return
            announce(step, question.config)
            yield step

    async def _aitems(self, question: Question) -> AsyncGenerator[Item, None]:
        """``_items`` of a question that rides with others."""
        engine, job, wanted = await question.call.in_thread(question.config, self._job, question)
        from latent_tool.engine.scheduler import get_scheduler

        loop = asyncio.get_running_loop()
        news: asyncio.Queue[ReasoningStep | Future[Outcome]] = asyncio.Queue()

        def tell(item: ReasoningStep | Future[Outcome]) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody listens any more
                loop.call_soon_threadsafe(news.put_nowait, item)

        future = get_scheduler(engine).submit(job, tell)
        future.add_done_callback(tell)
        try:
            while isinstance(item := await news.get(), ReasoningStep):
                await announce_async(item, question.config)
                yield item
            outcome = item.result()
        finally:
            future.cancel()
        yield await run_in_executor(question.config, self._result, engine, outcome, wanted, question)

    async def _aanswer_all(self, questions: Sequence[Question]) -> list[Exception | ReasoningResult]:
        """Results and errors in the order of the questions, which ride with others."""
        gate = asyncio.Semaphore(questions[0].config.get("max_concurrency") or _BATCH_SIZE)

        async def one(question: Question) -> Exception | ReasoningResult:
            async with gate:
                try:
                    return await self._aanswer(question)
                except Exception as error:
                    return error

        return await asyncio.gather(*map(one, questions))

    def _answer_all(self, questions: Sequence[Question]) -> list[Exception | ReasoningResult]:
        """Results and errors in the order of the questions; images are opened one group at a time, in threads."""
        size = questions[0].config.get("max_concurrency") or _BATCH_SIZE
        answers: list[Exception | ReasoningResult] = []
        for begin in range(0, len(questions), size):
            answers += self._answer_group(questions[begin : begin + size])
        return answers

    def _answer_group(self, questions: Sequence[Question]) -> list[Exception | ReasoningResult]:
        def prepare(question: Question) -> Exception | tuple[Engine, Job, Threshold]:
            try:
                return self._job(question)
            except Exception as error:
                return error

        # One deadline runs for all: an image that is slow to come must not keep the others waiting.
        with ContextThreadPoolExecutor(min(len(questions), _BATCH_SIZE)) as pool:
            prepared = list(pool.map(prepare, questions))
        ready = [each for each in prepared if not isinstance(each, Exception)]
        outcomes = iter(ready[0][0].answer_many([job for _, job, _ in ready]) if ready else ())
        answers: list[Exception | ReasoningResult] = []
        for question, each in zip(questions, prepared, strict=True):
            if isinstance(each, Exception):
                answers.append(each)
                continue
            engine, _, wanted = each
            found = next(outcomes)
            answers.append(found if isinstance(found, Exception) else self._result(engine, found, wanted, question))
        return answers
