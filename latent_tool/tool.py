"""``LatentReasoningTool``: the method as a tool for agents, with content that says what may be relied on.

The content is for the agent's model; the artifact is the whole ``ReasoningResult`` as plain JSON types, for code. This
module knows what agents hand to tools; asking is the reasoner's business.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from langchain_core.messages import BaseMessage, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import run_in_executor
from langchain_core.tools import BaseTool, InjectedToolArg, ToolException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latent_tool.errors import DeadlineError, ImageNotAllowedError, ImageNotFoundError, InputError
from latent_tool.images import LoadedImage, load_image
from latent_tool.messages import image_block, newest_images
from latent_tool.overlay import overlays
from latent_tool.reasoner import LatentReasoner
from latent_tool.schema import MAX_TEXT, ReasoningRequest, ReasoningResult
from latent_tool.settings import Budget, BudgetLevel, ImagePolicy, explain_validation, settings_error

try:
    from langgraph.prebuilt import InjectedState
except ImportError:  # without LangGraph nothing injects the agent's state, and the argument stays hidden all the same
    InjectedState = InjectedToolArg  # type: ignore[misc, assignment]

__all__ = ["LatentReasoningTool", "describe"]

_PATCHES_NAMED = 5


class LatentReasoningInput(BaseModel):
    """Arguments of the tool, as the agent's model sees them."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    question: str = Field(
        min_length=1, max_length=MAX_TEXT, description="One short question about what the image shows."
    )
    image: str | None = Field(
        None,
        description="Which image: a data URI, path or URL. Leave it out to ask about the newest image of the "
        "conversation.",
    )
    budget: BudgetLevel | None = Field(
        None,
        description="How hard to think. Leave it out at first; use 'thorough' to ask again after an answer that was "
        "not reliable.",
    )
    overlay: bool = Field(
        False, description="Also return the images, with the regions marked that the answer rests on."
    )
    state: Annotated[Any, InjectedState()] = Field(None, description="The agent's state.")


class LatentReasoningTool(BaseTool):
    """A tool with which an agent asks about an image and learns how sure the answer is.

    Without ``image`` the newest image in the agent's messages is asked about (this needs LangGraph, which LangChain's
    agents run on). The image policy is the tool's own, whatever the reasoner's: by default only images that are in the
    conversation, no files and no URLs.

    What the agent's model can mend (a wrong image reference, an empty question, a deadline that was too short) comes
    back to it as an error message with a remedy; what it cannot mend (a model that does not load) is raised.

    Raises:
        SettingsError: a field is out of its range.
    """

    name: str = "ask_about_image"
    description: str = (
        "Answers a question about an image, with a confidence between 0 and 1 and the image regions the answer rests "
        "on. Use it for whatever depends on what an image shows. Below its threshold the answer is marked as not "
        "reliable: do not pass it on as a fact."
    )
    args_schema: Any = LatentReasoningInput
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    handle_tool_error: Any = True
    handle_validation_error: Any = Field(default_factory=lambda: _explain_arguments)

    reasoner: Runnable[ReasoningRequest, ReasoningResult] = Field(
        default_factory=lambda: LatentReasoner(), description="Who answers: a LatentReasoner or a ConfidenceRouter."
    )
    min_confidence: float | None = Field(
        0.5, ge=0, le=1, description="Below it an answer is marked as not reliable; None: the reasoner's own threshold."
    )
    image_policy: ImagePolicy = Field(ImagePolicy.untrusted(), description="Which images the agent may have opened.")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise settings_error(type(self), error) from None

    def _run(
        self,
        question: str,
        config: RunnableConfig,
        image: str | None = None,
        budget: BudgetLevel | None = None,
        overlay: bool = False,
        state: Any = None,
    ) -> tuple[str | list[dict[str, Any]], dict[str, Any]]:
        try:
            opened = self._open(image, state)
            result = self.reasoner.invoke(self._request(question, opened, budget), config)
        except (InputError, DeadlineError) as error:
            raise ToolException(str(error)) from error
        return _reply(result, opened, overlay)

    async def _arun(
        self,
        question: str,
        config: RunnableConfig,
        image: str | None = None,
        budget: BudgetLevel | None = None,
        overlay: bool = False,
        state: Any = None,
    ) -> tuple[str | list[dict[str, Any]], dict[str, Any]]:
        try:
            opened = await run_in_executor(config, self._open, image, state)
            result = await self.reasoner.ainvoke(self._request(question, opened, budget), config)
        except (InputError, DeadlineError) as error:
            raise ToolException(str(error)) from error
        return await run_in_executor(config, _reply, result, opened, overlay)

    def _open(self, image: str | None, state: Any) -> list[LoadedImage]:
        """The image that was named, or those of the newest message that shows any."""
        shown = newest_images(self._messages(state))
        if image is None and not shown:
            raise InputError("There is no image in the conversation.", "Name one with the argument 'image'.")
        try:
            return [load_image(reference, self.image_policy) for reference in (shown if image is None else [image])]
        except (ImageNotAllowedError, ImageNotFoundError) as error:
            if image is None or not shown:
                raise
            hint = "Leave the argument 'image' out to ask about the newest image of the conversation."
            raise type(error)(error.message, hint) from error

    def _messages(self, state: Any) -> list[BaseMessage]:
        """The agent's messages, without the pictures this tool itself has returned."""
        messages = state.get("messages", []) if isinstance(state, dict) else getattr(state, "messages", [])
        return [each for each in messages if not (isinstance(each, ToolMessage) and each.name == self.name)]

    def _request(self, question: str, images: list[LoadedImage], level: BudgetLevel | None) -> ReasoningRequest:
        budget = None if level is None else Budget.level(level)
        if budget is not None and isinstance(self.reasoner, LatentReasoner):
            # A level says how long to search; the limits the developer has set stay.
            own = self.reasoner.budget
            budget = budget.but(
                deadline_s=own.deadline_s, max_candidates=own.max_candidates, max_new_tokens=own.max_new_tokens
            )
        return ReasoningRequest(
            images=[each.image for each in images],
            question=question,
            budget=budget,
            min_confidence=self.min_confidence,
        )


