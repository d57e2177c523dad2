"""The cache of image prefixes: what it keeps, what it drops, and that questions get what is theirs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from pictures import draw_shapes
from torch import Tensor
from transformers import DynamicCache

from latent_tool.engine.engine import Engine
from latent_tool.engine.job import Job, Sampled
from latent_tool.errors import SettingsError
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.passes import Continued, Ran
from latent_tool.models.prefix_cache import ImagePrefix, PrefixCache, image_key
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.settings import Budget, NoiseSettings, SamplingSettings, SearchSettings

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def entry(size: int) -> ImagePrefix:
    """An entry of so many bytes."""
    return ImagePrefix(DynamicCache(), torch.zeros(size - 8, dtype=torch.uint8), None, torch.zeros(1).long(), 0)


def test_the_least_recently_used_entries_go_first() -> None:
    cache = PrefixCache(300)
    for name in "abc":
        cache.put(name, entry(100))
    assert cache.find("a") is not None
    cache.put("d", entry(100))
    assert cache.find("b") is None
    cache.put("e", entry(200))
    assert [cache.find(name) is not None for name in "abcde"] == [False, False, False, True, True]
    assert cache.bytes == 300


def test_an_entry_larger_than_the_cache_drops_nothing() -> None:
    cache = PrefixCache(100)
    cache.put("a", entry(60))
    cache.put("b", entry(101))
    assert cache.find("a") is not None
    assert cache.find("b") is None
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_many_threads_keep_the_count_of_bytes_right() -> None:
    cache = PrefixCache(1000)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for number in torch.randint(0, 30, (300,), generator=generator).tolist():
            found = cache.find(str(number))
            if found is None:
                cache.put(str(number), entry(100 + number))
            else:
                assert found.bytes == 100 + number
            assert cache.bytes <= 1000 + 130

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    held = [found.bytes for number in range(30) if (found := cache.find(str(number))) is not None]
    assert cache.bytes == sum(held) <= 1000


def test_a_key_tells_pixels_shapes_tokens_and_names_apart() -> None:
    base = {"input_ids": torch.tensor([[1, 2, 3]]), "pixel_values": torch.arange(12.0)}
    others = [
        {**base, "pixel_values": torch.arange(12.0) + 1e-6},
        {**base, "pixel_values": torch.arange(12.0).view(3, 4)},
        {**base, "pixel_values": torch.arange(12.0).double()},
        {**base, "input_ids": torch.tensor([[1, 2, 4]])},
        {**base, "more": torch.zeros(0)},
        {"input_ids": base["input_ids"]},
    ]
    assert image_key({**base, "note": "not a tensor"}) == image_key(dict(reversed(base.items())))
    assert len({image_key(each) for each in (base, *others)}) == 7


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return load(ModelSpec())


def test_a_second_question_runs_only_what_follows_the_image(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm.prefill(vlm.prepare([draw_shapes()], "how many shapes are there?"))
    lengths: list[int] = []
    forward = vlm.model.forward

    def count(*args: object, **given: Tensor) -> object:
        lengths.append(given["input_ids" if "input_ids" in given else "inputs_embeds"].shape[1])
        assert "pixel_values" not in given
        return forward(*args, **given)

    monkeypatch.setattr(vlm.model, "forward", count)
    inputs = vlm.prepare([draw_shapes()], "what color is the circle?")
    prefix = vlm.prefill(inputs)
    assert lengths == [inputs.length - int(prefix.columns[-1]) - 1]


def test_an_entry_is_never_changed(vlm: VisionLanguageModel) -> None:
    inputs = vlm.prepare([draw_shapes()], "what color is the circle?")
    prefix = vlm.prefill(inputs)
    key = next(iter(vlm.prefix_cache._pictures))
    kept = vlm.prefix_cache.find(key)
    assert kept is not None
    before = [layer.keys.clone() for layer in kept.cache.layers]
    again = vlm.prefill(inputs)
    vlm.decode(again, None, (), 5)
    vlm.score(prefix, torch.randn(2, 3, prefix.features.shape[1]), [(1,), (2, 3)])
    assert all(torch.equal(layer.keys, copy) for layer, copy in zip(kept.cache.layers, before, strict=True))
    assert torch.equal(again.last_logits, prefix.last_logits)


def test_nothing_is_kept_when_it_is_off() -> None:
    off = load(ModelSpec(prefix_cache_bytes=0))
    inputs = off.prepare([draw_shapes()], "what color is the circle?")
    first, second = off.prefill(inputs), off.prefill(inputs)
    assert (len(off.prefix_cache), off.prefix_cache.hits, off.prefix_cache.misses) == (0, 0, 0)
    assert torch.equal(first.last_logits, second.last_logits)
    with pytest.raises(SettingsError, match="prefix_cache_bytes"):
        ModelSpec(prefix_cache_bytes=-1)


@pytest.mark.slow
def test_threads_with_mixed_images_and_questions_get_their_own_answers() -> None:
    """A cache too small for all images: entries come and go while questions are under way."""
    engine = Engine(load(ModelSpec()))
    pictures = [draw_shapes("circle", (200, 30 * index, 40)) for index in range(4)]
    questions = ["what color is the circle?", "how many shapes are there?"]
    jobs = [
        Job(
            (pictures[index % 4],),
            questions[index // 4 % 2],
            budget=Budget(iterations=1, target_confidence=None, max_views=0),
            seed=index % 4,
        )
        for index in range(16)
    ]
    engine.answer(jobs[0])
    engine.vlm.prefix_cache.limit = int(2.5 * engine.vlm.prefix_cache.bytes)
    start = threading.Barrier(8)

    def ask(rows: list[Job]) -> list[object]:
        start.wait(timeout=60)
        return [engine.answer(job) for job in rows]

    with ThreadPoolExecutor(8) as pool:
        answered = [outcome for rows in pool.map(ask, [jobs[index::8] for index in range(8)]) for outcome in rows]
    plain = Engine(load(ModelSpec(prefix_cache_bytes=0)))
    for job, outcome in zip([job for index in range(8) for job in jobs[index::8]], answered, strict=True):
        alone = plain.answer(job)
        assert outcome.answer.text == alone.answer.text  # type: ignore[attr-defined]
        assert outcome.search.best.reward == pytest.approx(alone.search.best.reward, abs=1e-4)  # type: ignore
    assert engine.vlm.prefix_cache.bytes <= engine.vlm.prefix_cache.limit
    assert engine.vlm.prefix_cache.hits


def test_an_inexact_split_is_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gives other logits in two parts is computed whole."""
    vlm = load(ModelSpec())
    after = VisionLanguageModel._after_images

    def otherwise(self: VisionLanguageModel, rows: Sequence[Continued]) -> list[Ran | Exception]:
        return [
            ran if isinstance(ran, Exception) else ran._replace(logits=ran.logits * 1.1) for ran in after(self, rows)
        ]

    monkeypatch.setattr(VisionLanguageModel, "_after_images", otherwise)
    inputs = vlm.prepare([draw_shapes()], "what color is the circle?")
    first, second = vlm.prefill(inputs), vlm.prefill(inputs)
    assert vlm._splits is False
    assert len(vlm.prefix_cache) == 0
    assert torch.equal(first.last_logits, second.last_logits)


