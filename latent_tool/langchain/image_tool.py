"""The tool that agents are given, once for every framework: name, description, arguments, and what comes back.

``ImageTool`` finds the image an agent means, asks the reasoner and returns a ``ToolReply``: text that says what may be
relied on, the whole result as plain JSON types, and pictures of the evidence. An adapter only passes these on in the
words of its framework. This module knows no framework, and nothing of LangChain but the reasoner it asks.
"""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, Self, runtime_checkable

from langchain_core.runnables import ensure_config
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, create_model, field_validator
from pydantic.json_schema import SkipJsonSchema

from latent_tool.about import what_it_is
from latent_tool.errors import DeadlineError, ImageNotAllowedError, ImageNotFoundError, InputError
from latent_tool.images.picture import open_pictures
from latent_tool.langchain.attachments import Chosen, Conversation, is_left_out
from latent_tool.langchain.call import OPTIONS_KEY, CallOptions
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.langchain.runnable import Handover, hand_over, refuse_tools
from latent_tool.request import MAX_TEXT, checked_options
from latent_tool.schema import Choice, ReasoningRequest, ReasoningResult, ReasoningStep
from latent_tool.settings import BudgetLevel, ImagePolicy
from latent_tool.validation import Settings, explain_validation
from latent_tool.views.overlay import overlay_png

__all__ = [
    "ALLOW_OVERLAY",
    "BRIEF_SCHEMA",
    "DESCRIPTION",
    "FIXABLE",
    "MIN_CONFIDENCE",
    "NAME",
    "ImageTool",
    "NamedImageArguments",
    "ToolArguments",
    "ToolReply",
    "describe",
    "explain_arguments",
    "fitted",
]

NAME = "ask_about_image"
DESCRIPTION = (
    "Answers a question about an image, with a confidence between 0 and 1 and the image regions the answer rests "
    "on. Use it for whatever depends on what an image shows. Below its threshold the answer is marked as not "
    "reliable: do not pass it on as a fact."
)

# What the agent's model can fix, and so gets to read; anything else is the developer's and is raised.
FIXABLE = (InputError, DeadlineError)

# Below, the model holds its own answer for more likely wrong than right.
UNSURE = 0.5
MIN_CONFIDENCE = (
    f"Below it an answer is marked as not reliable; None: the threshold of the reasoner, or {UNSURE} if it has none."
)

ALLOW_OVERLAY = (
    "Whether the agent's model may ask for pictures of the evidence. Turn it off where a tool's reply may hold text "
    "alone, as with OpenAI's Chat Completions."
)

_PATCHES_NAMED = 5
_OPTIONS_NAMED = 8


class ToolArguments(BaseModel):
    """Arguments of the tool, as the agent's model sees them.

    Words for nothing (an empty text, "null", "None") count as left out.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    question: str = Field(
        min_length=1, max_length=MAX_TEXT, description="One short question about what the image shows."
    )
    image: str | None = Field(
        None,
        description="Which image: its number in the conversation ('1' is the first it shows), or a data URI, path or "
        "URL. Leave it out to ask about the newest image of the conversation.",
    )
    options: list[str] | None = Field(
        None,
        description="The possible answers, if you know them: the reply is one of them, with the probability of each. "
        "Leave it out for a free answer.",
    )
    budget: BudgetLevel | None = Field(
        None,
        description="How hard to think. Leave it out at first; use 'thorough' to ask again after an answer that was "
        "not reliable.",
    )
    overlay: bool = Field(
        False, description="Also return the images, with the regions marked that the answer rests on."
    )

    @field_validator("image", "options", "budget", "overlay", mode="before")
    @classmethod
    def _no_fillers(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if is_left_out(value):
            return value if field.is_required() else field.default
        if info.field_name == "options" and value == []:
            return None
        if info.field_name == "image" and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if info.field_name == "budget" and isinstance(value, str):
            return value.strip().lower()
        return value

    @field_validator("options")
    @classmethod
    def _can_be_told_apart(cls, options: list[str] | None) -> list[str] | None:
        return None if options is None else checked_options(options)

    @classmethod
    def parse(cls, value: Self | Mapping[str, Any]) -> Self:
        """Return arguments from what an agent's model has sent; raises ``InputError`` naming the field that is
        wrong.
        """
        if isinstance(value, cls):
            return value
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise InputError(explain_arguments(error, cls)) from None


class NamedImageArguments(ToolArguments):
    """The same where an agent's conversation cannot be seen: the image must be named."""

    image: str = Field(min_length=1, description="Which image: a data URI, path or URL.")


