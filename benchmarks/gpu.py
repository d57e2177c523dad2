"""What a step, an answer and a search cost on a GPU, against the least that the card allows.

    python benchmarks/gpu.py [--shape 7b|2b|tiny] [--seconds 480] [--write FILE]

It needs the package and nothing else: a model in the shape of Qwen2.5-VL with random weights is built on the card, in
bf16. The limit of a step is one read of the decoder's weights at the bandwidth that the card reaches when it copies.
Every part looks at the clock first; what there is no time for is named at the end, and not estimated. Without a GPU,
``--shape tiny`` shows on the CPU that the script runs; its figures mean nothing there, and the page says so.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from latent_tool.engine.engine import Engine
from latent_tool.engine.job import Job
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.prefix import Prefix
from latent_tool.models.prefix_cache import PrefixCache
from latent_tool.models.requests import Score
from latent_tool.models.static_pass import StaticPasses
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.settings import Budget, GenerationSettings, SamplingSettings, SearchSettings

QUESTION = "what is left of the red thing?"
TOKENS = 64
SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, and sides of the square pictures that give it about so many tokens."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tower_layers: int
    tower_width: int
    tower_inner: int
    tower_heads: int
    sides: dict[str, int] = field(default_factory=lambda: {"1 k": 868, "8 k": 2492})


SHAPES = {
    "7b": Shape(3584, 18944, 28, 28, 4, 152064, 32, 1280, 3420, 16),
    "2b": Shape(1536, 8960, 28, 12, 2, 151936, 32, 1280, 3420, 16),
    "tiny": Shape(128, 256, 2, 4, 2, 1024, 2, 64, 128, 4, {"0.1 k": 280, "0.4 k": 560}),
}


def build(shape: Shape, device: str, dtype: torch.dtype) -> VisionLanguageModel:
    """Return a model of the shape with random weights, its tokenizer that of the embedded model."""
    tokenizer = load(ModelSpec()).tokenizer
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL]
    head = shape.width // shape.heads
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "model_type": "qwen2_5_vl_text",
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.width,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_heads,
            "max_position_embeddings": 32768,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head // 8, 3 * head // 16, head // 2 - head // 8 - 3 * head // 16],
            },
        },
        vision_config={
            "depth": shape.tower_layers,
            "hidden_size": shape.tower_width,
            "intermediate_size": shape.tower_inner,
            "num_heads": shape.tower_heads,
            "out_hidden_size": shape.width,
            "window_size": 112,
            "fullatt_block_indexes": [shape.tower_layers - 1],
        },
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)

    class ImageOnly(transformers.Qwen2_5_VLProcessor):  # its video part needs torchvision
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    class NoVideo:
        model_input_names: tuple[str, ...] = ()

    pixels = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16384}
    processor = ImageOnly(
        image_processor=transformers.Qwen2VLImageProcessorPil(patch_size=14, size=pixels),
        tokenizer=tokenizer,
        video_processor=NoVideo(),
        chat_template=TEMPLATE,
    )
    processor.image_token, processor.image_token_id = SPECIAL[0], ids[0]  # not those of the embedded model
    processor.video_token, processor.video_token_id = SPECIAL[1], ids[1]
    return VisionLanguageModel(model, processor, "random weights", compile=False)


class Clock:
    """Times work on the device, and knows when the script must end."""

    def __init__(self, device: str, limit: float) -> None:
        self.device = device
        self.end = time.perf_counter() + limit
        self.left_out: list[str] = []

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def has(self, wanted: float, part: str) -> bool:
        """Whether there are so many seconds left for a part; it is noted when there are not."""
        if self.end - time.perf_counter() >= wanted:
            return True
        self.left_out.append(part)
        return False

    def milliseconds(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Return the median time of a work, after one round that does not count."""
        taken = []
        for repeat in range(repeats + 1):
            began = self.now()
            work()
            if repeat:
                taken.append(1e3 * (self.now() - began))
        return statistics.median(taken)


