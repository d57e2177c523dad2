"""What a rung of a router is given, and how its reply reads as a result with a confidence.

A reasoner is given the request, a chat model messages, a prompt its variables, a function the request with images it
can use. A reply is a result, a message or a text; a message whose log-probabilities are known is scored by them. This
module asks nobody and decides nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import BaseMessage, ToolMessage
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from pydantic import ValidationError

from latent_tool.cannot_tell import CANNOT_TELL_REASON, says_cannot_tell
from latent_tool.errors import LatentToolError, RungError
from latent_tool.images.picture import Picture, open_pictures
from latent_tool.langchain.messages import asked_text, image_block, messages_from_request, shown_input
from latent_tool.langchain.runnable import RequestRunnable, first_step, with_images
from latent_tool.schema import ReasoningRequest, ReasoningResult
from latent_tool.settings import ImagePolicy

__all__ = ["PROMPT_VARIABLES", "Scorer", "as_result", "input_for", "joint_probability", "quiet", "scored"]

# Gives the confidence, in [0, 1], of an answer that comes without one; None: it cannot tell.
Scorer = Callable[[ReasoningRequest, ReasoningResult], float | None] | Literal["logprobs"]

# What a prompt template may name, beside the fields of the request.
PROMPT_VARIABLES = {
    "image": "the first image as a data URI (PNG)",
    "images": "all images as data URIs, a list",
    "image_base64": "the first image as base64 text (PNG)",
    "image_mime_type": "the type of image_base64: image/png",
    "messages": "the question as messages with all images in them, for a placeholder",
}
# What a reply of this package's chat model says about its acceptance.
_GATES = ("accepted", "abstained", "abstain_reason", "min_confidence", "domain")
_ONE_IMAGE = ("image", "image_base64")


# ---------------------------------------------------------------------- what a rung is given


def input_for(rung: Runnable[Any, Any], request: ReasoningRequest, policy: ImagePolicy) -> Any:
    """Return what the rung is asked. ``policy`` decides which images may be opened for it, unless it opens them itself.

    Raises what ``load_images`` raises, and ``RungError`` for a prompt that has room for fewer images than there are.
    """
    first = first_step(rung)
    if isinstance(first, RequestRunnable):
        return request
    if isinstance(first, BaseLanguageModel):
        return messages_from_request(request, _opened(request, policy))
    if isinstance(first, BasePromptTemplate):
        return _variables(first, request, policy)
    return _for_strangers(request, policy)


def _opened(request: ReasoningRequest, policy: ImagePolicy) -> list[Any]:
    return [each.image for each in open_pictures(request.image_references, policy)]


def _variables(prompt: BasePromptTemplate[Any], request: ReasoningRequest, policy: ImagePolicy) -> dict[str, Any]:
    """The request's fields and ``PROMPT_VARIABLES``; images are opened only for a prompt that shows them."""
    fields = {**dict(request), "question": asked_text(request), "image": None, "images": None}
    wanted = {*prompt.input_variables, *prompt.optional_variables} & {*PROMPT_VARIABLES}
    if not wanted:
        return fields
    if len(request.image_references) > 1 and wanted <= {*_ONE_IMAGE, "image_mime_type"}:
        raise RungError(
            f"The prompt shows one image, and the question has {len(request.image_references)}.",
            "Let the prompt show 'images' or 'messages', or ask about one image at a time.",
        )
    pictures = _opened(request, policy)
    texts = [image_block(picture)["base64"] for picture in pictures]
    uris = [f"data:image/png;base64,{text}" for text in texts]
    return {
        **fields,
        "image": uris[0],
        "images": uris,
        "image_base64": texts[0],
        "image_mime_type": "image/png",
        "messages": messages_from_request(request, pictures),
    }


def _for_strangers(request: ReasoningRequest, policy: ImagePolicy) -> ReasoningRequest:
    """The request for a rung that knows no policies: the caller's references, or pictures where a policy holds."""
    if any(isinstance(each, Picture) and each.policy for each in request.image_references):
        return with_images(request, _opened(request, policy))
    references = [each.reference if isinstance(each, Picture) else each for each in request.image_references]
    return with_images(request, references)


class _QuietLambda(RunnableLambda[Any, Any]):
    """A function as a rung: its run records neither the images nor the credentials of what it is given."""

    def _call_with_config(
        self, func: Any, input_: Any, config: RunnableConfig | None, *rest: Any, **kwargs: Any
    ) -> Any:
        def call(shown: Any, run_manager: Any, config: RunnableConfig, **named: Any) -> Any:
            return func(input_, run_manager, config, **named)

        return super()._call_with_config(call, shown_input(input_), config, *rest, **kwargs)

    async def _acall_with_config(
        self, func: Any, input_: Any, config: RunnableConfig | None, *rest: Any, **kwargs: Any
    ) -> Any:
        async def call(shown: Any, run_manager: Any, config: RunnableConfig, **named: Any) -> Any:
            return await func(input_, run_manager, config, **named)

        return await super()._acall_with_config(call, shown_input(input_), config, *rest, **kwargs)


def quiet(rung: Runnable[Any, Any]) -> Runnable[Any, Any]:
    """Return the rung; a function that does not write into the trace what it is given."""
    if type(rung) is not RunnableLambda:
        return rung
    copied = _QuietLambda.__new__(_QuietLambda)
    copied.__dict__.update(rung.__dict__)
    return copied


