"""Passes in fixed shapes against the plain ones: padded rows, columns and prefixes, and whose buffers are whose.

What is compiled is compared elsewhere (``families/test_models_compiled``); here the function that would be compiled is
called as it is, so that many shapes cost little.
"""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_tool.checkup.checks import CHECKS, Patient
from latent_tool.engine.engine import Engine
from latent_tool.errors import SettingsError
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.prefix import Prefix, Stems
from latent_tool.models.requests import Attend, Decode, Score
from latent_tool.models.shared_prefix import SharedRows
from latent_tool.models.static_pass import COLUMNS, LENGTHS, ROWS, Pass, StaticPasses, as_compile, bucket, prefix_bucket
from latent_tool.models.static_rows import StaticRows
from latent_tool.models.vlm import VisionLanguageModel

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


class Uncompiled(StaticPasses):
    """The passes, with nothing compiled."""

    def _compiled(self, function: Callable[[Pass], Any]) -> Callable[[Pass], Any]:
        return function


@pytest.fixture
def vlm(engine: Engine) -> Iterator[VisionLanguageModel]:
    """The embedded model with passes of its own."""
    engine.vlm.static = Uncompiled(engine.vlm)
    yield engine.vlm
    engine.vlm.static = None


def plainly(vlm: VisionLanguageModel, work: Callable[[], Any]) -> Any:
    """What work gives without the passes."""
    passes, vlm.static = vlm.static, None
    try:
        return work()
    finally:
        vlm.static = passes