@lru_cache(maxsize=64)
def fitted(arguments: type[ToolArguments], policy: ImagePolicy, allow_overlay: bool = True) -> type[ToolArguments]:
    """Return the arguments, described as an image policy has them; ``overlay`` is hidden where no pictures are
    returned.
    """
    info = arguments.model_fields["image"]
    named = _either(["a data URI", *_places(policy)])
    description = f"Which image: {named}."
    if not info.is_required():
        description = (
            f"Which image: its number in the conversation ('1' is the first it shows), {named}. Leave it out to ask "
            "about the newest image of the conversation."
        )
    field = copy(info)
    field.description = description
    fields: dict[str, Any] = {"image": (info.annotation, field)}
    if not allow_overlay:
        fields["overlay"] = (SkipJsonSchema[bool], False)
    made: type[ToolArguments] = create_model(
        arguments.__name__, __base__=arguments, __doc__=arguments.__doc__, __module__=arguments.__module__, **fields
    )
    return made


def _places(policy: ImagePolicy) -> list[str]:
    """From where an agent may name images, in words."""
    places = []
    if policy.files == "any":
        places.append("the path of a file")
    elif policy.files == "folders":
        places.append(f"the path of a file in {_either(map(str, policy.folders))}")
    if policy.hosts:
        places.append(f"an {'http or ' if policy.allow_http else ''}https URL of {_either(policy.hosts)}")
    return places


def _either(ways: Iterable[str]) -> str:
    *others, last = ways
    return f"{', '.join(others)} or {last}" if others else last


@runtime_checkable
class Reasoner(Protocol):
    """Who answers: a ``LatentReasoner``, a ``ConfidenceRouter`` or another Runnable from a request to a result."""

    def invoke(self, input: Any, config: Any = None) -> Any: ...

    async def ainvoke(self, input: Any, config: Any = None) -> Any: ...

    def astream(self, input: Any, config: Any = None) -> AsyncIterator[Any]: ...


@dataclass(frozen=True)
class ToolReply:
    """What the tool gives back.

    Attributes:
        result: the whole result; its ``image_numbers`` say which images of the conversation were asked about.
        pictures: PNG files, one per image, with the evidence marked; empty unless they were asked for.
    """

    result: ReasoningResult
    pictures: tuple[bytes, ...] = ()

    @property
    def text(self) -> str:
        """What the agent's model reads."""
        return describe(self.result)

    @property
    def data(self) -> dict[str, Any]:
        """The result as plain JSON types, for code."""
        return self.result.model_dump(mode="json")

    @property
    def brief(self) -> dict[str, Any]:
        """What agents decide by, as plain JSON types: for frameworks whose model reads whatever the tool returns."""
        answer = self.result.model_dump(
            mode="json",
            include={
                "answer",
                "confidence",
                "confidence_source",
                "accepted",
                "image_numbers",
                "image_sizes",
                "warnings",
            },
        )
        if self.result.choices is not None:
            answer["options"] = {choice.text: choice.probability for choice in self.result.choices}
        boxes = [list(patch.box) for patch in self.result.patches if patch.box is not None]
        windows = [list(view.box) for view in self.result.views if view.accepted]
        return {**answer, "evidence": boxes, "looked_again": windows, "advice": self.text}

    @property
    def picture_uris(self) -> list[str]:
        """The pictures as data URIs."""
        return ["data:image/png;base64," + base64.b64encode(each).decode("ascii") for each in self.pictures]


BRIEF_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "answer": {"type": "string"},
        "confidence": {"type": ["number", "null"], "description": "From 0 to 1; gate on it."},
        "confidence_source": {"type": "string"},
        "accepted": {"type": ["boolean", "null"], "description": "Whether the confidence reaches the threshold."},
        "image_numbers": {"type": "array", "description": "Which images of the conversation were asked about, from 1."},
        "image_sizes": {"type": "array", "description": "Width and height of every image, in pixels."},
        "warnings": {"type": "array", "items": {"type": "string"}},
        "options": {"type": "object", "description": "Probability of every option, if options were given."},
        "evidence": {"type": "array", "description": "Regions (left, top, right, bottom) the answer rests on."},
        "looked_again": {
            "type": "array",
            "description": "Windows (left, top, right, bottom) that were looked at again, closer, and made it surer.",
        },
        "advice": {"type": "string", "description": "The same in words, and what may be relied on."},
    },
    "required": ["answer", "confidence", "accepted", "advice"],
}