# ---------------------------------------------------------------------- how a reply reads


def as_result(answer: Any, request: ReasoningRequest, rung: int, name: str) -> ReasoningResult | Exception:
    """Return a rung's reply as a result, or the error that it stands for.

    A text about an error is no answer, and where options were given, neither is a text that is none of them.
    """
    result = _read(answer, rung, name)
    options = request.all_options
    if isinstance(result, Exception) or options is None or result.choices is not None:
        return result
    meant = [option for option in options if _folded(option) == _folded(result.answer)]
    if not meant and request.unsure and says_cannot_tell(result.answer):
        meant = [options[-1]]
    if len(meant) > 1:  # options that differ in case
        meant = [option for option in meant if option == result.answer]
    if not meant and (result.accepted is False or result.barred is not None):
        return result  # it abstained: the next rung is asked
    if len(meant) != 1:
        return RungError(
            f"Rung {rung} ({name}) answered with none of the options.", "Ask another rung, or give it other options."
        )
    found = result.model_copy(update={"answer": meant[0]})
    return found.abstaining(CANNOT_TELL_REASON) if request.unsure and meant[0] == options[-1] else found


def _folded(text: str) -> str:
    """A text without case, and without what chat models write around a single answer."""
    return " ".join(re.sub(r"^[\s\-*\"'`(]+|[\s.,;:!*\"'`)]+$", "", text.casefold()).split())


def _read(answer: Any, rung: int, name: str) -> ReasoningResult | Exception:
    if isinstance(answer, ReasoningResult):
        return answer
    if isinstance(answer, ToolMessage):
        return _from_tool(answer, rung, name)
    if isinstance(answer, BaseMessage):
        if (refusal := _refusal(answer)) is not None:
            return RungError(f"Rung {rung} ({name}) gave no answer: {refusal}.", "Ask another rung.")
        metadata = answer.response_metadata
        own = metadata.get("model_provider") == "latent_tool"
        has_confidence = own and metadata.get("confidence") is not None
        result = ReasoningResult(
            answer=answer.text.strip(),
            raw_text=answer.text,
            confidence=metadata["confidence"] if has_confidence else None,
            confidence_source=metadata["confidence_source"] if has_confidence else "unscored",
            **{name: metadata.get(name) if own else None for name in _GATES},
            model=metadata.get("model_name") or name,
        )
        return result if own else _abstaining(result)
    if isinstance(answer, str):
        return _abstaining(
            ReasoningResult(
                answer=answer.strip(), raw_text=answer, confidence=None, confidence_source="unscored", model=name
            )
        )
    return RungError(
        f"Rung {rung} ({name}) answered with {type(answer).__name__}.",
        "A rung must answer with a ReasoningResult, a message or a text; put a parser behind it.",
    )


def _abstaining(result: ReasoningResult) -> ReasoningResult:
    """The result, abstained from if its answer says that it cannot be told."""
    return result.abstaining(CANNOT_TELL_REASON) if says_cannot_tell(result.answer) else result


def _from_tool(message: ToolMessage, rung: int, name: str) -> ReasoningResult | Exception:
    """The result that a tool's message carries. A tool's text alone may be an error, and so is no answer."""
    if message.status != "error":
        try:
            return ReasoningResult.model_validate(message.artifact)
        except ValidationError:
            pass
    return RungError(
        f"Rung {rung} ({name}) answered with a tool's message that carries no result.",
        "Ask the tool's reasoner itself.",
    )


def _refusal(message: BaseMessage) -> str | None:
    """Why a chat model's message is no answer, if it says so."""
    reason = str(message.response_metadata.get("finish_reason") or message.response_metadata.get("stop_reason") or "")
    if reason.lower() in ("content_filter", "refusal", "safety", "error"):
        return f"the model stopped for the reason {reason.lower()!r}"
    return "the model refuses" if message.additional_kwargs.get("refusal") else None


def scored(
    result: ReasoningResult, answer: Any, request: ReasoningRequest, scorer: Scorer | None
) -> ReasoningResult | Exception:
    """Return the result with a confidence, where it has none and its log-probabilities or the scorer give one."""
    if result.confidence is not None or not result.answer:
        return result
    if scorer is None or scorer == "logprobs":
        confidence = joint_probability(answer) if isinstance(answer, BaseMessage) else None
    else:
        try:
            confidence = scorer(request, result)
        except LatentToolError as error:
            return error
        except Exception as error:
            failed = RungError(f"The scorer failed: {type(error).__name__}.", "Let it return None when it cannot tell.")
            failed.__cause__ = error
            return failed
        if confidence is not None and not (_is_number(confidence) and 0 <= confidence <= 1):
            return RungError("The scorer gave no number from 0 to 1.", "Let it return a probability, or None.")
    if confidence is None:
        return result
    return result.model_copy(update={"confidence": float(confidence), "confidence_source": "answer_probability"})


def joint_probability(message: BaseMessage) -> float | None:
    """Return the probability of a message's text by the log-probabilities in its metadata; ``None`` when it has
    none.
    """
    found = message.response_metadata.get("logprobs")
    content = found.get("content") if isinstance(found, Mapping) else None
    if not isinstance(content, list) or not content:
        return None
    values = [each.get("logprob") if isinstance(each, Mapping) else None for each in content]
    numbers = [float(value) for value in values if value is not None and _is_number(value)]
    return math.exp(min(0.0, sum(numbers))) if len(numbers) == len(values) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
