"""What a step of the search costs, as ratios measured side by side in one run.

    python benchmarks/speed.py [--repeats 7]

The model is a random one of about 60 million parameters in the shape of Qwen2.5-VL, with a prefix of about 900 tokens;
the fused batch is measured on the embedded model. Medians, with the range of the repeats in brackets.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import naive_model
import tiny_checkpoints

from latent_tool.engine import Engine, Job, get_engine
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.scenes import generate
from latent_tool.settings import Budget, SearchSettings

QUESTION = "what is red?"
LATENTS = 4


def large_model() -> VisionLanguageModel:
    """About 60 million parameters, 28 x 28 pixels per cell."""
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
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_checkpoints.write(Path(folder), dataclasses.replace(made, config=config, image_processor=processor))
        return load(ModelSpec(model=str(path)))


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of every repeat, after one that does not count."""
    work()
    taken = []
    for _ in range(repeats):
        gc.collect()
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return taken


def row(what: str, target: str, slow: list[float], fast: list[float], share: float = 1.0) -> None:
    """One line of the table: the ratio of two measurements, the second one divided by ``1 / share``."""
    ratios = [a / (b * share) for a in slow for b in fast]
    middle = statistics.median(slow) / (statistics.median(fast) * share)
    print(
        f"| {what} | {target} | {middle:.2f} [{min(ratios):.2f}, {max(ratios):.2f}] "
        f"| {1e3 * statistics.median(slow):.1f} | {1e3 * statistics.median(fast) * share:.1f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    vlm = large_model()
    inputs = vlm.prepare([tiny_checkpoints.picture(840, 840)], QUESTION)
    prefix = vlm.prefill(inputs)
    parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
    print(
        f"{parameters / 1e6:.0f} M parameters, prefix of {prefix.length} tokens, {LATENTS} latents; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, prefixes shared: {vlm.shares_prefixes(prefix)}\n"
    )
    print("| what | target | ratio | first, ms | second, ms |\n|---|---|---|---|---|")
    latents = naive_model.draw_latents(vlm, 16, LATENTS)

    def score(count: int) -> Callable[[], object]:
        return lambda: vlm.score(prefix, latents[:count], [(1, 2, 3, 4)] * count)

    naive = seconds(lambda: naive_model.run(vlm, inputs, latents[0], (1, 2, 3, 4)), max(3, repeats // 2))
    one, eight, sixteen = (seconds(score(count), repeats) for count in (1, 8, 16))
    row("one reward: naive full forward vs cached", ">= 30", naive, one)
    row("the same, per candidate in a batch of 8", ">= 80", naive, eight, 1 / 8)
    row("16 candidates vs 1", "<= 3", sixteen, one)

    # The answer of a random model ends nowhere: 64 tokens each.
    job = Job(
        (tiny_checkpoints.picture(840, 840),),
        QUESTION,
        settings=SearchSettings(latents=LATENTS),
        budget=Budget(max_new_tokens=64),
    )
    engine = Engine(vlm)
    plain = vlm.prepare(job.images, QUESTION)
    given = {name: value for name, value in plain.tensors.items() if isinstance(value, torch.Tensor)}

    def generate_plainly() -> object:
        return vlm.model.generate(**given, max_new_tokens=64, min_new_tokens=64, do_sample=False)

    whole = seconds(lambda: engine.answer(job), 3)
    row("standard budget + 64 tokens vs plain generate of 64", "<= 1.5", whole, seconds(generate_plainly, 3))

    small = get_engine(ModelSpec())
    jobs = []
    for seed in range(800_000, 800_008):
        scene = generate(seed, "held_out")
        jobs.append(Job((scene.image,), scene.questions[0].text, seed=seed))
    alone = seconds(lambda: [small.answer(each) for each in jobs], 3)
    row("8 questions one after another vs fused", ">= 1.5", alone, seconds(lambda: small.answer_many(jobs), 3))


if __name__ == "__main__":
    main()
