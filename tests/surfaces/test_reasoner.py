"""LatentReasoner as LangChain sees it: every way to call it, options, events, cancellation, serialisation."""

from __future__ import annotations

import asyncio
import copy
import os
import random
import threading
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.load import dumpd, load
from PIL import Image
from reasoner_calls import (  # noqa: F401
    test_a_closed_stream_stops,
    test_a_deadline_that_has_passed_is_an_error,
    test_a_graph_streams_the_steps,
    test_a_sync_call_can_be_stopped,
    test_another_seed_searches_elsewhere,
    test_copies_and_pickles_are_equal,
    test_errors_in_a_batch_take_their_place,
    test_names_tags_and_parents_reach_the_callbacks,
    test_options_of_a_batch_belong_to_their_question,
    test_prompts_and_messages_are_requests_too,
    test_retries_and_fallbacks_compose,
    test_schemas_name_the_classes,
    test_steps_go_out_as_events,
    test_streams_end_in_the_result,
    test_the_request_is_left_as_it_was,
    test_the_same_answer_however_it_is_asked,
    test_what_others_put_into_configurable_is_left_alone,
    test_with_budget_changes_the_budget_alone,
    test_wrong_options_are_errors,
    test_wrong_requests_are_input_errors,
)
from recorder import Recorder, options
from scripted_agents import CIRCLE, SQUARE, essence, small_reasoner

import latent_tool
from latent_tool import Budget, ImagePolicy, LatentReasoner, ReasoningResult, SearchSettings
from latent_tool.engine import engine as engine_module
from latent_tool.engine.in_step import InStep
from latent_tool.engine.job import Job
from latent_tool.errors import (
    CancelledError,
    ImageNotAllowedError,
    SettingsError,
)

pytestmark = pytest.mark.disable_socket


@pytest.fixture
def reasoner() -> LatentReasoner:
    return small_reasoner()


@pytest.fixture
def request_(picture: Image.Image) -> dict[str, Any]:
    return {"image": picture, "question": CIRCLE}


