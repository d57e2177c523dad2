"""What is asked: a question about one image or several, and the options of its answer.

This module knows nothing of torch, of models or of LangChain.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SkipValidation,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from latent_tool.cannot_tell import CANNOT_TELL
from latent_tool.errors import InputError
from latent_tool.settings import Budget
from latent_tool.validation import explain_validation
from latent_tool.words import redact

__all__ = ["MAX_OPTIONS", "MAX_TEXT", "ReasoningRequest", "checked_options", "same_text"]

# Characters of a question or a system text at most; how many tokens fit is the model's own limit.
MAX_TEXT = 100_000
# Options of one question at most.
MAX_OPTIONS = 255
MAX_OPTION = 1_000  # characters of one

ImageReference = Annotated[
    Any,
    SkipValidation,
    WithJsonSchema(
        {
            "anyOf": [{"type": "string"}, {"type": "object"}],
            "description": "An image: path, data URI or URL, or an image content block. "
            "In Python also bytes, pathlib.Path, a PIL image, a NumPy array or a torch tensor.",
        }
    ),
]


class ReasoningRequest(BaseModel):
    """A question about one image or several.

    Raises ``InputError`` when neither or both of ``image`` and ``images`` are given, or a field is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True)

    image: ImageReference | None = Field(None, description="The image the question is about.")
    images: list[ImageReference] | None = Field(None, description="Several images, in the order the question means.")
    question: str = Field(max_length=MAX_TEXT, description="What to answer about the image.")
    options: list[str] | None = Field(
        None,
        description=f"Answers to choose from, 2 to {MAX_OPTIONS}, each getting its exact probability; None: the model "
        "answers in its own words.",
    )
    unsure: bool = Field(False, description=f"Add {CANNOT_TELL!r} to the options.")
    system: str | None = Field(
        None, max_length=MAX_TEXT, description="System text put before the question, if the model's template can."
    )
    budget: Budget | Literal["quick", "standard", "thorough"] | None = Field(
        None,
        description="How much work at most: a budget, or the name of a level, beside which the reasoner's own "
        "deadline, max_candidates and max_new_tokens hold. None: the reasoner's own.",
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Seed of the search. None: the reasoner's own.")
    min_confidence: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Abstain below this confidence. None: the reasoner's own."
    )
    elapsed_s: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="No longer used: accepted from older callers, and ignored.",
    )

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Return a request from a request or a mapping; raises ``InputError`` naming the field that is wrong."""
        if isinstance(value, cls):
            return value
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise InputError(
                f"The request is not valid: {explain_validation(error)}.",
                "Pass a dict with 'image' (or 'images') and 'question'; optional: options, unsure, system, budget, "
                "seed, min_confidence.",
            ) from None

    def shown(self) -> dict[str, Any]:
        """Return the fields that were given, for logs and traces: images by kind and size only, no credentials."""
        given = {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}
        if not self.unsure:
            del given["unsure"]
        if isinstance(self.budget, Budget):
            given["budget"] = self.budget.model_dump(mode="json")
        return cast(dict[str, Any], redact(given))

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        yield from self.shown().items()

    @model_validator(mode="after")
    def _one_way_to_give_images(self) -> Self:
        if (self.image is None) == (self.images is None):
            raise ValueError("give either image or images")
        if self.images is not None and not self.images:
            raise ValueError("images is empty; give at least one")
        return self

    @field_validator("options")
    @classmethod
    def _can_be_told_apart(cls, options: list[str] | None) -> list[str] | None:
        return None if options is None else checked_options(options)

    @model_validator(mode="after")
    def _unsure_beside_options(self) -> Self:
        if self.unsure and self.options is None:
            raise ValueError("unsure adds an option to others: give options, too")
        if self.unsure and CANNOT_TELL in map(str.casefold, map(same_text, self.options or ())):
            raise ValueError(f"unsure adds the option {CANNOT_TELL!r}, which is among the options already")
        return self

    @property
    def all_options(self) -> tuple[str, ...] | None:
        """The options, with the one that ``unsure`` adds as the last; ``None`` if the answer is free."""
        if self.options is None:
            return None
        return (*self.options, CANNOT_TELL) if self.unsure else tuple(self.options)

    @property
    def image_references(self) -> list[Any]:
        """The images as a list, in order."""
        return list(self.images) if self.images is not None else [self.image]


def same_text(text: str) -> str:
    """Return a text as options are compared: composed characters, and one blank for any white space inside."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def checked_options(options: Sequence[str]) -> list[str]:
    """Return options with one blank for any white space inside, and none around.

    Raises ``ValueError`` unless they are 2 to ``MAX_OPTIONS`` texts that differ and can be shown.
    """
    if not 2 <= len(options) <= MAX_OPTIONS:
        raise ValueError(f"give 2 to {MAX_OPTIONS} options, not {len(options)}")
    if any(len(option) > MAX_OPTION for option in options):
        raise ValueError(f"an option has at most {MAX_OPTION:,} characters")
    if sum(map(len, options)) > MAX_TEXT:
        raise ValueError(f"all options together have at most {MAX_TEXT:,} characters")
    places: dict[str, int] = {}
    for place, option in enumerate(options, 1):
        plain = same_text(option)
        if not plain:
            raise ValueError(f"option {place} is empty")
        if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in plain):
            raise ValueError(f"option {place} has control characters, or half a character")
        if plain in places:
            raise ValueError(f"options {places[plain]} and {place} are the same")
        places[plain] = place
    return [" ".join(option.split()) for option in options]
