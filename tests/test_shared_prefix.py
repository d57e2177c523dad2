"""Shared prefixes and fused batches against the plain path: one question at a time, a cache for every candidate."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from pictures import draw_shapes
from torch.utils._python_dispatch import TorchDispatchMode

from latent_tool.engine import Engine, Job, Outcome
from latent_tool.errors import CancelledError, QuestionError
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.requests import Attend, Decode, Score
from latent_tool.models.shared_prefix import SuffixBatch
from latent_tool.models.vlm import Prefix
from latent_tool.settings import Budget, NoiseSettings, SearchSettings

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
QUESTIONS = ["what color is the circle?", "how many shapes are there?", "what is right of the red circle in the image?"]


@pytest.fixture(scope="module")
def plain() -> Engine:
    """The embedded model without shared prefixes."""
    engine = Engine(load(ModelSpec()))
    engine.vlm._shares = False
    return engine


@pytest.fixture(scope="module")
def prefixes(engine: Engine) -> list[Prefix]:
    """Prefixes of different lengths, about different pictures."""
    pictures = [draw_shapes(), draw_shapes("triangle"), draw_shapes("circle", (25, 150, 40))]
    return [
        engine.vlm.prefill(engine.vlm.prepare([picture], question))
        for picture, question in zip(pictures, QUESTIONS, strict=True)
    ]


def states(prefix: Prefix, engine: Engine, seed: int) -> Score:
    """Five states with different numbers of cells and, by seed, of latents."""
    width = prefix.features.shape[1]
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(5, 2 + seed, width, generator=generator) * engine.vlm.embedding_rms()
    return Score(prefix, latents, [(), (3,), (5, 60, 5), (1, 2), (63,)])


def test_the_embedded_model_shares_prefixes(engine: Engine, prefixes: list[Prefix]) -> None:
    assert engine.vlm.shares_prefixes(prefixes[0])


def test_scores_of_several_questions_equal_the_plain_ones(
    engine: Engine, plain: Engine, prefixes: list[Prefix]
) -> None:
    requests = [states(prefix, engine, seed) for seed, prefix in enumerate(prefixes)]
    for found, request in zip(engine.vlm.score_many(requests), requests, strict=True):
        expected = plain.vlm.score(request.prefix, request.latents, request.patches)
        torch.testing.assert_close(found.latents, expected.latents, **CLOSE)
        torch.testing.assert_close(found.answer, expected.answer, **CLOSE)


def test_attention_of_several_questions_equals_the_plain_one(
    engine: Engine, plain: Engine, prefixes: list[Prefix]
) -> None:
    requests = [
        Attend(each.prefix, each.latents[2], each.patches[seed])
        for seed, each in enumerate(states(prefix, engine, index) for index, prefix in enumerate(prefixes))
    ]
    for found, request in zip(engine.vlm.attend_many(requests), requests, strict=True):
        expected = plain.vlm.attend(request.prefix, request.latents, request.patches)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_decodings_of_several_questions_equal_the_plain_ones(
    engine: Engine, plain: Engine, prefixes: list[Prefix]
) -> None:
    """With and without latents, of different lengths, one cut after a token, two of the same prefix."""
    requests = [
        Decode(prefix, latents, cells, limit)
        for prefix, seed in zip([*prefixes, prefixes[0]], range(4), strict=True)
        for latents, cells, limit in (
            (None, (), 20),
            (states(prefix, engine, seed).latents[0], (4, 9), 1 + 19 * (seed % 2)),
        )
    ]
    found = engine.vlm.decode_many(requests)
    for each, request in zip(found, requests, strict=True):
        assert not isinstance(each, Exception)
        expected = plain.vlm.decode(request.prefix, request.latents, request.patches, request.max_new_tokens)
        assert (each.tokens, each.finish_reason) == (expected.tokens, expected.finish_reason)
        torch.testing.assert_close(each.log_probabilities, expected.log_probabilities, **CLOSE)


def test_a_decoding_that_fails_harms_no_other(engine: Engine, prefixes: list[Prefix]) -> None:
    asked = 0

    def cancel() -> bool:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise CancelledError("The question was cancelled.")
        return False

    requests = [Decode(prefixes[0], None, (), 20), Decode(prefixes[1], None, (), 20, cancel)]
    first, second = engine.vlm.decode_many(requests)
    alone = engine.vlm.decode(prefixes[0], None, (), 20)
    assert isinstance(second, CancelledError)
    assert not isinstance(first, Exception)
    assert first.tokens == alone.tokens


def test_no_copy_of_the_prefix_is_made(engine: Engine, prefixes: list[Prefix]) -> None:
    """Keys and values of the prefix stay the very same tensors, and the batch holds only the suffixes' own."""
    request = states(prefixes[2], engine, 1)
    before = [layer.keys.data_ptr() for layer in prefixes[2].cache.layers]
    batch = SuffixBatch(engine.vlm, [prefixes[2]] * 5)
    batch.extend([request.latents], [-1])
    assert [layer.keys.data_ptr() for layer in prefixes[2].cache.layers] == before
    assert all(layer.keys.shape[2] == request.latents.shape[1] for layer in batch.cache.layers)


