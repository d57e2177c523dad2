"""What the defaults cost, and what they are worth: the ladder, long answers of many rows, memory, many at once.

    python benchmarks/defaults.py [--parts ladder decoding memory together] [--questions 2000] [--write FILE]

All on the embedded model but ``decoding``. ``ladder`` asks every question three times, in alternation: the plain model,
``SearchSettings()`` and ``Budget()`` as they are, and the same with a search that is always made; ``--ways`` names some
of the three. A cost is processor time; the differences are paired. Every question pays for its own image, since what is
kept of images is forgotten before it: what it computes of its image it may use again, as by default, but nothing that
another question has computed. With ``--no-cache`` nothing is kept at all.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from latent_tool import LatentReasoner
from latent_tool.engine.engine import Engine, get_engine, use_threads
from latent_tool.engine.job import Job
from latent_tool.models.loading import ModelSpec
from latent_tool.models.prefix import Stem
from latent_tool.models.prefix_cache import AttentionMemory, PrefixCache
from latent_tool.models.shared_prefix import SharedRows
from latent_tool.scenes import generate
from latent_tool.settings import Budget, SearchSettings

PARTS = ("ladder", "decoding", "memory", "together")
WAYS: dict[str, tuple[SearchSettings, Budget]] = {
    "plain": (SearchSettings(latents=0), Budget()),
    "default": (SearchSettings(), Budget()),
    "always search": (SearchSettings(), Budget(target_confidence=None, max_views=0)),
}


def scenes(count: int, first_seed: int, per_picture: int = 3) -> list[tuple[Job, str]]:
    """Questions about held-out scenes, a few per picture, and their answers."""
    asked: list[tuple[Job, str]] = []
    seed = first_seed
    while len(asked) < count:
        scene = generate(seed, "held_out")
        asked += [(Job((scene.image,), question.text), question.answer) for question in scene.questions[:per_picture]]
        seed += 1
    return asked[:count]


def ladder(count: int, first_seed: int, budget_s: float, ways: Sequence[str], cached: bool = True) -> list[str]:
    """Accuracy, AUROC and cost of some ways, on the same questions, for so many seconds at most.

    ``cached``: keep what was computed of a question's image while it is answered, as by default.
    """
    use_threads(1)
    engine = get_engine(ModelSpec())
    if not cached:
        engine.vlm.prefix_cache = PrefixCache(0)
    right: dict[str, list[bool]] = {name: [] for name in ways}
    said: dict[str, list[str]] = {name: [] for name in ways}
    sure: dict[str, list[float]] = {name: [] for name in ways}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    stopped: list[tuple[str | None, int]] = []
    until = time.monotonic() + budget_s
    for number, (job, answer) in enumerate(scenes(count, first_seed)):
        if time.monotonic() > until:
            break
        for name in ways:
            settings, budget = WAYS[name]
            asked = Job(job.images, job.question, settings=settings, budget=budget)
            if not number:
                engine.answer(asked)
            engine.vlm.prefix_cache.clear()  # every question pays for its own image
            engine.vlm.neutral_attention = AttentionMemory()
            began = time.process_time()
            outcome = engine.answer(asked)
            taken[name].append(time.process_time() - began)
            result = engine.result(outcome)
            said[name].append(result.answer)
            right[name].append(result.answer.strip().lower() == answer.lower())
            sure[name].append(result.confidence or 0.0)
            if name == "default":
                stopped.append((result.stop_reason, outcome.usage.candidates))
    asked_of = len(stopped)
    plainly = sum(reason == "confident" and not candidates for reason, candidates in stopped)
    started = sum(reason == "confident" and candidates > 0 for reason, candidates in stopped)
    looked = sum(reason == "looked" for reason, _ in stopped)
    base = statistics.mean(taken["plain"])
    kept = "" if cached else ", nothing kept of images"
    against = ways[-1]
    lines = [
        f"### The ladder, embedded model: {asked_of} questions about held-out scenes from seed {first_seed:,}{kept}\n",
        f"{plainly / asked_of:.1%} were answered plainly, {started / asked_of:.1%} from the start of the latents, "
        f"{looked / asked_of:.1%} with a window, "
        f"{1 - (plainly + started + looked) / asked_of:.1%} were searched. *fixed / broken* counts answers against "
        f"*{against}*, with the exact test of their difference (McNemar); *difference* is that of the AUROC to that of "
        f"*{against}*, with 95 % of 2,000 draws of the questions. *wrong of the surest* 90 %: of what a threshold lets "
        "pass that lets nine of ten pass. *where they agree*: how many answers are those of "
        f"*{against}*, and how much higher the AUROC is than that of *{against}* among these, which are right or wrong "
        "together.\n",
        "| way | accuracy | fixed / broken | p | AUROC | difference | wrong of the surest 90 % | where they agree "
        "| mean cost, plain answers | ms of processor, mean |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ways:
        pairs = list(zip(right[name], right[against], strict=True))
        fixed, broken = sum(new and not old for new, old in pairs), sum(old and not new for new, old in pairs)
        p = binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
        ranked = roc_auc_score(right[name], sure[name]) if len(set(right[name])) == 2 else float("nan")
        mean = statistics.mean(taken[name])
        lines.append(
            f"| {name} | {statistics.mean(right[name]):.4f} | {fixed} / {broken} | {p:.2g} | {ranked:.4f} "
            f"| {'-' if name == against else difference((right[name], sure[name]), (right[against], sure[against]))} "
            f"| {wrong_of_the_surest(right[name], sure[name]):.4f} "
            f"| {'-' if name == against else agreeing(said, right, sure, name, against)} "
            f"| {mean / base:.2f} | {1e3 * mean:.1f} |"
        )
    return [*lines, ""]


def difference(one: tuple[list[bool], list[float]], other: tuple[list[bool], list[float]]) -> str:
    """How much higher one way's AUROC is than another's on the same questions, with 95 % of 2,000 draws of these."""
    rng = np.random.default_rng(0)
    ways = [(np.array(right), np.array(sure)) for right, sure in (one, other)]

    def gap(at: np.ndarray) -> float:
        if any(len(set(right[at])) < 2 for right, _ in ways):
            return float("nan")
        first, second = (float(roc_auc_score(right[at], sure[at])) for right, sure in ways)
        return first - second

    count = len(ways[0][0])
    drawn = [gap(rng.integers(0, count, count)) for _ in range(2000)]
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return f"{gap(np.arange(count)):+.4f} ({low:+.4f} to {high:+.4f})"


def agreeing(
    said: dict[str, list[str]], right: dict[str, list[bool]], sure: dict[str, list[float]], name: str, against: str
) -> str:
    """How many answers two ways share, and how much higher the AUROC of the one is among them."""
    same = [at for at, (one, other) in enumerate(zip(said[name], said[against], strict=True)) if one == other]
    both = [([right[way][at] for at in same], [sure[way][at] for at in same]) for way in (name, against)]
    return f"{len(same)}: {difference(*both)}"


def wrong_of_the_surest(right: list[bool], sure: list[float], share: float = 0.9) -> float:
    """Share of wrong answers among the surest; of equally sure ones at the border each counts in part."""
    rights, sures = np.array(right), np.array(sure)
    most = round(share * len(rights))
    border = np.sort(sures)[::-1][most - 1]
    above, at = sures > border, sures == border
    return float((~rights[above]).sum() + (most - above.sum()) * (~rights[at]).mean()) / most


def decoding(rows: int = 64) -> list[str]:
    """Milliseconds a token when many rows are decoded, at the beginning and far on, 60 million parameters."""
    from speed import QUESTION, qwen_shaped, tiny_checkpoints

    use_threads(1)
    vlm, size = qwen_shaped()
    prefix = vlm.prefill(vlm.prepare([tiny_checkpoints.picture(*size)], QUESTION))
    next_tokens = [[5 + row] for row in range(rows)]
    # Rows that have come so far already: as many tokens as the prefix's first ones, with their keys and values.
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in prefix.cache.layers]
    taken: dict[int, list[float]] = {}
    products: dict[int, list[float]] = {}
    reading: dict[int, list[float]] = {}
    for far in (32, 64, 128, 256, 512):
        known = Stem(tuple(range(far - 8)), torch.stack([each[:, :, : far - 8] for each in layers]))
        batch = SharedRows(vlm, [prefix] * rows, [known] * rows)
        batch.write(next_tokens, [-1])  # makes room
        taken[far] = []
        for _ in range(16):
            began = time.process_time()
            batch.write(next_tokens, [-1])
            taken[far].append(1e3 * (time.process_time() - began))
        own = [(layer.keys, layer.values) for layer in batch.cache.layers]
        heads = vlm.model.config.get_text_config().num_attention_heads // own[0][0].shape[1]
        query = torch.randn(*own[0][0].shape[:2], heads, own[0][0].shape[-1])
        weights = torch.randn(*query.shape[:3], own[0][0].shape[2])
        products[far], reading[far] = [], []
        for _ in range(8):
            began = time.process_time()
            for keys, values in own:
                torch.matmul(query, keys.transpose(-1, -2))
                torch.matmul(weights, values)
            products[far].append(1e3 * (time.process_time() - began))
            began = time.process_time()
            for keys, values in own:
                keys.sum()
                values.sum()
            reading[far].append(1e3 * (time.process_time() - began))
    lines = [
        f"### {rows} rows, token by token, Qwen2.5-VL shape, prefix of {prefix.length} tokens\n",
        "Median of 16 tokens; target: at most 1.3 times as long at token 512 as at token 32. Beside it what the two "
        "products with the rows' own keys and values take by themselves, and what merely reading these does.\n",
        "| token | ms of processor | against token 32 | own products, ms | reading, ms |\n|---|---|---|---|---|",
    ]
    for far, found in taken.items():
        middle = statistics.median(found)
        alone, read = statistics.median(products[far]), statistics.median(reading[far])
        ratio = middle / statistics.median(taken[32])
        lines.append(f"| {far} | {middle:.1f} | {ratio:.2f} | {alone:.1f} | {read:.1f} |")
    return [*lines, ""]


def resident() -> float:
    """Megabytes of memory that the process has in use now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def memory(count: int, first_seed: int, budget_s: float) -> list[str]:
    """Resident memory while questions about ever new pictures are answered with the defaults."""
    engine = get_engine(ModelSpec())
    lines = ["### Resident memory, embedded model, a new picture for every question\n", "| questions | MB |\n|---|---|"]
    until, every = time.monotonic() + budget_s, max(1, count // 10)
    for number in range(count + 1):
        if not number % every or time.monotonic() > until:
            gc.collect()
            lines.append(f"| {number} | {resident():.0f} |")
        if time.monotonic() > until:
            break
        scene = generate(first_seed + number, "held_out")
        engine.answer(Job((scene.image,), scene.questions[0].text))
    return [*lines, f"\nThe prefix cache holds {len(engine.vlm.prefix_cache)} pictures.\n"]


def together(count: int, first_seed: int) -> list[str]:
    """Questions per second when so many are asked at once of a reasoner with the defaults."""
    reasoner = LatentReasoner()
    scenes = [generate(first_seed + number, "held_out") for number in range(count)]
    requests = [{"image": scene.image, "question": scene.questions[0].text} for scene in scenes]

    async def ask(at_once: int) -> None:
        places = asyncio.Semaphore(at_once)

        async def one(request: dict[str, object]) -> None:
            async with places:
                await reasoner.ainvoke(request)

        await asyncio.gather(*map(one, requests))

    engine: Engine = get_engine(ModelSpec())
    asyncio.run(ask(8))
    lines = [f"### `ainvoke`, embedded model, {count} questions\n", "| at once | questions a second |\n|---|---|"]
    for at_once in (8, 64):
        best = 0.0
        for _ in range(2):
            engine.vlm.prefix_cache.clear()
            began = time.perf_counter()
            asyncio.run(ask(at_once))
            best = max(best, count / (time.perf_counter() - began))
        lines.append(f"| {at_once} | {best:.1f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--questions", type=int, default=2000, help="questions of the ladder at most")
    parser.add_argument("--seconds", type=float, default=3600.0, help="seconds for the ladder, and for the memory")
    parser.add_argument("--first-seed", type=int, default=5_200_000)
    parser.add_argument(
        "--ways",
        nargs="+",
        default=list(WAYS),
        choices=WAYS,
        help="ways of the ladder to measure; plain and default belong to every choice",
    )
    parser.add_argument("--no-cache", action="store_true", help="the ladder keeps nothing of a question's image")
    parser.add_argument("--write", type=Path, help="file to write the tables to")
    chosen = parser.parse_args()
    if not {"plain", "default"} <= set(chosen.ways):
        parser.error("--ways needs plain and default: a cost is counted in plain answers")
    parts: dict[str, Callable[[], list[str]]] = {
        "together": lambda: together(min(chosen.questions, 128), chosen.first_seed + 50_000),
        "memory": lambda: memory(5000, chosen.first_seed + 100_000, chosen.seconds),
        "ladder": lambda: ladder(chosen.questions, chosen.first_seed, chosen.seconds, chosen.ways, not chosen.no_cache),
        "decoding": decoding,
    }
    said = [
        f"`python benchmarks/defaults.py`: torch {torch.__version__}, {torch.get_num_threads()} threads at the start.\n"
    ]
    print(said[0], flush=True)
    for name, part in parts.items():
        if name in chosen.parts:
            found = part()
            said += found
            print("\n".join(found), flush=True)
    if chosen.write is not None:
        chosen.write.write_text("\n".join(said) + "\n")


if __name__ == "__main__":
    main()
