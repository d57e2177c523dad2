"""``RequestRunnable``: the six verbs of a LangChain Runnable, once for all that answer a ``ReasoningRequest``.

A subclass says how one question is answered, in steps and a result, in the calling thread (``_items``) or on an event
loop (``_aitems``); how many are answered together (``_answer_all``, ``_aanswer_all``); and what options become of it
that are bound to it (``_with_options``). ``hand_over`` hands a question to any Runnable, under a policy for its images.

This module knows LangChain's Runnables and requests; it knows nothing of how an answer is found.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.runnables import (
    Runnable,
    RunnableBinding,
    RunnableConfig,
    RunnableSequence,
    RunnableSerializable,
    RunnableWithFallbacks,
)
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.runnables.configurable import DynamicRunnable
from langchain_core.runnables.utils import ConfigurableFieldSpec
from langchain_core.tools import BaseTool

from latent_tool.errors import SettingsError
from latent_tool.images.picture import Picture, open_pictures
from latent_tool.langchain.call import OPTIONS_KEY, CallOptions, config_specs, split_options
from latent_tool.langchain.messages import shown_input
from latent_tool.schema import ReasoningRequest, ReasoningResult, ReasoningStep
from latent_tool.settings import ImagePolicy

__all__ = [
    "BindsOptions",
    "Handover",
    "Item",
    "OptionsBinding",
    "Question",
    "RequestRunnable",
    "first_step",
    "hand_over",
    "refuse_tools",
    "with_bound_options",
    "with_images",
]

Item = ReasoningStep | ReasoningResult
RunManager = CallbackManagerForChainRun | AsyncCallbackManagerForChainRun


# ---------------------------------------------------------------------- binding options


class BindsOptions(Runnable[Any, Any]):
    """A Runnable into which the options go that are bound to it, so that no later config can push them out."""

    @abstractmethod
    def _with_options(self, options: CallOptions) -> Self:
        """The same Runnable with these options as its own: a threshold may only get stricter."""

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> Runnable[Any, Any]:
        """Bind a config; options of a call in it become the Runnable's own."""
        return OptionsBinding(bound=self).with_config(config, **kwargs)

    def bind(self, **kwargs: Any) -> Runnable[Any, Any]:
        """Bind options of a call by name. Raises ``SettingsError`` for any other name."""
        return OptionsBinding(bound=self).with_config(configurable={OPTIONS_KEY: CallOptions(**kwargs)})

    def with_types(self, **kwargs: Any) -> Runnable[Any, Any]:
        return _guarded(super().with_types(**kwargs))

    def with_listeners(self, **kwargs: Any) -> Runnable[Any, Any]:
        return _guarded(super().with_listeners(**kwargs))

    def with_alisteners(self, **kwargs: Any) -> Runnable[Any, Any]:
        return _guarded(super().with_alisteners(**kwargs))

    def with_retry(self, **kwargs: Any) -> Runnable[Any, Any]:
        return _guarded(super().with_retry(**kwargs))

    def with_fallbacks(self, *args: Any, **kwargs: Any) -> Any:
        return _guarded(super().with_fallbacks(*args, **kwargs))


class OptionsBinding(RunnableBinding[Any, Any]):  # type: ignore[no-redef]  # its field kwargs
    """A binding that hands options of a call on to what it binds, however often another is bound on top of it.

    It is saved as LangChain's own ``RunnableBinding``: the options are in what it binds by then.
    """

    @classmethod
    def lc_id(cls) -> list[str]:
        return RunnableBinding.lc_id()

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> Runnable[Any, Any]:
        """Bind a config on top of the one that is bound; keys of ``configurable`` are merged one by one."""
        options, rest = split_options({**(config or {}), **kwargs})
        configurable = {**self.config.get("configurable", {}), **rest.get("configurable", {})}
        merged = {**self.config, **rest, **({"configurable": configurable} if configurable else {})}
        bound = with_bound_options(self.bound, options)
        return self._but(bound=bound, config=cast(RunnableConfig, merged))

    def bind(self, **kwargs: Any) -> Runnable[Any, Any]:
        """Bind keyword arguments on top of those that are bound, as what is bound here takes them."""
        if not isinstance(self.bound, BindsOptions):
            return super().bind(**kwargs)
        again = self.bound.bind(**kwargs)
        assert isinstance(again, OptionsBinding)
        merged = self._but(bound=again.bound, kwargs={**self.kwargs, **again.kwargs})
        return merged.with_config(again.config) if again.config else merged

    def with_fallbacks(self, *args: Any, **kwargs: Any) -> Any:
        return _guarded(super().with_fallbacks(*args, **kwargs))

    def _but(self, **changes: Any) -> Self:
        fields = ("bound", "kwargs", "config", "config_factories", "custom_input_type", "custom_output_type")
        return type(self)(**{**{name: getattr(self, name) for name in fields}, **changes})

    def _merge_configs(self, *configs: RunnableConfig | None) -> RunnableConfig:
        """LangChain's merged config; a stop event that is bound stays beside the options of the call."""
        merged = super()._merge_configs(*configs)
        own = (self.config.get("configurable") or {}).get(OPTIONS_KEY)
        if own:
            called = CallOptions.parse(merged["configurable"].get(OPTIONS_KEY))
            merged["configurable"][OPTIONS_KEY] = CallOptions.parse(own).overridden_by(called)
        return merged