def test_images_that_nobody_asks_about_again_push_nothing_out() -> None:
    """Noised and masked images are looked at once; the picture itself stays."""
    engine = Engine(load(ModelSpec()))
    settings = SearchSettings(search_below=None, latents=2, samples=4)
    job = Job((draw_shapes(),), "what color is the circle?", settings=settings, budget=Budget(iterations=0))
    noise = NoiseSettings(draws=2)
    outcome = engine.answer(replace(job, grounding=noise, controls=True))
    cache = engine.vlm.prefix_cache
    assert (len(cache), cache.misses) == (1, 0)
    (examined,) = engine.examine_many([outcome], noise)
    assert not isinstance(examined, Exception) and examined.grounding == outcome.grounding
    engine.dependency_many(
        [each for each in engine.sample_many([job], SamplingSettings(samples=1)) if isinstance(each, Sampled)], noise
    )
    assert (len(cache), cache.misses, cache.hits) == (1, 0, 1)


def test_scoring_again_uses_nothing_that_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(load(ModelSpec()))
    settings = SearchSettings(search_below=None, latents=2, samples=4)
    outcome = engine.answer(
        Job((draw_shapes(),), "what color is the circle?", settings=settings, budget=Budget(iterations=1))
    )
    assert outcome.search is not None

    def refuse(*_: object) -> None:
        raise AssertionError("the cache was asked")

    for name in ("find", "put"):
        monkeypatch.setattr(engine.vlm.prefix_cache, name, refuse)
    assert engine.rescore(outcome) == pytest.approx(outcome.search.best.reward, abs=1e-4)


def test_no_more_than_so_many_images_are_kept() -> None:
    """However few bytes they take; the least recently used one goes."""
    cache = PrefixCache(2**40, most=2)
    entries = {name: entry(10) for name in "abc"}
    cache.put("a", entries["a"])
    cache.put("b", entries["b"])
    assert cache.find("a") is not None
    cache.put("c", entries["c"])
    assert len(cache) == 2 and cache.find("b") is None and cache.find("a") is not None
    assert cache.bytes == entries["a"].bytes + entries["c"].bytes


def test_windows_never_push_out_whole_pictures() -> None:
    """They have few places of their own, and make way for pictures, whoever came last."""
    size = entry(10).bytes
    cache = PrefixCache(5 * size, most_windows=3)
    for name in "abc":
        cache.put(name, entry(10))
    for name in "vwxyz":
        cache.put(name, entry(10), window=True)
    assert [name for name in "abcvwxyz" if cache.find(name) is not None] == ["a", "b", "c", "y", "z"]
    assert cache.bytes == 5 * size
    cache.put("d", entry(10))
    cache.put("e", entry(10))
    assert [name for name in "abcdeyz" if cache.find(name) is not None] == ["a", "b", "c", "d", "e"]
    cache.put("z", entry(10), window=True)
    assert len(cache) == 5 and cache.bytes == 5 * size and cache.find("z") is None
    cache.clear()
    assert len(cache) == cache.bytes == 0


def test_looking_at_windows_leaves_the_pictures_where_they_are() -> None:
    """Questions that look again at every picture, with hardly more room than for the pictures."""
    engine = Engine(load(ModelSpec()))
    budget = Budget(iterations=1, target_confidence=1.0, max_views=6)
    settings = SearchSettings(look_below=1.0, latents=2, samples=4)
    pictures = [draw_shapes("circle", (200, 30 * index, 40)).resize((320, 320)) for index in range(3)]
    engine.answer(Job((pictures[0],), "how many shapes are there?", settings=SearchSettings(latents=0)))
    engine.vlm.prefix_cache.most = 3
    views = 0
    for picture in pictures:
        outcome = engine.answer(Job((picture,), "what color is the circle?", settings=settings, budget=budget))
        views += outcome.usage.views
    assert views > engine.vlm.prefix_cache.most_windows
    for picture in pictures:
        again = engine.vlm.prefill(engine.vlm.prepare([picture], "how many shapes are there?"))
        assert again.encoded == 0