def _explain_arguments(error: ValidationError) -> str:
    """What the agent's model reads when its arguments are wrong."""
    return (
        f"The arguments are not valid: {explain_validation(error)}. Give 'question' as text; 'image', 'budget' (quick, "
        "standard or thorough) and 'overlay' (true or false) may be left out."
    )


def _reply(
    result: ReasoningResult, images: list[LoadedImage], overlay: bool
) -> tuple[str | list[dict[str, Any]], dict[str, Any]]:
    """Content for the agent's model and the artifact."""
    warnings = [warning for each in images for warning in each.warnings]
    if warnings:
        result = result.model_copy(update={"warnings": [*warnings, *result.warnings]})
    text, artifact = describe(result), result.model_dump(mode="json")
    if not overlay:
        return text, artifact
    pictures = overlays(result, [each.image for each in images])
    return [{"type": "text", "text": text}, *map(image_block, pictures)], artifact


def describe(result: ReasoningResult) -> str:
    """Answer, confidence in words and as a number, where the evidence is, and what may be relied on."""
    lines = [f"Answer: {result.answer or '(none)'}"]
    if result.confidence is None:
        lines.append("Confidence: not measured.")
    else:
        words = "high" if result.confidence >= 0.9 else "moderate" if result.confidence >= 0.6 else "low"
        lines.append(f"Confidence: {words}, {result.confidence:.2f} of 1 ({result.confidence_source}).")
    lines.append(_evidence(result))
    if result.accepted is False:
        below = (
            f"below the threshold of {result.min_confidence:.2f}" if result.min_confidence is not None else "too low"
        )
        lines.append(
            f"NOT RELIABLE: the confidence is {below}. Do not state this answer as a fact. Ask again with "
            "budget='thorough' or a simpler question, check with another source, or say that you are not sure."
        )
    lines += [f"Note: {warning}" for warning in result.warnings]
    return "\n".join(lines)


def _evidence(result: ReasoningResult) -> str:
    boxes = [patch for patch in result.patches if patch.box is not None]
    if not boxes:
        return "Evidence: no single region; the answer rests on the image as a whole."
    named = []
    for patch in boxes[:_PATCHES_NAMED]:
        place = f"image {patch.image + 1} " if len(result.image_sizes) > 1 else ""
        named.append(place + "(" + ", ".join(f"{value:.0f}" for value in patch.box or ()) + ")")
    more = f", and {len(boxes) - _PATCHES_NAMED} more" if len(boxes) > _PATCHES_NAMED else ""
    sizes = ", ".join(f"{width} x {height}" for width, height in result.image_sizes)
    return f"Evidence: regions (left, top, right, bottom) in pixels of {sizes}: {'; '.join(named)}{more}."
