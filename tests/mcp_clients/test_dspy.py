"""DSPy: the text reaches a ReAct agent as its observation; structured content does where it is asked for."""

from __future__ import annotations

from typing import Any

import page
import pytest
from dspy.utils import DummyLM

TURNS: list[dict[str, Any]] = [
    {"next_thought": "I look.", "next_tool_name": page.TOOL, "next_tool_args": page.ASKED},
    {"next_thought": "I know.", "next_tool_name": "finish", "next_tool_args": {}},
    {"reasoning": "It was seen.", "answer": "a green triangle"},
]


@pytest.mark.parametrize("threshold", page.THRESHOLDS)
def test_the_agent_reads_what_may_be_relied_on(threshold: float) -> None:
    model = DummyLM([dict(turn) for turn in TURNS])
    ran = page.run("DSPy", 'dspy.LM("openai/gpt-5")', model, threshold)
    page.check(ran["said"].trajectory["observation_0"], threshold)
    assert ran["said"].answer == "a green triangle"
    page.check(str(model.history[-1]["messages"]), threshold)  # and so it reached the model


def test_the_agent_gets_the_whole_result_where_it_is_asked_for() -> None:
    model = DummyLM([dict(turn) for turn in TURNS])
    structured = {"(session, tool)": '(session, tool, result_mode="structured")'}
    ran = page.run("DSPy", 'dspy.LM("openai/gpt-5")', model, 1.0, structured)
    result = ran["said"].trajectory["observation_0"]
    assert result["answer"] == "green triangle" and 0.9 < result["confidence"] < 1 and result["accepted"] is False
