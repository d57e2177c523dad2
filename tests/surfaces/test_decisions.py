"""Typed decisions as langchain_core asks them: real questions, no picture in any record, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage
from PIL import Image
from scripted_agents import CIRCLE, small_reasoner

from latent_tool.errors import (
    AnswerMismatchError,
    ImageDecodeError,
    ImageNotAllowedError,
    InputError,
    SettingsError,
    UnsupportedError,
)
from latent_tool.langchain.messages import image_block

decisions = pytest.importorskip("langchain_core.decisions")
from langchain_core.decisions import Box, Choice, Noul, NoulCriteria, Score  # noqa: E402

from latent_tool.langchain.decisions import Decisions, LatentDecisionModel  # noqa: E402

pytestmark = pytest.mark.disable_socket

COLOUR = Choice(instructions=CIRCLE, criteria={"red": None, "green": None, "blue": None})
CIRCLE_THERE = Noul(instructions="is there a circle?")


@pytest.fixture(scope="module")
def model() -> LatentDecisionModel:
    return LatentDecisionModel(reasoner=small_reasoner())


def ask(model: LatentDecisionModel, state: Any, **questions: Any) -> Decisions:
    response = model.invoke({"state": state, "questions": questions or {"colour": COLOUR}})
    assert isinstance(response, Decisions)
    return response


async def test_every_type_of_question_in_one_request(model: LatentDecisionModel, picture: Image.Image) -> None:
    count = Score(instructions="how many circles are there?", criteria=["none", "one", "two or more"])
    request: Any = {
        "state": {"photo": image_block(picture)},
        "questions": {"colour": COLOUR, "there": CIRCLE_THERE, "count": count},
    }
    response = model.invoke(request)
    assert response.model == "embedded" and response.choices["colour"].choice == "red"
    assert response.choices["colour"].confidence == max(response.choices["colour"].probabilities.values())
    assert sum(response.choices["colour"].probabilities.values()) == pytest.approx(1)
    assert response.nouls["there"].noul > 0.9
    levels = response.scores["count"]
    assert levels.legend == {0: "none", 1: "one", 2: "two or more"} and 0 <= levels.score <= 2
    assert levels.score == pytest.approx(sum(level * chance for level, chance in levels.probabilities.items()))
    assert response.usage is not None and response.usage["input_tokens"] > 0
    assert response.results["colour"].mass > 0.9 and response.results["colour"].answer == "red"
    again, batched = await asyncio.gather(model.ainvoke(request), model.abatch([request, request]))
    for other in (again, *batched, *model.batch([request])):
        assert other.choices["colour"].probabilities == pytest.approx(
            response.choices["colour"].probabilities, abs=1e-3
        )
    assert json.loads(response.model_dump_json())["answers"]["there"]["type"] == "noul"


def test_images_anywhere_in_the_state(model: LatentDecisionModel, picture: Image.Image) -> None:
    block = image_block(picture)
    uri = f"data:image/png;base64,{block['base64']}"
    for state in (
        HumanMessage([block]),
        [AIMessage("Look."), HumanMessage([{"type": "image_url", "image_url": {"url": uri}}])],
        {"ticket": {"photos": [block]}},
        [block],
        block,
    ):
        assert ask(model, state).choices["colour"].choice == "red"


def test_what_is_asked(model: LatentDecisionModel, picture: Image.Image) -> None:
    """The state's text, the question and what its answers mean; a state of images alone adds nothing."""
    block = image_block(picture)
    plain = model._asked({"photo": block}, {"a": COLOUR})["a"].request
    assert plain.question == CIRCLE and plain.options == ["red", "green", "blue"]
    told = Noul(instructions="is it urgent?", criteria=NoulCriteria(true="smoke", false={"any": "else"}))
    asked = model._asked({"from": "Ann", "photos": [block, block]}, {"a": told})["a"].request
    assert asked.question == (
        '{"from": "Ann", "photos": ["[image 1]", "[image 2]"]}\nis it urgent?\nyes: smoke\nno: {"any": "else"}'
    )
    assert len(asked.image_references) == 2
    given = {"type": "noul", "instructions": "is it urgent?", "criteria": told.criteria}
    assert model._asked(block, {"a": given})["a"].request.question == 'is it urgent?\nyes: smoke\nno: {"any": "else"}'
    spoken = model._asked([HumanMessage(["Look at this.", block])], {"a": COLOUR})["a"].request
    assert spoken.question == f"Look at this.\n{CIRCLE}"
    compared = Choice(instructions=["like this one?", block], criteria={"like": "as here", "unlike": None})
    both = model._asked(block, {"a": compared})["a"].request
    assert len(both.image_references) == 2 and both.question == "like this one?\nlike: as here"
    shown = Choice(instructions="which?", criteria={"this": block, "that": [block, block], "none": None})
    assert model._asked(block, {"a": shown})["a"].request.question == (
        "which?\nthis: [image 2]\nthat: [image 3], [image 4]"
    )


