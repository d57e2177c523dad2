"""The base of everything a caller may choose, and what is said where it is refused.

This module knows pydantic and the errors; it knows no settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from latent_tool.errors import InputError, SettingsError

__all__ = ["Settings", "did_you_mean", "explain_validation", "settings_error"]


def explain_validation(error: ValidationError) -> str:
    """Say in one line what pydantic found wrong, field by field, without repeating the caller's values."""
    found: dict[str, list[str]] = {}
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part)[:60] for part in item["loc"][:8] if not _UNION_TAG.match(str(part))) or "value"
        found.setdefault(where, []).append(item["msg"].removeprefix("Value error, ")[:300])
    told = [f"{where}: {' or '.join(messages[:8])}" for where, messages in list(found.items())[:_FIELDS_TOLD]]
    return "; ".join([*told, f"and {len(found) - _FIELDS_TOLD} more"] if len(found) > _FIELDS_TOLD else told)


_FIELDS_TOLD = 5  # of all that are wrong
# What pydantic calls the alternatives of a union, where it says in which of them something is wrong.
_UNION_TAG = re.compile(r"constrained-|literal\[|function-|float$|int$|str$|json-or-python\[")


def did_you_mean(unknown: Iterable[object], known: Iterable[str]) -> str:
    """Return ``"Did you mean ...? "`` with the known fields nearest to unknown names, or nothing where none is near.

    ``"variant.scale"``, the field of a group, is also meant by its own name alone.
    """
    fields = {name.rpartition(".")[2]: name for name in known}
    wanted = [str(name)[:60] for name in unknown][:_FIELDS_TOLD]
    near = [fields[match] for name in wanted for match in get_close_matches(name, fields, n=1, cutoff=0.7)]
    return f"Did you mean {' and '.join(dict.fromkeys(near))}? " if near else ""


def settings_error(owner: type[BaseModel], error: ValidationError) -> InputError:
    """Return what to raise when an object of class ``owner`` could not be made: the inner error where a part
    was wrong.
    """
    wrong = error.errors(include_url=False, include_input=False)
    for item in wrong:
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, InputError):
            return inner
    known = owner.known_fields() if issubclass(owner, Settings) else list(owner.model_fields)
    unknown = [item["loc"][-1] for item in wrong if item["type"] == "extra_forbidden"]
    return SettingsError(
        f"{owner.__name__} is not valid: {explain_validation(error)}.",
        f"{did_you_mean(unknown, known)}Known fields: {', '.join(known)}.",
    )


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, and a ``SettingsError`` instead of pydantic's own error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise settings_error(type(self), error) from None

    @model_validator(mode="wrap")
    @classmethod
    def _names_are_texts(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Refuse what Python itself would not take as keywords, before it says so in its own words."""
        if isinstance(values, Mapping) and not all(isinstance(name, str) for name in values):
            raise SettingsError(
                f"{cls.__name__} has names that are no texts.", f"Known fields: {', '.join(cls.known_fields())}."
            )
        return handler(values)

    @classmethod
    def known_fields(cls) -> list[str]:
        """Return the names of all fields; those of a group after the group's name and a dot."""
        return list(cls.model_fields)

    @classmethod
    def from_mapping(cls, values: Mapping[Any, Any]) -> Self:
        """Make settings of a mapping from names of fields to their values, which a caller has given."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise settings_error(cls, error) from None

    def but(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, validated like a new one."""
        return type(self)(**{**dict(self), **changes})
