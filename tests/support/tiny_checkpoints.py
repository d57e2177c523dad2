"""Tiny random checkpoints on disk, one per model family, laid out like the ones on the hub.

Weights are drawn so that activations keep their size from layer to layer and attention is peaked: a wrong mask or
position then moves the logits by far more than the tolerances of the tests.
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

from latent_tool.models.loading import ModelSpec, load, load_weights
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


def qwen2_vl() -> Checkpoint:
    tower = {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2}
    return _qwen(T.Qwen2VLConfig, "Qwen2VLProcessor", text("qwen2_vl_text", rope_parameters=_mrope()), tower, 14)


def qwen3_vl() -> Checkpoint:
    tower = {"out_hidden_size": WIDTH, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    decoder = text("qwen3_vl_text", rope_parameters=_mrope())
    return _qwen(T.Qwen3VLConfig, "Qwen3VLProcessor", decoder, tower, 16)


def qwen3_5() -> Checkpoint:
    decoder = text(
        "qwen3_5_text",
        rope_parameters=_mrope(partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    tower = {"out_hidden_size": WIDTH, "num_position_embeddings": 64}
    return _qwen(T.Qwen3_5Config, "Qwen3VLProcessor", decoder, tower, 16)


def glm4v() -> Checkpoint:
    special = {
        "image_start": "<|begin_of_image|>",
        "image": "<|image|>",
        "image_end": "<|end_of_image|>",
        "video_start": "<|begin_of_video|>",
        "video": "<|video|>",
        "video_end": "<|end_of_video|>",
    }
    words = tokenizer(*special.values(), image_token=special["image"], video_token=special["video"])
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in special.items()}
    tower = {"depth": 2, "hidden_size": 32, "out_hidden_size": WIDTH, "intermediate_size": 64, "num_heads": 2}
    decoder = text("glm4v_text", rope_parameters=_mrope())
    return Checkpoint(
        T.Glm4vConfig(text_config=decoder, vision_config={**tower, "patch_size": 14, "image_size": 56}, **ids),
        words,
        T.Glm4vImageProcessorPil(patch_size=14, size=_PIXELS),
        "Glm4vProcessor",
        "<|begin_of_image|><|image|><|end_of_image|>",
    )


_PINPOINTS = [[56, 56], [56, 112], [112, 56], [112, 112]]


def llava_next() -> Checkpoint:
    words = tokenizer("<image>", image_token="<image>")
    return Checkpoint(
        T.LlavaNextConfig(
            text_config=text("mistral", sliding_window=None),
            vision_config=vision("clip_vision_model"),
            image_token_index=words.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=_PINPOINTS,
        ),
        words,
        T.LlavaNextImageProcessorPil(
            size={"shortest_edge": 56}, crop_size=_square(56), image_grid_pinpoints=_PINPOINTS
        ),
        "LlavaNextProcessor",
        "<image>",
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    )


def llava_onevision() -> Checkpoint:
    words = tokenizer("<image>", "<video>", image_token="<image>", video_token="<video>")
    return Checkpoint(
        T.LlavaOnevisionConfig(
            text_config=text("qwen2"),
            vision_config=vision("siglip_vision_model", vision_use_head=False),
            image_token_index=words.convert_tokens_to_ids("<image>"),
            video_token_index=words.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=_PINPOINTS,
        ),
        words,
        T.LlavaOnevisionImageProcessorPil(size=_square(56), image_grid_pinpoints=_PINPOINTS),
        "LlavaOnevisionProcessor",
        "<image>",
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    )


def _idefics(config: Any, tower: str, image_processor: Any, processor: str) -> Checkpoint:
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    words = tokenizer(*named.values(), "<video>", *rows, **named)
    return Checkpoint(
        config(
            text_config=text("llama"),
            vision_config=vision(tower, size=64, patch=16),
            image_token_id=words.convert_tokens_to_ids("<image>"),
            scale_factor=2,
        ),
        words,
        image_processor(max_image_size={"longest_edge": 64}, size={"longest_edge": 128}),
        processor,
        "<image>",
        {"image_seq_len": 4},
    )


def smolvlm() -> Checkpoint:
    return _idefics(T.SmolVLMConfig, "smolvlm_vision", T.SmolVLMImageProcessorPil, "SmolVLMProcessor")


def idefics3() -> Checkpoint:
    return _idefics(T.Idefics3Config, "idefics3_vision", T.Idefics3ImageProcessorPil, "Idefics3Processor")


def internvl() -> Checkpoint:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(*named.values(), **named)
    tower = vision("internvl_vision", image_size=[56, 56], patch_size=[14, 14])
    return Checkpoint(
        T.InternVLConfig(
            text_config=text("qwen2"),
            vision_config=tower,
            image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=4,
        ),
        words,
        T.GotOcr2ImageProcessorPil(size=_square(56), crop_to_patches=True, min_patches=1, max_patches=6),
        "InternVLProcessor",
        "<IMG_CONTEXT>",
        {"image_seq_length": 4},
    )


def aya_vision() -> Checkpoint:
    special = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "<image>")
    tiles = ("TILE", "TILE_GLOBAL", *(f"TILE_{index}" for index in range(1, 7)))
    words = tokenizer(*special, *tiles)
    return Checkpoint(
        T.AyaVisionConfig(
            text_config=text("cohere2", sliding_window=24, layer_types=["sliding_attention", "full_attention"] * 2),
            vision_config=vision("siglip_vision_model", vision_use_head=False),
            image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
            downsample_factor=2,
        ),
        words,
        T.GotOcr2ImageProcessorPil(size=_square(56), crop_to_patches=True, min_patches=1, max_patches=6),
        "AyaVisionProcessor",
        "<image>",
        {"patch_size": 14, "img_size": 56, "downsample_factor": 2},
    )


def gemma3() -> Checkpoint:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer(*named.values(), **named)
    decoder = text(
        "gemma3_text",
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=16,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=20.0,
    )
    return Checkpoint(
        T.Gemma3Config(
            text_config=decoder,
            vision_config=vision("siglip_vision_model", vision_use_head=False),
            mm_tokens_per_image=4,
            image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
            boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
            eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        ),
        words,
        T.Gemma3ImageProcessorPil(size=_square(56)),
        "Gemma3Processor",
        "<start_of_image>",
        {"image_seq_length": 4},
    )


def gemma4() -> Checkpoint:
    named = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    words = tokenizer(*named.values(), "<|video|>", **named)
    decoder = text(
        "gemma4_text",
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
        global_head_dim=32,
        final_logit_softcapping=30.0,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        use_bidirectional_attention="vision",
    )
    tower = vision("gemma4_vision", patch_size=16, num_key_value_heads=2, head_dim=16, pooling_kernel_size=2)
    tower["position_embedding_size"] = 64
    return Checkpoint(
        T.Gemma4Config(
            text_config=decoder,
            vision_config=tower,
            image_token_id=words.convert_tokens_to_ids("<|image|>"),
            boi_token_id=words.convert_tokens_to_ids("<|image>"),
            eoi_token_id=words.convert_tokens_to_ids("<image|>"),
            video_token_id=words.convert_tokens_to_ids("<|video|>"),
            audio_token_id=words.convert_tokens_to_ids("<|audio|>"),
        ),
        words,
        T.Gemma4ImageProcessorPil(max_soft_tokens=70, pooling_kernel_size=2),
        "Gemma4Processor",
        "<|image|>",
        {"image_seq_length": 70},
    )


def paligemma() -> Checkpoint:
    words = tokenizer("<image>", image_token="<image>")
    return Checkpoint(
        T.PaliGemmaConfig(
            text_config=text("gemma"),
            vision_config=vision("siglip_vision_model", vision_use_head=False, projection_dim=WIDTH),
            projection_dim=WIDTH,
            hidden_size=WIDTH,
            image_token_index=words.convert_tokens_to_ids("<image>"),
        ),
        words,
        T.SiglipImageProcessorPil(size=_square(56), image_seq_length=16),
        "PaliGemmaProcessor",
        "<image>",
        template="",
    )


def mistral3() -> Checkpoint:
    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    return Checkpoint(
        T.Mistral3Config(
            text_config=text("mistral", sliding_window=None),
            vision_config=vision("pixtral", size=112),
            image_token_index=words.convert_tokens_to_ids("[IMG]"),
            spatial_merge_size=2,
        ),
        words,
        T.PixtralImageProcessorPil(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}),
        "PixtralProcessor",
        "[IMG]",
        {"patch_size": 14, "spatial_merge_size": 2},
    )


def ovis2() -> Checkpoint:
    indicators = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    words = tokenizer("<IMG_ATOM>", *indicators, "<image>")
    tower = vision("ovis2_vision", vocab_size=32, hidden_stride=2, num_visual_indicator_tokens=5)
    return Checkpoint(
        T.Ovis2Config(
            text_config=text("qwen2"),
            vision_config=tower,
            image_token_id=words.convert_tokens_to_ids("<IMG_ATOM>"),
            visual_indicator_token_ids=words.convert_tokens_to_ids(list(indicators)),
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
        ),
        words,
        T.Ovis2ImageProcessorPil(size=_square(56), crop_to_patches=True, min_patches=1, max_patches=6),
        "Ovis2Processor",
        "<image>",
        {"image_seq_length": 4},
    )


def lfm2_vl() -> Checkpoint:
    named = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail": "<|img_thumbnail|>",
    }
    words = tokenizer(*named.values(), **named)
    tower = vision("siglip2_vision_model", vision_use_head=False, num_patches=64)
    return Checkpoint(
        T.Lfm2VlConfig(
            text_config=text("lfm2", layer_types=["conv", "full_attention"] * 2, conv_L_cache=3),
            vision_config=tower,
            image_token_id=words.convert_tokens_to_ids("<image>"),
            downsample_factor=2,
            projector_hidden_size=64,
        ),
        words,
        {"image_processor_type": "Lfm2VlImageProcessorFast", "downsample_factor": 2, "tile_size": 56},
        "Lfm2VlProcessor",
        "<image>",
    )


FAMILIES: dict[str, Callable[[], Checkpoint]] = {
    make.__name__: make
    for make in (
        llava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        qwen3_5,
        glm4v,
        smolvlm,
        idefics3,
        internvl,
        gemma3,
        gemma4,
        paligemma,
        mistral3,
        lfm2_vl,
        ovis2,
        aya_vision,
    )
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
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = T.AutoModelForImageTextToText.from_config(made.config).eval().float()
    randomise(model, seed)
    # A random model would say "<image>" now and then, which some families then try to replace by an image.
    words = made.tokenizer
    silent = sorted({*words.get_added_vocab().values()} - {words.eos_token_id})
    rules = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "suppress_tokens": silent}
    for name, value in {**rules, **(generation or {})}.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    if isinstance(made.image_processor, dict):
        (folder / "preprocessor_config.json").write_text(json.dumps(made.image_processor))
    else:
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


class HandMadeProcessor:
    """Stands in for the processor of a family whose own one cannot run without torchvision."""

    def __init__(self, made: Checkpoint) -> None:
        self.tokenizer, self.image_processor = made.tokenizer, made.image_processor
        self.image_token = made.image_text
        self.chat_template = made.template.replace("@IMAGE@", made.image_text)
        self.config = made.config

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options)

    def __call__(self, text: list[str], images: list[list[Image.Image]], **_options: Any) -> dict[str, Any]:
        parts = text[0].split(self.image_token)
        tensors, shown = self.see(images[0])
        spelled = "".join(part + more for part, more in zip(parts, [*shown, ""], strict=True))
        written = self.tokenizer(spelled, return_tensors="pt", add_special_tokens=False)
        offsets = [[{"type": "image", "replacement": more} for more in shown]]
        return {**written, **tensors, "text_replacement_offsets": offsets}

    def see(self, images: list[Image.Image]) -> tuple[dict[str, Any], list[str]]:
        """Tensors of the images, and what stands for each in the prompt."""
        raise NotImplementedError


class HandMadePixtral(HandMadeProcessor):
    def see(self, images: list[Image.Image]) -> tuple[dict[str, Any], list[str]]:
        side = {"height": 28, "width": 28}
        seen = dict(self.image_processor(images, patch_size=side, return_tensors="pt"))
        grids = [(int(height) // 28, int(width) // 28) for height, width in seen["image_sizes"]]
        shown = ["[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]" for rows, columns in grids]
        return seen, shown


class HandMadeLfm2(HandMadeProcessor):
    def see(self, images: list[Image.Image]) -> tuple[dict[str, Any], list[str]]:
        patch, most = 14, 48
        pixels, masks, shapes, shown = [], [], [], []
        for image in images:
            rows, columns = (4, 8) if image.width > image.height else (8, 6) if image.width < image.height else (6, 6)
            resized = image.resize((columns * patch, rows * patch), Image.Resampling.BILINEAR)
            values = torch.tensor(np.asarray(resized, dtype=np.float32)) / 127.5 - 1
            patches = values.view(rows, patch, columns, patch, 3).transpose(1, 2).reshape(rows * columns, -1)
            pixels.append(torch.nn.functional.pad(patches, (0, 0, 0, most - rows * columns)))
            masks.append((torch.arange(most) < rows * columns).long())
            shapes.append([rows, columns])
            shown.append("<|image_start|>" + "<image>" * (rows * columns // 4) + "<|image_end|>")
        tensors = {
            "pixel_values": torch.stack(pixels),
            "pixel_attention_mask": torch.stack(masks),
            "spatial_shapes": torch.tensor(shapes),
        }
        return tensors, shown


HAND_MADE = {"mistral3": HandMadePixtral, "lfm2_vl": HandMadeLfm2}


@functools.cache
def loaded(family: str) -> VisionLanguageModel:
    """The family's checkpoint, loaded as a user would, with a processor made by hand where its own one cannot run."""
    spec = ModelSpec(model=str(checkpoint(family)))
    if family not in HAND_MADE:
        return load(spec)
    return VisionLanguageModel(load_weights(spec), HAND_MADE[family](FAMILIES[family]()), family)
