"""The REINFORCE estimate against the analytic gradient of the smoothed objective."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latent_tool.method.policy import advantages, draw_noise, policy_gradient
from latent_tool.settings import SearchSettings, SearchVariant

WIDTH, SIGMA, SCALE = 3, 0.7, 1.1
POINT = torch.tensor([[0.4, -0.3, 0.8]])
PEAK = torch.tensor([[-0.2, 0.5, 0.1]])


def objective(latents: Tensor) -> Tensor:
    """A Gaussian bump, whose smoothing by Gaussian noise is known in closed form."""
    return torch.exp(-(latents - PEAK).pow(2).sum((-1, -2)) / (2 * SCALE**2))


def smoothed_gradient() -> Tensor:
    """grad_T E[R(T + eps)], eps ~ N(0, sigma^2 I), for the bump above."""
    variance = SCALE**2 + SIGMA**2
    height = (SCALE**2 / variance) ** (WIDTH / 2)
    gap = POINT - PEAK
    return -gap / variance * height * math.exp(-float(gap.pow(2).sum()) / (2 * variance))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        SearchSettings(samples=1, variant=SearchVariant(antithetic=False, baseline="none", normalise=False)),
        SearchSettings(samples=4, variant=SearchVariant(antithetic=False, baseline="leave_one_out", normalise=False)),
        SearchSettings(samples=4, variant=SearchVariant(antithetic=True, baseline="none", normalise=False)),
        SearchSettings(samples=4, variant=SearchVariant(antithetic=True, baseline="leave_one_out", normalise=False)),
    ],
    ids=["paper", "leave-one-out", "antithetic", "antithetic leave-one-out"],
)
def test_unbiased(settings: SearchSettings) -> None:
    """Mean of many estimates within four standard errors of the true gradient, and those errors small against it."""
    generator = torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(5_000):
        noise = draw_noise(settings, (1, WIDTH), generator)
        rewards = objective(POINT + SIGMA * noise).double()
        estimates.append(policy_gradient(noise, advantages(rewards, settings), SIGMA))
    stacked = torch.stack(estimates)
    mean, error = stacked.mean(0), stacked.std(0) / math.sqrt(len(stacked))
    truth = smoothed_gradient()
    assert error.max() < truth.abs().max() / 10
    assert torch.all((mean - truth).abs() < 4 * error)


def test_the_baseline_lowers_the_variance() -> None:
    spread = {}
    for baseline in ("none", "leave_one_out"):
        settings = SearchSettings(
            samples=8,
            variant=SearchVariant(antithetic=False, baseline=baseline, normalise=False),  # type: ignore[arg-type]
        )
        generator = torch.Generator().manual_seed(2)
        estimates = []
        for _ in range(2_000):
            noise = draw_noise(settings, (1, WIDTH), generator)
            rewards = objective(POINT + SIGMA * noise).double() + 5  # a constant that carries no information
            estimates.append(policy_gradient(noise, advantages(rewards, settings), SIGMA))
        spread[baseline] = float(torch.stack(estimates).var(0).sum())
    assert spread["leave_one_out"] < spread["none"] / 10


def test_normalised_advantages_have_unit_deviation_and_a_floor() -> None:
    settings = SearchSettings(samples=8, variant=SearchVariant(antithetic=False, baseline="none"))
    rewards = torch.linspace(0, 1, 8, dtype=torch.float64)
    assert float(advantages(rewards, settings).std(correction=0)) == pytest.approx(1)
    flat = torch.full((8,), 0.25, dtype=torch.float64)
    leave_one_out = SearchSettings(samples=8, variant=SearchVariant(antithetic=False))
    assert torch.equal(advantages(flat, leave_one_out), torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize("antithetic", [False, True])
def test_a_sample_without_a_reward_weighs_nothing(antithetic: bool) -> None:
    settings = SearchSettings(samples=8, variant=SearchVariant(antithetic=antithetic, normalise=False))
    rewards = torch.arange(8, dtype=torch.float64)
    rewards[2] = math.nan
    weights = advantages(rewards, settings)
    assert weights.isfinite().all()
    assert weights[2] == 0
    assert (weights[6] == 0) == antithetic  # its antithetic partner
    lost = torch.full((8,), math.nan, dtype=torch.float64)
    assert torch.equal(advantages(lost, settings), torch.zeros(8, dtype=torch.float64))


def test_antithetic_noise_comes_in_pairs() -> None:
    noise = draw_noise(SearchSettings(samples=6), (2, 3), torch.Generator().manual_seed(0))
    assert torch.equal(noise[:3], -noise[3:])
