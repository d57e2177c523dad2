"""An agent of the OpenAI Agents SDK asks about a picture and goes on by the confidence."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from agents import Agent, Runner
from agents.items import ToolCallOutputItem
from agents.testing import ScriptedModel, assistant_message, function_call
from asked import BRANCHES, CIRCLE, NAME, OUTSIDE, URI, decided, is_overlay, said, small_tool

from latent_tool.integrations.openai_agents import RESULT_KEY, image_tool

LOOK = [
    {"role": "user", "content": [{"type": "input_text", "text": "Look."}, {"type": "input_image", "image_url": URI}]}
]


async def outputs(*calls: Any, threshold: float = 0.5, given: Any = LOOK) -> list[ToolCallOutputItem]:
    """What the tool has answered to the calls of an agent's model."""
    turns = [[function_call(NAME, call, call_id=str(number))] for number, call in enumerate(calls)]
    model = ScriptedModel([*turns, [assistant_message("Done.")]])
    agent = Agent(name="looker", model=model, tools=[image_tool(small_tool(threshold))])
    run = await Runner.run(agent, given)
    assert run.final_output == "Done."
    return [item for item in run.new_items if isinstance(item, ToolCallOutputItem)]


@pytest.mark.parametrize(("threshold", "ends"), BRANCHES)
@pytest.mark.parametrize("image", [{}, {"image": URI}])
async def test_an_agent_goes_on_by_the_confidence(threshold: float, ends: str, image: dict[str, str]) -> None:
    (item,) = await outputs({"question": CIRCLE, **image}, threshold=threshold)
    assert said(str(item.output)) == ends
    assert decided(item.custom_data[RESULT_KEY]) == ends


async def test_an_agents_own_model_takes_the_other_branch() -> None:
    class Gate(ScriptedModel):
        """Says what it has read."""

        async def get_response(self, *positional: Any, **named: Any) -> Any:
            items = named.get("input", positional[1] if len(positional) > 1 else [])
            read = [
                item["output"]
                for item in items
                if isinstance(item, dict) and item.get("type") == "function_call_output"
            ]
            if read:
                self.enqueue([assistant_message(said(str(read[-1])))])
            return await super().get_response(*positional, **named)

    for threshold, ends in BRANCHES:
        model = Gate([[function_call(NAME, {"question": CIRCLE}, call_id="1")]])
        run = await Runner.run(Agent(name="looker", model=model, tools=[image_tool(small_tool(threshold))]), LOOK)
        assert run.final_output == ends


async def test_the_picture_is_shown_and_is_not_asked_about_itself() -> None:
    first, second = await outputs({"question": CIRCLE, "overlay": True}, {"question": CIRCLE})
    text, picture = first.raw_item["output"]
    assert said(text["text"]) == "red" and is_overlay(base64.b64decode(picture["image_url"].partition(",")[2]))
    for item in (first, second):
        assert item.custom_data[RESULT_KEY]["image_sizes"] == [[200, 150]]


async def test_errors_say_what_to_do() -> None:
    wrong = [{"question": CIRCLE, "image": OUTSIDE}, {"question": "", "image": URI}, {"image": 1}, {"question": CIRCLE}]
    items = await outputs(*wrong, given="Look.")
    parts = ("Files may not be opened", "at least 1 character", "Field required", "no image")
    for item, part in zip(items, parts, strict=True):
        assert str(item.output).startswith("Error: ") and part in str(item.output)
