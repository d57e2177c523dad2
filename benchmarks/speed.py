"""What thinking costs, as ratios measured side by side in one run.

    python benchmarks/speed.py [--repeats 5] [--parts ratios pieces fused ...] [--write FILE]

Two random models with prefixes of about 900 tokens, one of about 60 million parameters in the shape of Qwen2.5-VL, one
of about 135 million in the shape of SmolVLM, and the embedded model. Both sides of a ratio are run in alternation;
figures are medians, with the smallest and the largest repeat in brackets.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import naive_model
import tiny_checkpoints
from search_gain import questions
from sklearn.metrics import roc_auc_score
from torch._C._profiler import _EventType

from latent_tool.engine.engine import Engine, get_engine
from latent_tool.engine.job import Job, Outcome
from latent_tool.models import shared_prefix
from latent_tool.models.cache import fork_cache
from latent_tool.models.decoding import extract_answer, generation_rules
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.prefix import Prefix, Stems
from latent_tool.models.prefix_attention import PrefixAttention
from latent_tool.models.prefix_cache import AttentionMemory, PrefixCache
from latent_tool.models.shared_prefix import SharedRows
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.scenes import generate
from latent_tool.settings import Budget, GenerationSettings, SearchSettings

QUESTION = "what is red?"
LATENTS = 4
CELLS = (1, 2, 3, 4)
TOKENS = 64
PARTS = ("ratios", "calls", "whole", "pieces", "fused", "confidence", "start", "growth", "roofline")


# ---------------------------------------------------------------------------------------------------- the models


def written(made: tiny_checkpoints.Checkpoint) -> VisionLanguageModel:
    """A random model, written to disk and loaded as a user would."""
    with tempfile.TemporaryDirectory() as folder:
        return load(ModelSpec(model=str(tiny_checkpoints.write(Path(folder), made))))


def qwen_shaped() -> tuple[VisionLanguageModel, tuple[int, int]]:
    """About 60 million parameters, 28 x 28 pixels per cell; and the size of a picture that gives about 900 cells."""
    width, heads = 768, 12
    made = tiny_checkpoints.qwen2_5_vl()
    decoder = made.config.text_config.to_dict() | {
        "layer_types": None,
        "hidden_size": width,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": width // heads,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
    }
    tower = made.config.vision_config.to_dict() | {
        "depth": 8,
        "hidden_size": 320,
        "intermediate_size": 1280,
        "num_heads": 8,
        "out_hidden_size": width,
        "window_size": 112,
        "fullatt_block_indexes": [3, 7],
    }
    ids = {name: getattr(made.config, name) for name in ("image_token_id", "video_token_id")}
    ids |= {name: getattr(made.config, name) for name in ("vision_start_token_id", "vision_end_token_id")}
    config = transformers.Qwen2_5_VLConfig(text_config=decoder, vision_config=tower, **ids)
    processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=14, size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1024}
    )
    return written(dataclasses.replace(made, config=config, image_processor=processor)), (840, 840)


def smolvlm_shaped() -> tuple[VisionLanguageModel, tuple[int, int]]:
    """About 135 million parameters, a decoder of 30 layers, tiles of 64 cells; and the size of such a picture."""
    made = tiny_checkpoints.smolvlm()
    decoder = made.config.text_config.to_dict() | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
    }
    tower = made.config.vision_config.to_dict() | {
        "hidden_size": 448,
        "intermediate_size": 1792,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "image_size": 256,
        "patch_size": 16,
    }
    config = transformers.SmolVLMConfig(
        text_config=decoder, vision_config=tower, image_token_id=made.config.image_token_id, scale_factor=2
    )
    processor = transformers.SmolVLMImageProcessorPil(max_image_size={"longest_edge": 256}, size={"longest_edge": 1024})
    changes = {"config": config, "image_processor": processor, "options": {"image_seq_len": 64}}
    return written(dataclasses.replace(made, **changes)), (1024, 768)


SHAPES: dict[str, Callable[[], tuple[VisionLanguageModel, tuple[int, int]]]] = {
    "SmolVLM shape": smolvlm_shaped,
    "Qwen2.5-VL shape": qwen_shaped,
}


# ---------------------------------------------------------------------------------------------------- measuring


clock = time.perf_counter  # beside other work: time.process_time


def seconds(works: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of every repeat of several works, in alternation, after one round that does not count."""
    taken: list[list[float]] = [[] for _ in works]
    for repeat in range(repeats + 1):
        for work, found in zip(works, taken, strict=True):
            gc.collect()
            began = clock()
            work()
            if repeat:
                found.append(clock() - began)
    return taken


