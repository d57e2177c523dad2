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
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, cast

from langchain_core.callbacks import (
    AsyncCallbackManagerForChainRun,
    CallbackManagerForChainRun,
    adispatch_custom_event,
    dispatch_custom_event,
)
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import ContextThreadPoolExecutor, run_in_executor
from langchain_core.runnables.utils import ConfigurableFieldSpec
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from latent_tool.calibration.calibration import Calibration
from latent_tool.calibration.configuration import configuration, is_folder
from latent_tool.errors import CalibrationError, CalibrationMismatchError, CancelledError, SettingsError
from latent_tool.langchain.messages import as_request, shown_input
from latent_tool.langchain.runnable import RequestRunnable
from latent_tool.schema import MeasuredConfidence, ReasoningResult, ReasoningStep
from latent_tool.scores import RESULT_SCORES
from latent_tool.settings import (
    PREFIX_CACHE_BYTES,
    Budget,
    BudgetLevel,
    GenerationSettings,
    ImagePolicy,
    NoiseSettings,
    SearchSettings,
    Settings,
    settings_error,
)

if TYPE_CHECKING:
    from latent_tool.engine.engine import Engine, Job, Outcome

__all__ = ["OPTIONS_KEY", "CallOptions", "LatentReasoner"]

OPTIONS_KEY = "latent_reasoner"

# Questions opened and handed to the engine together when the caller sets no max_concurrency.
_BATCH_SIZE = 16

T = TypeVar("T")
Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Threshold = float | Literal["calibrated"] | None


class CallOptions(Settings):
    """What one call may change: the content of ``config["configurable"]["latent_reasoner"]``.

    A field of the request itself wins over these, and these win over the reasoner's own.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    budget: Budget | BudgetLevel | None = Field(
        None,
        description="A Budget, its fields, or quick, standard or thorough, beside which the reasoner's own deadline, "
        "max_candidates and max_new_tokens hold.",
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Seed of the search.")
    min_confidence: Unit | Literal["calibrated"] | None = Field(
        None, description="Abstain below this confidence, or below the calibration's own threshold."
    )
    cancelled: SkipJsonSchema[threading.Event | None] = Field(
        None, description="Set it from another thread to stop the call within one step of the search."
    )

    @field_validator("budget", mode="before")
    @classmethod
    def _coerce_budget(cls, value: Any) -> Budget | str | None:
        budget = None if value is None else Budget.coerce(value)
        return value if isinstance(value, str) else budget

    @classmethod
    def of(cls, config: RunnableConfig) -> CallOptions:
        """The options of a call. Raises ``SettingsError``; other keys of ``configurable`` are not looked at."""
        options = (config.get("configurable") or {}).get(OPTIONS_KEY)
        if options is None:
            return cls()
        if isinstance(options, cls):
            return options
        if isinstance(options, Mapping):
            return cls(**options)
        raise SettingsError(
            f"config['configurable'][{OPTIONS_KEY!r}] is {type(options).__name__}, not a dict.",
            f"Known fields: {', '.join(cls.model_fields)}.",
        )


class _Abort(threading.Event):
    """Set when the call was given up, or when the caller's own event is set."""

    def __init__(self, call: threading.Event, other: threading.Event | None) -> None:
        super().__init__()
        self._call = call
        self._other = other

    def is_set(self) -> bool:
        return self._call.is_set() or (self._other is not None and self._other.is_set())


