"""``LatentDecisionModel``: typed questions about pictures (yes or no, a choice, a score), as LangChain asks them.

``langchain_core.decisions`` (from langchain-core 1.8 on) asks several questions about one state and wants a probability
for every possible answer. Every question becomes a request with options, and all of them go through in one batch that
shares the images' prefix. Its names still change, so that this module takes two classes from there and tells questions
by their ``type``; where they are missing, importing it raises ``UnsupportedError``. It knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from pydantic import ConfigDict, Field, ValidationError, model_validator

from latent_tool.about import model_name
from latent_tool.errors import AnswerMismatchError, InputError, UnsupportedError
from latent_tool.images.picture import Picture
from latent_tool.langchain.attachments import Unreadable, is_media, read_blocks
from latent_tool.langchain.call import OPTIONS_KEY, CallOptions
from latent_tool.langchain.messages import shown_input
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.langchain.runnable import BindsOptions, with_bound_options
from latent_tool.schema import ReasoningRequest, ReasoningResult
from latent_tool.settings import ImagePolicy
from latent_tool.validation import settings_error
from latent_tool.words import redact

try:
    from langchain_core.decisions import BaseDecisionModel, ClassifierResponse
except ImportError as error:
    raise UnsupportedError(
        "This version of langchain-core has no decision models.",
        "Install langchain-core 1.8 or newer, or give options to a LatentReasoner: it gives the same probabilities.",
    ) from error

__all__ = ["Decisions", "LatentDecisionModel"]


class Decisions(ClassifierResponse):
    """The answers, and for each of them the whole result: patches, mass of all options, cost, warnings."""

    results: dict[str, ReasoningResult] = Field({}, description="Per question, what its answer rests on.")


class LatentDecisionModel(BindsOptions, BaseDecisionModel):
    """Answers typed questions about the images in a state, with the probability of every possible answer.

    Images may stand anywhere in the state and in the questions, as content blocks or in messages; whatever else the
    state holds stands before each question as text. ``confidence`` of an answer is the probability of its option,
    calibrated if the reasoner has a calibration. ``result.results`` has the whole result for every question.

    The reasoner's own threshold holds: an answer that is not accepted raises ``AnswerMismatchError``. Without one, gate
    on the probabilities. Runs record neither images nor credentials.

    Raises:
        SettingsError: a field is out of its range or not known.

    Calls raise ``InputError`` for a state without images or a question that cannot be asked, ``UnsupportedError`` for a
    question about a location, and what ``LatentReasoner`` raises.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str = Field("", description="Name of the model; by default the reasoner's.")
    reasoner: LatentReasoner = Field(default_factory=lambda: LatentReasoner(), description="Who answers.")
    image_policy: ImagePolicy = Field(
        ImagePolicy.untrusted(), description="Which images may be opened; the reasoner's own policy is not used."
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise settings_error(type(self), error) from None

    @model_validator(mode="after")
    def _named(self) -> LatentDecisionModel:
        if not self.model:
            self.model = model_name(self.reasoner.model)
        return self

    @property
    def _provider(self) -> str:
        return "latent_tool"

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Answer all questions of a request, a dict of ``state`` and ``questions``."""
        return super().invoke(_hidden(input), _named(config, kwargs))

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """``invoke`` without blocking the event loop."""
        return await super().ainvoke(_hidden(input), _named(config, kwargs))

    def _with_options(self, options: CallOptions) -> LatentDecisionModel:
        return self.model_copy(update={"reasoner": with_bound_options(self.reasoner, options)})

    def _classify(self, state: Any, questions: Mapping[str, Any]) -> Decisions:
        asked = self._asked(state, questions)
        results = self.reasoner.batch([each.request for each in asked.values()])
        return self._decided(dict(zip(asked, results, strict=True)), asked)

    async def _aclassify(self, state: Any, questions: Mapping[str, Any]) -> Decisions:
        asked = self._asked(state, questions)
        results = await self.reasoner.abatch([each.request for each in asked.values()])
        return self._decided(dict(zip(asked, results, strict=True)), asked)

    def _asked(self, state: Any, questions: Mapping[str, Any]) -> dict[str, _Asked]:
        if isinstance(state, _Hidden):
            state, questions = state.given
        if not isinstance(questions, Mapping) or not questions:
            raise InputError("There are no questions.", "Give 'questions': a dict of at least one question.")
        return {name: _Asked(state, question, self.image_policy) for name, question in questions.items()}

    def _decided(self, results: Mapping[str, ReasoningResult], asked: Mapping[str, _Asked]) -> Decisions:
        answers = {name: asked[name].answer(name, result) for name, result in results.items()}
        read = sum(result.usage.prompt_tokens for result in results.values() if result.usage is not None)
        written = sum(result.usage.generated_tokens for result in results.values() if result.usage is not None)
        usage = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
        return Decisions.model_validate({"model": self.model, "answers": answers, "usage": usage, "results": results})


def _named(config: RunnableConfig | None, kwargs: Mapping[str, Any]) -> RunnableConfig | None:
    """The config with options of the call that were given by name. Raises ``SettingsError`` for any other name."""
    if not kwargs:
        return config
    config = ensure_config(config)
    options = CallOptions.of(config, kwargs)
    return {**config, "configurable": {**config.get("configurable", {}), OPTIONS_KEY: options}}


class _Hidden(dict[str, Any]):
    """A state as a run may record it; ``given``: the state and the questions that are meant."""

    given: tuple[Any, Any]


def _hidden(request: Any) -> Any:
    """A request as a run may record it. Raises ``InputError`` for what is no request."""
    if not isinstance(request, Mapping) or {*request} != {"state", "questions"}:
        raise InputError("This is no request for decisions.", "Give a dict of 'state' and 'questions'.")
    state = _Hidden(shown=_shown(request["state"]))
    state.given = request["state"], request["questions"]
    return {"state": state, "questions": _shown(request["questions"])}


def _shown(value: Any) -> Any:
    """Any nesting of plain values, messages and questions without images and credentials."""
    if isinstance(value, BaseMessage):
        return shown_input(value)
    if hasattr(value, "model_dump"):
        return _shown(value.model_dump())
    if isinstance(value, Mapping) and not is_media(value):
        return {
            key: _shown(inner) if isinstance(inner, Mapping | list | tuple | BaseMessage) else _hidden_value(key, inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_shown(inner) for inner in value]
    return shown_input(value)


def _hidden_value(key: Any, value: Any) -> Any:
    """A value without what its key says is an image."""
    shown: Any = redact({key: value})
    return shown[key]


class _Asked:
    """One question as a request with options, and how its result reads as an answer.

    Raises ``InputError`` or ``UnsupportedError`` where it cannot be asked.
    """

    def __init__(self, state: Any, question: Any, policy: ImagePolicy) -> None:
        fields = question.model_dump() if hasattr(question, "model_dump") else question
        if not isinstance(fields, Mapping) or not isinstance(fields.get("type"), str):
            raise InputError("A question has no type.", "Give the questions of langchain_core.decisions.")
        self.kind = fields["type"]
        if self.kind == "box":
            raise UnsupportedError(
                "This model gives no locations: a question of the type 'box' cannot be answered.",
                "Ask a choice such as left or right; the regions an answer rests on are in results[...].patches.",
            )
        if self.kind not in _KINDS:
            raise UnsupportedError(
                f"Questions of the type {self.kind[:40]!r} are not known here.", f"Use one of: {', '.join(_KINDS)}."
            )
        if unknown := sorted(str(key)[:40] for key in fields if key not in _FIELDS):
            raise InputError(
                f"A question has fields that are not known here: {', '.join(unknown)}.",
                f"A question has: {', '.join(_FIELDS)}.",
            )
        pictures: list[Any] = []
        before = _text(state, pictures)
        asked = _text(fields.get("instructions"), pictures)
        if not asked.strip():
            raise InputError("A question has no instructions.", "Say in 'instructions' what is to be decided.")
        criteria: Any = fields.get("criteria")
        self.criteria: Any = criteria.model_dump() if hasattr(criteria, "model_dump") else criteria
        self.options, notes = _KINDS[self.kind](self.criteria, pictures)
        if not pictures:
            raise InputError(
                "There is no image in the state.",
                "Put an image content block into it, for example {'type': 'image', 'base64': ..., 'mime_type': ...}.",
            )
        text = "\n".join(part for part in (before, asked, *notes) if part.strip())
        self.request = ReasoningRequest.parse(
            {"images": [Picture(each, policy) for each in pictures], "question": text, "options": self.options}
        )

    def answer(self, name: str, result: ReasoningResult) -> dict[str, Any]:
        """Return the answer as ``langchain_core.decisions`` has it. Raises ``AnswerMismatchError`` if it was not
        accepted.
        """
        if result.accepted is False or result.barred is not None:
            reason = result.barred or result.abstain_reason or "its confidence is below the threshold"
            raise AnswerMismatchError(
                f"The answer to {name!r} was not accepted: {reason}.",
                "Ask about another picture, or another model."
                if result.barred is not None
                else "Ask another model, or give the reasoner no threshold and gate on the probabilities.",
            )
        if result.choices is None or result.confidence is None:
            raise AnswerMismatchError(
                f"The answer to {name!r} has no probabilities.", "Ask a reasoner that scores the options it is given."
            )
        chances = [choice.probability for choice in result.choices]
        if self.kind == "noul":
            return {"type": self.kind, "noul": min(1.0, chances[0])}
        if self.kind == "choice":
            probabilities = dict(zip(self.criteria, chances, strict=True))
            best = max(probabilities, key=lambda label: probabilities[label])
            return {
                "type": self.kind,
                "choice": best,
                "probabilities": probabilities,
                "confidence": result.confidence,
            }
        return {
            "type": self.kind,
            "score": sum(level * chance for level, chance in enumerate(chances)),
            "legend": dict(enumerate(_shown(list(self.criteria)))),
            "probabilities": dict(enumerate(chances)),
            "confidence": result.confidence,
        }


def _noul(criteria: Any, pictures: list[Any]) -> tuple[list[str], list[str]]:
    told = {} if criteria is None else criteria
    if not isinstance(told, Mapping) or any(key not in ("true", "false") for key in told):
        raise InputError(
            "The criteria of a yes-or-no question are not understood.", "Describe 'true', 'false' or both in a dict."
        )
    meant = {"yes": told.get("true"), "no": told.get("false")}
    return ["yes", "no"], [_note(word, what, pictures) for word, what in meant.items() if what is not None]


def _choice(criteria: Any, pictures: list[Any]) -> tuple[list[str], list[str]]:
    if not isinstance(criteria, Mapping) or len(criteria) < 2:
        raise InputError("A choice needs two labels at least.", "Add one, such as 'other'.")
    notes = [_note(label, what, pictures) for label, what in criteria.items() if what is not None]
    return list(criteria), notes


def _score(criteria: Any, pictures: list[Any]) -> tuple[list[str], list[str]]:
    if not isinstance(criteria, list | tuple) or len(criteria) < 2:
        raise InputError("A score needs two levels at least.", "Describe each level in 'criteria', a list.")
    levels = [str(level) for level in range(len(criteria))]
    notes = [_note(level, what, pictures) for level, what in zip(levels, criteria, strict=True)]
    return levels, ["Answer with the number of the level.", *notes]


def _note(answer: Any, what: Any, pictures: list[Any]) -> str:
    """What an answer means, as a line; a meaning that is shown is named by the numbers of its images."""
    known = len(pictures)
    text = _text(what, pictures) or ", ".join(f"[image {number + 1}]" for number in range(known, len(pictures)))
    return f"{answer}: {text}"


_FIELDS = ("type", "instructions", "criteria")
_KINDS = {"noul": _noul, "choice": _choice, "score": _score}


def _text(value: Any, pictures: list[Any]) -> str:
    """What stands in a state or a question as text; its images are added to ``pictures``.

    Messages and texts are lines, other values JSON, in which ``[image 1]`` stands for the first image. What holds
    nothing but images is no text. Raises ``ImageDecodeError`` for an attachment that cannot be read.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, BaseMessage) or is_media(value):
        return "\n".join(_parts(value, pictures))
    if isinstance(value, list | tuple) and _is_content(value):
        return "\n".join(text for each in value if (text := _text(each, pictures)))
    plain = _json(value, pictures)
    return json.dumps(plain, ensure_ascii=False) if _says_something(plain) else ""