def launches(work: Callable[[], object], device: str) -> int:
    """Count the kernels that a work launches; on a CPU, the operators that torch dispatches."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
    if device == "cuda":
        return sum(each.count for each in profile.key_averages() if "LaunchKernel" in each.key)
    return sum(each.count for each in profile.key_averages() if each.key.startswith("aten::"))


def bandwidth(clock: Clock, device: str) -> float:
    """Return the bytes per second that the device reads when it copies: twice the buffer per copy, read and written."""
    source = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * clock.milliseconds(lambda: target.copy_(source), 10))


def naive_step(vlm: VisionLanguageModel, tensors: dict[str, Any], suffix: Tensor) -> None:
    """Do what a loop without any cache does for one step: two whole forward passes over picture, question, latents."""
    with torch.inference_mode():
        for _ in range(2):
            ids = tensors["input_ids"]
            filler = torch.zeros((1, suffix.shape[0]), dtype=ids.dtype, device=ids.device)
            more = {"input_ids": torch.cat([ids, filler], 1)}
            if "attention_mask" in tensors:
                more["attention_mask"] = torch.ones_like(more["input_ids"])
            if "mm_token_type_ids" in tensors:
                more["mm_token_type_ids"] = torch.cat([tensors["mm_token_type_ids"], filler], 1)
            vlm.model(**{**tensors, **more}, use_cache=False, logits_to_keep=suffix.shape[0])


def measured(vlm: VisionLanguageModel, name: str, side: int, clock: Clock, limit_ms: float, device: str) -> list[str]:
    """Measure all parts with a picture of one size; what each line says stands in its first column."""
    image = Image.effect_noise((side, side), 60).convert("RGB")
    inputs = vlm.prepare([image], QUESTION)
    prefix: Prefix = vlm.prefill(inputs)
    latents = vlm.mean_embedding().expand(8, 8, -1) + 0.01 * torch.randn(8, 8, vlm.mean_embedding().shape[0]).to(
        vlm.device
    )
    tensors = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.tensors.items()}
    lines = [
        f"### Prefix of {prefix.length} tokens ({name})\n",
        "| what | ms | against | launches |",
        "|---|---|---|---|",
    ]

    def line(what: str, taken: float, against: str, count: int | None = None) -> None:
        lines.append(f"| {what} | {taken:.1f} | {against} | {'' if count is None else count} |")

    def steps(way: str) -> None:
        for rows in (1, 8):

            def step(rows: int = rows) -> object:
                return vlm.score_many([Score(prefix, latents[:rows], [()] * rows, answer_only=True)])

            taken = clock.milliseconds(step)
            line(f"a step of {rows}, {way}", taken, f"{taken / limit_ms:.2f} x the limit", launches(step, device))

    steps("eager")
    eager = clock.milliseconds(lambda: vlm.score_many([Score(prefix, latents, [()] * 8, answer_only=True)]))
    if clock.has(120 if device == "cuda" else 5, f"compiled steps ({name})"):
        # On a CPU the trial compiles nothing: the passes are traced and run as they are.
        vlm.static = StaticPasses(vlm, None if device == "cuda" else "eager")
        steps("compiled")
        if vlm.static.failure is not None:
            lines.append(f"| not compiled: {vlm.static.failure} | | | |")
        vlm.static = None
    if clock.has(20, f"the naive step ({name})"):
        taken = clock.milliseconds(lambda: naive_step(vlm, tensors, latents[0]), 2)
        line(
            "a naive step: two whole forwards for one candidate", taken, f"{taken / (eager / 8):.0f} x a candidate of 8"
        )

    def plainly() -> object:
        with torch.inference_mode():
            return vlm.model.generate(**tensors, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)

    if not clock.has(30, f"whole answers ({name})"):
        return lines
    plain = clock.milliseconds(plainly, 2)
    line(f"plain `generate` of {TOKENS} tokens", plain, "1")
    engine = Engine(vlm)
    generation = GenerationSettings(min_new_tokens=TOKENS)  # as long as what stands beside it
    for level in ("quick", "standard", "thorough"):
        if not clock.has(plain / 1e3 * (6 if level != "thorough" else 20), f"{level} ({name})"):
            continue
        budget = Budget.level(level).but(max_new_tokens=TOKENS)  # type: ignore[arg-type]
        job = Job((image,), QUESTION, settings=SearchSettings(), budget=budget, generation=generation)
        taken = clock.milliseconds(lambda job=job: engine.answer(job), 2)  # type: ignore[misc]
        line(f"{level}, {TOKENS} tokens", taken, f"{taken / plain:.2f} x generate")
    if clock.has(plain / 1e3 * 8, f"self-consistency ({name})"):
        job = Job((image,), QUESTION, settings=SearchSettings(latents=0), budget=Budget(max_new_tokens=TOKENS))
        ten = SamplingSettings(samples=10)
        taken = clock.milliseconds(lambda: engine.sample_many([job], ten), 2)
        line(f"self-consistency, 10 samples of up to {TOKENS}", taken, f"{taken / plain:.2f} x generate")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--seconds", type=float, default=480.0, help="the script ends within this time")
    parser.add_argument("--write", type=Path, help="file to write the page to; refused without a GPU")
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and chosen.shape != "tiny":
        parser.error("there is no GPU here; --shape tiny shows that the script runs")
    if device == "cpu" and chosen.write:
        parser.error("figures of a CPU say nothing about a GPU, so that no page is written without one")
    clock = Clock(device, chosen.seconds)
    shape = SHAPES[chosen.shape]
    torch.manual_seed(0)
    vlm = build(shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
    vlm.prefix_cache = PrefixCache(0)  # every question pays for its own picture
    decoder = vlm.model.get_decoder()
    weights = sum(parameter.nbytes for parameter in decoder.layers.parameters())
    weights += vlm.model.get_output_embeddings().weight.nbytes
    speed = bandwidth(clock, device)
    limit_ms = 1e3 * weights / speed
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU: only a trial of the script"
    lines = [
        f"`python benchmarks/gpu.py --shape {chosen.shape}`: {card}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}.\n",
        f"A step reads {weights / 1e9:.2f} GB of weights; a copy moves {speed / 1e9:.0f} GB/s; so the limit of a step "
        f"is {limit_ms:.2f} ms.\n",
    ]
    print("\n".join(lines), flush=True)
    for name, side in shape.sides.items():
        if not clock.has(60 if device == "cuda" else 5, f"the prefix of {name}"):
            continue
        part = measured(vlm, name, side, clock, limit_ms, device)
        print("\n".join(part), flush=True)
        lines += [*part, ""]
    if device == "cuda":
        lines.append(f"Memory at its peak: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB.")
    if clock.left_out:
        lines.append(f"No time was left for: {', '.join(clock.left_out)}.")
    print("\n".join(lines[-2:]))
    if chosen.write:
        chosen.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
