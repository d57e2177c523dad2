"""The values that a type allows, and which of them an answer in words spells.

A type is Python's (a ``Literal``, an ``Enum``, ``bool``, text or a number, each with or without ``None``) or a JSON
schema of the same. What such a type says and this module does not understand is refused, never skipped. This module
knows nothing of models, of replies or of schemas with several fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaError

from latent_tool.errors import AnswerMismatchError, SettingsError
from latent_tool.request import checked_options

__all__ = ["HINT", "Answer", "bare", "resolved"]

HINT = (
    "An answer can be one of the values of a Literal, an Enum or a JSON enum (texts, numbers, true and false), bool, a "
    "text or a number."
)

_JSON_TYPES: dict[str, type] = {"string": str, "integer": int, "number": float, "boolean": bool}
# What a JSON schema may demand of a text or a number, by pydantic's names.
_JSON_LIMITS = {
    "minimum": "ge",
    "maximum": "le",
    "exclusiveMinimum": "gt",
    "exclusiveMaximum": "lt",
    "multipleOf": "multiple_of",
    "minLength": "min_length",
    "maxLength": "max_length",
    "pattern": "pattern",
}
# What demands nothing of an answer.
_JSON_NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}


@dataclass(frozen=True)
class _Value:
    """One value: the text by which it is offered, and other ways to write it, folded."""

    value: Any
    text: str
    others: tuple[str, ...] = ()


class Answer:
    """Reads answers in words as values of one type.

    Args:
        kind: the type, or its JSON schema with references resolved.
        name: of the schema or field, for errors.

    Raises ``SettingsError`` for a type that no answer can be a value of, or two of whose values are spelled alike.
    """

    def __init__(self, kind: Any, name: str) -> None:
        self.values: list[_Value] = []
        for each in _values(kind, name):
            if not any(type(each.value) is type(other.value) and each.value == other.value for other in self.values):
                self.values.append(each)
        spelled: set[str] = set()
        for each in self.values:
            if not each.text or each.text in spelled:
                what = "an empty value" if not each.text else f"two values that are spelled {each.text!r}"
                raise SettingsError(f"{name} has {what}: an answer cannot tell.", "Give every value words of its own.")
            spelled.add(each.text)
        self._open = None if self.values else _reader(kind, name)

    @property
    def options(self) -> list[str] | None:
        """The texts of the values, to choose from; ``None`` where there is nothing to choose, or it cannot be asked."""
        try:
            return checked_options([each.text for each in self.values])
        except ValueError:
            return None

    def read(self, text: str) -> Any:
        """Return the value that an answer spells. Raises ``AnswerMismatchError``."""
        if self._open is not None:
            try:
                return self._open(text.strip())
            except ValidationError as error:
                raise AnswerMismatchError(
                    f"The answer {text[:80]!r} is not of the type the schema wants.",
                    "Say in the question what to answer with.",
                ) from error
        for found in self._matches(text):
            if len(found) == 1:
                return found[0].value
        shown = ", ".join(each.text for each in self.values)
        raise AnswerMismatchError(
            f"The answer {text[:80]!r} is none of: {shown}.", "Name the possible answers in the question."
        )

    def _matches(self, text: str) -> Iterator[list[_Value]]:
        """The values that are written so: as they are offered, in other letters, by another name."""
        exact, answer = " ".join(text.split()), _folded(text)
        yield [each for each in self.values if each.text == exact]
        yield [each for each in self.values if _folded(each.text) == answer]
        yield [each for each in self.values if answer in each.others]
        lead = re.match(r"(yes|no)\s*[,.;:]", answer)
        if lead and {each.text for each in self.values} == {"yes", "no"}:
            yield [each for each in self.values if each.text == lead[1]]


def bare(hint: Any) -> Any:
    """Return a type without what is written around it: an alias, ``Annotated``, ``Required`` or ``NotRequired``."""
    while True:
        if get_origin(hint) in (Required, NotRequired) or hasattr(hint, "__metadata__"):
            hint = get_args(hint)[0]
        elif hasattr(hint, "__value__"):  # a type alias
            hint = hint.__value__
        elif hasattr(hint, "__supertype__"):  # a NewType
            hint = hint.__supertype__
        else:
            return hint


def resolved(kind: Any, defined: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a property's JSON schema with its references followed, what stands beside them kept.

    Raises ``SettingsError`` for a reference that leads nowhere, and what is no schema.
    """
    kind = {} if kind is True else kind
    for _ in range(16):
        if not isinstance(kind, Mapping):
            break
        if isinstance(parts := kind.get("allOf"), Sequence) and len(parts) == 1 and isinstance(parts[0], Mapping):
            kind = {**parts[0], **{key: value for key, value in kind.items() if key != "allOf"}}
        reference = kind.get("$ref")
        if reference is None:
            followed: Mapping[str, Any] = kind
            return followed
        there = defined.get(reference.rpartition("/")[2]) if isinstance(reference, str) else None
        if not isinstance(there, Mapping):
            break
        kind = {**there, **{key: value for key, value in kind.items() if key != "$ref"}}
    raise SettingsError(f"The JSON schema of {name} cannot be followed.", HINT)


