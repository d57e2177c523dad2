"""Options on every surface: they arrive, are validated in one way, and every option's probability comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda
from PIL import Image
from scripted_agents import CIRCLE, shows, small_reasoner
from typer.testing import CliRunner

from latent_tool import ConfidenceRouter, LatentReasoningTool, ReasoningResult
from latent_tool.cli import app
from latent_tool.errors import InputError, QuestionError
from latent_tool.langchain.image_tool import ImageTool
from latent_tool.langchain.messages import messages_from_request
from latent_tool.schema import ReasoningRequest
from latent_tool.views.report import report_html

pytestmark = pytest.mark.disable_socket

COLOURS = ["green", "red"]


@pytest.fixture(scope="module")
def answered() -> ReasoningResult:
    from pictures import draw_shapes

    asked = {"image": draw_shapes(), "question": CIRCLE, "options": ["<b>green</b>", "red"], "unsure": True}
    return small_reasoner().invoke(asked)


def test_a_reasoner_answers_with_an_option(answered: ReasoningResult) -> None:
    assert answered.answer == "red" and [choice.text for choice in answered.choices or ()] == [
        "<b>green</b>",
        "red",
        "cannot tell",
    ]


async def test_the_tool(picture: Image.Image) -> None:
    tool = ImageTool(reasoner=small_reasoner())
    reply = tool.ask({"question": CIRCLE, "options": COLOURS}, shown=[picture])
    assert (reply.result.answer == "red" and "Options: red 0.9" in reply.text) or "Options: red 1.0" in reply.text
    assert (
        reply.brief["options"].keys() == {*COLOURS}
        and "options" not in tool.ask({"question": "?"}, shown=[picture]).brief
    )
    assert (await tool.aask({"question": CIRCLE, "options": []}, shown=[picture])).result.choices is None
    for wrong in (["red"], ["red", "red "], "red", ["red", ""]):
        with pytest.raises(InputError, match="option"):
            tool.ask({"question": CIRCLE, "options": wrong}, shown=[picture])
    with pytest.raises(QuestionError):
        tool.ask({"question": CIRCLE, "options": ["red", "Red"]}, shown=[picture])
    message = LatentReasoningTool(reasoner=small_reasoner()).invoke(
        {
            "type": "tool_call",
            "id": "1",
            "name": "ask_about_image",
            "args": {
                "question": CIRCLE,
                "options": COLOURS,
                "state": {"messages": [shows(picture)]},
            },
        }
    )
    assert message.artifact["answer"] == "red" and len(message.artifact["choices"]) == 2


def test_the_command(tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "scene.png"
    picture.save(path)
    base = ["ask", str(path), CIRCLE, "--iterations", "1", "--latents", "2", "--quiet"]
    report = tmp_path / "out.html"
    done = CliRunner().invoke(
        app, [*base, "--option", "green", "--option", "red", "--or-cannot-tell", "--report", str(report)]
    )
    assert done.exit_code == 0, done.output
    shown = [line for line in done.stdout.splitlines() if "█" in line or "#" in line or "░" in line]
    assert any("red" in line for line in shown) and "cannot tell" in done.stdout and "any of them" in done.stdout
    assert "green" in report.read_text()
    as_json = CliRunner().invoke(app, [*base, "--option", "red", "--option", "blue", "--json"])
    assert [choice["text"] for choice in json.loads(as_json.stdout)["choices"]] == ["red", "blue"]
    for wrong in (["--option", "red"], ["--or-cannot-tell"]):
        refused = CliRunner().invoke(app, [*base, *wrong])
        assert refused.exit_code != 0


def test_the_report_has_a_bar_for_every_option_the_likeliest_first(
    answered: ReasoningResult, picture: Image.Image
) -> None:
    page = report_html(answered, picture, question=CIRCLE)
    table = page[page.index('class="options"') :]
    table = table[: table.index("</table>")]
    assert table.count("<tr>") == 3 and table.index("red") < table.index("&lt;b&gt;green")
    assert "<b>green</b>" not in page and "unsure" in page[page.index("LatentReasoner") :]


def test_a_router_asks_chat_models_in_words_and_takes_only_an_option(picture: Image.Image) -> None:
    request = ReasoningRequest.parse({"image": picture, "question": CIRCLE, "options": COLOURS, "unsure": True})
    asked = messages_from_request(request, [picture])[-1].text
    assert asked.startswith(CIRCLE) and "- green\n- red\n- cannot tell" in asked

    def route(reply: Any) -> ReasoningResult:
        chat = RunnableLambda(lambda _: reply)
        return ConfidenceRouter(rungs=[chat], thresholds=0.5).invoke(request)

    assert route(AIMessage("**Red.**")).answer == "red"
    told = route("I cannot tell.")
    assert told.answer == "cannot tell" and told.accepted is False
    for nothing in ("purple", "red or green", ""):
        with pytest.raises(Exception, match="none of the options"):
            route(nothing)
    first = ConfidenceRouter(rungs=[small_reasoner(), RunnableLambda(lambda _: "green")], thresholds=0.5)
    result = first.invoke(request)
    assert result.answer == "red" and result.choices is not None and len(result.route) == 1