def test_the_public_names_are_pinned() -> None:
    assert latent_tool.__all__ == [
        "Budget",
        "ChatLatentReasoner",
        "ConfidenceRouter",
        "ImagePolicy",
        "LatentReasoner",
        "LatentReasoningTool",
        "Patch",
        "ReasoningRequest",
        "ReasoningResult",
        "RemoteReasoner",
        "SearchSettings",
        "doctor",
    ]
    assert set(latent_tool.__all__) <= set(dir(latent_tool))
    assert all(getattr(latent_tool, name).__name__ == name for name in latent_tool.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Reasoner'"):
        _ = latent_tool.Reasoner


# ---------------------------------------------------------------------- every way to call it


# ---------------------------------------------------------------------- batches


async def test_batches_are_fused_up_to_max_concurrency(
    reasoner: LatentReasoner, request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: set[int] = set()
    step = InStep.step

    def counted(self: InStep) -> Any:
        sizes.add(len(self.members))
        return step(self)

    monkeypatch.setattr(InStep, "step", counted)
    reasoner.batch([request_] * 5, {"max_concurrency": 2})
    assert max(sizes) == 2
    sizes.clear()
    await reasoner.abatch([request_] * 5, {"max_concurrency": 2})
    assert max(sizes) == 2
    sizes.clear()
    await reasoner.abatch([request_] * 3)
    assert max(sizes) == 3


WHO = ContextVar("WHO", default="nobody")


class Together(os.PathLike[str]):
    """A file that can be opened only while another one is being opened, too; notes who opens it."""

    def __init__(self, path: Path, meeting: threading.Barrier) -> None:
        self.path, self.meeting, self.opened_by = path, meeting, ""

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        self.meeting.wait(20)
        self.opened_by = WHO.get()
        return str(self.path)


async def test_the_images_of_a_batch_are_opened_together(
    reasoner: LatentReasoner, picture: Image.Image, tmp_path: Path
) -> None:
    """So that a slow one does not use up the time of the others."""
    picture.save(tmp_path / "a.png")
    meeting = threading.Barrier(3)
    images = [Together(tmp_path / "a.png", meeting) for _ in range(3)]
    asked = [{"image": image, "question": CIRCLE} for image in images]
    WHO.set("me")
    for answers in (reasoner.batch(asked), await reasoner.abatch(asked)):
        assert [each.answer for each in answers] == ["red"] * 3
        assert [each.opened_by for each in images] == ["me"] * 3


# ---------------------------------------------------------------------- options


def test_request_before_call_before_reasoner(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    plain = small_reasoner(seed=1, min_confidence=0.1)
    result = plain.invoke(request_)
    assert (result.seed, result.min_confidence, result.budget) == (1, 0.1, plain.budget)

    call = options(seed=2, min_confidence=1.0, budget={"iterations": 0})
    result = plain.invoke(request_, call)
    assert (result.seed, result.min_confidence, result.budget) == (2, 1.0, Budget(iterations=0))
    assert result.accepted is False and result.abstained is True

    result = plain.invoke({**request_, "seed": 3, "min_confidence": 0.5, "budget": Budget(iterations=2)}, call)
    assert (result.seed, result.min_confidence, result.budget) == (3, 0.5, Budget(iterations=2))
    assert result.accepted is True


@pytest.mark.parametrize(
    "wrong",
    [
        {"modle": "x"},
        {"model": ""},
        {"seed": -1},
        {"min_confidence": 1.01},
        {"min_confidence": float("nan")},
        {"budget": "huge"},
        {"budget": {"iterations": -1}},
        {"settings": {"latents": -1}},
        {"confidence": "feeling"},
        {"confidence": "reward", "settings": {"latents": 0}},
        {"confidence": "reward", "settings": {"reward": "neg_log_probability"}},
        {"device": "cpu", "device_map": "auto"},
        {"grounding": "yes, please"},
    ],
)
def test_wrong_fields_are_settings_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        LatentReasoner(**wrong)
    assert caught.value.hint


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_the_device_is_chosen_where_the_model_is_loaded() -> None:
    """So that what was saved on one machine, and a calibration, hold on another."""
    for device in ("auto", None, "cuda:0"):
        saved = dumpd(LatentReasoner(device=device))
        assert load(saved, allowed_objects=[LatentReasoner], valid_namespaces=["latent_tool"]).device == device
    assert LatentReasoner(device_map="auto").device == "auto"
    assert LatentReasoner().configuration() == LatentReasoner(device="cuda:0").configuration()


def test_the_image_policy_is_enforced(picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    request = {"image": tmp_path / "a.png", "question": CIRCLE}
    assert small_reasoner().invoke(request).answer == "red"
    with pytest.raises(ImageNotAllowedError):
        small_reasoner(image_policy=ImagePolicy.untrusted()).invoke(request)


def test_grounding_controls_and_reward_confidence(request_: dict[str, Any]) -> None:
    result = small_reasoner(grounding=True, controls=True, confidence="reward").invoke(request_)
    assert result.confidence_source == "reward"
    assert result.grounding is not None and result.grounding.mean > 0  # the answer depends on the image
    assert result.controls is not None and result.controls.latents_off.answer == "red"


def test_tokens_spell_what_was_decoded(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    result = reasoner.invoke({**request_, "question": "what is left of the blue square?"})
    assert [token.token for token in result.tokens] == [" red", " circle", "<|end|>"]
    product = 1.0
    for token in result.tokens:
        assert token.in_answer
        product *= token.probability
    assert product == pytest.approx(result.scores.answer_probability, rel=1e-6)


# ---------------------------------------------------------------------- events and traces


# ---------------------------------------------------------------------- limits


def test_deadlines_count_from_the_call(request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening images takes 5 seconds of the deadline; loading the model, 100 seconds, takes none."""
    now = 1000.0
    asked: list[Job] = []

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    def open_slowly(reference: Any, policy: Any, *, deadline: float) -> Any:
        assert deadline == 1030.0
        wait(5.0)
        return SimpleNamespace(image=reference, warnings=("slow",))

    class Nobody:
        def run(self, job: Job) -> Any:
            asked.append(job)
            raise CancelledError("enough")

    def load_slowly(self: LatentReasoner) -> Any:
        wait(100.0)
        return Nobody()

    monkeypatch.setattr("latent_tool.langchain.reasoner.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("latent_tool.images.picture.load_image", open_slowly)
    monkeypatch.setattr(LatentReasoner, "engine", load_slowly)
    with pytest.raises(CancelledError):
        LatentReasoner(budget={"deadline_s": 30}).invoke(request_)
    (job,) = asked
    assert job.deadline == 1000 + 100 + 30
    assert (job.image_seconds, job.queue_seconds, job.warnings) == (5.0, 0.0, ("slow",))


def assert_no_thread_is_left(before: set[threading.Thread]) -> None:
    """The scheduler's thread ends at its next step when there is nothing left to do."""
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    assert set(threading.enumerate()) <= before


def test_cancelling_a_task_stops_its_search(reasoner: LatentReasoner, request_: dict[str, Any]) -> None:
    """A search that would take hours, and a batch of them."""

    async def main() -> int:
        loop, searching = asyncio.get_running_loop(), asyncio.Event()

        def on_step() -> None:
            if len(recorder.steps) == 3:
                loop.call_soon_threadsafe(searching.set)

        recorder = Recorder(on_step)
        long = reasoner.with_budget({"iterations": 10_000})
        for ask in (
            lambda config: asyncio.create_task(long.ainvoke(request_, config)),
            lambda config: asyncio.create_task(anext_until_end(long.astream(request_, config))),
        ):
            task = ask({"callbacks": [recorder]})
            begun = asyncio.create_task(searching.wait())
            await asyncio.wait((begun, task), return_when=asyncio.FIRST_COMPLETED)
            if not begun.done():  # a search that failed never comes to its third step
                begun.cancel()
                pytest.fail(f"the search ended before it was cancelled: {await task!r}")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            searching.clear()
            recorder.steps.clear()
        batch = asyncio.create_task(long.abatch([request_] * 3))
        await asyncio.sleep(0)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        return len(recorder.errors)

    async def anext_until_end(steps: Any) -> None:
        async for _ in steps:
            pass

    before = set(threading.enumerate())
    assert asyncio.run(main()) == 2
    assert_no_thread_is_left(before)


def test_many_at_once_with_a_third_cancelled(picture: Image.Image) -> None:
    """32 concurrent questions, 11 cancelled at random moments: the others' results equal their sequential ones."""
    reasoner = small_reasoner(iterations=1)
    requests = [{"image": picture, "question": (CIRCLE, SQUARE)[i % 2], "seed": i % 4} for i in range(32)]
    expected = [essence(reasoner.invoke(requests[i])) for i in range(4)]
    rng = random.Random(0)
    doomed = {i: rng.randrange(1, 60) for i in rng.sample(range(32), 11)}  # which, and after how many steps of all

    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        lock, steps = threading.Lock(), 0

        def on_step() -> None:
            nonlocal steps
            with lock:
                steps += 1
                for i, moment in doomed.items():
                    if moment == steps:
                        loop.call_soon_threadsafe(tasks[i].cancel)

        config = {"callbacks": [Recorder(on_step)]}
        tasks = [asyncio.create_task(reasoner.ainvoke(each, config)) for each in requests]
        return await asyncio.gather(*tasks, return_exceptions=True)

    before = set(threading.enumerate())
    answers = asyncio.run(main())
    assert_no_thread_is_left(before)
    for i, answer in enumerate(answers):
        if i in doomed and isinstance(answer, asyncio.CancelledError):
            continue
        assert isinstance(answer, ReasoningResult), answer
        assert essence(answer) == expected[i % 4]
    assert sum(isinstance(each, asyncio.CancelledError) for each in answers) >= 8  # few had ended before their moment


# ---------------------------------------------------------------------- composition and serialisation


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_saved_and_loaded_again() -> None:
    reasoner = LatentReasoner(
        model="some/model",
        budget="quick",
        settings=SearchSettings.paper(latents=6),
        grounding={"strength": 0.5},
        image_policy=ImagePolicy.untrusted(hosts=("example.org",)),
        seed=3,
    )
    saved = dumpd(reasoner)
    assert "not_implemented" not in str(saved)
    assert load(saved, allowed_objects=[LatentReasoner], valid_namespaces=["latent_tool"]) == reasoner
    secret = LatentReasoner(token="hf_secret")
    assert "hf_secret" not in f"{dumpd(secret)} {secret!r}"


def test_a_model_is_loaded_once(request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load_for_real = engine_module.load

    def counted(spec: Any) -> Any:
        loaded.append(spec)
        return load_for_real(spec)

    monkeypatch.setattr(engine_module, "load", counted)
    monkeypatch.setattr(engine_module, "_engines", {})
    reasoner = small_reasoner(iterations=0)
    twins = [reasoner, copy.deepcopy(reasoner), reasoner.with_budget("quick"), reasoner.with_config(tags=["x"])]
    threads = [threading.Thread(target=twin.invoke, args=(request_,)) for twin in twins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reasoner.with_config(options(seed=3)).batch([request_] * 2)
    assert len(loaded) == 1