def _is_content(values: Sequence[Any]) -> bool:
    """Whether a list is messages, or the content of one, and not any list of values."""
    shown = [isinstance(each, BaseMessage) or is_media(each) for each in values]
    return any(shown) and all(known or isinstance(each, str) for known, each in zip(shown, values, strict=True))


def _parts(value: Any, pictures: list[Any]) -> Iterator[str]:
    """The texts of a message or block; its images are added."""
    content = value.content if isinstance(value, BaseMessage) else value
    for part in read_blocks(content):
        if isinstance(part, str):
            yield part
        elif isinstance(part, Unreadable):
            raise part.error()
        else:
            pictures.append(part)


class _Place(str):
    """The word that stands where an image was."""


def _json(value: Any, pictures: list[Any]) -> Any:
    if isinstance(value, BaseMessage) or is_media(value):
        known = len(pictures)
        texts = list(_parts(value, pictures))
        places = [_Place(f"[image {number + 1}]") for number in range(known, len(pictures))]
        found = [*texts, *places]
        return found[0] if len(found) == 1 else found
    if isinstance(value, Mapping):
        return {str(key): _json(inner, pictures) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner, pictures) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise InputError(f"The state holds a {type(value).__name__}.", "Give texts, numbers, lists, dicts and messages.")


def _says_something(value: Any) -> bool:
    """Whether there is more than places of images."""
    if isinstance(value, Mapping):
        return any(map(_says_something, value.values()))
    if isinstance(value, list):
        return any(map(_says_something, value))
    return value is not None and not isinstance(value, _Place)
