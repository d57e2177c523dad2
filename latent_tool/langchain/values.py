"""The values that a type allows, and which of them an answer in words spells.

A type is Python's (a ``Literal``, an ``Enum``, ``bool``, text or a number, each with or without ``None``); a JSON
schema of the same is turned into one. What such a type says and this module does not understand is refused, never
skipped. This module knows nothing of models, of replies or of schemas with several fields.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaError

from latent_tool.errors import AnswerMismatchError, SettingsError
from latent_tool.request import checked_options

__all__ = ["HINT", "JSON_NOTES", "Answer", "type_of_json", "validator"]

HINT = (
    "An answer can be one of the values of a Literal, an Enum or a JSON enum (texts, numbers, true and false), bool, a "
    "text or a number."
)

_JSON_TYPES: dict[str, type] = {"string": str, "integer": int, "number": float, "boolean": bool}
# What a JSON schema may demand of a number and of a text, by pydantic's names.
_NUMBER_LIMITS = {
    "minimum": "ge",
    "maximum": "le",
    "exclusiveMinimum": "gt",
    "exclusiveMaximum": "lt",
    "multipleOf": "multiple_of",
}
_TEXT_LIMITS = {"minLength": "min_length", "maxLength": "max_length", "pattern": "pattern"}
# What demands nothing of an answer.
JSON_NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
# What holds the schema proper inside.
_AROUND = ("$ref", "allOf", "anyOf", "oneOf")
# Pydantic's errors that say that no text will do, beside those that end in "_type".
_NO_TEXT = {"sequence_str", "none_required", "is_instance_of", "is_subclass_of"}
_ARTICLES = frozenset({"the", "a", "an"})


@dataclass(frozen=True)
class _Value:
    """One value: the text by which it is offered, and other ways to write it."""

    value: Any
    text: str
    others: tuple[str, ...] = ()


class Answer:
    """Reads answers in words as values of one type.

    Args:
        kind: the type.
        name: of the schema or field, for errors.

    Raises ``SettingsError`` for a type that no answer can be a value of, or two of whose values are spelled alike.
    """

    def __init__(self, kind: Any, name: str) -> None:
        listed = list(_values(kind, name))
        self._type = validator(kind, name)
        self.values: list[_Value] = []
        for each in listed:
            known = any(_same(each.value, other.value) for other in self.values)
            if not known and _is_allowed(each.value, self._type):
                self.values.append(each)
        if listed and not self.values:
            raise SettingsError(f"{name} allows none of its values.", HINT)
        if not listed and not any(_is_read(text, self._type) for text in ("text", "1")):
            raise SettingsError(f"{name} is of a type that no answer can be read as.", HINT)
        spelled: set[str] = set()
        for each in self.values:
            if not each.text or each.text in spelled:
                what = "an empty value" if not each.text else f"two values that are spelled {each.text!r}"
                raise SettingsError(f"{name} has {what}: an answer cannot tell.", "Give every value words of its own.")
            spelled.add(each.text)
        self._articles = _articles(text for each in self.values for text in (each.text, *each.others))

    @property
    def options(self) -> list[str] | None:
        """The texts of the values, to choose from; ``None`` where there is nothing to choose, or it cannot be asked."""
        try:
            return checked_options([each.text for each in self.values])
        except ValueError:
            return None

    def read(self, text: str) -> Any:
        """Return the value that an answer spells. Raises ``AnswerMismatchError``."""
        if not self.values:
            try:
                return self._type.validate_python(text.strip())
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
        exact, answer = " ".join(text.split()), self._core(text)
        yield [each for each in self.values if each.text == exact]
        yield [each for each in self.values if self._core(each.text) == answer]
        yield [each for each in self.values if answer in map(self._core, each.others)]
        lead = re.match(r"(yes|no)\s*[,.;:]", answer)
        if lead and {each.text for each in self.values} == {"yes", "no"}:
            yield [each for each in self.values if each.text == lead[1]]

    def _core(self, text: str) -> str:
        return _without(_folded(text), self._articles)


def _bare(hint: Any) -> Any:
    """Return a type without what is written around it: an alias or ``Annotated``."""
    while True:
        if hasattr(hint, "__metadata__"):
            hint = get_args(hint)[0]
        elif hasattr(hint, "__value__"):  # a type alias
            hint = hint.__value__
        elif hasattr(hint, "__supertype__"):  # a NewType
            hint = hint.__supertype__
        else:
            return hint


def validator(kind: Any, name: str) -> TypeAdapter[Any]:
    """Return what validates values of a type. Raises ``SettingsError`` for what is no type."""
    try:
        return TypeAdapter(kind)
    except (PydanticUserError, SchemaError, NameError, TypeError) as error:
        raise SettingsError(f"{name} is of a type that is not understood ({error!s:.200}).", HINT) from None


def type_of_json(kind: Any, defined: Mapping[str, Any], name: str, depth: int = 16) -> Any:
    """Return the Python type of a JSON schema, its references followed and what stands beside them kept.

    Args:
        kind: the schema.
        defined: by their references (``#/$defs/Name``), schemas or Python types.
        name: of the field, for errors.
        depth: how many schemas may lie within one another.

    Raises ``SettingsError`` for what it does not understand.
    """
    if kind is True:
        return Any
    if not isinstance(kind, Mapping) or not depth:
        raise SettingsError(f"{name} has a JSON schema that cannot be followed.", HINT)
    key = next((each for each in _AROUND if each in kind), None)
    if key is None:
        return _type_of_json(kind, defined, name, depth - 1)
    beside = {other: value for other, value in kind.items() if other != key}
    parts = [defined.get(kind[key]) if isinstance(kind[key], str) else None] if key == "$ref" else kind[key]
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        raise SettingsError(f"{name} has an {key!r} that is no list.", HINT)
    rest = [part for part in parts if key in ("$ref", "allOf") or part != {"type": "null"}]
    if len(rest) != 1:
        raise SettingsError(f"{name} may be of several kinds.", HINT)
    if key == "$ref" and isinstance(rest[0], type):
        _refuse_unknown(beside, (), name)
        return rest[0]
    found = type_of_json(_joined(rest[0], beside, name), defined, name, depth - 1)
    # Limits say nothing of null; a type or values that stand beside it may forbid it.
    may_be_null = len(rest) < len(parts) and beside.keys() <= JSON_NOTES | {*_NUMBER_LIMITS, *_TEXT_LIMITS}
    return found | None if may_be_null else found


def _joined(inner: Any, beside: Mapping[str, Any], name: str) -> Any:
    """A schema with what stands beside the place that holds it."""
    if not isinstance(inner, Mapping):
        _refuse_unknown(beside, (), name)
        return inner
    for key in inner.keys() & beside.keys() - JSON_NOTES:
        if repr(inner[key]) != repr(beside[key]):  # 1 is not true
            raise SettingsError(f"{name} has two different {key!r}.", HINT)
    return {**inner, **beside}


def _type_of_json(kind: Mapping[str, Any], defined: Mapping[str, Any], name: str, depth: int) -> Any:
    if "type" not in kind and not {"enum", "const"} & kind.keys():
        _refuse_unknown(kind, (), name)
        return Any
    several = isinstance(kind.get("type"), Sequence) and not isinstance(kind["type"], str)
    types = kind["type"] if several else [kind.get("type")]
    rest = [each for each in types if not (several and each == "null")]
    if len(rest) != 1:
        raise SettingsError(f"{name} may be of several kinds.", HINT)
    (type_,) = rest
    may_be_null = "type" not in kind or len(rest) < len(types)
    if "enum" in kind or "const" in kind:
        _refuse_unknown(kind, {"enum", "const", "type"}, name)
        return _literal(kind, type_, may_be_null, name)
    if type_ == "array":
        _refuse_unknown(kind, {"type", "items"}, name)
        found: Any = list[type_of_json(kind.get("items", True), defined, name, depth)]  # type: ignore[misc]
    elif type_ == "object":
        _refuse_unknown(kind, {"type"}, name)
        found = dict[str, Any]
    elif not isinstance(type_, str) or type_ not in _JSON_TYPES:
        raise SettingsError(f"{name} cannot be filled from an answer.", HINT)
    else:
        known = {"boolean": {}, "string": _TEXT_LIMITS}.get(type_, _NUMBER_LIMITS)
        _refuse_unknown(kind, {"type", *known}, name)
        limits: dict[str, Any] = {own: kind[key] for key, own in known.items() if key in kind}
        if None in limits.values():
            raise SettingsError(f"{name} has a limit that is null.", "Leave it out, or give it a value.")
        if type_ == "number":
            limits["allow_inf_nan"] = False
        found = Annotated[_JSON_TYPES[type_], Field(**limits)] if limits else _JSON_TYPES[type_]
    return found | None if may_be_null else found


def _literal(kind: Mapping[str, Any], type_: Any, may_be_null: bool, name: str) -> Any:
    """The values that ``enum`` and ``const`` of a JSON schema both allow."""
    values = kind.get("enum", [kind.get("const")])
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise SettingsError(f"{name} has an enum that is no list.", HINT)
    if "const" in kind:
        values = [each for each in values if _same(each, kind["const"])]
    if "type" in kind and not all(_is_of(type_, each) for each in values if each is not None):
        raise SettingsError(f"{name} has a value that is not of its type.", HINT)
    values = [each for each in values if each is not None or may_be_null]
    if all(each is None for each in values):
        raise SettingsError(f"{name} has no values.", HINT)
    return Literal.__getitem__(tuple(values))


def _values(kind: Any, name: str) -> Iterator[_Value]:
    """The values a type allows but ``None``; none if it is open. Raises ``SettingsError``."""
    kind = _bare(kind)
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        parts = [part for part in get_args(kind) if part not in (NoneType, Literal[None])]
        inner = [list(_values(part, name)) for part in parts]
        if all(inner):  # otherwise it is open, whatever some parts list
            for each in inner:
                yield from each
    elif origin is Literal:
        if all(value is None for value in get_args(kind)):
            raise SettingsError(f"{name} has no values.", HINT)
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


def _value(value: Any, name: str) -> _Value:
    if isinstance(value, Enum):
        words = isinstance(value.value, str) and any(sign.isalpha() for sign in value.value)
        own = value.name.replace("_", " ").lower()
        others = (own, str(value.value)) if isinstance(value.value, str | int | float) else (own,)
        return _Value(value, " ".join(value.value.split()) if words else own, others)
    if isinstance(value, bool):
        return _Value(value, "yes" if value else "no", ("true",) if value else ("false",))
    if isinstance(value, str | int | float):
        return _Value(value, " ".join(str(value).split()))
    raise SettingsError(f"{name} has a value that no answer spells: a {type(value).__name__}.", HINT)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _is_allowed(value: Any, type_: TypeAdapter[Any]) -> bool:
    """Whether a listed value is one within the limits, too."""
    try:
        return _same(type_.validate_python(value), value)
    except Exception:  # a validator of the caller's may raise anything
        return False


def _is_read(text: str, type_: TypeAdapter[Any]) -> bool:
    """Whether a text is a value of a type, or is none for what it says only."""
    try:
        return not isinstance(type_.validate_python(text), Iterator)  # of its letters
    except ValidationError as error:
        kinds = [each["type"] for each in error.errors()]
        return not all(kind.endswith("_type") or kind in _NO_TEXT for kind in kinds)
    except Exception:  # a validator of the caller's may raise anything; it did look at the text
        return True


def _is_of(type_: Any, value: Any) -> bool:
    """Whether a value is of a JSON type; whole numbers are numbers, too, but true and false are none."""
    kind = _JSON_TYPES.get(type_) if isinstance(type_, str) else None
    return (
        kind is not None
        and isinstance(value, kind | int if kind is float else kind)
        and (isinstance(value, bool) == (kind is bool))
    )


def _refuse_unknown(kind: Mapping[str, Any], known: Collection[str], name: str) -> None:
    unknown = [key for key in kind if key not in known and key not in JSON_NOTES]
    if unknown:
        raise SettingsError(
            f"{name} asks for what is not checked here: {', '.join(map(str, unknown))}.",
            "Leave it out, or give the field a type that it belongs to.",
        )


def _articles(texts: Iterable[str]) -> frozenset[str]:
    """The articles that say nothing before these texts: none is one of them, or tells two of them apart."""
    folded = {_folded(text) for text in texts}
    alike = Counter(_without(text, _ARTICLES) for text in folded)
    telling = [text for text in folded if text in _ARTICLES or alike[_without(text, _ARTICLES)] > 1]
    return _ARTICLES - {text.partition(" ")[0] for text in telling}


def _without(text: str, articles: Collection[str]) -> str:
    """A folded text without an article before it."""
    first, _, rest = text.partition(" ")
    return rest if rest and first in articles else text


def _folded(text: str) -> str:
    """Words in lower case, without what stands around them; signs alone stay as they are."""
    words = " ".join(re.findall(r"[^\W_]+(?:[.'-][^\W_]+)*|[^\w\s]", text.casefold()))
    return words.strip(" .,;:!?\"'`*()[]") or " ".join(text.split())