class _Call:
    """One call of the reasoner: since when its deadlines count, and whether it was given up."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.cancelled = threading.Event()
        self._loading = threading.Lock()

    def engine(self, reasoner: LatentReasoner) -> Engine:
        """The reasoner's engine; the time it takes to load the model does not count."""
        with self._loading:  # the questions of a batch count it once
            before = time.monotonic()
            engine = reasoner.engine()
            self.began += time.monotonic() - before
        return engine

    def deadline(self, budget: Budget) -> float | None:
        """When the answer must be there, in the time of ``time.monotonic``."""
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
    quantization_config: Any = Field(None, description="Passed to from_pretrained, for example a BitsAndBytesConfig.")
    allow_pickle: bool = Field(False, description="Also load pickled weights, which can run code.")
    trust_remote_code: bool = Field(False, description="Run code from the checkpoint's repository.")
    prefix_cache_bytes: int = Field(
        PREFIX_CACHE_BYTES,
        ge=0,
        description="Memory for prefixes of images that may be asked about again; 0: none is kept.",
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
        """The same reasoner with another budget: a ``Budget``, its fields, or the name of a level."""
        return type(self)(**{**dict(self), "budget": budget})

    # ------------------------------------------------------------------ what LangChain asks of a Runnable

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

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

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        return [
            ConfigurableFieldSpec(
                id=OPTIONS_KEY,
                annotation=CallOptions | None,
                name="Options of a call",
                description="Budget, seed, threshold and stop event of one call of a LatentReasoner.",
                is_shared=True,
            )
        ]

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> ReasoningResult:
        """Answer one question in the calling thread."""
        call = _Call()

        def answer(value: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig) -> ReasoningResult:
            return self._answer(input, config, call)

        return self._call_with_config(answer, shown_input(input), config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> ReasoningResult:
        """Answer one question, together with others asked meanwhile; cancelling the task takes it out at once."""
        call = _Call()

        async def answer(
            value: Any, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
        ) -> ReasoningResult:
            return await self._answer_scheduled(input, config, call)

        return await self._acall_with_config(answer, shown_input(input), config, **kwargs)

    def stream(  # type: ignore[override]  # steps come before the result, which is what the type parameter names
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[ReasoningStep | ReasoningResult]:
        """Yield every step of the search, then the result. Closing the iterator stops the search."""
        call = _Call()

        def steps(
            values: Iterator[Any], run_manager: CallbackManagerForChainRun, config: RunnableConfig
        ) -> Iterator[Any]:
            yield from self._steps(input, config, call)

        yield from self._transform_stream_with_config(iter([shown_input(input)]), steps, config, **kwargs)

    async def astream(  # type: ignore[override]
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[ReasoningStep | ReasoningResult]:
        """``stream``, together with other questions asked meanwhile. Closing the iterator takes this one out."""
        call = _Call()

        async def steps(
            values: AsyncIterator[Any], run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
        ) -> AsyncIterator[Any]:
            async with aclosing(self._scheduled(input, config, call)) as running:
                async for step in running:
                    yield step

        async def only() -> AsyncIterator[Any]:
            yield shown_input(input)

        async for step in self._atransform_stream_with_config(only(), steps, config, **kwargs):
            yield step

    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[ReasoningResult]:
        """Answer several questions together, at most ``max_concurrency`` at a time; each as if it were asked alone."""
        call = _Call()

        def answer(
            values: list[Any], run_manager: list[CallbackManagerForChainRun], config: list[RunnableConfig]
        ) -> list[Exception | ReasoningResult]:
            return self._answer_many(inputs, config, call)

        return self._batch_with_config(
            answer, shown_input(inputs), config, return_exceptions=return_exceptions, **kwargs
        )

    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[ReasoningResult]:
        """``batch``, together with other questions asked meanwhile."""
        call = _Call()

        async def answer(
            values: list[Any], run_manager: list[AsyncCallbackManagerForChainRun], config: list[RunnableConfig]
        ) -> list[Exception | ReasoningResult]:
            gate = asyncio.Semaphore(config[0].get("max_concurrency") or _BATCH_SIZE)

            async def one(value: Any, own: RunnableConfig) -> Exception | ReasoningResult:
                async with gate:
                    try:
                        return await self._answer_scheduled(value, own, call)
                    except Exception as error:
                        return error

            return await asyncio.gather(*map(one, inputs, config))

        return await self._abatch_with_config(
            answer, shown_input(inputs), config, return_exceptions=return_exceptions, **kwargs
        )

    # ------------------------------------------------------------------ calibration

    def configuration(self, budget: Budget | None = None, system: str | None = None) -> dict[str, Any]:
        """What a calibration of the confidence belongs to; see ``latent_tool.calibration.configuration``."""
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
        """The process's engine of this model; loads torch and the model when it is asked for first."""
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
            )
        )

    def _job(self, value: Any, config: RunnableConfig, call: _Call) -> tuple[Engine, Job, Threshold]:
        """The engine, what it is asked and from when on to accept: request, options of the call, own fields."""
        from latent_tool.images.picture import open_pictures

        request, options = as_request(value), CallOptions.of(config)
        cancelled = _Abort(call.cancelled, options.cancelled)
        if cancelled.is_set():
            raise CancelledError("The question was cancelled.")
        budget = self.budget.replaced_by(options.budget).replaced_by(request.budget)
        wanted: Threshold = _first_given(request.min_confidence, options.min_confidence, self.min_confidence)
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

        from latent_tool.engine.engine import Job  # loads torch, which counts as loading the model

        job = Job(
            images=tuple(each.image for each in loaded),
            question=request.question,
            system=request.system,
            settings=self.settings,
            generation=self.generation,
            images_first=self.images_first,
            budget=budget,
            seed=_first_given(request.seed, options.seed, self.seed),
            confidence=self.confidence,
            min_confidence=None if isinstance(wanted, str) or self.calibration is not None else wanted,
            attention=self.attention,
            grounding=self._noise(),
            controls=self.controls,
            deadline=call.deadline(budget),
            cancelled=cancelled,
            image_seconds=image_seconds,
            queue_seconds=queued,
            warnings=tuple(warning for each in loaded for warning in each.warnings),
        )
        return engine, job, wanted

    def _result(self, engine: Engine, outcome: Outcome, wanted: Threshold) -> ReasoningResult:
        """The outcome as a result; with a calibration, its confidence is a probability."""
        result = engine.result(outcome)
        return result if self.calibration is None else self.calibration.apply(result, wanted)

    def _noise(self) -> NoiseSettings | None:
        if isinstance(self.grounding, NoiseSettings):
            return self.grounding
        return NoiseSettings() if self.grounding else None

    def _steps(self, value: Any, config: RunnableConfig, call: _Call) -> Iterator[ReasoningStep | ReasoningResult]:
        """Every step of one question, then its result; steps also go out as events."""
        engine, job, wanted = self._job(value, config, call)
        run = engine.run(job)
        while True:
            try:
                step = next(run)
            except StopIteration as end:
                outcome: Outcome = end.value
                yield self._result(engine, outcome, wanted)
                return
            announce(step, config)
            yield step

    def _answer(self, value: Any, config: RunnableConfig, call: _Call) -> ReasoningResult:
        *_, result = self._steps(value, config, call)
        return cast(ReasoningResult, result)

    async def _scheduled(
        self, value: Any, config: RunnableConfig, call: _Call
    ) -> AsyncGenerator[ReasoningStep | ReasoningResult]:
        """``_steps`` of a question that rides with others."""
        engine, job, wanted = await call.in_thread(config, self._job, value, config, call)
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
                await announce_async(item, config)
                yield item
            outcome = item.result()
        finally:
            future.cancel()
        yield await run_in_executor(config, self._result, engine, outcome, wanted)

    async def _answer_scheduled(self, value: Any, config: RunnableConfig, call: _Call) -> ReasoningResult:
        async with aclosing(self._scheduled(value, config, call)) as running:
            async for each in running:
                last = each
        return cast(ReasoningResult, last)

    def _answer_many(
        self, values: Sequence[Any], configs: Sequence[RunnableConfig], call: _Call
    ) -> list[Exception | ReasoningResult]:
        """Results and errors in the order of the questions; images are opened one group at a time, in threads."""
        size = configs[0].get("max_concurrency") or _BATCH_SIZE
        answers: list[Exception | ReasoningResult] = []
        for begin in range(0, len(values), size):
            group = range(begin, min(begin + size, len(values)))
            answers += self._answer_group([values[i] for i in group], [configs[i] for i in group], call)
        return answers

    def _answer_group(
        self, values: Sequence[Any], configs: Sequence[RunnableConfig], call: _Call
    ) -> list[Exception | ReasoningResult]:
        def prepare(value: Any, config: RunnableConfig) -> Exception | tuple[Engine, Job, Threshold]:
            try:
                return self._job(value, config, call)
            except Exception as error:
                return error

        # One deadline runs for all: an image that is slow to come must not keep the others waiting.
        with ContextThreadPoolExecutor(min(len(values), _BATCH_SIZE)) as pool:
            prepared = list(pool.map(prepare, values, configs))
        ready = [each for each in prepared if not isinstance(each, Exception)]
        outcomes = iter(ready[0][0].answer_many([job for _, job, _ in ready]) if ready else ())
        answers: list[Exception | ReasoningResult] = []
        for each in prepared:
            if isinstance(each, Exception):
                answers.append(each)
                continue
            engine, _, wanted = each
            found = next(outcomes)
            answers.append(found if isinstance(found, Exception) else self._result(engine, found, wanted))
        return answers


def _first_given(*values: Any) -> Any:
    """The first value that is not ``None``, or ``None``."""
    return next((value for value in values if value is not None), None)


def announce(step: ReasoningStep, config: RunnableConfig) -> None:
    """Send a step to the callbacks of the run and, inside a LangGraph run, to its stream writer."""
    data = step.model_dump(mode="json")
    dispatch_custom_event("latent_step", data, config=ensure_config(config))
    _write_to_graph(data)


async def announce_async(step: ReasoningStep, config: RunnableConfig) -> None:
    """``announce`` inside an event loop."""
    data = step.model_dump(mode="json")
    await adispatch_custom_event("latent_step", data, config=ensure_config(config))
    _write_to_graph(data)


def _write_to_graph(data: dict[str, Any]) -> None:
    writer = graph_writer()
    if writer is not None:
        writer({"latent_step": data})


def graph_writer() -> Callable[[Any], None] | None:
    """The stream writer of the LangGraph run this is called in."""
    langgraph = sys.modules.get("langgraph.config")  # loaded whenever a graph is running
    if langgraph is None:
        return None
    try:
        return cast(Callable[[Any], None], langgraph.get_stream_writer())
    except (RuntimeError, KeyError):  # not inside a graph
        return None
