"""The Gaussian policy over latents, and its REINFORCE gradient.

    T' = T + eps,   eps ~ N(0, sigma^2 I)
    J(T) = E[R(T')],   grad J = E[R(T') eps / sigma^2]          (score function of a Gaussian)
    T <- T + eta grad J

A baseline that does not depend on a sample's own noise leaves the estimate unbiased and lowers its variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_tool.settings import SearchSettings

__all__ = ["advantages", "draw_noise", "policy_gradient"]


def draw_noise(settings: SearchSettings, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Unit normal noise ``(samples, L, d)`` from the caller's generator; antithetic pairs are ``i`` and ``i + n/2``."""
    if not settings.variant.antithetic:
        return torch.randn(settings.samples, *shape, generator=generator)
    half = torch.randn(settings.samples // 2, *shape, generator=generator)
    return torch.cat([half, -half])


def advantages(rewards: Tensor, settings: SearchSettings) -> Tensor:
    """Return what each sample's noise is weighted with, ``(N,)``, on the rewards' device and of their type.

    The leave-one-out baseline of a sample is the mean reward of the others; of an antithetic pair, the mean of the
    other pairs (a partner's reward depends on the same noise). Samples without a finite reward, and their partners,
    weigh 0.
    """
    finite, variant = rewards.isfinite(), settings.variant
    if variant.antithetic:
        half = len(rewards) // 2
        finite = (finite[:half] & finite[half:]).repeat(2)
    count = finite.sum()  # stays on the device, like everything here: nobody waits for it
    kept = torch.where(finite, rewards, 0.0)
    if variant.baseline == "none":
        centred = kept
    elif variant.antithetic:
        pairs = kept[:half] + kept[half:]
        others = (pairs.sum() - pairs) / (count - 2).clamp_min(1)
        centred = kept - others.repeat(2)
    else:
        centred = kept - (kept.sum() - kept) / (count - 1).clamp_min(1)
    centred = torch.where(finite, centred, 0.0)
    if variant.normalise:
        apart = torch.where(finite, kept - kept.sum() / count.clamp_min(1), 0.0)
        deviation = (apart.square().sum() / count.clamp_min(1)).sqrt()
        centred = centred / deviation.clamp_min(variant.advantage_floor)
    # The mean over the finite samples, expressed as a mean over all of them.
    return centred * (len(rewards) / count.clamp_min(1))


def policy_gradient(noise: Tensor, weights: Tensor, sigma: float) -> Tensor:
    """``(1/N) sum_i A_i eps_i / sigma^2`` with ``eps = sigma * noise``; ``(N, L, d)``, ``(N,)`` -> ``(L, d)``."""
    return torch.einsum("n,nld->ld", weights.to(noise.dtype).to(noise.device), noise) / (len(noise) * sigma)
