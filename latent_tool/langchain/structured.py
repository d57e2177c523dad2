"""An answer as structured output: a schema of ours, or the caller's own where the answer is one of its values.

The model writes an answer in words; nothing makes it write JSON. So a schema is filled, not generated: one field (or
the schema itself) takes the answer, fields named like what a reply carries (``confidence``, ``accepted``, ...) take
that, and what cannot be filled is refused when the schema is given. This module knows nothing of models or images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints, is_typeddict

from langchain_core.messages import AIMessage
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from latent_tool.errors import AnswerMismatchError, SettingsError
from latent_tool.request import checked_options
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
        SettingsError: the schema has not exactly one place for the answer.
    """

    def __init__(self, schema: Any) -> None:
        self.schema = schema
        self._fields = _fields(schema)
        if self._fields is None:
            self._answer: tuple[str, Any] | None = None
            if not _options(schema):
                raise SettingsError(f"The schema {_name(schema)} cannot be filled from an answer.", _HINT)
            return
        own = {name: kind for name, (kind, _) in self._fields.items() if name not in _CARRIED}
        needed = [name for name in own if self._fields[name][1]] or list(own)
        if len(needed) > 1 and not any(self._fields[name][1] for name in needed):
            needed = [name for name in needed if _options(own[name])]  # the others may keep their defaults
        if len(needed) != 1:
            named = ", ".join(own) or "none"
            raise SettingsError(
                f"The schema {_name(schema)} needs exactly one field for the answer; it has: {named}.", _HINT
            )
        (name,) = needed
        if isinstance(own[name], Mapping) and not _options(own[name]) and own[name].get("type") not in _JSON_TYPES:
            raise SettingsError(f"The field {name} of the schema cannot be filled from an answer.", _HINT)
        self._answer = name, own[name]

    @property
    def options(self) -> list[str] | None:
        """How an answer spells each of the schema's values, to choose from; ``None`` if they cannot be told apart."""
        kind = self.schema if self._answer is None else self._answer[1]
        spelled: dict[Any, str] = {}
        for key, value in _options(kind).items():
            spelled.setdefault(value, _spelled(value, key))
        texts = list(spelled.values())
        if len({_folded(text) for text in texts}) < len(texts):
            return None
        try:
            return checked_options(texts)
        except ValueError:
            return None

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
        if self._answer is None or self._fields is None:
            return _read(text, self.schema)
        name, kind = self._answer
        values = {key: carried[key] for key in self._fields if key in _CARRIED} | {name: _read(text, kind)}
        if isinstance(self.schema, Mapping) or is_typeddict(self.schema):
            return values
        try:
            return self.schema.model_validate(values)
        except ValidationError as error:
            where = ", ".join(str(item["loc"][0]) for item in error.errors() if item["loc"]) or "the whole"
            raise AnswerMismatchError(
                f"The answer does not fit the schema {_name(self.schema)}: {where} is not valid.",
                "Ask so that the answer is one of the schema's values.",
            ) from error


_JSON_TYPES: dict[str, type] = {"string": str, "integer": int, "number": float, "boolean": bool}


def _name(schema: Any) -> str:
    return (
        repr(schema.get("title", "given")) if isinstance(schema, Mapping) else getattr(schema, "__name__", str(schema))
    )


def _fields(schema: Any) -> dict[str, tuple[Any, bool]] | None:
    """Type of every field of a schema and whether it must be given; ``None`` if it is no object."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return {name: (info.annotation, info.is_required()) for name, info in schema.model_fields.items()}
    if is_typeddict(schema):
        hints = get_type_hints(schema, include_extras=True)
        return {name: (_bare(hint), name in schema.__required_keys__) for name, hint in hints.items()}
    if isinstance(schema, Mapping):
        function = schema.get("function", schema)
        inner = function.get("parameters", function) if isinstance(function, Mapping) else {}
        properties = inner.get("properties") if isinstance(inner, Mapping) else None
        if not isinstance(properties, Mapping):
            raise SettingsError("The JSON schema has no properties.", _HINT)
        defined = {**inner.get("$defs", {}), **inner.get("definitions", {})}
        return {
            name: (_resolved(kind, defined), name in inner.get("required", properties))
            for name, kind in properties.items()
        }
    return None


def _bare(hint: Any) -> Any:
    """A type without what a ``TypedDict`` writes around it."""
    while get_origin(hint) in (Required, NotRequired) or hasattr(hint, "__metadata__"):
        hint = get_args(hint)[0]
    return hint


def _resolved(kind: Any, defined: Mapping[str, Any]) -> Any:
    """A property's schema, a reference followed."""
    for part in [kind, *(kind.get("allOf") or [])] if isinstance(kind, Mapping) else []:
        if isinstance(reference := part.get("$ref"), str):
            return defined.get(reference.rpartition("/")[2], {})
    return kind if isinstance(kind, Mapping) else {}


def _options(kind: Any) -> dict[str, Any]:
    """The values a type allows, by how an answer may spell each; none if it is open."""
    if isinstance(kind, Mapping):
        values = kind.get("enum", [kind["const"]] if "const" in kind else [])
        if not values and kind.get("type") == "boolean":
            return _options(bool)
        return {_folded(value): value for value in values if value is not None}
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        parts = [_options(part) for part in get_args(kind) if part is not NoneType]
        return {key: value for part in parts for key, value in part.items()} if all(parts) else {}
    if origin is Literal:
        return {_folded(value): value for value in get_args(kind) if value is not None}
    if kind is bool:
        return {"yes": True, "true": True, "no": False, "false": False}
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = {_folded(each.name.replace("_", " ")): each for each in kind}
        return {**names, **{_folded(each.value): each for each in kind}}
    return {}


def _spelled(value: Any, key: str) -> str:
    """How an answer would spell a value; ``key`` is one way to."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Enum):
        words = isinstance(value.value, str) and any(sign.isalpha() for sign in value.value)
        return str(value.value) if words else value.name.replace("_", " ").lower()
    return str(value) if not isinstance(value, list | dict) else key


def _folded(value: Any) -> str:
    """Words in lower case, without articles and what stands around them."""
    text = " ".join(re.findall(r"[^\W_]+(?:[.'-][^\W_]+)*|[^\w\s]", str(value).casefold()))
    text = text.strip(" .,;:!?\"'`*()[]")
    return re.sub(r"^(?:the|a|an)\s+", "", text)


def _read(text: str, kind: Any) -> Any:
    """The value of a type that an answer spells. Raises ``AnswerMismatchError``."""
    options = _options(kind)
    if options:
        answer = _folded(text)
        if answer in options:
            return options[answer]
        lead = re.match(r"(yes|no)\s*[,.;:]", answer)
        if (
            lead
            and {"yes", "no"} == {key for key in options if key in ("yes", "no")}
            and len(set(options.values())) == 2
        ):
            return options[lead[1]]
        shown = ", ".join(str(getattr(value, "value", value)) for value in dict.fromkeys(options.values()))
        raise AnswerMismatchError(
            f"The answer {text[:80]!r} is none of: {shown}.", "Name the possible answers in the question."
        )
    if isinstance(kind, Mapping):
        kind = _JSON_TYPES[kind["type"]]
    try:
        return TypeAdapter(kind).validate_python(text.strip())
    except ValidationError as error:
        raise AnswerMismatchError(
            f"The answer {text[:80]!r} is not of the type the schema wants.", "Say in the question what to answer with."
        ) from error