def row(what: str, target: str, slow: list[float], fast: list[float], share: float = 1.0) -> str:
    """One line of the table: the ratio of two measurements, the second one times ``share``."""
    ratios = [a / (b * share) for a, b in zip(slow, fast, strict=True)]
    middle = statistics.median(slow) / (statistics.median(fast) * share)
    return (
        f"| {what} | {target} | {middle:.2f} [{min(ratios):.2f}, {max(ratios):.2f}] "
        f"| {1e3 * statistics.median(slow):.1f} | {1e3 * statistics.median(fast) * share:.1f} |"
    )


HEAD = "| what | target | ratio | first, ms | second, ms |\n|---|---|---|---|---|"


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that was allocated through torch at one time beyond what was there before."""
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    changes = []
    waiting = list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, size in sorted(changes, key=lambda each: each[0]):
        held += size
        peak = max(peak, held)
    return peak


# ---------------------------------------------------------------------------------------------------- the parts


def ratios(name: str, vlm: VisionLanguageModel, size: tuple[int, int], repeats: int) -> list[str]:
    """One model's table."""
    image = tiny_checkpoints.picture(*size)
    inputs = vlm.prepare([image], QUESTION)
    prefix = vlm.prefill(inputs)
    parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
    lines = [
        f"### {name}: {parameters / 1e6:.0f} M parameters, prefix of {prefix.length} tokens\n",
        f"Steps: {LATENTS} latents, {len(CELLS)} cells; prefixes shared: {vlm.shares_prefixes(prefix)}.\n",
        HEAD,
    ]
    latents = naive_model.draw_latents(vlm, 16, LATENTS)

    def score(count: int) -> Callable[[], object]:
        return lambda: vlm.score(prefix, latents[:count], [CELLS] * count)

    def naive() -> object:
        return naive_model.run(vlm, inputs, latents[0], CELLS)

    few = max(3, repeats // 2)
    whole, one, eight, sixteen = seconds([naive, score(1), score(8), score(16)], few)
    lines.append(row("one reward: naive full forward vs cached", ">= 30", whole, one))
    lines.append(row("the same, per candidate in a batch of 8", ">= 80", whole, eight, 1 / 8))
    one, sixteen = seconds([score(1), score(16)], 3 * repeats)
    lines.append(row("16 candidates vs 1", "<= 3", sixteen, one))

    cached, vlm.prefix_cache = vlm.prefix_cache, PrefixCache(0)
    (first,) = seconds([lambda: vlm.prefill(inputs)], few)
    vlm.prefix_cache = cached
    others = iter([vlm.prepare([image], f"{QUESTION} or {number}") for number in range(few + 1)])
    vlm.prefill(inputs)
    (second,) = seconds([lambda: vlm.prefill(next(others))], few)
    lines.append(row("prefill of a second question about the image vs of a first", "<= 0.3", second, first))

    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix.cache.layers)
    peaks = [peak_bytes(score(count)) for count in (1, 16)]
    lines.append(
        f"\nMemory: the prefix cache takes {held / 1e6:.1f} MB; scoring 1 candidate takes {peaks[0] / 1e6:.2f} MB more "
        f"at its peak, 16 candidates {peaks[1] / 1e6:.2f} MB: together {(held + peaks[1]) / held:.3f} of the prefix "
        "cache (target <= 1.1; what torch allocates, without the workspaces of its matrix library).\n"
    )
    return lines