@pytest.mark.parametrize("seed", range(2))
def test_rows_that_grow_leave_and_fork_are_as_without(
    vlm: VisionLanguageModel, prefixes: list[Prefix], seed: int
) -> None:
    """Two batches take turns in the same buffers, over 300 tokens, so that there is more than one size of these."""
    draw = random.Random(seed)
    owners = [[0, 0, 0, 1, 1], [1, 0, 0]]
    stems = [[prefixes[0].stems.find((3, 4)) if seed % 2 and not owner else None for owner in each] for each in owners]
    begun = [[vlm.written([7, 8, 9, 10][: draw.randint(1, 4)]) for _ in each] for each in owners]
    script: list[tuple[int, str, Any]] = []
    live = [len(each) for each in owners]
    for _ in range(30):
        which, kind = draw.randrange(2), draw.choice(["write", "write", "write", "select", "fork"])
        count = draw.choice([1, 1, 1, 9, 17])
        if kind == "select" and live[which] > 1:
            live[which] -= 1
            script.append((which, kind, sorted(draw.sample(range(live[which] + 1), live[which]))))
        elif kind == "fork":
            rows = sorted(draw.choices(range(live[which]), k=draw.randint(1, 6)))
            script.append((which, kind, (rows, [[draw.randrange(20, 60)] * 3 for _ in rows])))
        else:
            script.append((which, "write", [[draw.randrange(20, 60)] * count for _ in range(live[which])]))

    def run(kind: type[SharedRows]) -> list[Tensor]:
        batches = [kind(vlm, [prefixes[at] for at in own], known) for own, known in zip(owners, stems, strict=True)]
        found = [batch.extend(rows, [-1]) for batch, rows in zip(batches, begun, strict=True)]
        for which, what, given in script:
            batch = batches[which]
            if what == "select":
                batch.select(given)
            elif what == "fork":
                found.append(batch.fork(given[0]).write(given[1], [-2, -1]))
            else:
                found.append(batch.write(given, [-1]))
        return found

    found, expected = run(StaticRows), run(SharedRows)
    assert vlm.static.failure is None and len(vlm.static.passes) > 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_scores_attention_and_answers_are_as_without(vlm: VisionLanguageModel, prefixes: list[Prefix]) -> None:
    noise = torch.randn(9, 3, vlm.width, generator=torch.Generator().manual_seed(2)) * vlm.embedding_rms()
    fresh = [replace(prefix, stems=Stems()) for prefix in prefixes]

    def work() -> list[Tensor]:
        found: list[Tensor] = []
        for count, cells in ((1, ()), (3, (5,)), (9, (5, 7)), (2, (5, 7, 1))):
            asked = [Score(fresh[0], noise[:count], [cells] * count), Score(fresh[1], noise[:2], [(), (2,)])]
            for logits in vlm.score_many(asked):
                found += [logits.answer, logits.latents]
            (logits,) = vlm.score_many([Score(fresh[0], noise[:1], [cells], attended=1)])
            assert logits.attention is not None
            found += [logits.answer, logits.attention]
        found += vlm.attend_many([Attend(fresh[0], noise[0], (5,)), Attend(fresh[1], noise[1], ())])
        for decoded in vlm.decode_many([Decode(fresh[0], None, (), 9), Decode(fresh[1], noise[0], (2,), 9)]):
            assert not isinstance(decoded, Exception)
            found += [torch.tensor(decoded.tokens), decoded.log_probabilities, decoded.entropies]
        return found

    found = work()
    assert vlm.static.failure is None and len(vlm.static.passes) > 5
    fresh = [replace(prefix, stems=Stems()) for prefix in prefixes]
    for one, other in zip(found, plainly(vlm, work), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_what_stood_in_the_buffers_changes_nothing(vlm: VisionLanguageModel, prefixes: list[Prefix]) -> None:
    """Values that are not finite, left by another question, are still not finite times zero."""
    noise = torch.randn(2, 3, vlm.width, generator=torch.Generator().manual_seed(2))

    def work() -> Tensor:
        return vlm.score_many([Score(replace(prefixes[1], stems=Stems()), noise, [(), ()])])[0].answer

    before = work()
    with torch.inference_mode():
        for fixed in vlm.static.passes.values():
            for buffer in (*fixed.suffix.every, fixed.embeddings):
                buffer.fill_(torch.nan)
            for stored in fixed.stored:
                for layer in stored.layers:
                    layer.keys.fill_(torch.nan)
                    layer.values.fill_(torch.nan)
                stored._held = None
    assert torch.equal(work(), before)


def test_buffers_are_used_again(vlm: VisionLanguageModel, prefixes: list[Prefix]) -> None:
    """Of one question and the next, and of many lengths: as many shapes as there are buckets, always in one place."""
    noise = torch.randn(1, 4, vlm.width, generator=torch.Generator().manual_seed(2))

    def places() -> set[int]:
        return {
            buffer.data_ptr()
            for fixed in vlm.static.passes.values()
            for buffer in (
                *(fixed.embeddings, fixed.positions, fixed.standing, *fixed.suffix.every),
                *(states for each in fixed.stored for layer in each.layers for states in (layer.keys, layer.values)),
            )
        }

    batch = StaticRows(vlm, [prefixes[0]])
    batch.write([[5]], [-1])
    first = places()
    for _ in range(40):
        batch.write([[5]], [-1])
    assert places() == first and len(vlm.static.passes) == 1
    for prefix in prefixes:
        for length in (1, 2, 3, 4):
            for cells in ((), (1,), (1, 2, 3)):
                vlm.score_many([Score(replace(prefix, stems=Stems()), noise[:, :length], [cells], answer_only=True)])
    lengths = {shape.length for shape in vlm.static.passes}
    assert lengths <= {1, 16, 32} and len(vlm.static.passes) <= len(lengths)
    assert first <= places()


def test_rows_that_are_gone_are_not_copied_out(vlm: VisionLanguageModel, prefixes: list[Prefix]) -> None:
    batch = StaticRows(vlm, [prefixes[0]])
    batch.write([[5]], [-1])
    held = batch._held
    assert held is not None and held.owner is batch and batch.cache.layers[0].keys is None
    other = StaticRows(vlm, [prefixes[0]])
    other.write([[5]], [-1])
    assert held.owner is other and batch._held is None and batch.cache.layers[0].keys.shape[2] >= 1
    del other
    gc.collect()
    assert held.owner is None


def test_more_shapes_than_are_compiled_run_plainly_and_it_is_said_once(
    vlm: VisionLanguageModel, prefixes: list[Prefix], caplog: pytest.LogCaptureFixture
) -> None:
    vlm.static = Uncompiled(vlm, most=2)
    noise = torch.randn(9, 3, vlm.width, generator=torch.Generator().manual_seed(2))

    def work() -> list[Tensor]:
        prefix = replace(prefixes[0], stems=Stems())
        return [vlm.score_many([Score(prefix, noise[:n], [()] * n)])[0].answer for n in (1, 3, 7, 9, 7, 1)]

    with caplog.at_level(logging.WARNING, "latent_tool"):
        found = work()
    assert len(vlm.static.passes) == 2
    assert [record.message.startswith("Compiling") for record in caplog.records] == [True, False]
    assert "2 shapes" in caplog.records[1].message
    for one, other in zip(found, plainly(vlm, work), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_what_cannot_be_compiled_runs_plainly(
    vlm: VisionLanguageModel, prefixes: list[Prefix], fails_at: int, caplog: pytest.LogCaptureFixture
) -> None:
    """At the first pass, at the first token, and in the middle of an answer."""

    class Failing(StaticPasses):
        calls = 0

        def _compiled(self, function: Callable[[Pass], Any]) -> Callable[[Pass], Any]:
            def call(fixed: Pass) -> Any:
                Failing.calls += 1
                if Failing.calls == (fails_at if fails_at < 3 else 6):
                    function(fixed)  # written into the buffers already
                    raise OSError("no C++ compiler was found\nand much more")
                return function(fixed)

            return call

    def work() -> Any:
        (decoded,) = vlm.decode_many([Decode(replace(prefixes[1], stems=Stems()), vlm.embed([5, 6]), (2, 3), 12)])
        assert not isinstance(decoded, Exception)
        return decoded

    def tokens() -> list[Tensor]:
        batch = vlm.kind_of_rows(prefixes[0])(vlm, [prefixes[0]] * 2)
        return [batch.extend([vlm.written([7, 8]), vlm.written([9])], [-1])] + [
            batch.write([[at], [at + 1]], [-1]) for at in range(20, 30)
        ]

    expected = plainly(vlm, tokens)
    vlm.static = Failing(vlm)
    with caplog.at_level(logging.WARNING, "latent_tool"):
        for one, other in zip(tokens(), expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
        work()
    assert vlm.static.failure == "OSError: no C++ compiler was found" and not vlm.static.passes
    said = [record.message for record in caplog.records if "no C++" in record.message]
    assert len(said) == 1 and "compile=False" in said[0] and "much more" not in said[0]


def test_a_pass_that_gives_something_else_is_found_out(
    vlm: VisionLanguageModel, prefixes: list[Prefix], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = Pass.fill

    def shifted(self: Pass, at: Tensor, embeddings: Tensor, positions: Tensor, *rest: Any) -> None:
        fill(self, at, embeddings, positions + 3, *rest)

    noise = torch.randn(3, 3, vlm.width, generator=torch.Generator().manual_seed(2)) * vlm.embedding_rms()
    prefix = replace(prefixes[0], stems=Stems())
    expected = plainly(vlm, lambda: vlm.score(prefix, noise, [(), (1,), (2, 3)]).answer)
    monkeypatch.setattr(Pass, "fill", shifted)
    found = vlm.score(replace(prefix, stems=Stems()), noise, [(), (1,), (2, 3)]).answer
    assert "differs" in vlm.static.failure and torch.equal(found, expected)


def test_buckets_hold_what_is_asked_and_little_more() -> None:
    for sizes in (ROWS, LENGTHS, COLUMNS):
        assert list(sizes) == sorted(set(sizes))
        for count in range(1, min(sizes[-1], 3000) + 1):
            found = bucket(count, sizes)
            assert found is not None and found >= count
            assert all(size < count for size in sizes if size < found)
        assert bucket(sizes[-1] + 1, sizes) is None
    for length in range(1, 9000):
        found = prefix_bucket(length)
        assert length <= found <= max(length * 1.25, length + 255)
    assert len({prefix_bucket(length) for length in range(1, 9000)}) <= 20


def test_compile_is_a_setting_of_the_model() -> None:
    assert load(ModelSpec()).static is None  # auto, on a CPU
    assert load(ModelSpec(compile=False)).static is None
    assert load(ModelSpec(compile=True)).static is not None
    assert ModelSpec(compile="on") == ModelSpec(compile=True) != ModelSpec()  # type: ignore[arg-type]
    assert LatentReasoner(compile="off").compile is False  # type: ignore[arg-type]
    for wrong in ("sometimes", "", None, 2, "inductor"):
        with pytest.raises(SettingsError, match="compile"):
            as_compile(wrong)
        with pytest.raises(SettingsError):
            ModelSpec(compile=wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingsError):
        LatentReasoner(compile="sometimes")  # type: ignore[arg-type]


def test_auto_compiles_on_one_gpu_alone() -> None:
    def decoder(device: str, **map: str) -> Any:
        text = SimpleNamespace(num_attention_heads=4)
        config = SimpleNamespace(get_text_config=lambda: text)
        return SimpleNamespace(device=torch.device(device), model=SimpleNamespace(config=config, hf_device_map=map))

    assert StaticPasses.wanted(decoder("cuda"), "auto") is not None
    for other in (decoder("cpu"), decoder("mps"), decoder("cuda", a="cuda:0", b="cuda:1")):
        assert StaticPasses.wanted(other, "auto") is None
    assert StaticPasses.wanted(decoder("cuda"), False) is None
    assert StaticPasses.wanted(decoder("cuda", a="cuda:0", b="cpu"), True) is None


def test_the_doctor_says_what_is_compiled(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = Patient(vlm)
    found = CHECKS["compiled passes"](patient)
    assert found.status == "ok" and found.figures["shapes"] == 1 and "1 of at most 32" in found.said
    vlm.static.give_up("no compiler")
    found = CHECKS["compiled passes"](patient)
    assert found.status == "off" and "no compiler" in found.said and "--compile off" in found.remedy
    monkeypatch.setattr(vlm, "static", None)
    assert CHECKS["compiled passes"](patient).status == "off"


def grown(vlm: VisionLanguageModel, prefix: Prefix, interrupt: Callable[[int], None]) -> list[Tensor]:
    """What rows say token by token, with attention read; ``interrupt`` may do something to others in between."""
    batch = vlm.kind_of_rows(prefix)(vlm, [prefix] * 2)
    found = [batch.extend([vlm.written([7, 8]), vlm.written([9])], [-1])]
    for step in range(6):
        interrupt(step)
        found.append(batch.write([[20 + step], [30 + step]], [-1]))
    return found


def test_rows_whose_eviction_fails_lose_nothing(
    vlm: VisionLanguageModel, prefixes: list[Prefix], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out while keys and values are copied out for other rows: these fail, and the first ones go on."""
    expected = plainly(vlm, lambda: grown(vlm, prefixes[0], lambda _: None))
    copies = 0

    class Scarce:
        """A layer of buffers that cannot be copied."""

        def __init__(self, layer: Any) -> None:
            self.layer = layer

        @property
        def keys(self) -> Tensor:
            return self.layer.keys

        @property
        def values(self) -> Tensor:
            nonlocal copies
            copies += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def interrupt(step: int) -> None:
        if step != 3:
            return
        (buffers,) = {id(fixed.suffix): fixed.suffix for fixed in vlm.static.passes.values()}.values()
        whole = buffers.layers
        buffers.layers = [*whole[:-1], Scarce(whole[-1])]
        StaticRows(vlm, [prefixes[1]] * 2).write([[5], [6]], [-1])
        buffers.layers = whole

    found = grown(vlm, prefixes[0], interrupt)
    assert copies
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_want_of_memory_gives_the_buffers_back_and_does_not_end_it(
    vlm: VisionLanguageModel, prefixes: list[Prefix], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plainly(vlm, lambda: grown(vlm, prefixes[0], lambda _: None))
    run, failing = Pass.run, [1, 4]
    calls = 0

    def scarce(self: Pass) -> Any:
        nonlocal calls
        calls += 1
        if calls in failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(self)

    monkeypatch.setattr(Pass, "run", scarce)
    room = vlm.static._room
    for one, other in zip(grown(vlm, prefixes[0], lambda _: None), expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert vlm.static.failure is None and vlm.static.passes and vlm.static._room == room // 4
    failing += range(calls, calls + 50)
    for one, other in zip(grown(vlm, prefixes[0], lambda _: None), expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert vlm.static.failure is not None and not vlm.static.passes


def test_buffers_take_no_more_than_their_room(vlm: VisionLanguageModel, prefixes: list[Prefix]) -> None:
    def bytes_of(passes: StaticPasses) -> int:
        layers = [layer for each in passes._suffixes.values() for layer in each.layers]
        layers += [layer for each in passes._stored.values() for stored in each for layer in stored.layers]
        return sum(states.nbytes for layer in layers for states in (layer.keys, layer.values))

    noise = torch.randn(40, 3, vlm.width, generator=torch.Generator().manual_seed(2))

    def work() -> list[Tensor]:
        prefix = replace(prefixes[0], stems=Stems())
        return [vlm.score_many([Score(prefix, noise[:n], [()] * n)])[0].answer for n in (1, 40, 7, 9)]

    work()
    most = bytes_of(vlm.static)
    vlm.static = Uncompiled(vlm)
    vlm.static._room = most - 1
    found = work()
    assert 0 < bytes_of(vlm.static) < most and vlm.static.failure is None
    for one, other in zip(found, plainly(vlm, work), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_logits_that_are_not_finite_prove_nothing(vlm: VisionLanguageModel, prefixes: list[Prefix]) -> None:
    nothing = torch.full((1, 3, vlm.width), torch.nan)
    for latents, unproven in ((nothing, 1), (vlm.embed([5, 6, 7])[None], 0)):
        vlm.score_many([Score(replace(prefixes[0], stems=Stems()), latents, [()])])
        (fixed,) = vlm.static.passes.values()
        assert vlm.static.failure is None and fixed.unproven == unproven


def test_attention_of_a_pass_that_is_found_out_is_that_of_the_plain_one(
    vlm: VisionLanguageModel, prefixes: list[Prefix], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.randn(1, 3, vlm.width, generator=torch.Generator().manual_seed(2)) * vlm.embedding_rms()

    def work() -> Tensor:
        asked = Score(replace(prefixes[0], stems=Stems()), noise, [()], attended=len(noise))
        attention = vlm.score_many([asked])[0].attention
        assert attention is not None
        return attention

    expected = plainly(vlm, work)
    run = Pass.run

    def otherwise(self: Pass) -> Any:
        logits, attention = run(self)
        return logits, None if attention is None else attention + 0.1

    monkeypatch.setattr(Pass, "run", otherwise)
    found = work()
    assert "differs" in str(vlm.static.failure)
    torch.testing.assert_close(found, expected, **CLOSE)