@pytest.mark.parametrize(
    ("state", "question", "error", "named"),
    [
        (None, Box(instructions="the circle"), UnsupportedError, "location"),
        ("no picture", COLOUR, InputError, "image"),
        ({"a": [1, 2.5, None, True]}, COLOUR, InputError, "image"),
        (None, Choice(instructions="?", criteria={"one": None}), InputError, "two labels"),
        (None, Choice(instructions="which?", criteria={"red": None, " red": None}), InputError, "same"),
        (None, Choice(instructions=" ", criteria={"a": None, "b": None}), InputError, "instructions"),
        (None, {"type": "rank", "instructions": "?"}, UnsupportedError, "rank"),
        (None, "is it red?", InputError, "type"),
        (None, {"type": "noul", "instructions": "is it?", "criteria": {"yes": "smoke"}}, InputError, "criteria"),
        (
            None,
            {"type": "noul", "instructions": "is it?", "criteria": {"true": "smoke", "else": 1}},
            InputError,
            "crit",
        ),
        (None, {"type": "noul", "instructions": "is it?", "criteria": {True: "smoke"}}, InputError, "criteria"),
        (None, {"type": "noul", "instructions": "is it?", "criteria": ["smoke"]}, InputError, "criteria"),
        (None, {"type": "noul", "instructions": "is it?", "criteria": "smoke"}, InputError, "criteria"),
        (None, {"type": "noul", "instructions": "is it?", "min_confidence": 1}, InputError, "min_confidence"),
        (None, {**COLOUR.model_dump(), "threshold": 0.9}, InputError, "threshold"),
        (None, {"type": "choice", "instructions": "?", "criteria": {1: None, 2: None}}, InputError, "options"),
        (None, {"type": "choice", "instructions": "?", "criteria": ["red", "blue"]}, InputError, "two labels"),
        (None, {"type": "score", "instructions": "?", "criteria": b"ab"}, InputError, "levels"),
        (None, {"type": "score", "instructions": "?", "criteria": {"0": "a", "1": "b"}}, InputError, "levels"),
        ({"when": object()}, COLOUR, InputError, "object"),
        ({"type": "file", "base64": "JVBERi0=", "mime_type": "application/pdf"}, COLOUR, ImageDecodeError, "PDF"),
        ({"type": "image", "url": "https://example.org/a.png"}, COLOUR, ImageNotAllowedError, "downloads"),
    ],
)
def test_what_cannot_be_decided_is_a_typed_error(
    model: LatentDecisionModel, picture: Image.Image, state: Any, question: Any, error: type[Exception], named: str
) -> None:
    with pytest.raises(error) as caught:
        ask(model, image_block(picture) if state is None else state, it=question)
    assert named.lower() in str(caught.value).lower() and getattr(caught.value, "hint", "")


@pytest.mark.parametrize("request_", [None, {}, {"state": "x"}, {"state": "x", "questions": {}}, {"state": "", "q": 1}])
def test_what_is_no_request(model: LatentDecisionModel, request_: Any) -> None:
    with pytest.raises(InputError):
        model.invoke(request_)


def test_a_threshold_of_the_reasoner_is_never_lost(picture: Image.Image) -> None:
    gated = LatentDecisionModel(reasoner=small_reasoner().model_copy(update={"min_confidence": 1.0}))
    with pytest.raises(AnswerMismatchError, match="not accepted"):
        ask(gated, image_block(picture))
    with pytest.raises(SettingsError):
        LatentDecisionModel(colour="red")


def test_a_threshold_of_a_call_is_never_lost(model: LatentDecisionModel, picture: Image.Image) -> None:
    request: Any = {"state": image_block(picture), "questions": {"colour": COLOUR}}
    key = "latent_reasoner"
    bound = model.with_config(configurable={key: {"min_confidence": 1.0}})
    for asked, config, named in (
        (model, {"configurable": {key: {"min_confidence": 1.0}}}, {}),
        (model, None, {"min_confidence": 1.0}),
        (model.bind(min_confidence=1.0), None, {}),
        (bound, {"configurable": {key: {"seed": 1}}}, {}),
    ):
        with pytest.raises(AnswerMismatchError, match="not accepted"):
            asked.invoke(request, config, **named)
    with pytest.raises(SettingsError):
        model.invoke(request, colour="red")
    assert model.invoke(request, min_confidence=0.1).choices["colour"].choice == "red"


class Recorder(BaseCallbackHandler):
    """Everything that runs are told, as text."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
        self.seen.append(repr(inputs))

    def on_llm_start(self, serialized: Any, prompts: Any, **kwargs: Any) -> None:
        self.seen.append(repr(prompts))

    def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        self.seen.append(repr(outputs))


def test_runs_record_no_picture_and_no_credentials(model: LatentDecisionModel, picture: Image.Image) -> None:
    recorder, block = Recorder(), image_block(picture)
    shown = Choice(instructions=["what color is the circle?", block], criteria={"red": block, "blue": None})
    state = [
        HumanMessage([block]),
        {"site": "https://ann:secret@example.org/x", "photo": [block]},
    ]
    level = Score(instructions="how alike are they?", criteria=[block, "another"])
    model.invoke({"state": state, "questions": {"a": shown, "b": level}}, {"callbacks": [recorder]})
    seen = "\n".join(recorder.seen)
    assert seen and block["base64"][40:80] not in seen and "secret" not in seen
    assert base64.b64decode(block["base64"])[20:40] not in seen.encode("latin-1", "replace")
    assert "what color" in seen


def test_without_decisions_in_langchain_core_the_error_names_the_remedy() -> None:
    code = (
        "import sys; sys.modules['langchain_core.decisions'] = None\n"
        "from latent_tool.errors import UnsupportedError\n"
        "try:\n import latent_tool.langchain.decisions\n"
        "except UnsupportedError as error:\n print(error.hint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "langchain-core 1.8" in done.stdout