def calls(name: str, vlm: VisionLanguageModel, size: tuple[int, int], repeats: int, whole: bool) -> list[str]:
    """What calls cost where the model is unsure throughout, against plain generation of as many tokens.

    ``whole``: those that go through the whole search, or look at windows.
    """
    settings, budget = SearchSettings(), Budget(max_new_tokens=TOKENS)
    engine = Engine(vlm)
    image = tiny_checkpoints.picture(*size)
    larger = image.resize((2 * size[0], 2 * size[1]))  # which the processor makes as small as the other

    def plainly(picture: Any) -> Callable[[], object]:
        inputs = vlm.prepare([picture], QUESTION)
        given = {key: value for key, value in inputs.tensors.items() if isinstance(value, torch.Tensor)}

        def work() -> object:
            with torch.inference_mode():
                return vlm.model.generate(**given, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)

        return work

    said: dict[str, Outcome] = {}

    def call(row: str, picture: Any, budget: Budget) -> Callable[[], object]:
        long = GenerationSettings(min_new_tokens=TOKENS)
        job = Job((picture,), QUESTION, settings=settings, budget=budget, generation=long)

        def work() -> None:
            vlm.prefix_cache.clear()  # every question pays for its own picture
            vlm.neutral_attention = AttentionMemory()
            said[row] = engine.answer(job)

        return work

    quick = Budget.level("quick").but(max_new_tokens=TOKENS)
    rows = {
        f"standard budget + {TOKENS} tokens": ("<= 1.5", image, budget),
        f"quick budget + {TOKENS} tokens": ("<= 1.2", image, quick),
    }
    further = {
        f"standard budget + {TOKENS} tokens, always searched": ("-", image, budget.but(target_confidence=None)),
        "standard budget, a picture of twice the sides": ("-", larger, budget),
        "quick budget, a picture of twice the sides": ("-", larger, quick),
    }
    rows = further if whole else rows
    works = [call(row, picture, limits) for row, (_, picture, limits) in rows.items()]
    plain = [plainly(picture) for picture in ((image, larger) if whole else (image,))]
    taken = seconds([*works, *plain], max(2, repeats // 2))
    lines = [
        f"### {name}: {'calls that search or look' if whole else 'calls'}\n",
        f"The defaults against plain generation of {TOKENS} tokens; both write all of them. {settings.latents} "
        f"latents, {budget.iterations} rounds of {settings.samples} samples, {settings.patches_per_latent} cells per "
        f"latent and at most {budget.max_patches} in all, read at the {settings.reward_position}, start "
        f"{settings.init}. With random weights no rung of the ladder is sure. Of the larger picture, which the "
        "processor shrinks, windows are looked at.\n",
        HEAD,
    ]
    for (text, (target, picture, _)), slow in zip(rows.items(), taken, strict=False):
        lines.append(row(text, target, slow, taken[len(rows) + (picture is larger)]))
    ends = [
        f"{text}: {each.stop_reason}, {each.usage.views} windows, {each.usage.candidates} candidates"
        for text, each in said.items()
    ]
    return [*lines, "", f"How they ended: {'; '.join(ends)}.", ""]


@contextmanager
def without(piece: str) -> Iterator[None]:
    """The model as it would be without one piece of what makes it fast."""
    scored = VisionLanguageModel.score_behind

    def asking(**changes: bool) -> Callable[..., object]:
        return lambda self, kind, requests: scored(
            self, kind, [dataclasses.replace(each, **changes) for each in requests]
        )

    patched: Any = {
        "nothing": nullcontext,
        "shared prefix": lambda: patch.object(VisionLanguageModel, "shares_prefixes", lambda _self, _prefix: False),
        "known cells": lambda: patch.object(Stems, "find", lambda _self, _cells: None),
        "attention kernel": lambda: patch.object(
            shared_prefix, "attention_for", lambda *_: PrefixAttention("written out", "asked for")
        ),
        "attention in the pass that scores": lambda: patch.object(
            VisionLanguageModel, "score_behind", asking(attention=False)
        ),
        "logits of the answer alone": lambda: patch.object(
            VisionLanguageModel, "score_behind", asking(answer_only=False)
        ),
    }
    with patched[piece]():
        yield


def pieces(vlm: VisionLanguageModel, size: tuple[int, int], repeats: int) -> list[str]:
    """What each piece is worth: the same work without it, in alternation with the whole."""
    engine = get_engine(ModelSpec())
    scenes = [generate(seed, "held_out") for seed in range(800_000, 800_008)]
    always = Budget(target_confidence=None)
    jobs = [Job((scene.image,), scene.questions[0].text, budget=always) for scene in scenes]
    job = Job(
        (tiny_checkpoints.picture(*size),),
        QUESTION,
        settings=SearchSettings(latents=LATENTS),
        budget=Budget(iterations=3, max_new_tokens=8, target_confidence=None),
    )
    large = Engine(vlm)
    works: dict[str, Callable[[], object]] = {
        "Qwen2.5-VL shape, 3 rounds and 8 tokens": lambda: large.answer(job),
        "embedded, one question": lambda: engine.answer(jobs[0]),
        "embedded, 8 fused": lambda: engine.answer_many(jobs),
    }
    names = [
        "nothing",
        "shared prefix",
        "known cells",
        "attention kernel",
        "attention in the pass that scores",
        "logits of the answer alone",
    ]
    lines = [
        "### What each piece is worth\n",
        "Time without a piece, against the whole; the prefix of the image is in the cache throughout.\n",
        f"| without | {' | '.join(works)} |",
        "|---|" + "---|" * len(works),
    ]
    columns = []
    for work in works.values():

        def run(name: str, work: Callable[[], object] = work) -> None:
            with without(name):
                work()

        columns.append(seconds([partial(run, name) for name in names], max(2, repeats // 2)))
    for index, name in enumerate(names):
        cells = []
        for column in columns:
            ratios = [a / b for a, b in zip(column[index], column[0], strict=True)]
            middle = statistics.median(column[index])
            cells.append(f"{statistics.median(ratios):.2f} ({1e3 * middle:.0f} ms)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def fused(repeats: int) -> list[str]:
    """Eight different questions to the embedded model: one after another, and in one batch."""
    engine = get_engine(ModelSpec())
    jobs = []
    for seed in range(800_000, 800_008):
        scene = generate(seed, "held_out")
        always = Budget(target_confidence=None)
        jobs.append(Job((scene.image,), scene.questions[0].text, seed=seed, budget=always))
    alone = [engine.answer(job) for job in jobs]
    together = [outcome for outcome in engine.answer_many(jobs) if isinstance(outcome, Outcome)]
    apart = [
        abs(a.search.best.reward - b.search.best.reward)
        for a, b in zip(alone, together, strict=True)
        if a.search is not None and b.search is not None
    ]
    same = sum(a.answer.text == b.answer.text for a, b in zip(alone, together, strict=True))
    slow, fast = seconds([lambda: [engine.answer(job) for job in jobs], lambda: engine.answer_many(jobs)], repeats)
    return [
        "### The embedded model: 8 different questions\n",
        HEAD,
        row("one after another vs fused", ">= 1.5", slow, fast),
        f"\n{same} of 8 answers are the same; {sum(gap > 1e-4 for gap in apart)} of 8 rewards differ by more than 1e-4 "
        f"(by a near-tie that was decided otherwise), the others by at most "
        f"{max((gap for gap in apart if gap <= 1e-4), default=0.0):.1e}.\n",
    ]


def draw(vlm: VisionLanguageModel, prefix: Prefix, count: int, think: bool, seed: int) -> tuple[str, float]:
    """Self-consistency: answers drawn in one batch that shares the prefix; the most common one, and its share."""
    markers = prefix.inputs.markers
    rules = generation_rules(vlm.model, prefix.length)
    generator = torch.Generator().manual_seed(seed)
    batch = SharedRows(vlm, [prefix] * count)
    logits = prefix.last_logits.expand(count, -1)
    if think and markers.opening:
        logits = batch.write([markers.opening] * count, [-1])[:, -1]
    texts: list[list[int]] = [[] for _ in range(count)]
    live = list(range(count))
    for _ in range(TOKENS):
        drawn = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0].tolist()
        for place, token in zip(live, drawn, strict=True):
            texts[place].append(token)
        going = [row for row, token in enumerate(drawn) if token not in rules.stop_tokens]
        if not going:
            break
        if len(going) < len(live):
            batch.select(going)
            live = [live[row] for row in going]
        logits = batch.write([[drawn[row]] for row in going], [-1])[:, -1]
    answers = [extract_answer(tuple(each), vlm.tokenizer, markers.closing, rules.stop_tokens).text for each in texts]
    answer, times = Counter(answers).most_common(1)[0]
    return answer, times / count


def confidence(count: int) -> list[str]:
    """How well a confidence ranks right above wrong answers, and what it costs; one question at a time."""
    engine = get_engine(ModelSpec())
    vlm = engine.vlm
    vlm.prefix_cache, cached = PrefixCache(0), vlm.prefix_cache  # every question pays for its own image
    asked = questions(count, 900_000)

    def probability(settings: SearchSettings, budget: Budget) -> Callable[[Job], tuple[str, float]]:
        def ask(job: Job) -> tuple[str, float]:
            outcome = engine.answer(dataclasses.replace(job, settings=settings, budget=budget))
            return outcome.answer.text, engine.result(outcome).confidence or 0.0

        return ask

    def consistency(think: bool) -> Callable[[Job], tuple[str, float]]:
        return lambda job: draw(vlm, vlm.prefill(vlm.prepare(job.images, job.question)), 10, think, 0)

    methods = {
        f"self-consistency, 10 samples of up to {TOKENS} tokens, thinking": consistency(True),
        f"self-consistency, 10 samples of up to {TOKENS} tokens": consistency(False),
        "pooled probability, plain": probability(SearchSettings(latents=0), Budget()),
        "pooled probability, reasoning as latents": probability(SearchSettings(), Budget(iterations=0)),
        "pooled probability, quick budget": probability(SearchSettings(), Budget.level("quick")),
        "pooled probability, standard budget": probability(SearchSettings(), Budget()),
        "pooled probability, always searched": probability(SearchSettings(), Budget(target_confidence=None)),
    }
    right: dict[str, list[bool]] = {name: [] for name in methods}
    sure: dict[str, list[float]] = {name: [] for name in methods}
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for number, (job, answer) in enumerate(asked):
        for name, method in methods.items():
            if not number:
                method(job)
            began = time.perf_counter()
            found, chance = method(job)
            taken[name].append(time.perf_counter() - began)
            right[name].append(found == answer)
            sure[name].append(chance)
    vlm.prefix_cache = cached
    against = statistics.median(taken[next(iter(methods))])
    lines = [
        f"### The embedded model: confidence and its cost, {count} questions\n",
        "*share* is the median time against self-consistency with thinking; the target is an AUROC at least as good in "
        "at most 0.5 of its seconds.\n",
        "| confidence | accuracy | AUROC | ms, median [quartiles] | share |\n|---|---|---|---|---|",
    ]
    for name, times in taken.items():
        low, middle, high = (1e3 * each for each in statistics.quantiles(times, n=4))
        ranked = roc_auc_score(right[name], sure[name]) if len(set(right[name])) == 2 else float("nan")
        share = 1e-3 * middle / against
        accuracy = statistics.mean(right[name])
        lines.append(f"| {name} | {accuracy:.3f} | {ranked:.3f} | {middle:.1f} [{low:.1f}, {high:.1f}] | {share:.2f} |")
    return [*lines, ""]


def start(repeats: int) -> list[str]:
    """What a fresh process takes to import the package and to show its help."""
    package = Path(sys.executable).parent / "latent-tool"
    commands = {
        "python -c pass": ([sys.executable, "-c", "pass"], "-"),
        "import latent_tool": ([sys.executable, "-c", "import latent_tool"], "< 0.3"),
        "latent-tool --help": ([str(package), "--help"], "< 0.5"),
    }
    lines = ["### Start\n", "| what | target, s | s, median [range] |\n|---|---|---|"]
    for name, (command, target) in commands.items():
        (taken,) = seconds([lambda command=command: subprocess.run(command, check=True, capture_output=True)], repeats)  # type: ignore[misc]
        lines.append(f"| `{name}` | {target} | {statistics.median(taken):.2f} [{min(taken):.2f}, {max(taken):.2f}] |")
    return [*lines, ""]


def stretched(prefix: Prefix, length: int) -> Prefix:
    """A prefix of another length: the same keys and values again and again."""
    cache = fork_cache(prefix.cache)
    times = -(-length // prefix.length)
    for layer in cache.layers:
        layer.keys = layer.keys.repeat(1, 1, times, 1)[:, :, :length].contiguous()
        layer.values = layer.values.repeat(1, 1, times, 1)[:, :, :length].contiguous()
    return dataclasses.replace(prefix, cache=cache, next_position=length, stems=Stems())


def growth(vlm: VisionLanguageModel, size: tuple[int, int], repeats: int, plot: Path | None) -> list[str]:
    """How the cost grows: with the rounds of the search, and with the length of the prefix."""
    engine = get_engine(ModelSpec())
    scene = generate(800_000, "held_out")
    rounds = [5, 10, 20, 40]
    jobs = [
        Job(
            (scene.image,),
            scene.questions[0].text,
            budget=Budget(iterations=number, max_patches=8, target_confidence=None),
        )
        for number in rounds
    ]
    phases = seconds([lambda job=job: engine.answer(job) for job in jobs], max(3, repeats // 2))  # type: ignore[misc]
    per_round = [1e3 * statistics.median(taken) / number for taken, number in zip(phases, rounds, strict=True)]
    lines = ["### Growth\n", "| rounds (embedded model, at most 8 cells) | ms | ms per round |\n|---|---|---|"]
    for number, taken, each in zip(rounds, phases, per_round, strict=True):
        lines.append(f"| {number} | {1e3 * statistics.median(taken):.0f} | {each:.1f} |")

    prefix = vlm.prefill(vlm.prepare([tiny_checkpoints.picture(*size)], QUESTION))
    latents = naive_model.draw_latents(vlm, 8, LATENTS)
    lengths = [250, 500, 1000, 2000, 3000, 4000]
    prefixes = [stretched(prefix, length) for length in lengths]
    steps = seconds([lambda each=each: vlm.score(each, latents, [()] * 8) for each in prefixes], repeats)  # type: ignore[misc]
    base = statistics.median(steps[0])
    lines.append(
        "\n| prefix, tokens (Qwen2.5-VL shape, 8 candidates) | ms per step | against the first |\n|---|---|---|"
    )
    for length, taken in zip(lengths, steps, strict=True):
        middle = statistics.median(taken)
        lines.append(f"| {length} | {1e3 * middle:.1f} | {middle / base:.2f} |")
    if plot is not None:
        draw_growth(plot, rounds, [statistics.median(taken) for taken in phases], lengths, steps)
    return [*lines, "\nTargets: linear in rounds; within 2x up to 4,000 tokens.\n"]


def draw_growth(
    path: Path, rounds: list[int], totals: list[float], lengths: list[int], steps: list[list[float]]
) -> None:
    """Both tables as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "speed", "font.size": 9}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(7.2, 2.6), layout="constrained")
        left.plot(rounds, totals, "o-", color="#1f77b4")
        left.set(xlabel="rounds of the search", ylabel="seconds", title="one question, embedded model")
        middles = [1e3 * statistics.median(taken) for taken in steps]
        spread = [
            [middle - 1e3 * min(taken) for middle, taken in zip(middles, steps, strict=True)],
            [1e3 * max(taken) - middle for middle, taken in zip(middles, steps, strict=True)],
        ]
        right.errorbar(lengths, middles, spread, fmt="o-", color="#d62728", capsize=3)
        right.set(xlabel="tokens of the prefix", ylabel="ms per step of 8 candidates", title="Qwen2.5-VL shape")
        for axes in (left, right):
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def roofline(vlm: VisionLanguageModel, size: tuple[int, int], repeats: int) -> list[str]:
    """What steps must compute and move, what the machine reaches on that alone, and what the steps take."""
    prefix = vlm.prefill(vlm.prepare([tiny_checkpoints.picture(*size)], QUESTION))
    weights = [each.weight for each in vlm.model.get_decoder().layers.modules() if isinstance(each, torch.nn.Linear)]
    numbers = sum(weight.numel() for weight in weights)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix.cache.layers)
    layer = prefix.cache.layers[0]
    heads = vlm.model.config.get_text_config().num_attention_heads
    lines = [
        "### Roofline, Qwen2.5-VL shape\n",
        f"A step of N new tokens reads the decoder's matrices, {numbers * 4 / 1e6:.0f} MB, and the prefix cache, "
        f"{held / 1e6:.0f} MB, and computes {2 * numbers / 1e6:.0f} M operations per token in the matrices and "
        f"{4 * heads * layer.keys.shape[3] * prefix.length * len(prefix.cache.layers) / 1e6:.0f} M in attention. "
        "*matrices* are the decoder's matrices alone, the same shapes in the same order; *largest* is the same with "
        "1,024 tokens, for the processor's ceiling.\n",
        "| tokens | GFLOP | MB | step, ms | matrices, ms | matrices, GFLOP/s | matrices, GB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for count, tokens in ((1, 1), (1, 4), (4, 4), (8, 4), (16, 4)):
        rows = count * tokens
        latents = naive_model.draw_latents(vlm, count, tokens)
        inner = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}

        def multiply(inner: dict[int, torch.Tensor] = inner) -> None:
            with torch.inference_mode():
                for weight in weights:
                    torch.nn.functional.linear(inner[weight.shape[1]], weight)

        def step(latents: torch.Tensor = latents, count: int = count) -> object:
            return vlm.score(prefix, latents, [()] * count)

        whole, alone = (statistics.median(taken) for taken in seconds([step, multiply], 2 * repeats))
        work, moved = 2 * rows * numbers, numbers * 4
        lines.append(
            f"| {count} x {tokens} | {work / 1e9:.2f} | {(moved + held) / 1e6:.0f} | {1e3 * whole:.1f} "
            f"| {1e3 * alone:.1f} | {work / alone / 1e9:.0f} | {moved / alone / 1e9:.1f} |"
        )
    some = {weight.shape[1]: torch.randn(1024, weight.shape[1]) for weight in weights}

    def most() -> None:
        with torch.inference_mode():
            for weight in weights:
                torch.nn.functional.linear(some[weight.shape[1]], weight)

    (taken,) = seconds([most], repeats)
    alone = statistics.median(taken)
    lines.append(
        f"| largest | {2048 * numbers / 1e9:.0f} | - | - | {1e3 * alone:.0f} | {2048 * numbers / alone / 1e9:.0f} | - |"
    )

    latents = naive_model.draw_latents(vlm, 8, LATENTS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(5):
            vlm.score(prefix, latents, [CELLS] * 8)
    table = sorted(profile.key_averages(), key=lambda each: -each.self_cpu_time_total)
    total = sum(each.self_cpu_time_total for each in table)
    lines.append(
        "\nWhere a step of 8 candidates spends its time, by operator:\n\n| operator | share | calls |\n|---|---|---|"
    )
    lines += [f"| {each.key} | {each.self_cpu_time_total / total:.1%} | {each.count // 5} |" for each in table[:10]]
    return [*lines, ""]


def machine() -> str:
    """Processor, cores and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    load_now = f"load {os.getloadavg()[0]:.1f} at the start, " if hasattr(os, "getloadavg") else ""
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {load_now}Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="repeats of short measurements; long ones have fewer")
    parser.add_argument("--questions", type=int, default=100, help="questions that confidence is measured on")
    usual = [part for part in PARTS if part != "whole"]  # which takes many minutes
    parser.add_argument("--parts", nargs="*", default=usual, choices=PARTS, help="all but whole by default")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES, help="for ratios and calls")
    parser.add_argument("--processor-time", action="store_true", help="in place of seconds, on a busy machine")
    parser.add_argument("--write", type=Path, help="file to write the tables to")
    parser.add_argument("--plot", type=Path, help="file to draw the growth to")
    chosen = parser.parse_args()
    if chosen.processor_time:
        global clock
        clock = time.process_time
    said: list[str] = []

    def say(lines: list[str]) -> None:
        said.extend(lines)
        print("\n".join(lines), flush=True)

    began = time.perf_counter()
    say([f"`python benchmarks/speed.py`: {machine()}{' Processor time.' if chosen.processor_time else ''}\n"])
    kept: Any = None
    for name, make in SHAPES.items():
        wanted = {"ratios", "calls", "whole"} if name in chosen.shapes else set()
        wanted |= {"growth", "roofline", "pieces"} if make is qwen_shaped else set()
        if wanted & set(chosen.parts):
            kept = make()
            if "ratios" in wanted & set(chosen.parts):
                say(ratios(name, *kept, chosen.repeats))
            for part in ("calls", "whole"):
                if part in wanted & set(chosen.parts):
                    say(calls(name, *kept, chosen.repeats, part == "whole"))
    if "pieces" in chosen.parts:
        say(pieces(*kept, chosen.repeats))
    if "growth" in chosen.parts:
        say(growth(*kept, chosen.repeats, chosen.plot))
    if "roofline" in chosen.parts:
        say(roofline(*kept, chosen.repeats))
    del kept
    if "fused" in chosen.parts:
        say(fused(max(3, chosen.repeats // 2)))
    if "confidence" in chosen.parts:
        say(confidence(chosen.questions))
    if "start" in chosen.parts:
        say(start(chosen.repeats))
    say([f"Measured in {time.perf_counter() - began:.0f} s."])
    if chosen.write is not None:
        chosen.write.write_text("\n".join(said) + "\n")


if __name__ == "__main__":
    main()
