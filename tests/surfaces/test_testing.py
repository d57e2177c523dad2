"""The scripted reasoner for users' tests: it answers as told, and is a reasoner in everything else."""

from __future__ import annotations

import asyncio
import base64
import io
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from recorder import Recorder

from latent_tool import ChatLatentReasoner, ConfidenceRouter, ImagePolicy, LatentReasoningTool, ReasoningResult
from latent_tool.errors import (
    CancelledError,
    DeadlineError,
    ImageNotAllowedError,
    ImageNotFoundError,
    InputError,
    SettingsError,
    UnsupportedError,
)
from latent_tool.schema import ReasoningStep
from latent_tool.testing import Feed, Reply, ScriptedReasoner

pytestmark = pytest.mark.disable_socket

PICTURE = Image.new("RGB", (40, 30), "blue")


def ask(question: str = "What colour?", **fields: Any) -> dict[str, Any]:
    return {"image": PICTURE, "question": question, **fields}


def test_one_reply_for_everything() -> None:
    reasoner = ScriptedReasoner(Reply("blue", 0.9, boxes=[(0, 0, 10, 10)]))
    for _ in range(3):
        result = reasoner.invoke(ask())
        assert (result.answer, result.confidence, result.confidence_source) == ("blue", 0.9, "pooled_probability")
        assert result.patches[0].box == (0, 0, 10, 10) and result.image_sizes == [(40, 30)]
        assert result.accepted is None
    assert [request.question for request in reasoner.asked] == ["What colour?"] * 3


def test_replies_in_order_and_per_question() -> None:
    ordered = ScriptedReasoner([Reply("a"), Reply("b"), Reply("c", None)])
    assert [result.answer for result in ordered.batch([ask(), ask(), ask()])] == ["a", "b", "c"]
    with pytest.raises(SettingsError, match="question 4"):
        ordered.invoke(ask())
    named = ScriptedReasoner({"one?": Reply("1"), "two?": Reply("2", None)})
    assert named.invoke(ask("two?")).confidence_source == "unscored"
    assert named.invoke(ask("one?")).answer == "1"
    with pytest.raises(SettingsError, match="three"):
        named.invoke(ask("three?"))


def test_sync_async_stream_and_batch_say_the_same() -> None:
    reasoner = ScriptedReasoner(Reply("blue", 0.9, steps=2), min_confidence=0.5)
    expected = reasoner.invoke(ask())

    async def every() -> list[Any]:
        streamed = [item async for item in reasoner.astream(ask())]
        return [await reasoner.ainvoke(ask()), *await reasoner.abatch([ask()]), streamed]

    invoked, batched, streamed = asyncio.run(every())
    assert invoked == batched == streamed[-1] == expected == reasoner.batch([ask()])[0]
    assert streamed == list(reasoner.stream(ask()))
    assert [item.phase for item in streamed[:-1]] == ["prefill", "search", "search", "decode"]
    assert isinstance(streamed[-1], ReasoningResult) and expected.accepted is True


def test_steps_are_events_of_the_run() -> None:
    watch = Recorder()
    ScriptedReasoner(Reply("blue", steps=3)).invoke(ask(), {"callbacks": [watch]})
    assert [step["phase"] for step in watch.steps] == ["prefill", "search", "search", "search", "decode"]


def test_a_request_is_validated_as_by_the_real_one(tmp_path: Path) -> None:
    reasoner = ScriptedReasoner(Reply("blue"))
    with pytest.raises(InputError):
        reasoner.invoke({"image": PICTURE})
    with pytest.raises(InputError):
        reasoner.invoke(ask(sead=3))
    with pytest.raises(ImageNotFoundError):
        reasoner.invoke({"image": tmp_path / "none.png", "question": "?"})
    with pytest.raises(SettingsError):
        reasoner.invoke(ask(), {"configurable": {"latent_reasoner": {"sead": 3}}})
    with pytest.raises(ImageNotAllowedError):
        ScriptedReasoner(Reply("x"), image_policy=ImagePolicy.untrusted()).invoke({"image": "/a.png", "question": "?"})
    assert reasoner.asked == []
    with pytest.raises(SettingsError):
        Reply("blue", 1.5)
    with pytest.raises(SettingsError):
        ScriptedReasoner("blue")


def test_thresholds_decide() -> None:
    reasoner = ScriptedReasoner(Reply("blue", 0.6), min_confidence=0.5)
    assert reasoner.invoke(ask()).accepted is True
    assert reasoner.invoke(ask(min_confidence=0.7)).abstained is True
    strict = {"configurable": {"latent_reasoner": {"min_confidence": 0.9, "seed": 4}}}
    result = reasoner.invoke(ask(), strict)
    assert result.accepted is False and result.seed == 4 and result.min_confidence == 0.9
    assert ScriptedReasoner(Reply("blue", None), min_confidence=0.0).invoke(ask()).accepted is False


def test_errors_deadlines_and_cancelling() -> None:
    with pytest.raises(ZeroDivisionError):
        ScriptedReasoner(Reply(error=ZeroDivisionError())).invoke(ask())
    answers = ScriptedReasoner([Reply("a"), Reply(error=OSError("x"))]).batch([ask(), ask()], return_exceptions=True)
    assert answers[0].answer == "a" and isinstance(answers[1], OSError)
    slow = ScriptedReasoner(Reply("late", seconds=60))
    with pytest.raises(DeadlineError):
        slow.invoke(ask(budget={"deadline_s": 0.05}))
    event = threading.Event()
    event.set()
    with pytest.raises(CancelledError):
        slow.invoke(ask(), {"configurable": {"latent_reasoner": {"cancelled": event}}})


