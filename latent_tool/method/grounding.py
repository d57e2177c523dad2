"""Visual dependency: how much a generated token depends on the image.

S(token) = log p(token | image) - log p(token | noised image)      in nats
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latent_tool.settings import NoiseSettings

__all__ = ["add_noise", "visual_dependency"]


def add_noise(pixels: Tensor, settings: NoiseSettings, generator: torch.Generator) -> Tensor:
    """Return a noised copy of processed pixel values of any shape; the noise comes from the caller's CPU generator."""
    noise = torch.randn(pixels.shape, generator=generator).to(pixels)
    keep = math.sqrt(1 - settings.strength**2) if settings.kind == "diffusion" else 1.0
    return keep * pixels + settings.strength * noise


def visual_dependency(clean: Tensor, noised: Tensor) -> Tensor:
    """``S`` per token: log-probabilities with the image ``(n,)`` minus their mean over noised images ``(draws, n)``."""
    return clean - noised.mean(0)
