"""An untrained model with its tokenizer and processor, and saving them so that a crash never leaves half a model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from latent_tool.scenes import CHARACTERS, COLORS, SHAPES, generate
from training.settings import CELLS, CELLS_PER_SIDE, IMAGE_SIZE, PATCH_SIZE, Recipe

# <thought> stands for one latent in a prompt; its embedding is always replaced and never trained.
SPECIAL_TOKENS = (
    "<pad>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<image>",
    "<thought>",
    "<think>",
    "</think>",
)
PAD, END, USER, ASSISTANT, SYSTEM, IMAGE, THOUGHT, THINK, END_THINK = range(len(SPECIAL_TOKENS))

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer the question using a single word or phrase.",
    "You are a helpful assistant. Answer briefly.",
    "You answer questions about images.",
    "Look at the image carefully and answer the question.",
    "You are a vision model. Be short and exact.",
    "Think step by step, then answer.",
    "You are a careful assistant that looks at pictures.",
    "Answer with one word.",
    "Be brief.",
)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_processor(recipe: Recipe) -> LlavaProcessor:
    """Byte-level tokenizer (any text survives, in lower case) and an image processor that stretches to a square."""
    tokenizer = Tokenizer.from_str(_learnt_tokenizer(recipe.vocabulary, tuple(SYSTEM_PROMPTS)))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        extra_special_tokens={"image_token": "<image>", "thought_token": "<thought>"},
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = LlavaImageProcessorPil(
        size=square,
        crop_size=square,
        do_center_crop=False,
        do_pad=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )


@lru_cache(maxsize=4)
def _learnt_tokenizer(vocabulary: int, system_prompts: tuple[str, ...]) -> str:
    """The tokenizer as JSON; learning it from thousands of scenes takes seconds, so that a process does it once."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=12,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(system_prompts), trainer)
    return str(tokenizer.to_str())


def _corpus(system_prompts: Sequence[str]) -> Iterator[str]:
    """Text from which the vocabulary is learnt. Numbers stay single digits: none of them is in here."""
    for seed in range(3000):
        for question in generate(seed, "train").questions:
            if not any(character.isdigit() for character in question.text):
                yield question.text
    for _ in range(30):
        yield from system_prompts
        yield from ("yes", "no", "nothing", "top left", "top right", "bottom left", "bottom right", "center", "number")
        yield from (f"{color} {shape}" for color in COLORS for shape in SHAPES)
        yield from CHARACTERS


def build_model(recipe: Recipe, vocabulary: int) -> LlavaForConditionalGeneration:
    """A model with random weights (of the caller's global seed) and sines as position embeddings of the cells."""
    vision = SiglipVisionConfig(
        hidden_size=recipe.hidden,
        intermediate_size=recipe.vision_mlp,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
        hidden_act="gelu_pytorch_tanh",
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.text_mlp,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=CELLS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        projector_hidden_act="gelu",
    )
    config.pad_token_id, config.eos_token_id = PAD, END
    model = LlavaForConditionalGeneration(config)
    quarter = recipe.hidden // 4
    rates = 1.5 / 100 ** (torch.arange(quarter) / quarter)
    index = torch.arange(CELLS)
    x, y = (index % CELLS_PER_SIDE)[:, None] * rates, (index // CELLS_PER_SIDE)[:, None] * rates
    sines = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight.copy_(sines)
    return model


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary directory beside ``target`` that takes its place when the block ends well.

    A crash or a full disk leaves the old directory as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        old = target.with_name(f".{target.name}-old-{os.getpid()}")
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the checkpoint in bf16 into an existing folder, in the standard layout."""
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    copy = LlavaForConditionalGeneration(model.config)
    copy.load_state_dict(weights)
    copy.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def save_state(state: dict[str, object], path: Path) -> None:
    """Write a training state; the old one stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
