"""What a model sees of a picture, in a few numbers: what a domain check compares pictures by.

The numbers are made of the merged image features, which every prefix has, and of the picture's own pixels: nothing is
run for them. ``look`` gives the
features of a picture that nobody asks about; it stops where the decoder would begin. This module knows nothing of what
the numbers are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from latent_tool.images.appearance import pixel_numbers
from latent_tool.models.prefix import Cell, Inputs
from latent_tool.models.vlm import VisionLanguageModel

__all__ = ["SPREAD", "look", "picture_numbers"]

SPREAD = 9  # numbers about the spread of the cells, after the d of the mean cell
_QUANTILES = (0.25, 0.5, 0.75, 0.9, 1.0)
_LEAST = 1e-6  # added before logarithms


def picture_numbers(features: Tensor, cells: Sequence[Cell], images: Sequence[Image]) -> tuple[tuple[float, ...], ...]:
    """Describe every picture of a prompt by ``d + SPREAD + PIXEL_NUMBERS`` numbers, in the order of the pictures.

    The mean of its cells' features ``(d,)``; then the logarithms of their total variance, of the quantiles 25, 50, 75,
    90 and 100 % of their distance to the mean cell, and of the mean, largest and smallest norm; then ``pixel_numbers``.

    Args:
        features: merged image features ``(C, d)``, of any float type.
        cells: the cells they belong to, ``C`` of them.
        images: the prompt's pictures.
    """
    values = features.detach().float().cpu().numpy()
    owners = [cell.image for cell in cells]
    rows = []
    for image in sorted(set(owners)):
        own = [place for place, owner in enumerate(owners) if owner == image]
        part = values if len(own) == len(owners) else values[own]  # (n, d)
        mean = part.mean(0, dtype=np.float64)
        apart = part - mean
        squares = np.einsum("nd,nd->n", apart, apart)  # (n,)
        norm = np.sqrt(np.einsum("nd,nd->n", part, part, dtype=np.float64))
        distances = _quantiles(np.sqrt(squares))
        spread = [squares.mean(), *distances, norm.mean(), norm.max(), norm.min()]
        logarithms = (math.log(each + _LEAST) for each in spread)
        rows.append((*mean.tolist(), *logarithms, *pixel_numbers(images[image])))
    return tuple(rows)


def _quantiles(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quantiles of values ``(n,)``, by straight lines between the sorted ones."""
    places = np.array(_QUANTILES) * (len(values) - 1)
    return np.asarray(np.interp(places, np.arange(len(values)), np.sort(values)), dtype=np.float64)


def look(vlm: VisionLanguageModel, inputs: Inputs) -> Tensor:
    """Return merged image features ``(C, d)`` of a prompt's pictures; the decoder is not run.

    Raises ``ModelNotSupportedError`` for a model that does not merge image features into its decoder's input.
    """
    tensors = vlm.model_inputs(inputs.tensors)
    with vlm.forward_pass(), vlm.decoder_input(run=False) as given:
        vlm.model(**tensors, use_cache=False, logits_to_keep=1)
    columns = (tensors["input_ids"][0] == vlm.image_token).nonzero()[:, 0]
    return vlm.image_features(given, columns)