def _guarded(runnable: Runnable[Any, Any]) -> OptionsBinding:
    """A Runnable around a reasoner whose ``with_config`` reaches the reasoner."""
    if isinstance(runnable, OptionsBinding):
        return runnable
    if isinstance(runnable, RunnableBinding):
        return OptionsBinding(
            bound=runnable.bound,
            kwargs=runnable.kwargs,
            config=runnable.config,
            config_factories=runnable.config_factories,
            custom_input_type=runnable.custom_input_type,
            custom_output_type=runnable.custom_output_type,
        )
    return OptionsBinding(bound=runnable)


def with_bound_options(runnable: Any, options: CallOptions) -> Any:
    """Return the Runnable with options bound to every reasoner in it that answers its input."""
    if not options.given:
        return runnable
    if isinstance(runnable, BindsOptions):
        return runnable._with_options(options)
    if isinstance(runnable, RunnableBindingBase):
        return runnable.model_copy(update={"bound": with_bound_options(runnable.bound, options)})
    if isinstance(runnable, RunnableWithFallbacks):
        others = [with_bound_options(each, options) for each in runnable.fallbacks]
        return runnable.model_copy(
            update={"runnable": with_bound_options(runnable.runnable, options), "fallbacks": others}
        )
    if isinstance(runnable, DynamicRunnable):
        return runnable.model_copy(update={"default": with_bound_options(runnable.default, options)})
    if isinstance(runnable, RunnableSequence):
        first, *middle, last = (with_bound_options(each, options) for each in runnable.steps)
        return runnable.model_copy(update={"first": first, "middle": middle, "last": last})
    return runnable


# ---------------------------------------------------------------------- the six verbs


@dataclass
class Question:
    """One call, or one of a batch.

    Attributes:
        value: what was asked, as it was given.
        call: what the subclass keeps of the call, shared by the questions of a batch.
        config: of the question's run.
        run_manager: of the question's run.
        streaming: whether the caller gets the steps.
        pictures: references of the images, once the request was read; notebooks show them.
    """

    value: Any
    call: Any
    config: RunnableConfig
    run_manager: RunManager
    named: Mapping[str, Any] = field(default_factory=dict)
    around: RunnableConfig | None = None
    streaming: bool = False
    pictures: Sequence[object] = ()

    def options(self) -> CallOptions:
        """Return the options of the call. Raises ``SettingsError``."""
        return CallOptions.of(self.config, self.named, self.around)


class RequestRunnable(BindsOptions, RunnableSerializable[ReasoningRequest, ReasoningResult]):
    """A Runnable from a request to a result that opens the request's images itself, each under its policy."""

    # The address under which objects are saved and found again, wherever the module lies today.
    _saved_as: ClassVar[tuple[str, ...]] = ()

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def _begin(self) -> Any:
        """What is kept of a call from its first moment on."""

    @abstractmethod
    def _items(self, question: Question) -> Iterator[Item]:
        """Steps, if there are any, and the result."""

    @abstractmethod
    def _aitems(self, question: Question) -> AsyncGenerator[Item, None]:
        """``_items`` on an event loop."""

    @abstractmethod
    def _answer_all(self, questions: Sequence[Question]) -> list[Exception | ReasoningResult]:
        """Results and errors of a batch, in the order of the questions."""

    @abstractmethod
    async def _aanswer_all(self, questions: Sequence[Question]) -> list[Exception | ReasoningResult]:
        """``_answer_all`` on an event loop."""

    # ------------------------------------------------------------------ what LangChain asks of a Runnable

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return list(cls._saved_as) or super().get_lc_namespace()

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        return config_specs()

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> ReasoningResult:
        """Answer one question in the calling thread. Keyword arguments are options of the call."""
        made = self._asker(kwargs)

        def answer(value: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig) -> ReasoningResult:
            *_, result = self._items(made(input, config, run_manager))
            return cast(ReasoningResult, result)

        result: ReasoningResult = self._call_with_config(answer, shown_input(input), config)
        return result

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> ReasoningResult:
        """``invoke`` without blocking the event loop; cancelling the task stops the search."""
        made = self._asker(kwargs)

        async def answer(
            value: Any, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
        ) -> ReasoningResult:
            return await self._aanswer(made(input, config, run_manager))

        result: ReasoningResult = await self._acall_with_config(answer, shown_input(input), config)
        return result

    def stream(  # steps come before the result, which is what the type parameter names
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Item]:
        """Yield the steps of the search, then the result. Closing the iterator stops the search."""
        made = self._asker(kwargs, streaming=True)

        def items(
            values: Iterator[Any], run_manager: CallbackManagerForChainRun, config: RunnableConfig
        ) -> Iterator[Any]:
            yield from self._items(made(input, config, run_manager))

        yield from self._transform_stream_with_config(iter([shown_input(input)]), items, config)

    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Item]:
        """``stream`` without blocking the event loop."""
        made = self._asker(kwargs, streaming=True)

        async def items(
            values: AsyncIterator[Any], run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
        ) -> AsyncIterator[Any]:
            async with aclosing(self._aitems(made(input, config, run_manager))) as running:
                async for item in running:
                    yield item

        async def only() -> AsyncIterator[Any]:
            yield shown_input(input)

        async for item in self._atransform_stream_with_config(only(), items, config):
            yield item

    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[ReasoningResult]:
        """Answer several questions together, at most ``max_concurrency`` at a time; each as if it were asked alone."""
        made = self._asker(kwargs)

        def answer(
            values: list[Any], run_manager: list[CallbackManagerForChainRun], config: list[RunnableConfig]
        ) -> list[Exception | ReasoningResult]:
            return self._answer_all([made(*each) for each in zip(inputs, config, run_manager, strict=True)])

        return self._batch_with_config(answer, shown_input(inputs), config, return_exceptions=return_exceptions)

    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[ReasoningResult]:
        """``batch`` without blocking the event loop."""
        made = self._asker(kwargs)

        async def answer(
            values: list[Any], run_manager: list[AsyncCallbackManagerForChainRun], config: list[RunnableConfig]
        ) -> list[Exception | ReasoningResult]:
            return await self._aanswer_all([made(*each) for each in zip(inputs, config, run_manager, strict=True)])

        return await self._abatch_with_config(answer, shown_input(inputs), config, return_exceptions=return_exceptions)

    def _asker(
        self, named: Mapping[str, Any], streaming: bool = False
    ) -> Callable[[Any, RunnableConfig, RunManager], Question]:
        """Begin a call; what is returned makes its questions. Raises ``SettingsError`` for unknown options."""
        CallOptions(**named)
        call, around = self._begin(), var_child_runnable_config.get()

        def made(value: Any, config: RunnableConfig, run_manager: RunManager) -> Question:
            return Question(value, call, config, run_manager, named, around, streaming)

        return made

    async def _aanswer(self, question: Question) -> ReasoningResult:
        async with aclosing(self._aitems(question)) as running:
            async for item in running:
                last = item
        return cast(ReasoningResult, last)


