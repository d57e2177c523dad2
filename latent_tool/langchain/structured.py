"""An answer as structured output: a schema of ours, or the caller's own where the answer is one of its values.

The model writes an answer in words; nothing makes it write JSON. So a schema is filled, not generated: one field (or
the schema itself) takes the answer, fields named like what a reply carries (``confidence``, ``accepted``, ...) take
that, and what cannot be filled is refused when the schema is given. This module knows nothing of models or images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, NotRequired, Required, get_args, get_origin, get_type_hints, is_typeddict

from langchain_core.messages import AIMessage
from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from latent_tool.errors import AnswerMismatchError, SettingsError
from latent_tool.langchain.values import JSON_NOTES, Answer, type_of_json, validator
from latent_tool.schema import ConfidenceSource, Patch

__all__ = ["StructuredAnswer", "StructuredOutput"]


class StructuredAnswer(BaseModel):
    """An answer, how sure the model is, and what it rests on."""

    model_config = ConfigDict(frozen=True)

    answer: str
    confidence: float | None = Field(description="In [0, 1]; gate on it. None: nothing was scored.")
    confidence_source: ConfidenceSource
    accepted: bool | None = Field(None, description="Whether the confidence reached the threshold; None: none was set.")
    min_confidence: float | None = Field(None, description="The threshold.")
    patches: list[Patch] = Field([], description="The image regions the answer rests on.")
    warnings: list[str] = []


# Fields that are filled from what a reply carries beside its answer, whatever else a schema has.
_CARRIED = {
    *StructuredAnswer.model_fields,
    *("abstained", "abstain_reason", "domain", "finish_reason", "model_name", "scores"),
} - {"answer"}
# Below this probability of all values together, the model's own answer is more likely none of them.
_LEAST_MASS = 0.5
# Where a schema shows that an answer was not accepted.
_GATES = {"accepted", "abstained", "confidence"}
_HINT = (
    "Give it one field for the answer (a Literal, an Enum, bool, text or a number), and if you like some of: "
    f"{', '.join(sorted(_CARRIED))}. Ask one question for each value you want."
)


class StructuredOutput:
    """Fills a schema from a reply of ``ChatLatentReasoner``.

    Args:
        schema: a pydantic class, a ``TypedDict``, a JSON schema (or an OpenAI function) of an object, a ``Literal``, an
            ``Enum`` or ``bool``.

    Raises:
        SettingsError: the schema has not exactly one place for the answer, or asks for what is not checked here.
    """

    def __init__(self, schema: Any) -> None:
        self.schema = schema
        self._fields = _fields(schema)
        if self._fields is None:
            self._place: str | None = None
            self._answer = Answer(schema, f"The schema {_name(schema)}")
            if not self._answer.values:
                raise SettingsError(f"The schema {_name(schema)} cannot be filled from an answer.", _HINT)
            return
        own = {name: kind for name, (kind, _) in self._fields.items() if name not in _CARRIED}
        needed = [name for name in own if self._fields[name][1]] or list(own)
        if len(needed) > 1 and not any(self._fields[name][1] for name in needed):
            needed = [name for name in needed if _is_chosen(own[name])]  # the others may keep their defaults
        if len(needed) != 1:
            named = ", ".join(own) or "none"
            raise SettingsError(
                f"The schema {_name(schema)} needs exactly one field for the answer; it has: {named}.", _HINT
            )
        (self._place,) = needed
        self._answer = Answer(own[self._place](), f"The field {self._place} of the schema")
        # A pydantic class checks its fields itself.
        self._carried: dict[str, TypeAdapter[Any]] = {}
        if isinstance(schema, Mapping) or is_typeddict(schema):
            for name in filter(_CARRIED.__contains__, self._fields):
                self._carried[name] = validator(self._fields[name][0](), f"The field {name} of the schema")

    @property
    def options(self) -> list[str] | None:
        """How an answer spells each of the schema's values, to choose from; ``None`` if there is nothing to choose."""
        return self._answer.options

    def __call__(self, reply: AIMessage) -> Any:
        """The schema, filled.

        Raises ``AnswerMismatchError`` when the answer is none of the schema's values, or was not accepted and the
        schema has no field to say so.
        """
        carried = {name: reply.response_metadata.get(name) for name in _CARRIED}
        why = carried["abstain_reason"] or "its confidence is below the threshold"
        # A confidence says nothing of an answer that none would make acceptable.
        shown = _GATES if reply.response_metadata.get("barred") is None else _GATES - {"confidence"}
        if carried["accepted"] is False and not (self._fields and shown & set(self._fields)):
            raise AnswerMismatchError(
                f"The answer was not accepted: {why}.",
                "Take another answer, or give the schema a field 'accepted' to see such answers too.",
            )
        text = str(reply.text)
        mass = reply.response_metadata.get("mass")
        if mass is not None and mass < _LEAST_MASS:
            raise AnswerMismatchError(
                f"The model would rather answer with something else: it gives all values of the schema together a "
                f"probability of {mass:.2g}.",
                "Name the possible answers in the question, or give the schema a value for whatever else there is.",
            )
        answer = self._answer.read(text)
        if self._place is None or self._fields is None:
            return answer
        if isinstance(self.schema, Mapping) or is_typeddict(self.schema):
            return self._filled(carried) | {self._place: answer}
        values = {key: carried[key] for key in self._fields if key in _CARRIED} | {self._place: answer}
        try:
            if issubclass(self.schema, RootModel):
                return self.schema.model_validate(answer)
            return self.schema.model_validate(values, by_alias=True, by_name=True)
        except ValidationError as error:
            where = ", ".join(str(item["loc"][0]) for item in error.errors() if item["loc"]) or "the whole"
            raise self._mismatch(where) from error

    def _filled(self, carried: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a dict that take what a reply carries."""
        values = {}
        for name, type_ in self._carried.items():
            value = carried[name]
            try:
                if isinstance(self.schema, Mapping):  # JSON takes nothing for something else: 1 is not true
                    type_.validate_json(json.dumps(value), strict=True)
                else:
                    value = type_.validate_python(value)
            except ValidationError as error:
                needed = self._fields is None or self._fields[name][1]
                if value is None and not needed and carried["accepted"] is not False:
                    continue
                raise self._mismatch(name) from error
            values[name] = value
        return values

    def _mismatch(self, where: str) -> AnswerMismatchError:
        return AnswerMismatchError(
            f"The answer does not fit the schema {_name(self.schema)}: {where} is not valid.",
            "Ask so that the answer is one of the schema's values; let a field be None that not every answer has.",
        )


def _name(schema: Any) -> str:
    return (
        repr(schema.get("title", "given")) if isinstance(schema, Mapping) else getattr(schema, "__name__", str(schema))
    )


# What may be said of an object here: its properties, and what demands nothing of them.
_OF_AN_OBJECT = JSON_NOTES | {
    *("type", "properties", "required", "additionalProperties"),
    *("$defs", "definitions", "$schema", "$id", "name", "strict"),
}
_OF_A_FUNCTION = {"name", "title", "description", "parameters", "strict"}
_PATCH = Patch.model_json_schema()
# A field: what gives its type, and whether it must be given.
_Field = tuple[Callable[[], Any], bool]


def _fields(schema: Any) -> dict[str, _Field] | None:
    """Type of every field of a schema and whether it must be given; ``None`` if it is no object."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        try:
            complete = schema.model_rebuild() is not False
        except (PydanticUserError, NameError):
            complete = False
        if not complete:
            raise SettingsError(f"The schema {_name(schema)} names types that are not defined.", _HINT)
        return {name: (_always(info.annotation), info.is_required()) for name, info in schema.model_fields.items()}
    if is_typeddict(schema):
        try:
            hints = get_type_hints(schema, include_extras=True)
        except (NameError, TypeError):
            raise SettingsError(f"The schema {_name(schema)} names types that are not defined.", _HINT) from None
        fields: dict[str, _Field] = {}
        for name, hint in hints.items():
            kind, required = _unmarked(hint)
            # Where annotations are texts, the class itself does not see what marks a field.
            fields[name] = (_always(kind), name in schema.__required_keys__ if required is None else required)
        return fields
    return _json_fields(schema) if isinstance(schema, Mapping) else None


def _always(kind: Any) -> Callable[[], Any]:
    return lambda: kind


def _unmarked(hint: Any) -> tuple[Any, bool | None]:
    """The type of a ``TypedDict``'s field, its limits kept, and whether ``Required`` or ``NotRequired`` marks it."""
    if (mark := get_origin(hint)) in (Required, NotRequired):
        return get_args(hint)[0], mark is Required
    if mark is Annotated:
        kind, required = _unmarked(hint.__origin__)
        return Annotated[(kind, *hint.__metadata__)], required
    return hint, None


def _json_fields(schema: Mapping[str, Any]) -> dict[str, _Field]:
    function = schema.get("function", schema)
    function = function if isinstance(function, Mapping) else {}
    inner = function.get("parameters", function)
    inner = inner if isinstance(inner, Mapping) else {}
    for outside, within, known in ((schema, function, {"type", "function"}), (function, inner, _OF_A_FUNCTION)):
        if outside is not within and (more := sorted(map(str, outside.keys() - known))):
            raise SettingsError(f"The function has {', '.join(more)}, which is not understood here.", _HINT)
    properties, required = inner.get("properties"), inner.get("required")
    if not isinstance(properties, Mapping):
        raise SettingsError("The JSON schema has no properties.", _HINT)
    if inner.get("type", "object") != "object":
        raise SettingsError("The JSON schema is of no object.", _HINT)
    if more := sorted(map(str, inner.keys() - _OF_AN_OBJECT)):
        raise SettingsError(f"The JSON schema has {', '.join(more)}, which is not understood here.", _HINT)
    if required is None:  # where nothing is said, an answer is wanted for each
        required = [name for name in properties if name not in _CARRIED]
    if isinstance(required, str) or not isinstance(required, Sequence) or not set(map(str, required)) <= {*properties}:
        raise SettingsError("'required' of the JSON schema is no list of its properties.", _HINT)
    defined: dict[str, Any] = {}
    for key in ("$defs", "definitions"):
        known = inner.get(key, {})
        if not isinstance(known, Mapping):
            raise SettingsError(f"{key!r} of the JSON schema is no dict.", _HINT)
        defined |= {f"#/{key}/{name}": Patch if kind == _PATCH else kind for name, kind in known.items()}
    return {name: (partial(_json_type, name, kind, defined), name in required) for name, kind in properties.items()}


def _json_type(name: str, kind: Any, defined: Mapping[str, Any]) -> Any:
    found = type_of_json(kind, defined, f"The field {name} of the schema")
    if found is Any and name not in _CARRIED:
        raise SettingsError(f"The field {name} of the schema says nothing of its values.", _HINT)
    return found


def _is_chosen(kind: Callable[[], Any]) -> bool:
    """Whether a type lists its values."""
    try:
        return bool(Answer(kind(), "a field").values)
    except SettingsError:
        return False
