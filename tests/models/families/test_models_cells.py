"""Every image cell stands for the pixels its box says: change the pixels there, and that cell's feature changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import picture
from torch import Tensor

from latent_tool.models import cells
from latent_tool.models.cells import Box
from latent_tool.models.families import family
from latent_tool.models.vlm import VisionLanguageModel

SHAPES = [(300, 200), (170, 260), (240, 240)]
SAMPLED = 8
_OUTPUTS = ("out_proj", "o_proj", "o_proj.linear", "projection_layer", "attn.proj", "attention.proj")


class _Stop(Exception):
    pass


@contextlib.contextmanager
def without_mixing(vlm: VisionLanguageModel) -> Iterator[None]:
    """A vision tower whose attention adds nothing, so that a feature depends on its own pixels alone."""
    decoder = {id(weight) for weight in vlm.model.get_decoder().parameters()}
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for name, module in vlm.model.named_modules():
            if isinstance(module, torch.nn.Linear) and id(module.weight) not in decoder and name.endswith(_OUTPUTS):
                for weight in (module.weight, module.bias):
                    if weight is not None:
                        kept.append((weight, weight.clone()))
                        weight.zero_()
        assert kept
        try:
            yield
        finally:
            for weight, before in kept:
                weight.copy_(before)


def features(vlm: VisionLanguageModel, images: Sequence[Image.Image]) -> Tensor:
    """Merged image features ``(C, d)``; the decoder does not run."""
    tensors = vlm.prepare(images, "?").tensors
    merged = torch.zeros(0)

    def capture(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal merged
        merged = kwargs["inputs_embeds"][0]
        raise _Stop

    handle = vlm.model.get_decoder().register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.inference_mode(), contextlib.suppress(_Stop):
            vlm.model(**tensors)
    finally:
        handle.remove()
    return merged[tensors["input_ids"][0] == vlm.image_token]


def inverted(image: Image.Image, box: Box) -> Image.Image:
    """The image with the pixels around the centre of a box inverted."""
    left, top, right, bottom = box
    x, y, half_width, half_height = (left + right) / 2, (top + bottom) / 2, (right - left) * 0.2, (bottom - top) * 0.2
    pixels = np.asarray(image).copy()
    rows = slice(int(max(y - max(half_height, 1), 0)), int(y + max(half_height, 1)) + 1)
    columns = slice(int(max(x - max(half_width, 1), 0)), int(x + max(half_width, 1)) + 1)
    pixels[rows, columns] = 255 - pixels[rows, columns]
    return Image.fromarray(pixels)


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def hit_rate(vlm: VisionLanguageModel, image: Image.Image, boxes: Sequence[Box | None]) -> float:
    """Share of sampled cells that change most among the cells of their size when the centre of their box changes."""
    before = features(vlm, [image])
    assert len(before) == len(boxes)
    shown = [index for index, box in enumerate(boxes) if box is not None]
    sampled = shown[:: max(1, len(shown) // SAMPLED)]
    hits = 0
    for index in sampled:
        box = boxes[index]
        assert box is not None
        change = (features(vlm, [inverted(image, box)]) - before).norm(dim=-1)
        # An overview and a tile may show the same pixels: compare cells of about the same size, and not its twin.
        rivals = [
            other
            for other in shown
            if 0.75 < area(boxes[other]) / area(box) < 1.33 and boxes[other] != box  # type: ignore[arg-type]
        ]
        hits += bool(change[index] > 1e-3) and all(change[index] > change[other] for other in rivals)
    return hits / len(sampled)


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_by_changing_the_pixels_at_their_centre(vlm, shape):
    image = picture(*shape)
    inputs = vlm.prepare([image], "?")
    boxes = [cell.box for cell in inputs.cells]
    assert inputs.warnings == ()
    with without_mixing(vlm):
        assert hit_rate(vlm, image, boxes) == 1
        if shape[0] != shape[1]:
            return
        turned = [None if box is None else (box[1], box[0], box[3], box[2]) for box in boxes]
        assert hit_rate(vlm, image, turned) < 0.75  # the diagonal stays where it is


def test_boxes_lie_in_the_image(vlm):
    for shape in SHAPES:
        inputs = vlm.prepare([picture(*shape)], "?")
        for cell in inputs.cells:
            if cell.box is not None:
                left, top, right, bottom = cell.box
                assert 0 <= left < right <= shape[0]
                assert 0 <= top < bottom <= shape[1]


def test_cells_of_several_images_carry_the_image_and_its_boxes(vlm):
    images = [picture(300, 200), picture(170, 260, seed=1)]
    inputs = vlm.prepare(images, "which one is red?")
    of_image = [cell.image for cell in inputs.cells]
    assert of_image == sorted(of_image)
    assert set(of_image) == {0, 1}
    assert inputs.warnings == ()
    for cell in inputs.cells:
        if cell.box is not None:
            assert cell.box[2] <= images[cell.image].width
            assert cell.box[3] <= images[cell.image].height
    with without_mixing(vlm):
        before = features(vlm, images)
        for index in (0, 1):
            changed = list(images)
            changed[index] = Image.fromarray(255 - np.asarray(images[index]))
            moved = (features(vlm, changed) - before).norm(dim=-1) > 1e-4
            expected = [cell.image == index and cell.box is not None for cell in inputs.cells]
            assert moved.tolist() == expected


def test_a_family_without_a_recipe_works_with_a_warning(vlm, monkeypatch):
    monkeypatch.setattr("latent_tool.models.vlm.family", lambda _kind: None)
    inputs = vlm.prepare([picture()], "what is red?")
    assert all(cell.box is None and cell.image == 0 for cell in inputs.cells)
    assert any("geometry" in warning for warning in inputs.warnings)
    prefix = vlm.prefill(inputs)
    assert vlm.attend(prefix, vlm.embed([5, 6]), (1,)).shape == (2, len(inputs.cells))


def test_a_recipe_that_does_not_fit_gives_no_boxes():
    def broken(_view: cells.View) -> list[Box | None]:
        raise KeyError("image_sizes")

    view = cells.View(None, None, {}, 0, 10, 10, 4)
    assert cells.cell_boxes(broken, view) is None
    assert cells.cell_boxes(lambda _view: [None] * 3, view) is None
    assert cells.cell_boxes(lambda _view: [(-5.0, 0.0, 5.0, 20.0)] * 4, view) == [(0, 0, 5, 10)] * 4


def test_the_table_lists_what_is_tested():
    from tiny_checkpoints import FAMILIES, HAND_MADE

    from latent_tool.models.families import supported

    assert [row.model_type for row in supported()] == list(FAMILIES)
    assert {row.model_type for row in supported() if not row.own_processor} == set(HAND_MADE)
    assert family("no_such_family") is None
