"""What a domain check compares pictures by, in every family: the prefix's own features, and nothing run for them."""

from __future__ import annotations

import numpy as np
import torch
from tiny_checkpoints import picture

from latent_tool.images.appearance import PIXEL_NUMBERS, pixel_numbers
from latent_tool.models.looks import SPREAD, look, picture_numbers
from latent_tool.models.prefix import Cell
from latent_tool.models.vlm import VisionLanguageModel


def test_a_look_sees_what_the_prefix_has(vlm: VisionLanguageModel) -> None:
    """Of one picture and of two; the decoder is not run, and nothing stays on the model."""
    for images in ([picture()], [picture(), picture(90, 130, seed=2)]):
        inputs = vlm.prepare(images, "what is red?")
        prefix = vlm.prefill(inputs, cached=False)
        calls: list[int] = []
        handle = vlm.model.get_decoder().register_forward_hook(lambda *_, seen=calls: seen.append(1))
        try:
            seen = look(vlm, inputs)
        finally:
            handle.remove()
        assert not calls
        torch.testing.assert_close(seen, prefix.features)
        assert not vlm.model.get_decoder()._forward_pre_hooks
        numbers = picture_numbers(prefix.features, inputs.cells, images)
        assert len(numbers) == len(images)
        assert {len(row) for row in numbers} == {seen.shape[1] + SPREAD + PIXEL_NUMBERS}
        assert np.isfinite(numbers).all()
        assert numbers == picture_numbers(prefix.features, inputs.cells, images)


def test_the_numbers_of_a_picture_are_its_own(vlm: VisionLanguageModel) -> None:
    """Each picture's cells are described apart, by the mean of their features and the logarithms of their spread."""
    images = [picture(), picture(90, 130, seed=2)]
    inputs = vlm.prepare(images, "what is red?")
    features = look(vlm, inputs).float()
    for image, row in enumerate(picture_numbers(features, inputs.cells, images)):
        own = np.array([features[at].tolist() for at, cell in enumerate(inputs.cells) if cell.image == image])
        distance = np.linalg.norm(own - own.mean(0), axis=1)
        norm = np.linalg.norm(own, axis=1)
        spread = [(distance**2).mean(), *np.quantile(distance, (0.25, 0.5, 0.75, 0.9, 1)), norm.mean()]
        spread += [norm.max(), norm.min()]
        seen, pixels = row[:-PIXEL_NUMBERS], row[-PIXEL_NUMBERS:]
        assert pixels == pixel_numbers(images[image])
        np.testing.assert_allclose(seen[:-SPREAD], own.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(seen[-SPREAD:], np.log(np.array(spread) + 1e-6), rtol=1e-2, atol=1e-2)


def test_one_cell_and_equal_cells_have_numbers() -> None:
    """No distance at all is a small number, not minus infinity."""
    cell = Cell(0, None)
    for count in (1, 7):
        (row,) = picture_numbers(torch.ones(count, 5), [cell] * count, [picture()])
        assert np.isfinite(row).all() and len(row) == 5 + SPREAD + PIXEL_NUMBERS
    (half,) = picture_numbers(torch.ones(3, 5, dtype=torch.bfloat16), [cell] * 3, [picture()])
    assert half[0] == 1.0