class ImageTool(Settings):
    """The tool, whatever framework calls it.

    ``ask`` and ``aask`` raise ``FIXABLE`` errors for what the agent's model can fix; their text says how. Cancelling
    the task that awaits ``aask`` stops the search within one step.

    The agent chooses how hard to search, nothing more: deadlines and other limits of the reasoner hold, the time it
    takes to open the image counts, and so does a threshold of the reasoner's own. Without one it is 0.5.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    reasoner: Reasoner = Field(
        default_factory=lambda: LatentReasoner(), description="Who answers: a LatentReasoner or a ConfidenceRouter."
    )
    min_confidence: float | None = Field(None, ge=0, le=1, description=MIN_CONFIDENCE)
    image_policy: ImagePolicy = Field(ImagePolicy.untrusted(), description="Which images the agent may have opened.")
    allow_overlay: bool = Field(True, description=ALLOW_OVERLAY)

    def arguments(self, *, named: bool = False) -> type[ToolArguments]:
        """Return the arguments, described as this tool takes them; ``named``: no conversation can be seen."""
        return fitted(NamedImageArguments if named else ToolArguments, self.image_policy, self.allow_overlay)

    @field_validator("reasoner")
    @classmethod
    def _no_tool(cls, value: Any) -> Any:
        refuse_tools(value)
        return value

    def ask(
        self,
        arguments: ToolArguments | Mapping[str, Any],
        *,
        shown: Conversation | Sequence[Any] = (),
        config: Any = None,
    ) -> ToolReply:
        """Answer in the calling thread.

        Args:
            arguments: what the agent's model has sent.
            shown: the images of the conversation; those of the newest message that attaches any are asked about when
                no image is named. A list of references: the conversation shows these, in one message.
            config: passed to the reasoner.
        """
        asked = self._asked(arguments)
        chosen = Conversation.of(shown).choose(asked.image)
        with _hint_at_the_conversation(chosen, shown):
            question = self._hand_over(asked, chosen, config)
            result = self.reasoner.invoke(question.request, config)
        return self._reply(result, chosen, question, asked.overlay)

    async def aask(
        self,
        arguments: ToolArguments | Mapping[str, Any],
        *,
        shown: Conversation | Sequence[Any] = (),
        config: Any = None,
    ) -> ToolReply:
        """``ask`` without blocking the event loop."""
        asked = self._asked(arguments)
        chosen = Conversation.of(shown).choose(asked.image)
        with _hint_at_the_conversation(chosen, shown):
            question = await asyncio.to_thread(self._hand_over, asked, chosen, config)
            result = await self.reasoner.ainvoke(question.request, config)
        return await asyncio.to_thread(self._reply, result, chosen, question, asked.overlay)

    async def steps(
        self, arguments: ToolArguments | Mapping[str, Any], *, shown: Conversation | Sequence[Any] = ()
    ) -> AsyncGenerator[ReasoningStep | ToolReply, None]:
        """Yield every step of the search, then the reply. Closing the iterator stops the search."""
        asked = self._asked(arguments)
        chosen = Conversation.of(shown).choose(asked.image)
        # A caller that goes away between two steps must not wait for the garbage collector to stop the search.
        abandoned = threading.Event()
        options = {"configurable": {OPTIONS_KEY: CallOptions(cancelled=abandoned)}}
        try:
            with _hint_at_the_conversation(chosen, shown):
                question = await asyncio.to_thread(self._hand_over, asked, chosen)
                async for item in self.reasoner.astream(question.request, options):
                    if isinstance(item, ReasoningStep):
                        yield item
                    else:
                        yield await asyncio.to_thread(self._reply, item, chosen, question, asked.overlay)
        finally:
            abandoned.set()

    def _asked(self, arguments: ToolArguments | Mapping[str, Any]) -> ToolArguments:
        """The arguments. Raises ``InputError`` when pictures are asked for where none are returned."""
        asked = ToolArguments.parse(arguments)
        if asked.overlay and not self.allow_overlay:
            raise InputError("Pictures are not returned here.", "Leave the argument 'overlay' out.")
        return asked

    def _hand_over(self, asked: ToolArguments, chosen: Chosen, config: Any = None) -> Handover:
        """The request about the images that were chosen, under this policy."""
        named = CallOptions.of(ensure_config(config)).min_confidence  # the caller's word for this call counts
        request = ReasoningRequest(
            images=list(chosen.references),
            question=asked.question,
            options=asked.options,
            budget=asked.budget,
            min_confidence=self.min_confidence if named is None else None,
        )
        return hand_over(self.reasoner, request, self.image_policy)

    def _reply(self, result: ReasoningResult, chosen: Chosen, question: Handover, overlay: bool) -> ToolReply:
        changes: dict[str, Any] = {"image_numbers": list(chosen.numbers)}
        if result.accepted is None and result.confidence is not None:  # nobody has set a threshold
            result = result.decided(result.confidence >= UNSURE, UNSURE)
            if (barred := result.barred) is not None:
                result = result.abstaining(barred)
        result = question.with_warnings(result.model_copy(update=changes))
        opened = open_pictures(question.pictures, self.image_policy) if overlay else []
        pictures = [overlay_png(result, each.image, index=i) for i, each in enumerate(opened)]
        return ToolReply(result, tuple(pictures))


@contextmanager
def _hint_at_the_conversation(chosen: Chosen, shown: Conversation | Sequence[Any]) -> Iterator[None]:
    """Where a named image cannot be opened but the conversation shows one, say that in the error's hint."""
    try:
        yield
    except (ImageNotAllowedError, ImageNotFoundError) as error:
        if chosen.numbers or not Conversation.of(shown).pictures:
            raise
        raise type(error)(error.message, Conversation.of(shown).remedy) from error


