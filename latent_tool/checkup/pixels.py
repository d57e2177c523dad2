"""Find an image cell by changing pixels: the cell whose feature changes most is the one that shows them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_tool.checkup.naive import on_device
from latent_tool.models.cells import Box
from latent_tool.models.prefix import Inputs
from latent_tool.models.vlm import VisionLanguageModel

__all__ = ["features", "hit_rate"]

# Cells that are looked at.
SAMPLED = 8
# What the projections are called that end an attention layer of a vision tower.
_OUTPUTS = ("out_proj", "o_proj", "o_proj.linear", "projection_layer", "attn.proj", "attention.proj")


class _Seen(Exception):
    """The features are there; the decoder need not run."""


@contextlib.contextmanager
def without_mixing(vlm: VisionLanguageModel) -> Iterator[None]:
    """Keep the attention of the vision tower from adding anything, so that a feature depends on its own pixels alone.

    No weight is touched, so that quantized models are treated alike.
    """
    decoder = {id(module) for module in vlm.model.get_decoder().modules()}

    def nothing(_module: Any, _args: Any, output: Any) -> Any:
        return torch.zeros_like(output)

    handles = [
        module.register_forward_hook(nothing)
        for name, module in vlm.model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in decoder and name.endswith(_OUTPUTS)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def features(vlm: VisionLanguageModel, inputs: Inputs) -> Tensor:
    """Return merged image features ``(C, d)`` of a question, float32 on the CPU; the decoder does not run."""
    given = on_device(vlm, inputs)
    seen: list[Tensor] = []

    def capture(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"][0])
        raise _Seen

    with vlm.forward_pass():
        handle = vlm.model.get_decoder().register_forward_pre_hook(capture, with_kwargs=True)
        try:
            with contextlib.suppress(_Seen):
                vlm.model(**given, use_cache=False)
        finally:
            handle.remove()
    cells = (given["input_ids"][0] == vlm.image_token).to(seen[0].device)
    return seen[0][cells].float().cpu()


def _inverted(image: Image.Image, box: Box) -> Image.Image:
    """The image with the pixels around the centre of a box inverted."""
    left, top, right, bottom = box
    x, y = (left + right) / 2, (top + bottom) / 2
    half_width, half_height = max((right - left) * 0.2, 1), max((bottom - top) * 0.2, 1)
    pixels = np.asarray(image).copy()
    rows = slice(int(max(y - half_height, 0)), int(y + half_height) + 1)
    columns = slice(int(max(x - half_width, 0)), int(x + half_width) + 1)
    pixels[rows, columns] = 255 - pixels[rows, columns]
    return Image.fromarray(pixels)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def hit_rate(vlm: VisionLanguageModel, image: Image.Image) -> tuple[int, int]:
    """Tell how many of the sampled cells change most, among the cells of their size, when the centre of their box does.

    Two numbers: hits, and cells looked at; no cell is looked at where none has a box.
    """
    inputs = vlm.prepare([image], "?")
    boxes = [cell.box for cell in inputs.cells]
    shown = [index for index, box in enumerate(boxes) if box is not None]
    sampled = shown[:: max(1, len(shown) // SAMPLED)][:SAMPLED]
    if not sampled:
        return 0, 0
    hits = 0
    with without_mixing(vlm):
        before = features(vlm, inputs)
        for index in sampled:
            box = boxes[index]
            assert box is not None
            change = (features(vlm, vlm.prepare([_inverted(image, box)], "?")) - before).norm(dim=-1)
            hits += bool(change[index] > 1e-3) and bool(change[index] > _rivals(change, index, box, boxes))
    return hits, len(sampled)


def _rivals(change: Tensor, index: int, box: Box, boxes: Sequence[Box | None]) -> float:
    """The largest change of another cell of about the same size that does not show the same pixels.

    An overview and a tile may show the same.
    """
    others = [
        float(change[place])
        for place, other in enumerate(boxes)
        if other is not None and place != index and other != box and 0.75 < _area(other) / _area(box) < 1.33
    ]
    return max(others, default=0.0)
