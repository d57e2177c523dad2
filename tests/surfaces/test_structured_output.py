"""with_structured_output: a schema of ours, the caller's own, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from enum import Enum, IntEnum
from typing import Annotated, Any, Literal, NewType, NotRequired, Optional, Required, TypedDict

import pytest
from langchain_core.messages import AIMessage
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Json, RootModel, create_model
from scripted_agents import CIRCLE, shows, small_reasoner

from latent_tool import ChatLatentReasoner
from latent_tool.errors import AnswerMismatchError, SettingsError
from latent_tool.langchain.structured import StructuredAnswer, StructuredOutput
from latent_tool.schema import Patch

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


class Marked(TypedDict):
    colour: Literal["red", "blue"]
    note: NotRequired[str]
    accepted: NotRequired[bool]


class Noted(TypedDict):
    colour: Annotated[Optional[Literal["red", "blue"]], "of the circle"]  # noqa: UP045


MaybeRed = Optional[Literal["red", "blue"]]  # noqa: UP045
Named = NewType("Named", bool)
MAYBE = {"anyOf": [{"enum": ["red", "blue"]}, {"type": "null"}]}


def model_of(kind: Any) -> type[BaseModel]:
    return create_model("Made", it=(kind, ...))


def typed_of(**kinds: Any) -> Any:
    return TypedDict("Made", kinds)  # type: ignore[operator]


NINE = {"N": {"type": "integer", "maximum": 9, "title": "Nine"}}


def of(kind: Any, **more: Any) -> dict[str, Any]:
    return {"properties": {"it": kind}, "$defs": NINE, **more}


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
        (Marked, "Red", {"colour": "red"}),
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
        (of({"enum": ["red", "blue"], "const": "blue"}), "blue", {"it": "blue"}),
        (of({"$ref": "#/$defs/N", "maximum": 9, "minimum": 1, "title": "Mine"}), "9", {"it": 9}),
        (of({"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}], "minimum": 1}), "1", {"it": 1}),
        (typed_of(it=Required[Annotated[int, Field(le=9)]]), "9", {"it": 9}),
        (typed_of(it=Annotated[NotRequired[int], Field(le=9)]), "9", {"it": 9}),
        (typed_of(it=Annotated[list[int], BeforeValidator(str.split)]), "1 2", {"it": [1, 2]}),
        (typed_of(it=Json[list[int]]), "[1]", {"it": [1]}),
        (typed_of(it=Annotated[str, BeforeValidator({"a bus": "bus"}.__getitem__)]), "a bus", {"it": "bus"}),
        (typed_of(it=complex), "1+2j", {"it": 1 + 2j}),
        (typed_of(it=date), "2026-01-31", {"it": date(2026, 1, 31)}),
        (typed_of(it=int | list[str]), "3", {"it": 3}),
        (model_of(Colour | None).model_json_schema(), "RED", {"it": "red"}),
        (Literal["A", "B"], "the B", "B"),
        (Literal["a ball", "ball"], "Ball.", "ball"),
        (Literal["a ball", "ball"], "A ball.", "a ball"),
        (Literal["a ball", "the ball"], "The ball.", "the ball"),
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
        (of({"enum": ["red", "blue"], "const": "blue"}), "red"),
        (of({"$ref": "#/$defs/N", "minimum": 1}), "10"),
        (of({"allOf": [{"$ref": "#/$defs/N"}], "minimum": 1}), "0"),
        (of({"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}], "minimum": 1}), "0"),
        (typed_of(it=Annotated[int, Field(le=9)]), "10"),
        (typed_of(it=Required[Annotated[int, Field(le=9)]]), "10"),
        (typed_of(it=Annotated[NotRequired[int], Field(le=9)]), "10"),
        (typed_of(it=Annotated[Literal[1, 2, 3], Field(le=2)]), "3"),
        (Literal["A", "B"], "A B"),
        (Literal["a ball", "the ball"], "ball"),
        (Literal["_", "red"], ""),
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


class Within(RootModel[Look]):
    pass


@pytest.mark.parametrize(
    "schema",
    [
        Plain,
        Undefined,
        UndefinedTyped,
        Held,
        Whole,
        Within,
        *(
            model_of(kind)
            for kind in (
                list[str],
                dict,
                dict[str, int],
                tuple[str, ...],
                set[int],
                Sequence[str],
                Iterable[str],
                Plain,
                type[Look],
                Literal[None],
                None,
                Look | list[str],
                list[str] | None,
            )
        ),
        typed_of(it=Annotated[int, Field(strict=True)]),
        typed_of(it=Annotated[Literal[1, 2], Field(gt=2)]),
        typed_of(it=Annotated[bool, BeforeValidator(str.lower)]),
        Literal["red", "red "],
        Literal["1", 1],
        Literal["yes", True],
        Literal["", "red"],
        Literal[b"red", b"blue"],
        Literal[([1], [2])],  # type: ignore[valid-type]
        Literal["yes"] | bool,
        Enum("Nothing", []),
        Literal[None],
        {},
        {"properties": []},
        {"properties": {"it": {"enum": ["a", "b"]}}, "required": "it"},
        {"properties": {"it": {"enum": ["a", "b"]}}, "required": ["that"]},
        {"properties": {"it": {"enum": ["a", "b"]}}, "$defs": []},
        {"properties": {"it": {"enum": ["a", "b"]}}, "allOf": [{"required": ["that"]}]},
        *(
            of({"enum": ["a", "b"]}, **more)
            for more in (
                {"maxProperties": 0},
                {"dependencies": {"it": ["that"]}},
                {"$ref": "#/$defs/A"},
                {"unheardOf": 1},
                {"type": "array"},
            )
        ),
        {"function": 5},
        {"parameters": {"properties": 5}},
        {"name": "look", "parameters": JSON, "required": ["colour"]},
        {"name": "look", "parameters": JSON, "properties": {}},
        {"type": "function", "function": {"name": "look", "parameters": JSON}, "parameters": JSON},
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
                {"type": "string", "minimum": 3},
                {"type": "integer", "minimum": None},
                {"enum": ["red", "blue"], "const": "green"},
                {"enum": [1, 2], "const": True},
                {"$ref": "#/$defs/N", "maximum": 100},
                {"allOf": [{"$ref": "#/$defs/N"}], "maximum": 100},
                {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}], "maximum": 100},
                {"$ref": "#/$defs/N", "type": "number"},
                {"$ref": "#/$defs/N", "anyOf": [{"enum": [3]}, {"type": "null"}]},
                {"$ref": "#/properties/N"},
                {"$ref": "other.json#/$defs/N"},
                {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "string"}]},
                int,
                True,
                False,
                "string",
                None,
            )
        ),
        of({"$ref": "#/$defs/A"}, **{"$defs": {"A": {"$ref": "#/$defs/A"}}}),
        of({"$ref": "#/$defs/A"}, **{"$defs": {"A": {"type": "array", "items": {"$ref": "#/$defs/A"}}}}),
    ],
    ids=lambda schema: str(schema)[:60],
)
def test_odd_schemas_that_no_answer_can_fill_are_refused_at_once(schema: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        StructuredOutput(schema)
    assert caught.value.hint


PATCH = {"rank": 0, "image": 0, "cell": 3, "box": [0.0, 0.0, 8.0, 8.0], "attention": 0.1, "gain": 0.2, "latent": 0}
COLOUR = {"enum": ["red", "blue"]}


def beside(**fields: Any) -> dict[str, Any]:
    return {"properties": {"colour": COLOUR, **fields}, "required": ["colour"]}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (beside(accepted={"const": True}), True),
        (beside(accepted={"const": False}), False),
        (beside(accepted={"type": "boolean"}, abstain_reason={"type": "string"}), "low"),
        (beside(confidence={"type": "number", "minimum": 0.1}), 0.1),
        (beside(confidence={"type": ["number", "null"]}), 0.1),
        (beside(confidence={"anyOf": [{"type": "number"}, {"type": "null"}], "maximum": 1}), 0.1),
        (beside(confidence={}, accepted=True), False),
        (beside(patches={"type": "array"}, confidence={"type": "number"}), [PATCH]),
        (beside(scores={"type": "object"}, confidence={"type": "number"}), {"reward": 0.5}),
        (typed_of(colour=Literal["red", "blue"], accepted=NotRequired[Literal[False]]), False),
        (typed_of(colour=Literal["red", "blue"], accepted=bool, patches=list[Patch]), [Patch(**PATCH)]),
    ],
)
def test_fields_that_take_what_a_reply_carries(schema: Any, expected: Any) -> None:
    told = {"accepted": expected is True, "abstain_reason": "low", "patches": [PATCH], "scores": {"reward": 0.5}}
    found = StructuredOutput(schema)(reply("red", **told | {"confidence": 0.1}))
    assert found["colour"] == "red" and expected in found.values()


@pytest.mark.parametrize(
    "schema",
    [
        beside(accepted={"const": True}),
        beside(accepted={"enum": [True]}),
        beside(accepted={"type": "boolean", "const": True}),
        beside(accepted={"anyOf": [{"$ref": "#/$defs/Yes"}, {"type": "null"}]}) | {"$defs": {"Yes": {"const": True}}},
        beside(confidence={"type": "number", "minimum": 0.9}),
        beside(confidence={"type": "number", "exclusiveMinimum": 0.1}),
        beside(confidence={"type": "integer"}),
        beside(accepted={"type": "integer"}),
        beside(min_confidence={"type": "boolean"}, confidence={}),
        beside(confidence={"enum": [0.9, None]}),
        beside(confidence={"type": "number"}, abstain_reason={"type": "string"}, warnings={"type": "object"}),
        beside(patches={"type": "array", "items": {"type": "string"}}, confidence={}),
        typed_of(colour=Literal["red", "blue"], accepted=Literal[True]),
        typed_of(colour=Literal["red", "blue"], accepted=NotRequired[Literal[True]]),
        typed_of(colour=Literal["red", "blue"], confidence=Annotated[float, Field(ge=0.9)]),
    ],
    ids=str,
)
def test_a_gate_that_a_schema_sets_on_what_a_reply_carries_is_kept(schema: Any) -> None:
    told = {"accepted": False, "confidence": 0.1, "abstain_reason": "low", "patches": [PATCH]}
    told |= {"warnings": [], "min_confidence": 1.0}
    with pytest.raises(AnswerMismatchError):
        StructuredOutput(schema)(reply("red", **told))


@pytest.mark.parametrize(
    "kind",
    [
        {"minimum": 0.9},
        {"type": "number", "not": {"maximum": 0.5}},
        {"type": "array", "minItems": 1},
        {"type": "object", "properties": {"p_value": {"minimum": 0.9}}},
        {"anyOf": [{"type": "number"}, {"type": "string"}]},
        {"$ref": "#/$defs/Nowhere"},
        {"enum": [True], "const": False},
        7,
    ],
    ids=str,
)
def test_what_is_not_understood_of_such_a_field_is_refused_at_once(kind: Any) -> None:
    with pytest.raises(SettingsError):
        StructuredOutput(beside(confidence=kind))


def test_a_field_that_need_not_be_given_is_left_out_where_a_reply_has_nothing_for_it() -> None:
    schema = beside(accepted={"type": "boolean"}, abstain_reason={"type": ["string", "null"]})
    assert StructuredOutput(schema)(reply("red")) == {"colour": "red", "abstain_reason": None}
    with pytest.raises(AnswerMismatchError, match="accepted"):
        StructuredOutput(schema | {"required": ["colour", "accepted"]})(reply("red"))
    # The field that would show that an answer was not accepted is not left out.
    with pytest.raises(AnswerMismatchError, match="confidence"):
        StructuredOutput(beside(confidence={"type": "number"}))(reply("red", accepted=False, confidence=None))


def test_the_json_schema_of_our_own_answer_is_filled_like_it() -> None:
    told = reply("a bus", patches=[PATCH], warnings=["small"])
    assert StructuredOutput(StructuredAnswer.model_json_schema())(told) == StructuredOutput(StructuredAnswer)(
        told
    ).model_dump(mode="json")