def explain_arguments(error: ValidationError, arguments: type[ToolArguments] = ToolArguments) -> str:
    """Return what the agent's model reads when its arguments are wrong."""
    required = arguments.model_fields["image"].is_required()
    return (
        f"The arguments are not valid: {explain_validation(error)}. "
        + ("Give 'question' and 'image' as text; " if required else "Give 'question' as text; 'image', ")
        + "'options' (2 or more texts), 'budget' (quick, standard or thorough) and 'overlay' (true or false) may be "
        "left out."
    )


def describe(result: ReasoningResult, *, spent: bool | None = None) -> str:
    """Answer, confidence in words and as a number, where the evidence is, and what may be relied on.

    ``spent``: whether the most thorough search was made already; ``None``: what the result's budget says.
    """
    lines = [f"Answer: {result.answer or '(none)'}"]
    if result.confidence is None:
        lines.append("Confidence: not measured.")
    else:
        words = "high" if result.confidence >= 0.9 else "moderate" if result.confidence >= 0.6 else "low"
        lines.append(f"Confidence: {words}, {result.confidence:.2f} of 1 ({result.confidence_source}).")
    if result.choices is not None:
        lines.append(_options(result.choices))
    if result.image_numbers:
        numbers = ", ".join(map(str, result.image_numbers))
        lines.append(f"Asked about: image{'s' if len(result.image_numbers) > 1 else ''} {numbers} of the conversation.")
    lines += _looked_again(result)
    lines.append(_evidence(result))
    note = what_it_is(result.model, "agent")
    about = f"{note} " if note else ""
    if result.accepted is False:
        if spent is None:
            spent = result.budget is not None and result.budget.replaced_by("thorough") == result.budget
        again = "" if spent else "again with budget='thorough' or "
        below = (
            f"below the threshold of {result.min_confidence:.2f}" if result.min_confidence is not None else "too low"
        )
        lines.append(
            f"NOT RELIABLE: {_barred(result) or f'the confidence is {below}'}. Do not state this answer as a fact. "
            f"{about}Ask {again}a simpler question, check with another source, or say that you are not sure."
        )
    elif about:
        lines.append(f"Note: {about.rstrip()}")
    lines += [f"Note: {warning}" for warning in result.warnings]
    return "\n".join(lines)


def _looked_again(result: ReasoningResult) -> list[str]:
    """Say which windows of the picture the answer rests on, where it became surer with any."""
    kept = [view for view in result.views if view.accepted]
    if not kept:
        return []
    named = []
    for view in kept:
        number = result.image_numbers[view.image] if result.image_numbers else view.image + 1
        named.append(f"image {number} at {view.where}" if len(result.image_sizes) > 1 else view.where)
    return [f"Looked again, closer, at {'; '.join(named)} (left,top-right,bottom in pixels)."]


def _options(choices: Sequence[Choice]) -> str:
    """The likeliest options and their probabilities."""
    ranked = sorted(choices, key=lambda choice: -choice.probability)
    named = ", ".join(f"{choice.text} {choice.probability:.2f}" for choice in ranked[:_OPTIONS_NAMED])
    more = f", and {len(ranked) - _OPTIONS_NAMED} less likely ones" if len(ranked) > _OPTIONS_NAMED else ""
    return f"Options: {named}{more}."


def _barred(result: ReasoningResult) -> str | None:
    """Why no confidence would do, as the beginning of a sentence."""
    barred = result.barred
    return f"the picture is {barred}" if barred is not None and barred.startswith("unlike") else barred


def _evidence(result: ReasoningResult) -> str:
    boxes = [patch for patch in result.patches if patch.box is not None]
    if not boxes and any(view.accepted for view in result.views):
        return "Evidence: the last of these windows, beside the image as a whole."
    if not boxes:
        return "Evidence: no single region; the answer rests on the image as a whole."
    named = []
    for patch in boxes[:_PATCHES_NAMED]:
        number = result.image_numbers[patch.image] if result.image_numbers else patch.image + 1
        place = f"image {number} " if len(result.image_sizes) > 1 else ""
        named.append(place + "(" + ", ".join(f"{value:.0f}" for value in patch.box or ()) + ")")
    more = f", and {len(boxes) - _PATCHES_NAMED} more" if len(boxes) > _PATCHES_NAMED else ""
    sizes = ", ".join(f"{width} x {height}" for width, height in result.image_sizes)
    return f"Evidence: regions (left, top, right, bottom) in pixels of {sizes}: {'; '.join(named)}{more}."