JOBS = [
    Job(
        (draw_shapes("circle" if index % 2 else "triangle", (220, 25 * index, 25)),),
        QUESTIONS[index % 2] if index != 3 else "what is left of the blue square in this image?",
        settings=SearchSettings(reward_position="both", patches_per_latent=2),
        budget=Budget(iterations=3, max_patches=4 + index),
        seed=index,
        attention=index == 1,
        grounding=NoiseSettings() if index == 2 else None,
        controls=index == 4,
    )
    for index in range(6)
]


def test_a_fused_batch_gives_what_each_question_gives_alone(engine: Engine, plain: Engine) -> None:
    """Same answers, patches and rewards to 1e-4; no near-tie may be decided differently on these questions."""
    fused = engine.answer_many(JOBS)
    for job, found in zip(JOBS, fused, strict=True):
        alone = plain.answer(job)
        assert isinstance(found, Outcome)
        assert found.search is not None
        assert alone.search is not None
        assert found.answer.text == alone.answer.text
        assert found.patches == alone.patches
        assert found.search.best.reward == pytest.approx(alone.search.best.reward, abs=1e-4)
        assert found.search.candidates == alone.search.candidates
        assert (found.attention is None) == (not job.attention)
        if found.attention is not None:
            assert found.attention == pytest.approx(alone.attention, abs=1e-5)
        assert (found.grounding is None) == (job.grounding is None)
        assert (found.controls is None) == (not job.controls)
        assert engine.rescore(found) == pytest.approx(found.search.best.reward, abs=1e-4)


def test_bad_cancelled_and_short_questions_leave_the_rest_of_a_batch_alone(engine: Engine) -> None:
    cancelled = threading.Event()
    cancelled.set()
    odd = [
        Job(JOBS[0].images, ""),
        Job(JOBS[0].images, QUESTIONS[0], cancelled=cancelled),
        Job(JOBS[0].images, QUESTIONS[0], budget=Budget(iterations=0, max_new_tokens=1)),
    ]
    results = engine.answer_many([JOBS[0], *odd, JOBS[1]])
    assert isinstance(results[1], QuestionError)
    assert isinstance(results[2], CancelledError)
    assert isinstance(results[3], Outcome)
    for result, job in zip((results[0], results[4]), JOBS[:2], strict=True):
        assert isinstance(result, Outcome)
        assert result.answer.text == engine.answer(job).answer.text


def test_a_batch_that_does_not_fit_is_served_one_by_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out whenever rows of two questions are run together."""
    extend = SuffixBatch.extend
    refused = 0

    def small(self: SuffixBatch, *arguments: object) -> object:
        nonlocal refused
        if len(self.blocks) > 1:
            refused += 1
            raise torch.OutOfMemoryError("no memory left")
        return extend(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SuffixBatch, "extend", small)
    results = engine.answer_many(JOBS[:2])
    assert refused
    for result, job in zip(results, JOBS[:2], strict=True):
        assert isinstance(result, Outcome)
        assert result.answer.text == engine.answer(job).answer.text


def test_a_model_on_which_sharing_is_not_exact_falls_back(
    prefixes: list[Prefix], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inexact = load(ModelSpec())
    attend = SuffixBatch.attend
    monkeypatch.setattr(SuffixBatch, "attend", lambda self, *arguments: attend(self, *arguments) * 1.5)
    prefix = inexact.prefill(inexact.prepare([draw_shapes()], QUESTIONS[0]))
    request = states(prefix, engine, 0)
    found = inexact.score(prefix, request.latents, request.patches)
    assert not inexact.shares_prefixes(prefix)
    monkeypatch.undo()
    expected = engine.vlm.score(prefixes[0], request.latents, request.patches)
    torch.testing.assert_close(found.answer, expected.answer, **CLOSE)


class _NoLookAtNumbers(TorchDispatchMode):
    """Refuses what would make a GPU's host wait for its numbers."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
        assert not any(name.startswith(f"aten.{each}.") for each in waits), name
        return function(*args, **(kwargs or {}))


def test_the_host_never_waits_inside_a_step(
    engine: Engine, prefixes: list[Prefix], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number is read while states of several questions are scored, with and without known cells."""
    requests = [states(prefix, engine, seed) for seed, prefix in enumerate(prefixes)]
    requests[1] = replace(requests[1], attention=True, answer_only=True)
    engine.vlm.score_many(requests)

    def refuse(*_arguments: object) -> None:
        raise AssertionError("numbers were read")

    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse, raising=False)
    with _NoLookAtNumbers():
        engine.vlm.score_many(requests)
        engine.vlm.score_many(requests[1:2])
