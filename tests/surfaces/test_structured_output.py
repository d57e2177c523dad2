"""with_structured_output: a schema of ours, the caller's own, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Annotated, Any, Literal, NewType, Optional, TypedDict

import pytest
from langchain_core.messages import AIMessage
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, RootModel
from scripted_agents import CIRCLE, shows, small_reasoner

from latent_tool import ChatLatentReasoner
from latent_tool.errors import AnswerMismatchError, SettingsError
from latent_tool.langchain.structured import StructuredAnswer, StructuredOutput

pytestmark = pytest.mark.disable_socket


class Colour(Enum):
    RED = "red"
    DARK_BLUE = "#008"


class Look(BaseModel):
    """What was seen."""

    colour: Literal["red", "green", "blue"] = Field(description="The circle's colour.")
    confidence: float
    note: str = "none"


class Typed(TypedDict):
    colour: Literal["red", "blue"]
    accepted: bool | None


JSON = {"title": "look", "type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}


def reply(text: str, **metadata: Any) -> AIMessage:
    return AIMessage(text, response_metadata={"confidence": 0.9, "confidence_source": "reward", **metadata})


async def test_the_answer_of_a_real_question(picture: Image.Image) -> None:
    chat, messages = ChatLatentReasoner(reasoner=small_reasoner()), [shows(picture, text=CIRCLE)]
    ours = chat.with_structured_output().invoke(messages)
    assert isinstance(ours, StructuredAnswer) and ours.answer == "red" and ours.confidence is not None
    assert ours.confidence > 0.9 and ours.accepted is None
    own = await chat.with_structured_output(Look, method="json_schema", strict=True).ainvoke(messages)
    assert own.colour == "red" and own.confidence > 0.9
    chosen = chat.invoke(messages, options=["green", "red"]).response_metadata
    assert chosen["confidence_source"] == "option_probability" and chosen["mass"] > 0.9
    assert {choice["text"] for choice in chosen["choices"]} == {"green", "red"}
    assert ours.confidence_source == "pooled_probability"
    # The model would say red: the likelier one of two wrong values is no answer.
    raw = chat.with_structured_output(Literal["blue", "green"], include_raw=True).invoke(messages)
    assert raw["raw"].response_metadata["mass"] < 0.01 and raw["parsed"] is None
    assert isinstance(raw["parsing_error"], AnswerMismatchError)
    assert chat.with_structured_output(Colour, include_raw=True).invoke(messages)["parsed"] is Colour.RED
    # A gate that was set is never lost: a schema that cannot say so gets no answer that was not accepted.
    with pytest.raises(AnswerMismatchError, match="not accepted"):
        chat.with_structured_output(Colour).invoke(
            messages, {"configurable": {"latent_reasoner": {"min_confidence": 1}}}
        )


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (Colour, "Red.", Colour.RED),
        (Colour, "dark blue", Colour.DARK_BLUE),
        (Colour, "#008", Colour.DARK_BLUE),
        (bool, "Yes", True),
        (bool, "no, there is none", False),
        (bool, "False", False),
        (Literal["a ball", "a cube"], "the ball", "a ball"),
        (Literal[1, 2, 3], "2", 2),
        (Typed, "blue", {"colour": "blue", "accepted": None}),
        (JSON, "RED", {"colour": "red"}),
        ({"name": "look", "parameters": JSON}, "red", {"colour": "red"}),
        ({"type": "function", "function": {"name": "look", "parameters": JSON}}, "red", {"colour": "red"}),
        ({"properties": {"seen": {"type": "boolean"}}}, "yes", {"seen": True}),
        ({"properties": {"n": {"$ref": "#/$defs/N"}}, "$defs": {"N": {"enum": ["1", "2"]}}}, "1", {"n": "1"}),
        ({"properties": {"count": {"type": "integer"}}}, "3", {"count": 3}),
    ],
)
def test_schemas_that_an_answer_fills(schema: Any, text: str, expected: Any) -> None:
    assert StructuredOutput(schema)(reply(text)) == expected


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (Colour, "not red"),
        (Colour, "red or blue"),
        (Literal["A", "B"], "A and B"),
        (bool, "maybe"),
        (bool, "yesterday"),
        (Literal[1, 2], "12"),
        (Look, "purple"),
        ({"properties": {"count": {"type": "integer"}}}, "many"),
    ],
)
def test_an_answer_that_is_none_of_the_values(schema: Any, text: str) -> None:
    with pytest.raises(AnswerMismatchError):
        StructuredOutput(schema)(reply(text))


class TwoFields(BaseModel):
    setup: str
    punchline: str


class NoField(BaseModel):
    confidence: float


class Whole(BaseModel):
    inner: Look


@pytest.mark.parametrize("schema", [TwoFields, NoField, str, list[str], {"type": "object"}, {"properties": {}}, 7])
def test_schemas_that_no_answer_can_fill_are_refused_at_once(schema: Any) -> None:
    with pytest.raises(SettingsError):
        ChatLatentReasoner(reasoner=small_reasoner()).with_structured_output(schema)


def test_a_field_that_is_an_object_is_a_mismatch() -> None:
    with pytest.raises(AnswerMismatchError):
        StructuredOutput(Whole)(reply("red"))


def test_an_answer_that_was_not_accepted_needs_a_field_that_says_so() -> None:
    refused = reply("red", accepted=False, min_confidence=0.95)
    assert StructuredOutput(Look)(refused).confidence == 0.9
    assert StructuredOutput(Typed)(refused) == {"colour": "red", "accepted": False}
    for schema in (Colour, JSON, bool):
        with pytest.raises(AnswerMismatchError, match="not accepted"):
            StructuredOutput(schema)(refused)


def test_options_that_only_this_chat_model_does_not_know() -> None:
    with pytest.raises(SettingsError, match="tools"):
        ChatLatentReasoner(reasoner=small_reasoner()).with_structured_output(Look, tools=[])


def test_a_confidence_is_no_place_to_say_that_an_answer_was_abstained_from() -> None:
    class Verdict(BaseModel):
        verdict: bool
        confidence: float

    told = {"accepted": False, "abstained": True, "confidence": 0.97, "barred": "unlike", "abstain_reason": "unlike"}
    with pytest.raises(AnswerMismatchError, match="unlike"):
        StructuredOutput(Verdict)(AIMessage("yes", response_metadata=told))
    low = {"accepted": False, "confidence": 0.2, "abstain_reason": "the confidence 0.20 is below 0.5"}
    assert StructuredOutput(Verdict)(AIMessage("yes", response_metadata=low)).confidence == 0.2


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Odd(Enum):
    PAIR = (1, 2)
    NONE = None


class Aliased(BaseModel):
    colour: Literal["red", "blue"] = Field(alias="hue")


class Rooted(RootModel[Literal["red", "blue"]]):
    pass


class Noted(TypedDict):
    colour: Annotated[Optional[Literal["red", "blue"]], "of the circle"]  # noqa: UP045


MaybeRed = Optional[Literal["red", "blue"]]  # noqa: UP045
Named = NewType("Named", bool)
MAYBE = {"anyOf": [{"enum": ["red", "blue"]}, {"type": "null"}]}


def of(kind: Any, **more: Any) -> dict[str, Any]:
    return {"properties": {"it": kind}, **more}


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (Level, "2", Level.HIGH),
        (Level, "low", Level.LOW),
        (Odd, "pair", Odd.PAIR),
        (Literal[Colour.RED, "green"], "red.", Colour.RED),
        (MaybeRed, "the blue", "blue"),
        (Literal["red"] | Literal["red", "blue"] | None, "blue", "blue"),
        (Literal["A", "a"], "a", "a"),
        (Literal["!", "?"], "?", "?"),
        (Literal[1, True], "yes", True),
        (Literal["yes", "no"], "no: there is none", "no"),
        (Named, "true", True),
        (Noted, "Red", {"colour": "red"}),
        (of({"type": ["string", "null"]}), "a bus", {"it": "a bus"}),
        (of({"type": ["boolean", "null"]}), "no", {"it": False}),
        (of(MAYBE), "blue", {"it": "blue"}),
        (
            of(
                {"allOf": [{"$ref": "#/$defs/A"}]} | {"title": "It"},
                **{"$defs": {"A": {"$ref": "#/$defs/B"}, "B": MAYBE}},
            ),
            "red",
            {"it": "red"},
        ),
        (of({"type": "integer", "minimum": 0, "maximum": 9}), "9", {"it": 9}),
        (of({"enum": ["red", None, "red"]}), "red", {"it": "red"}),
    ],
)
def test_odd_schemas_that_an_answer_fills(schema: Any, text: str, expected: Any) -> None:
    found = StructuredOutput(schema)(reply(text))
    assert found == expected and type(found) is type(expected)


def test_models_with_other_names_and_of_one_value() -> None:
    assert StructuredOutput(Aliased)(reply("red")).colour == "red"
    assert StructuredOutput(Rooted)(reply("blue")).root == "blue"
    assert StructuredOutput(Literal["A", "a"]).options == ["A", "a"]


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (Literal["A", "a", "b"], "the a."),
        (Literal["!", "?"], "."),
        (of({"type": "integer", "minimum": 0, "maximum": 9}), "10"),
        (of({"type": "string", "pattern": "^[a-z]+$"}), "A BUS"),
        (of({"type": "number"}), "nan"),
        (of({"enum": [None, "red"]}), "None"),
        (Aliased, "green"),
    ],
)
def test_odd_schemas_and_an_answer_that_is_none_of_their_values(schema: Any, text: str) -> None:
    with pytest.raises(AnswerMismatchError):
        StructuredOutput(schema)(reply(text))


@dataclass
class Plain:
    colour: Literal["red", "blue"]


class Undefined(BaseModel):
    colour: Nowhere  # type: ignore[name-defined]  # noqa: F821


class UndefinedTyped(TypedDict):
    colour: Nowhere  # type: ignore[name-defined]  # noqa: F821


class Handle:
    pass


class Held(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    it: Handle


@pytest.mark.parametrize(
    "schema",
    [
        Plain,
        Undefined,
        UndefinedTyped,
        Held,
        Literal["red", "red "],
        Literal["1", 1],
        Literal["yes", True],
        Literal["", "red"],
        Literal[b"red", b"blue"],
        Literal[([1], [2])],  # type: ignore[valid-type]
        Literal["yes"] | bool,
        Enum("Nothing", []),
        {},
        {"properties": []},
        {"properties": {"it": {"enum": ["a", "b"]}}, "required": "it"},
        {"properties": {"it": {"enum": ["a", "b"]}}, "required": ["that"]},
        {"properties": {"it": {"enum": ["a", "b"]}}, "$defs": []},
        {"properties": {"it": {"enum": ["a", "b"]}}, "allOf": [{"required": ["that"]}]},
        {"function": 5},
        {"parameters": {"properties": 5}},
        *(
            of(kind)
            for kind in (
                {"enum": [[1], [2]]},
                {"enum": [{"a": 1}, {"a": 2}]},
                {"enum": "red"},
                {"enum": {"red": 1}},
                {"enum": None},
                {"enum": []},
                {"enum": [None]},
                {"enum": ["1", 1]},
                {"const": [1]},
                {"const": None},
                {"type": ["string", "integer"]},
                {"type": [["string"]]},
                {"type": {"string": 1}},
                {"type": "array", "items": {"type": "string"}},
                {"type": "string", "format": "date"},
                {"type": "string", "pattern": "("},
                {"type": "integer", "minimum": "many"},
                {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                {"anyOf": []},
                {"oneOf": "red"},
                {"$ref": "#/$defs/Nowhere"},
                {"$ref": 5},
                {"not": {"enum": ["red"]}},
                {"enum": ["red", "blue"], "not": {"const": "red"}},
                {"enum": [1, 2, 3], "minimum": 2},
                {"enum": ["red", 2], "type": "string"},
                {"enum": [True, 2], "type": "integer"},
                {"enum": ["red"], "type": 7},
                {"type": "boolean", "const": True, "if": {}},
                True,
                False,
                "string",
                None,
            )
        ),
        of({"$ref": "#/$defs/A"}, **{"$defs": {"A": {"$ref": "#/$defs/A"}}}),
    ],
    ids=lambda schema: str(schema)[:60],
)
def test_odd_schemas_that_no_answer_can_fill_are_refused_at_once(schema: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        StructuredOutput(schema)
    assert caught.value.hint
