"""``ChatLatentReasoner``: the method as a LangChain chat model, images in content blocks, confidence in the metadata.

This module knows chat messages; asking is the reasoner's business. It has no tool calling and pretends none.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from importlib import resources
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn, Self

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    BaseCallbackManager,
    CallbackManager,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import LangSmithParams, ModelProfile
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import (
    Runnable,
    RunnableConfig,
    RunnableLambda,
    RunnableMap,
    RunnablePassthrough,
    ensure_config,
)
from pydantic import ConfigDict, Field, ValidationError, field_validator

from latent_tool.about import model_name
from latent_tool.errors import AnswerMismatchError, SettingsError, UnsupportedError
from latent_tool.images.load import is_whole, load_images
from latent_tool.images.picture import Picture
from latent_tool.langchain.call import OPTIONS_KEY, CallOptions
from latent_tool.langchain.messages import conversation, request_from_messages, transcript
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.langchain.runnable import BindsOptions, with_bound_options, with_images
from latent_tool.langchain.structured import StructuredAnswer, StructuredOutput
from latent_tool.request import ImageReference
from latent_tool.schema import GeneratedToken, ReasoningRequest, ReasoningResult
from latent_tool.settings import ImagePolicy
from latent_tool.validation import settings_error

__all__ = ["ChatLatentReasoner"]


class ChatLatentReasoner(BindsOptions, BaseChatModel):
    """A chat model that answers questions about the images in the conversation.

    The last human message is the question; it is about the images of the newest message that shows any, or about
    ``image`` when none does. Images may come in any content block that LangChain or its providers know; an attachment
    that cannot be read is an error. By default images must be in the message itself; files and URLs need another
    ``image_policy``, which is this model's own, whatever the reasoner's. ``image`` is opened under the reasoner's.

    ``response_metadata`` of the reply holds ``confidence`` (in [0, 1]), ``confidence_source``, ``accepted``,
    ``patches``, ``scores``, ``warnings``, ``finish_reason``, ``model_name``, and under ``logprobs`` the log-probability
    of every token of the answer after thinking; the confidence also asks the model before it thought (see
    ``LatentReasoner``), so that it is not their product.

    ``stream`` yields the answer's tokens once it has been found and scored: what comes before an answer is search and
    reasoning, which goes out as the custom event ``latent_step``.

    ``with_structured_output`` fills a schema from the answer; see there. Decoding is greedy, so a ``temperature`` other
    than 0 is an error; ``max_retries`` and ``api_key`` are accepted and change nothing, because nothing is sent.

    A call takes ``options`` (answers to choose from: ``response_metadata["choices"]`` then has the probability of each,
    and ``["mass"]`` that of all), ``stop``, ``max_tokens`` and ``timeout``, and of ``CallOptions`` ``budget``,
    ``seed`` and ``min_confidence``, as keyword arguments (for example through ``bind``) or in
    ``config["configurable"]["latent_reasoner"]``.

    LangChain's cache is used only for conversations that hold their images: it knows neither ``image`` nor what is
    behind a path or a URL.

    Raises:
        SettingsError: a field is out of its range or not known.
    """

    model_config = ConfigDict(extra="forbid")

    reasoner: LatentReasoner = Field(
        default_factory=lambda: LatentReasoner(image_policy=ImagePolicy.untrusted()), description="Who answers."
    )
    image: ImageReference | None = Field(None, description="The image asked about when the messages show none.")
    image_policy: ImagePolicy = Field(
        ImagePolicy.untrusted(), description="Which images of messages may be opened; the reasoner's own is not used."
    )
    temperature: float | None = Field(None, description="0 or None: decoding is greedy.")
    max_retries: int | None = Field(None, description="Without effect: nothing is sent anywhere.")
    max_tokens: int | None = Field(None, ge=1, description="Tokens decoded at most; None: the reasoner's budget.")
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False, description="The budget's deadline, in seconds.")
    streaming: bool = Field(False, description="Let invoke stream to callbacks, too.")
    stop: list[str] | None = Field(None, description="Texts (or one text) before which the answer is cut.")

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: Any) -> Any:
        return None if value is None else _checked_stop(value)

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float | None) -> float | None:
        return _checked_temperature(value)

    def __init__(self, **values: Any) -> None:
        values.pop("api_key", None)  # given to every chat model alike; here nothing is sent, so it is not even kept
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise settings_error(type(self), error) from None

    def _with_options(self, options: CallOptions) -> Self:
        return self.model_copy(update={"reasoner": with_bound_options(self.reasoner, options)})

    # ------------------------------------------------------------------ what LangChain asks of a chat model

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["latent_tool", "chat_model"]

    def bind(self, **kwargs: Any) -> Any:
        """Bind keyword arguments of a call; budget, seed and threshold become the reasoner's own."""
        options = {name: kwargs.pop(name) for name in ("budget", "seed", "min_confidence") if name in kwargs}
        return BaseChatModel.bind(with_bound_options(self, CallOptions(**options)), **kwargs)

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """The image policy as plain JSON, from which the constructor makes it again."""
        return {"image_policy": self.image_policy.model_dump(mode="json", exclude_defaults=True)}

    @property
    def _llm_type(self) -> str:
        return "latent-reasoner"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What a cached answer depends on."""
        own = self.model_dump(mode="json", include={"image_policy", "max_tokens", "timeout"})
        return self.reasoner.model_dump(mode="json") | own

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """What a cached answer depends on, the messages aside; LangChain leaves out what is not plain JSON."""
        return f"{super()._get_llm_string(stop=stop, **kwargs)}---{self.reasoner.quantization_config!r}"

    def _may_be_cached(self, messages: list[BaseMessage]) -> bool:
        """Whether the messages hold all that the answer is about, so that equal messages have equal answers."""
        shown = conversation(messages).pictures
        return all(is_whole(each) for each in shown) if shown else self.image is None

    def _generate_with_cache(self, messages: list[BaseMessage], *arguments: Any, **options: Any) -> ChatResult:
        if self.cache is False or self._may_be_cached(messages):
            return super()._generate_with_cache(messages, *arguments, **options)
        return self.model_copy(update={"cache": False})._generate_with_cache(messages, *arguments, **options)

    async def _agenerate_with_cache(self, messages: list[BaseMessage], *arguments: Any, **options: Any) -> ChatResult:
        if self.cache is False or self._may_be_cached(messages):
            return await super()._agenerate_with_cache(messages, *arguments, **options)
        return await self.model_copy(update={"cache": False})._agenerate_with_cache(messages, *arguments, **options)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=[stop] if isinstance(stop, str) else stop, **kwargs)
        params["ls_provider"] = "latent_tool"
        params.setdefault("ls_model_name", model_name(self.reasoner.model))
        return params

    def invoke(
        self, input: Any, config: RunnableConfig | None = None, *, stop: list[str] | None = None, **kwargs: Any
    ) -> AIMessage:
        return super().invoke(input, config, stop=stop, **_with_options(config, kwargs))

    async def ainvoke(
        self, input: Any, config: RunnableConfig | None = None, *, stop: list[str] | None = None, **kwargs: Any
    ) -> AIMessage:
        return await super().ainvoke(input, config, stop=stop, **_with_options(config, kwargs))

    def stream(
        self, input: Any, config: RunnableConfig | None = None, *, stop: list[str] | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        yield from super().stream(input, config, stop=stop, **_with_options(config, kwargs))

    async def astream(
        self, input: Any, config: RunnableConfig | None = None, *, stop: list[str] | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        async for chunk in super().astream(input, config, stop=stop, **_with_options(config, kwargs)):
            yield chunk

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        stop = self.stop if stop is None else _checked_stop(stop)
        request, warnings = self._question(messages, kwargs.pop("options", None))
        result = self.reasoner.invoke(request, self._config(run_manager, kwargs))
        return self._reply(result, stop, warnings)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        stop = self.stop if stop is None else _checked_stop(stop)
        request, warnings = self._question(messages, kwargs.pop("options", None))
        result = await self.reasoner.ainvoke(request, self._config(run_manager, kwargs))
        return self._reply(result, stop, warnings)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        yield from _chunks(self._generate(messages, stop, run_manager, **kwargs))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in _chunks(await self._agenerate(messages, stop, run_manager, **kwargs)):
            yield chunk

    # ------------------------------------------------------------------ what agents and chains ask of it

    def _resolve_model_profile(self) -> ModelProfile:
        """What the model can do, for frameworks that ask before they use it."""
        profile = ModelProfile(
            name=model_name(self.reasoner.model),
            text_inputs=True,
            image_inputs=True,
            image_url_inputs=bool(self.image_policy.hosts),
            pdf_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            image_tool_message=True,
            pdf_tool_message=False,
            max_output_tokens=self.max_tokens or self.reasoner.budget.max_new_tokens,
            reasoning_output=False,
            text_outputs=True,
            image_outputs=False,
            audio_outputs=False,
            video_outputs=False,
            tool_calling=False,
            tool_choice=False,
            structured_output=False,  # by the model itself: with_structured_output fills a schema from an answer
        )
        length = _context_length(self.reasoner.model)
        return profile if length is None else {**profile, "max_input_tokens": length}

    def bind_tools(self, tools: Any, *, tool_choice: str | None = None, **kwargs: Any) -> NoReturn:
        """Refuse: this model answers questions about images and calls no tools. Raises ``UnsupportedError``."""
        raise UnsupportedError(
            "This chat model calls no tools: it answers questions about images.",
            "Give the agent another chat model, and this one's reasoner as a tool: "
            "create_agent(model, tools=[LatentReasoningTool(reasoner=chat.reasoner)]).",
        )

    def with_structured_output(
        self, schema: Any = StructuredAnswer, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[Any, Any]:
        """Return a Runnable that fills a schema from the answer.

        Args:
            schema: ``StructuredAnswer`` (answer, confidence, patches), or your own: a pydantic class, ``TypedDict`` or
                JSON schema with one field for the answer (a ``Literal``, an ``Enum``, ``bool``, text or a number), and
                any fields that a ``StructuredAnswer`` has; or a ``Literal``, an ``Enum`` or ``bool`` alone.
            include_raw: return a dict of ``raw``, ``parsed`` and ``parsing_error`` instead of raising that error.
            kwargs: ``method`` and ``strict`` are accepted and change nothing.

        Where the schema has a list of values, the answer is chosen among them by their probabilities; otherwise it is
        read. Raises ``SettingsError`` when the schema has not one place for the answer; calls raise
        ``AnswerMismatchError`` when the answer is none of its values, or more likely none of them, or was not accepted
        and the schema has no field that says so.
        """
        unknown = set(kwargs) - {"method", "strict"}
        if unknown:
            raise SettingsError(f"with_structured_output does not know: {', '.join(sorted(unknown))}.", "Leave it out.")
        output = StructuredOutput(schema)
        chat: Runnable[Any, AIMessage] = self if output.options is None else self.bind(options=output.options)
        fill = RunnableLambda(output.__call__, name="StructuredOutput")
        if not include_raw:
            return chat | fill
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | fill, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=chat) | parsed.with_fallbacks(
            [failed], exceptions_to_handle=(AnswerMismatchError,), exception_key="parsing_error"
        )

    def get_token_ids(self, text: str) -> list[int]:
        """Return the model's own tokens of a text; loads the model when it is asked for first."""
        return self.reasoner.engine().vlm.tokens(text)

    def get_num_tokens_from_messages(self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Count the tokens of messages: their texts with the speaker's name, and the cells of their images.

        Raises ``UnsupportedError`` for tools, and the errors of opening an image.
        """
        if tools:
            self.bind_tools(tools)
        engine = self.reasoner.engine()
        texts = sum(len(engine.vlm.tokens(line)) for line in transcript(messages))
        opened = load_images(conversation(messages).pictures, self.image_policy)
        return texts + sum(len(engine.vlm.prepare([each.image], "?").cells) for each in opened)

    # ------------------------------------------------------------------ the work

    def _config(
        self, run_manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun | None, kwargs: dict[str, Any]
    ) -> RunnableConfig:
        """The reasoner's config: a child of this run, with the options of this call."""
        _checked_temperature(kwargs.pop("temperature", None))
        max_tokens, timeout = kwargs.pop("max_tokens", self.max_tokens), kwargs.pop("timeout", self.timeout)
        options = CallOptions(**kwargs)
        budget = self.reasoner.budget.replaced_by(options.budget)
        if max_tokens is not None:
            budget = budget.but(max_new_tokens=max_tokens)
        if timeout is not None:
            budget = budget.but(deadline_s=timeout)
        config = RunnableConfig(configurable={OPTIONS_KEY: options.but(budget=budget)})
        if run_manager is not None:
            config["callbacks"] = _children_of(run_manager)
        return config

    def _question(
        self, messages: Sequence[BaseMessage], options: Sequence[str] | None
    ) -> tuple[ReasoningRequest, list[str]]:
        """What is asked, and what of the conversation is not looked at."""
        request, shown = request_from_messages(messages, self.image), conversation(messages).pictures
        if options is not None:
            request = ReasoningRequest.parse({**dict(request), "options": options})
        if not shown:
            return request, []  # about the developer's own image, under the reasoner's policy
        asked = request.image_references
        warnings = [f"Images of earlier messages were not looked at: {len(shown) - len(asked)}."]
        pictures = [Picture(each, self.image_policy) for each in asked]
        return with_images(request, pictures), warnings if len(shown) > len(asked) else []

    def _reply(self, result: ReasoningResult, stop: list[str] | None, warnings: Sequence[str] = ()) -> ChatResult:
        """The result as an assistant's message."""
        if result.accepted is None and result.barred is not None:
            result = result.abstaining(result.barred)
        text = result.answer
        for sequence in stop or ():
            text = text.partition(sequence)[0]
        plain = result.model_dump(
            mode="json", include={"patches", "scores", "choices", "mass", "warnings", "finish_reason", "domain"}
        )
        metadata = {
            "model_name": result.model,
            "model_provider": "latent_tool",
            "confidence": result.confidence,
            "confidence_source": result.confidence_source,
            "accepted": result.accepted,
            "abstained": result.abstained,
            "abstain_reason": result.abstain_reason,
            "barred": result.barred,
            "min_confidence": result.min_confidence,
            **plain,
            "warnings": [*warnings, *plain["warnings"]],
            "logprobs": {
                "content": [
                    {"token": piece, "logprob": logprob, "bytes": list(piece.encode()), "top_logprobs": []}
                    for piece, logprob in _pieces(result, text)
                ]
            },
        }
        usage = None
        if result.usage is not None:
            read, written = result.usage.prompt_tokens, result.usage.generated_tokens
            usage = UsageMetadata(input_tokens=read, output_tokens=written, total_tokens=read + written)
        message = AIMessage(content=text, response_metadata=metadata, usage_metadata=usage)
        return ChatResult(generations=[ChatGeneration(message=message)])


def _children_of(run_manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun) -> BaseCallbackManager:
    """Callbacks for runs below a chat model's run, which LangChain gives no ``get_child``."""
    kind = CallbackManager if isinstance(run_manager, CallbackManagerForLLMRun) else AsyncCallbackManager
    manager = kind(handlers=[], parent_run_id=run_manager.run_id)
    manager.set_handlers(run_manager.inheritable_handlers)
    manager.add_tags(run_manager.inheritable_tags)
    manager.add_metadata(run_manager.inheritable_metadata)
    return manager


def _with_options(config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a call, with the options that its config holds; LangChain hands a model no config."""
    options = CallOptions.of(ensure_config(config))
    return {**{name: getattr(options, name) for name in options.model_fields_set}, **kwargs}


def _checked_stop(stop: str | Sequence[str]) -> list[str]:
    """The texts an answer is cut before; a text alone is one. Raises ``SettingsError`` for what is empty or no text."""
    texts = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(each, str) for each in texts):
        raise SettingsError("stop holds something that is no text.", "Give a text or a list of texts.")
    if not all(texts):
        raise SettingsError("A stop text is empty.", "Leave it out of stop.")
    return texts


def _checked_temperature(value: float | None) -> float | None:
    if value:
        raise SettingsError(f"A temperature of {value} has no meaning: decoding is greedy.", "Leave it out, or give 0.")
    return value


def _context_length(model: str) -> int | None:
    """Tokens that a local checkpoint's context holds, read from its configuration; ``None`` if that does not say."""
    folder = resources.files("latent_tool.models.embedded") if model == "embedded" else Path(model)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        length = config.get("text_config", config)["max_position_embeddings"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return length if isinstance(length, int) else None


def _pieces(result: ReasoningResult, text: str) -> list[tuple[str, float]]:
    """The answer, or the beginning of it, in the pieces its tokens spell, each with the token's log-probability."""
    tokens = [token for token in result.tokens if token.in_answer]
    begin = "".join(token.token for token in tokens).find(text)
    if begin < 0:  # a character made of several tokens has no pieces
        return [(text, sum(map(_logprob, tokens)))]
    pieces = []
    position = -begin
    for token in tokens:
        piece = token.token[max(0, -position) : max(0, len(text) - position)]
        if piece:
            pieces.append((piece, _logprob(token)))
        position += len(token.token)
    return pieces


def _logprob(token: GeneratedToken) -> float:
    """Of a token; a probability that is too small for a float is as small as one can be."""
    return math.log(max(token.probability, sys.float_info.min))


def _chunks(reply: ChatResult) -> Iterator[ChatGenerationChunk]:
    """A reply piece by piece; metadata and usage come with the last, empty one."""
    message = reply.generations[0].message
    assert isinstance(message, AIMessage)
    for piece in message.response_metadata["logprobs"]["content"]:
        yield ChatGenerationChunk(message=AIMessageChunk(content=piece["token"]))
    yield ChatGenerationChunk(
        message=AIMessageChunk(
            content="",
            response_metadata=message.response_metadata,
            usage_metadata=message.usage_metadata,
            chunk_position="last",
        )
    )
