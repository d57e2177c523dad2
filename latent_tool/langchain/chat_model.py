"""``ChatLatentReasoner``: the method as a LangChain chat model, images in content blocks, confidence in the metadata.

This module knows chat messages; asking is the reasoner's business. It has no tool calling and pretends none.
"""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    BaseCallbackManager,
    CallbackManager,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import LangSmithParams
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig, ensure_config
from pydantic import ConfigDict, Field, ValidationError, field_validator

from latent_tool.errors import SettingsError
from latent_tool.images.load import is_whole
from latent_tool.langchain.messages import image_blocks, request_from_messages
from latent_tool.langchain.reasoner import OPTIONS_KEY, CallOptions, LatentReasoner
from latent_tool.schema import GeneratedToken, ImageReference, ReasoningResult
from latent_tool.settings import ImagePolicy, settings_error

__all__ = ["ChatLatentReasoner"]


class ChatLatentReasoner(BaseChatModel):
    """A chat model that answers questions about the images in the conversation.

    The last human message is the question; it is about all images the messages show, or about ``image`` when they show
    none. Images may come in any content block that LangChain knows. By default they must be in the message itself;
    files and URLs need a reasoner with another ``image_policy``.

    ``response_metadata`` of the reply holds ``confidence`` (in [0, 1]), ``confidence_source``, ``accepted``,
    ``patches``, ``scores``, ``warnings``, ``finish_reason``, ``model_name``, and under ``logprobs`` the log-probability
    of every token of the answer after thinking; the confidence also asks the model before it thought (see
    ``LatentReasoner``), so that it is not their product.

    ``stream`` yields the answer's tokens once it has been found and scored: what comes before an answer is search and
    reasoning, which goes out as the custom event ``latent_step``.

    A call takes ``stop`` and ``max_tokens``, and of ``CallOptions`` ``budget``, ``seed`` and ``min_confidence``, as
    keyword arguments (for example through ``bind``) or in ``config["configurable"]["latent_reasoner"]``.

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
    max_tokens: int | None = Field(None, ge=1, description="Tokens decoded at most; None: the reasoner's budget.")
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False, description="The budget's deadline, in seconds.")
    streaming: bool = Field(False, description="Let invoke stream to callbacks, too.")
    stop: list[str] | None = Field(None, description="Texts before which the answer is cut.")

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: list[str] | None) -> list[str] | None:
        return None if value is None else _checked_stop(value)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise settings_error(type(self), error) from None

    # ------------------------------------------------------------------ what LangChain asks of a chat model

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    def _llm_type(self) -> str:
        return "latent-reasoner"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What a cached answer depends on."""
        return self.reasoner.model_dump(mode="json") | {"max_tokens": self.max_tokens, "timeout": self.timeout}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """What a cached answer depends on, the messages aside; LangChain leaves out what is not plain JSON."""
        return f"{super()._get_llm_string(stop=stop, **kwargs)}---{self.reasoner.quantization_config!r}"

    def _may_be_cached(self, messages: list[BaseMessage]) -> bool:
        """Whether the messages hold all that the answer is about, so that equal messages have equal answers."""
        blocks = [block for message in messages for block in image_blocks(message)]
        return all(is_whole(block) for block in blocks) if blocks else self.image is None

    def _generate_with_cache(self, messages: list[BaseMessage], *arguments: Any, **options: Any) -> ChatResult:
        if self.cache is False or self._may_be_cached(messages):
            return super()._generate_with_cache(messages, *arguments, **options)
        return self.model_copy(update={"cache": False})._generate_with_cache(messages, *arguments, **options)

    async def _agenerate_with_cache(self, messages: list[BaseMessage], *arguments: Any, **options: Any) -> ChatResult:
        if self.cache is False or self._may_be_cached(messages):
            return await super()._agenerate_with_cache(messages, *arguments, **options)
        return await self.model_copy(update={"cache": False})._agenerate_with_cache(messages, *arguments, **options)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "latent_tool"
        params.setdefault("ls_model_name", self.reasoner.model)
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
        request = request_from_messages(messages, self.image)
        return self._reply(self.reasoner.invoke(request, self._config(run_manager, kwargs)), stop)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        stop = self.stop if stop is None else _checked_stop(stop)
        request = request_from_messages(messages, self.image)
        return self._reply(await self.reasoner.ainvoke(request, self._config(run_manager, kwargs)), stop)

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

    # ------------------------------------------------------------------ the work

    def _config(
        self, run_manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun | None, kwargs: dict[str, Any]
    ) -> RunnableConfig:
        """The reasoner's config: a child of this run, with the options of this call."""
        max_tokens = kwargs.pop("max_tokens", self.max_tokens)
        options = CallOptions(**kwargs)
        budget = self.reasoner.budget.replaced_by(options.budget)
        if max_tokens is not None:
            budget = budget.but(max_new_tokens=max_tokens)
        if self.timeout is not None:
            budget = budget.but(deadline_s=self.timeout)
        config = RunnableConfig(configurable={OPTIONS_KEY: options.but(budget=budget)})
        if run_manager is not None:
            config["callbacks"] = _children_of(run_manager)
        return config

    def _reply(self, result: ReasoningResult, stop: list[str] | None) -> ChatResult:
        """The result as an assistant's message."""
        text = result.answer
        for sequence in stop or ():
            text = text.partition(sequence)[0]
        plain = result.model_dump(mode="json", include={"patches", "scores", "warnings", "finish_reason"})
        metadata = {
            "model_name": result.model,
            "model_provider": "latent_tool",
            "confidence": result.confidence,
            "confidence_source": result.confidence_source,
            "accepted": result.accepted,
            "abstained": result.abstained,
            "min_confidence": result.min_confidence,
            **plain,
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


def _checked_stop(stop: list[str]) -> list[str]:
    """The texts an answer is cut before. Raises ``SettingsError`` for an empty one, which stands everywhere."""
    if not all(stop):
        raise SettingsError("A stop text is empty.", "Leave it out of stop.")
    return stop


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