def test_a_router_and_a_tool_take_it(tmp_path: Path) -> None:
    weak, strong = ScriptedReasoner(Reply("red", 0.3)), ScriptedReasoner(Reply("blue", 0.95))
    result = ConfidenceRouter(rungs=[weak, strong], thresholds=0.8).invoke(ask())
    assert result.answer == "blue" and [step.decision for step in result.route] == ["unsure", "accepted"]
    tool = LatentReasoningTool(reasoner=weak, image_policy=ImagePolicy.local())
    PICTURE.save(tmp_path / "a.png")
    call = {"question": "What colour?", "image": str(tmp_path / "a.png")}
    answer = tool.invoke({"type": "tool_call", "name": tool.name, "id": "1", "args": call})
    assert "red" in answer.content and answer.artifact["answer"] == "red"


def test_copies_with_bound_options_share_the_script() -> None:
    reasoner = ScriptedReasoner([Reply("a", 0.6), Reply("b", 0.6), Reply("c", 0.6)])
    strict = reasoner.bind(min_confidence=0.9)
    assert strict.invoke(ask()).answer == "a"
    assert reasoner.with_budget("quick").invoke(ask()).answer == "b"
    # A threshold that is bound only gets stricter.
    loose = strict.with_config(configurable={"latent_reasoner": {"min_confidence": 0.1}})
    result = loose.invoke(ask())
    assert result.answer == "c" and result.accepted is False and result.min_confidence == 0.9
    assert len(reasoner.asked) == 3


def test_a_function_of_the_request_and_a_whole_result() -> None:
    whole = ReasoningResult(answer="red", raw_text="red!", confidence=0.4, confidence_source="reward", seed=3)
    reasoner = ScriptedReasoner(lambda request: Reply(result=whole) if "red" in request.question else Reply("no"))
    assert reasoner.invoke(ask("red?")) == whole and reasoner.invoke(ask("blue?")).answer == "no"
    assert reasoner.invoke(ask("red?", min_confidence=0.5)).abstained is True
    with pytest.raises(SettingsError, match="scripted"):
        ScriptedReasoner(lambda request: None).invoke(ask())  # type: ignore[arg-type,return-value]


def test_a_feed_goes_on_when_the_test_says_so() -> None:
    feed = Feed()
    stream = ScriptedReasoner(feed).stream(ask())
    feed.say(ReasoningStep(phase="prefill"))
    assert next(stream) == ReasoningStep(phase="prefill")
    stream.close()
    assert feed.cancelled.is_set()
    feed.clear()
    result = ReasoningResult(answer="a", raw_text="a", confidence=None, confidence_source="unscored")
    feed.say(ReasoningStep(phase="decode"), result)
    assert ScriptedReasoner(feed).invoke(ask()).answer == "a" and not feed.cancelled.is_set()
    feed.say(OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        ScriptedReasoner(feed).invoke(ask())
    with pytest.raises(DeadlineError):
        ScriptedReasoner(feed, budget={"deadline_s": 0.05}).invoke(ask())

    async def left_alone() -> None:
        task = asyncio.create_task(ScriptedReasoner(feed).ainvoke(ask()))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    feed.clear()
    asyncio.run(left_alone())
    assert feed.cancelled.is_set()


def test_a_chat_model_takes_it_and_says_what_it_has_not() -> None:
    reasoner = ScriptedReasoner(Reply("blue", 0.9))
    chat = ChatLatentReasoner(reasoner=reasoner)
    content = [
        {"type": "text", "text": "What colour?"},
        {"type": "image", "base64": _base64(PICTURE), "mime_type": "image/png"},
    ]
    message = chat.invoke([("user", content)])
    assert message.content == "blue" and message.response_metadata["confidence"] == 0.9
    assert reasoner.asked[0].question == "What colour?"
    with pytest.raises(UnsupportedError, match="no model"):
        print(reasoner.engine().vlm)
    with pytest.raises(SettingsError, match="calibrat"):
        ScriptedReasoner(Reply("blue"), calibration="embedded")


def _base64(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def test_it_goes_to_another_process() -> None:
    reasoner = ScriptedReasoner([Reply("a"), Reply("b")])
    reasoner.invoke(ask())
    assert pickle.loads(pickle.dumps(reasoner)).invoke(ask()).answer == "b"


def test_it_loads_no_model() -> None:
    code = (
        "import sys; from PIL import Image; from latent_tool.testing import Reply, ScriptedReasoner;"
        "print(ScriptedReasoner(Reply('a')).invoke({'image': Image.new('RGB', (9, 9)), 'question': '?'}).answer);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "a\n"


def test_steps_have_the_shape_of_real_ones() -> None:
    first, *_ = ScriptedReasoner(Reply("a"), budget="quick").stream(ask())
    assert isinstance(first, ReasoningStep) and first.iterations > 0


def test_the_page_about_it_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
    names: dict[str, Any] = {}
    for block in page.split("```python\n")[1:]:
        exec(block.split("```")[0], names)


def test_what_a_real_reasoner_abstains_from_is_abstained_from() -> None:
    untold = ScriptedReasoner(Reply("cannot tell", 0.95)).invoke(ask(min_confidence=0.5))
    assert untold.accepted is False and "cannot be told" in (untold.abstain_reason or "")
    low = ScriptedReasoner(Reply("blue", 0.4)).invoke(ask(min_confidence=0.5))
    assert low.accepted is False and "0.5" in (low.abstain_reason or "")
