"""``LatentReasoningTool``: the method as a LangChain tool, with content that says what may be relied on.

The content is for the agent's model; the artifact is the whole ``ReasoningResult`` as plain JSON types, for code. This
module knows what LangChain's agents hand to tools; what the tool says and does is in ``tool_spec``.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal, Self, cast

from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool, InjectedToolArg, ToolException
from pydantic import Field, ValidationError, create_model, field_validator

from latent_tool.langchain.attachments import Conversation
from latent_tool.langchain.call import CallOptions
from latent_tool.langchain.image_tool import (
    ALLOW_OVERLAY,
    DESCRIPTION,
    FIXABLE,
    MIN_CONFIDENCE,
    NAME,
    ImageTool,
    ToolArguments,
    ToolReply,
    explain_arguments,
)
from latent_tool.langchain.messages import conversation
from latent_tool.langchain.progress import TOOL_CALL_ID
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.langchain.runnable import BindsOptions, refuse_tools, with_bound_options
from latent_tool.schema import ReasoningRequest, ReasoningResult
from latent_tool.settings import BudgetLevel, ImagePolicy
from latent_tool.validation import settings_error
from latent_tool.words import redact

try:
    from langgraph.prebuilt import InjectedState
except ImportError:  # without LangGraph nothing injects the agent's state, and the argument stays hidden all the same
    InjectedState = InjectedToolArg  # type: ignore[misc, assignment]

__all__ = ["LatentReasoningTool"]


class LatentReasoningInput(ToolArguments):
    """Arguments of the tool, as the agent's model sees them, and the agent's state."""

    state: Annotated[Any, InjectedState()] = Field(None, description="The agent's state.")


class LatentReasoningTool(BindsOptions, BaseTool):
    """A tool with which an agent asks about an image and learns how sure the answer is.

    The images in the agent's messages are numbered, and ``image="2"`` asks about the second; without ``image`` the
    newest is asked about (this needs LangGraph, which LangChain's agents run on). An attachment that cannot be read is
    an error, never an older image. The image policy is the tool's own, whatever the reasoner's: by default only images
    that are in the conversation, no files and no URLs. The agent chooses how hard to search; the reasoner's own
    deadline, limits and threshold hold.

    What the agent's model can fix (a wrong image reference, an empty question, a deadline that was too short) comes
    back to it as an error message with a remedy; what it cannot fix (a model that does not load) is raised.

    Raises:
        SettingsError: a field is out of its range.
    """

    name: str = NAME
    description: str = DESCRIPTION
    args_schema: Any = LatentReasoningInput
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    handle_tool_error: Any = True
    handle_validation_error: Any = Field(default_factory=lambda: explain_arguments)

    reasoner: Runnable[ReasoningRequest, ReasoningResult] = Field(
        default_factory=lambda: LatentReasoner(), description="Who answers: a LatentReasoner or a ConfidenceRouter."
    )
    min_confidence: float | None = Field(None, ge=0, le=1, description=MIN_CONFIDENCE)
    image_policy: ImagePolicy = Field(ImagePolicy.untrusted(), description="Which images the agent may have opened.")
    allow_overlay: bool = Field(True, description=ALLOW_OVERLAY)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise settings_error(type(self), error) from None

    @property
    def tool_call_schema(self) -> Any:
        """The arguments as the agent's model sees them: those of the image policy, without the agent's state."""
        if self.args_schema is not LatentReasoningInput:
            return super().tool_call_schema
        return create_model(self.name, __base__=self._tool().arguments(), __doc__=self.description)

    @field_validator("reasoner")
    @classmethod
    def _no_tool(cls, value: Any) -> Any:
        refuse_tools(value)
        return value

    def _with_options(self, options: CallOptions) -> Self:
        own, named, reasoner = self.min_confidence, options.min_confidence, self.reasoner
        if own is not None and isinstance(named, float):
            own, options = max(own, named), options.but(min_confidence=None)
        elif own is not None and named is not None:  # "calibrated": the reasoner knows which of the two is stricter
            own, reasoner = None, with_bound_options(reasoner, CallOptions(min_confidence=own))
        return self.model_copy(update={"reasoner": with_bound_options(reasoner, options), "min_confidence": own})

    def run(self, *args: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the tool; steps of the search say which of the agent's calls they belong to."""
        return super().run(*args, config=_marked(config, kwargs.get("tool_call_id")), **kwargs)

    async def arun(self, *args: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """``run`` without blocking the event loop."""
        return await super().arun(*args, config=_marked(config, kwargs.get("tool_call_id")), **kwargs)

    def _filter_injected_args(self, tool_input: dict[str, Any]) -> dict[str, Any]:
        """What a run of the tool records of its arguments: not the agent's state, and no image bytes or credentials."""
        return cast(dict[str, Any], redact(super()._filter_injected_args(tool_input)))

    def _run(
        self,
        question: str,
        config: RunnableConfig,
        image: str | None = None,
        options: list[str] | None = None,
        budget: BudgetLevel | None = None,
        overlay: bool = False,
        state: Any = None,
    ) -> tuple[str | list[dict[str, Any]], dict[str, Any]]:
        asked = ToolArguments(question=question, image=image, options=options, budget=budget, overlay=overlay)
        try:
            return _parts(self._tool().ask(asked, shown=self._shown(state), config=config))
        except FIXABLE as error:
            raise ToolException(str(error)) from error

    async def _arun(
        self,
        question: str,
        config: RunnableConfig,
        image: str | None = None,
        options: list[str] | None = None,
        budget: BudgetLevel | None = None,
        overlay: bool = False,
        state: Any = None,
    ) -> tuple[str | list[dict[str, Any]], dict[str, Any]]:
        asked = ToolArguments(question=question, image=image, options=options, budget=budget, overlay=overlay)
        try:
            return _parts(await self._tool().aask(asked, shown=self._shown(state), config=config))
        except FIXABLE as error:
            raise ToolException(str(error)) from error

    def _tool(self) -> ImageTool:
        return ImageTool(
            reasoner=self.reasoner,
            min_confidence=self.min_confidence,
            image_policy=self.image_policy,
            allow_overlay=self.allow_overlay,
        )

    def _shown(self, state: Any) -> Conversation:
        """The images of the conversation, without the pictures this tool itself has returned."""
        messages: list[BaseMessage] = (
            state.get("messages", []) if isinstance(state, dict) else getattr(state, "messages", [])
        )
        return conversation(messages, without=self.name)


def _parts(reply: ToolReply) -> tuple[str | list[dict[str, Any]], dict[str, Any]]:
    """Content for the agent's model and the artifact."""
    if not reply.pictures:
        return reply.text, reply.data
    pictures = [
        {"type": "image", "base64": base64.b64encode(each).decode("ascii"), "mime_type": "image/png"}
        for each in reply.pictures
    ]
    return [{"type": "text", "text": reply.text}, *pictures], reply.data


def _marked(config: RunnableConfig | None, call_id: str | None) -> RunnableConfig | None:
    """The config with the id of the tool call in its metadata, which every run below inherits."""
    if call_id is None:
        return config
    return {**(config or {}), "metadata": {**((config or {}).get("metadata") or {}), TOOL_CALL_ID: call_id}}