def _values(kind: Any, name: str) -> Iterator[_Value]:
    """The values a type allows but ``None``; none if it is open. Raises ``SettingsError``."""
    if isinstance(kind, Mapping):
        yield from _values_of_json(kind, name)
        return
    kind = bare(kind)
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        parts = [part for part in get_args(kind) if part is not NoneType]
        inner = [list(_values(part, name)) for part in parts]
        if all(inner):  # otherwise it is open, whatever some parts list
            for each in inner:
                yield from each
    elif origin is Literal:
        for value in get_args(kind):
            if value is not None:
                yield _value(value, name)
    elif kind is bool:
        yield from (_value(True, name), _value(False, name))
    elif isinstance(kind, type) and issubclass(kind, Enum):
        if not len(kind):
            raise SettingsError(f"{name} has no values.", HINT)
        for member in kind:
            yield _value(member, name)


def _values_of_json(kind: Mapping[str, Any], name: str) -> Iterator[_Value]:
    kind = _without_null(kind, name)
    if "enum" in kind or "const" in kind or kind.get("type") == "boolean":
        _refuse_unknown(kind, {"enum", "const", "type"}, name)
    if "enum" in kind or "const" in kind:
        values = kind.get("enum", [kind.get("const")])
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise SettingsError(f"The enum of {name} is no list.", HINT)
        known = [_value(value, name) for value in values if value is not None]
        if not known:
            raise SettingsError(f"{name} has no values.", HINT)
        if "type" in kind and not all(_is_of(kind["type"], each.value) for each in known):
            raise SettingsError(f"{name} has a value that is not of its type.", HINT)
        yield from known
    elif kind.get("type") == "boolean":
        yield from _values(bool, name)


def _without_null(kind: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A JSON schema that also allows ``null``, as one that does not."""
    for key in ("anyOf", "oneOf"):
        if isinstance(parts := kind.get(key), Sequence):
            rest = [part for part in parts if part != {"type": "null"}]
            if len(rest) != 1 or not isinstance(rest[0], Mapping):
                raise SettingsError(f"{name} may be of several kinds.", HINT)
            kind = {**rest[0], **{other: value for other, value in kind.items() if other != key}}
    if isinstance(types := kind.get("type"), Sequence) and not isinstance(types, str):
        rest = [each for each in types if each != "null"]
        if len(rest) != 1:
            raise SettingsError(f"{name} may be of several kinds.", HINT)
        kind = {**kind, "type": rest[0]}
    return kind


def _value(value: Any, name: str) -> _Value:
    if isinstance(value, Enum):
        words = isinstance(value.value, str) and any(sign.isalpha() for sign in value.value)
        own = value.name.replace("_", " ").lower()
        others = (own, str(value.value)) if isinstance(value.value, str | int | float) else (own,)
        return _Value(value, " ".join(value.value.split()) if words else own, tuple(map(_folded, others)))
    if isinstance(value, bool):
        return _Value(value, "yes" if value else "no", ("true",) if value else ("false",))
    if isinstance(value, str | int | float):
        return _Value(value, " ".join(str(value).split()))
    raise SettingsError(f"{name} has a value that no answer spells: a {type(value).__name__}.", HINT)


def _reader(kind: Any, name: str) -> Callable[[str], Any]:
    """What validates a text as an open type. Raises ``SettingsError`` for one that no text can be."""
    if isinstance(kind, Mapping):
        kind = _type_of_json(_without_null(kind, name), name)
    try:
        return TypeAdapter(kind).validate_python
    except (PydanticUserError, SchemaError, NameError, TypeError) as error:
        raise SettingsError(f"{name} is of a type that no answer can be read as ({error!s:.200}).", HINT) from None


def _type_of_json(kind: Mapping[str, Any], name: str) -> Any:
    type_ = kind.get("type")
    if not isinstance(type_, str) or type_ not in _JSON_TYPES:
        raise SettingsError(f"{name} cannot be filled from an answer.", HINT)
    _refuse_unknown(kind, {"type", *_JSON_LIMITS}, name)
    limits: dict[str, Any] = {own: kind[key] for key, own in _JSON_LIMITS.items() if key in kind}
    if type_ == "number":
        limits["allow_inf_nan"] = False
    return Annotated[_JSON_TYPES[type_], Field(**limits)]


def _is_of(type_: Any, value: Any) -> bool:
    """Whether a value is of a JSON type; whole numbers are numbers, too, but true and false are none."""
    kind = _JSON_TYPES.get(type_) if isinstance(type_, str) else None
    return (
        kind is not None
        and isinstance(value, kind | int if kind is float else kind)
        and (isinstance(value, bool) == (kind is bool))
    )


def _refuse_unknown(kind: Mapping[str, Any], known: Collection[str], name: str) -> None:
    unknown = [key for key in kind if key not in known and key not in _JSON_NOTES]
    if unknown:
        raise SettingsError(f"{name} asks for what is not checked here: {', '.join(map(str, unknown))}.", HINT)


def _folded(value: Any) -> str:
    """Words in lower case, without articles and what stands around them; signs alone stay as they are."""
    text = " ".join(re.findall(r"[^\W_]+(?:[.'-][^\W_]+)*|[^\w\s]", str(value).casefold()))
    words = text.strip(" .,;:!?\"'`*()[]")
    return re.sub(r"^(?:the|a|an)\s+", "", words) or text
