"""Tiny random checkpoints on disk, one per model family, laid out like the ones on the hub.

Weights are drawn so that activations keep their size from layer to layer and attention is peaked: a wrong mask, position
or prefix then moves the logits by far more than the tolerances of the tests.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as T
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.vlm import VisionLanguageModel

WIDTH, LAYERS, VOCABULARY = 64, 4, 768
END = "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}@IMAGE@{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that is written to one checkpoint folder; an empty ``template`` writes none."""

    config: Any
    tokenizer: Any
    image_processor: Any
    processor: str
    image_text: str
    options: dict[str, Any] = field(default_factory=dict)
    template: str = CHAT_TEMPLATE


def tokenizer(*special: str, **named: str) -> Any:
    """A byte-level tokenizer without merges, with special tokens of its own; ids are below ``VOCABULARY``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(dict.fromkeys(["<pad>", "<s>", "</s>", "<|im_start|>", END, *special])))
    return T.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=END,
        extra_special_tokens=named or None,
    )


def text(kind: str, **changes: Any) -> dict[str, Any]:
    """A decoder of four layers with grouped heads."""
    values: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": 260,
        "tie_word_embeddings": False,
    }
    return {**values, **changes}


def vision(kind: str, size: int = 56, patch: int = 14, **changes: Any) -> dict[str, Any]:
    """A vision tower of two layers."""
    values: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": patch,
        "projection_dim": 32,
    }
    return {**values, **changes}


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


# ---------------------------------------------------------------------------------------------------- the families


def llava() -> Checkpoint:
    words = tokenizer("<image>", image_token="<image>")
    return Checkpoint(
        T.LlavaConfig(
            text_config=text("llama"),
            vision_config=vision("clip_vision_model"),
            image_token_index=words.convert_tokens_to_ids("<image>"),
        ),
        words,
        T.LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size=_square(56)),
        "LlavaProcessor",
        "<image>",
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    )


_QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}


def _qwen(config: Any, processor: str, decoder: dict[str, Any], tower: dict[str, Any], patch: int) -> Checkpoint:
    words = tokenizer(*_QWEN)
    names = ("vision_start", "vision_end", "image", "video")
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in zip(names, _QWEN, strict=True)}
    tower = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": patch, **tower}
    return Checkpoint(
        config(text_config=decoder, vision_config=tower, **ids),
        words,
        T.Qwen2VLImageProcessorPil(patch_size=patch, size=_PIXELS),
        processor,
        _QWEN_IMAGE,
    )


def _mrope(**changes: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], **changes}


def qwen2_5_vl() -> Checkpoint:
    return _qwen(
        T.Qwen2_5_VLConfig,
        "Qwen2_5_VLProcessor",
        text("qwen2_5_vl_text", rope_parameters=_mrope()),
        {"out_hidden_size": WIDTH, "window_size": 56, "fullatt_block_indexes": [1]},
        14,
    )


FAMILIES: dict[str, Callable[[], Checkpoint]] = {
    "llava": llava,
    "qwen2_5_vl": qwen2_5_vl,
}


# ---------------------------------------------------------------------------------------------------- on disk


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw all matrices anew, with peaked attention and logits."""
    generator = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                continue
            deviation = 1.0 if "embed_tokens" in name else weight[0].numel() ** -0.5
            if "q_proj" in name or "k_proj" in name:
                deviation *= 1.6
            if "lm_head" in name:
                deviation *= 2
            weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)


def write(folder: Path, made: Checkpoint, *, generation: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """Write a checkpoint as it would lie on the hub; returns the folder."""
    made.config.tie_word_embeddings = False
    made.config.get_text_config().tie_word_embeddings = False
    model = T.AutoModelForImageTextToText.from_config(made.config).eval().float()
    randomise(model, seed)
    for name, value in {"eos_token_id": 260, "pad_token_id": 256, **(generation or {})}.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    if made.image_processor is not None:
        made.image_processor.save_pretrained(folder)
    written = {"processor_class": made.processor, **made.options}
    (folder / "processor_config.json").write_text(json.dumps(written))
    if made.template:
        (folder / "chat_template.jinja").write_text(made.template.replace("@IMAGE@", made.image_text))
    return folder


@functools.cache
def _workspace() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="latent-tool-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def checkpoint(family: str) -> Path:
    """The family's checkpoint folder, written once per process; do not change what is in it."""
    return write(_workspace() / family, FAMILIES[family]())


def picture(width: int = 150, height: int = 100, seed: int = 0) -> Image.Image:
    """Smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (10, 15, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@functools.cache
def loaded(family: str) -> VisionLanguageModel:
    """The family's checkpoint, loaded as a user would."""
    return load(ModelSpec(model=str(checkpoint(family))))
