"""The slow, obvious way to run a state: one forward pass over everything, pixels included, without any cache.

It rests on the model's own code alone, not on what it is compared with: the model merges the picture and counts the
positions itself, on a prompt that was lengthened by fillers whose embeddings are then replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latent_tool.models.prefix import Inputs
from latent_tool.models.vlm import VisionLanguageModel

__all__ = ["naive_logits", "on_device"]


def on_device(vlm: VisionLanguageModel, inputs: Inputs) -> dict[str, Tensor]:
    """Return the tensors that a model is given for a question, on its device and of its type."""
    return {
        name: value.to(vlm.device, vlm.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.tensors.items()
        if isinstance(value, Tensor)
    }


def naive_logits(vlm: VisionLanguageModel, inputs: Inputs, latents: Tensor, patches: Sequence[int]) -> Tensor:
    """Return logits ``(vocabulary,)``, float32, where the answer begins after ``[prefix | V | opening | T | closing,
    tail]``.

    Args:
        latents: ``(L, d)``.
        patches: injected cells.
    """
    given = on_device(vlm, inputs)
    config = vlm.model.config
    prefix = inputs.length
    filler = config.get_text_config().pad_token_id or 0
    markers = inputs.markers
    first = prefix + len(patches) + len(markers.opening)
    more = [*[filler] * len(patches), *markers.opening, *[filler] * len(latents), *markers.closing, *inputs.tail]
    ids = given["input_ids"]
    given["input_ids"] = torch.cat([ids, torch.tensor([more], device=ids.device)], dim=1)
    # PaliGemma reads tokens of type 0 in both directions; what is generated has type 1.
    causal = 1 if config.model_type == "paligemma" else 0
    for name, value in (("attention_mask", 1), ("token_type_ids", causal), ("mm_token_type_ids", 0)):
        if name in given:
            added = torch.full((1, len(more)), value, dtype=given[name].dtype, device=given[name].device)
            given[name] = torch.cat([given[name], added], dim=1)
    cells = (ids[0] == vlm.image_token).nonzero()[:, 0]

    def splice(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        merged = kwargs["inputs_embeds"].clone()
        if patches:
            merged[0, prefix : prefix + len(patches)] = merged[0, cells[list(patches)].to(merged.device)]
        merged[0, first : first + len(latents)] = latents.to(merged)
        return args, {**kwargs, "inputs_embeds": merged}

    with vlm.forward_pass():
        handle = vlm.model.get_decoder().register_forward_pre_hook(splice, with_kwargs=True)
        try:
            output: Any = vlm.model(**given, use_cache=False)
        finally:
            handle.remove()
    logits: Tensor = output.logits[0, -1].float()
    return logits