# ---------------------------------------------------------------------- asking any Runnable


def first_step(runnable: Any) -> Any:
    """Return what a Runnable's input reaches first, below retries, fallbacks, bindings and chains."""
    while True:
        if isinstance(runnable, RunnableBindingBase):
            runnable = runnable.bound
        elif isinstance(runnable, RunnableWithFallbacks):
            runnable = runnable.runnable
        elif isinstance(runnable, DynamicRunnable):
            runnable = runnable.default
        elif isinstance(runnable, RunnableSequence):
            runnable = runnable.first
        else:
            return runnable


def refuse_tools(runnable: Any) -> None:
    """Raise ``SettingsError`` for a tool where a reasoner belongs: its errors come back as text, like answers."""
    if isinstance(runnable, RunnableWithFallbacks):
        for each in runnable.runnables:
            refuse_tools(each)
    elif isinstance(runnable, RunnableBindingBase):
        refuse_tools(runnable.bound)
    elif isinstance(runnable, DynamicRunnable):
        refuse_tools(runnable.default)
    elif isinstance(runnable, RunnableSequence):
        refuse_tools(runnable.first)
        refuse_tools(runnable.last)
    elif isinstance(runnable, BaseTool):
        raise SettingsError(
            f"{runnable.name!r} is a tool, which takes an agent's arguments and not a request.",
            "Give what is behind it: of a LatentReasoningTool, its reasoner.",
        )


@dataclass(frozen=True)
class Handover:
    """A question as a Runnable is asked it.

    Attributes:
        request: what the Runnable is given.
        pictures: the images of the request, which are opened once, in its order.
    """

    request: ReasoningRequest
    pictures: tuple[Picture, ...]

    def with_warnings(self, result: ReasoningResult) -> ReasoningResult:
        """Return the result with what was changed of the images when they were opened, where it does not say so
        itself.
        """
        warnings = [each for picture in self.pictures for each in picture.warnings if each not in result.warnings]
        return result.model_copy(update={"warnings": [*warnings, *result.warnings]}) if warnings else result


def hand_over(reasoner: Any, request: ReasoningRequest, policy: ImagePolicy) -> Handover:
    """Hand a request to ``reasoner`` when ``policy`` decides which images may be opened, not the reasoner's own.

    A reasoner of this package opens the images itself, within its deadline. Any other Runnable does not know the
    policy, and is given the pictures opened: this takes time, and raises what ``load_images`` raises.
    """
    pictures = tuple(Picture(reference, policy) for reference in request.image_references)
    images: list[Any] = [*pictures]
    if not isinstance(first_step(reasoner), RequestRunnable):
        images = [each.image for each in open_pictures(pictures, policy)]
    return Handover(with_images(request, images), pictures)


def with_images(request: ReasoningRequest, images: list[Any]) -> ReasoningRequest:
    """Return the request with other images in the place of its own, as ``image`` or ``images`` as they were given."""
    return request.model_copy(update={"images": images} if request.images is not None else {"image": images[0]})
