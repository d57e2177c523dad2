"""The slow, obvious way to run a state: one ordinary forward pass over everything, pixels included, without any cache.

It rests on transformers alone, not on the code it is compared with: the model merges the image and counts the positions
itself, on a prompt that was lengthened by filler tokens whose embeddings are then replaced by patches and latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latent_tool.models.prefix import Inputs
from latent_tool.models.vlm import VisionLanguageModel

# Float32: what is left is the order in which sums are taken. A position off by one moves logits by more than 0.05.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
QUESTION = "what is red?"
MARKERS = ("((", "))")


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """The model with eager attention everywhere; every part gets back what it had."""
    config = model.config
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    before = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    before[""] = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class NaiveRun:
    """Logits ``(S, vocabulary)`` of the whole sequence, where the parts stand in it, and eager attention if asked for.

    ``attention``: ``(layers, heads, S, S)`` of the layers that have attention. ``merged``: ``(S, d)``, what the decoder
    was given.
    """

    logits: Tensor
    merged: Tensor
    prefix: int
    latents: slice
    after: int
    attention: Tensor | None = None

    @property
    def at_latents(self) -> Tensor:
        """``(L, vocabulary)``."""
        return self.logits[self.latents]

    @property
    def at_answer(self) -> Tensor:
        """``(n + 1, vocabulary)``: what predicts the first answer token, and every one after it."""
        return self.logits[self.after - 1 :]


def run(
    vlm: VisionLanguageModel,
    inputs: Inputs,
    latents: Tensor | None,
    patches: Sequence[int],
    answer: Sequence[int] = (),
    *,
    attention: bool = False,
    shift: int = 0,
) -> NaiveRun:
    """One full forward pass over ``[prefix | V | opening | T | closing, tail | answer]``.

    ``shift`` moves the positions of all that follows the prefix: a mistake on purpose.
    """
    model = vlm.model
    given: dict[str, Any] = {key: value for key, value in inputs.tensors.items() if isinstance(value, Tensor)}
    prefix_ids = given["input_ids"][0].tolist()
    prefix = len(prefix_ids)
    count = 0 if latents is None else len(latents)
    filler = model.config.get_text_config().pad_token_id or 0
    opening = list(inputs.markers.opening) if count else []
    closing = list(inputs.markers.closing) if count else []
    first_latent = prefix + len(patches) + len(opening)
    suffix = [filler] * len(patches) + opening + [filler] * count + closing + list(inputs.tail)
    after = prefix + len(suffix)
    ids = prefix_ids + suffix + list(answer)
    given["input_ids"] = torch.tensor([ids])
    # PaliGemma reads tokens of type 0 in both directions; what is generated has type 1.
    causal = 1 if model.config.model_type == "paligemma" else 0
    for name, value in {"attention_mask": 1, "token_type_ids": causal, "mm_token_type_ids": 0}.items():
        if name in given:
            more = torch.full((1, len(ids) - prefix), value, dtype=given[name].dtype)
            given[name] = torch.cat([given[name], more], dim=1)
    given = {key: value.to(vlm.dtype) if value.is_floating_point() else value for key, value in given.items()}
    cells = (given["input_ids"][0] == vlm.image_token).nonzero()[:, 0]
    seen: dict[str, Tensor] = {}

    def splice(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        merged = kwargs["inputs_embeds"].clone()
        if patches:
            merged[0, prefix : prefix + len(patches)] = merged[0, cells[list(patches)]]
        if latents is not None:
            merged[0, first_latent : first_latent + count] = latents.to(merged)
        seen["merged"] = merged[0]
        positions = kwargs.get("position_ids")
        if shift:
            positions = torch.arange(len(ids))[None] if positions is None else positions.clone()
            positions[..., prefix:] += shift
        return args, {**kwargs, "inputs_embeds": merged, "position_ids": positions}

    handle = model.get_decoder().register_forward_pre_hook(splice, with_kwargs=True)
    try:
        with torch.inference_mode(), eager(model) if attention else nullcontext():
            output = model(**given, use_cache=False, output_attentions=attention)
    finally:
        handle.remove()
    seen_attention = None
    if attention:
        seen_attention = torch.stack([layer[0].float() for layer in output.attentions if layer is not None])
    return NaiveRun(
        output.logits[0].float(),
        seen["merged"],
        prefix,
        slice(first_latent, first_latent + count),
        after,
        seen_attention,
    )


def option_log_probability(
    vlm: VisionLanguageModel,
    inputs: Inputs,
    latents: Tensor | None,
    patches: Sequence[int],
    spellings: Sequence[Sequence[int]],
) -> Tensor:
    """Log-probability ``()`` of one option: the sum over its spellings and over all ends, one full pass a spelling."""
    ends = vlm.model.generation_config.eos_token_id
    stops = [ends] if isinstance(ends, int) else list(ends)
    spelled = []
    for tokens in spellings:
        log_p = run(vlm, inputs, latents, patches, tokens).at_answer.double().log_softmax(-1)
        spelled.append(log_p[range(len(tokens)), list(tokens)].sum() + log_p[-1, stops].logsumexp(0))
    return torch.stack(spelled).logsumexp(0).float()


def draw_latents(vlm: VisionLanguageModel, batch: int, count: int = 3, seed: int = 1) -> Tensor:
    """Latents ``(batch, count, d)`` of the size of the model's embeddings."""
    width = vlm.embed([0]).shape[1]
    noise = torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))
    return noise * vlm.embedding_rms()


def some_cells(vlm: VisionLanguageModel, cells: int) -> list[tuple[int, ...]]:
    """Eight choices of cells, of mixed numbers, some of them repeated."""
    last = cells - 1
    return [(), (1,), (last, 0), (2, 1), (), (0, last, 1), (3,), (last,)]
