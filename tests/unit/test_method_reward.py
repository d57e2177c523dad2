"""Rewards against formulas worked out by hand, and what each of them can be won with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_tool.method import reward as formulas
from latent_tool.method.reward import Logits, read_reward
from latent_tool.settings import SearchSettings

K = 10


def logits_of(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_top_k_entropy_by_hand() -> None:
    # The two most probable of (0.5, 0.3, 0.2): H_2 = -(0.5 ln 0.5 + 0.3 ln 0.3), from the full softmax.
    expected = 1 + 0.5 * math.log(0.5) + 0.3 * math.log(0.3)
    assert formulas.top_k_entropy(logits_of([0.5, 0.3, 0.2]), 2).item() == pytest.approx(expected, abs=1e-6)


def test_renormalised_top_k_entropy_by_hand() -> None:
    p, q = 0.5 / 0.8, 0.3 / 0.8
    expected = 1 + p * math.log(p) + q * math.log(q)
    assert formulas.renormalised_top_k_entropy(logits_of([0.5, 0.3, 0.2]), 2).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_entropy_reward_by_hand() -> None:
    entropy = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
    assert formulas.entropy_reward(logits_of([0.5, 0.3, 0.2]), 2).item() == pytest.approx(
        1 - entropy / math.log(3), abs=1e-6
    )


def test_neg_log_probability_by_hand() -> None:
    expected = -(math.log(0.5) + math.log(0.3)) / 2
    assert formulas.neg_log_probability(logits_of([0.5, 0.3, 0.2]), 2).item() == pytest.approx(expected, abs=1e-6)


def test_the_papers_reward_can_be_won_by_flattening_and_the_default_cannot() -> None:
    """Uniform over 151,000 tokens: the paper's formula rewards it with 0.9992, above a useful 70/30 answer."""
    flat = torch.zeros(151_000)
    useful = torch.full((151_000,), -30.0)
    useful[0], useful[1] = math.log(0.7), math.log(0.3)
    assert formulas.top_k_entropy(flat, K).item() == pytest.approx(0.9992, abs=1e-4)
    assert formulas.top_k_entropy(flat, K) > formulas.top_k_entropy(useful, K)
    default = SearchSettings().reward
    assert default == "renormalised_top_k_entropy"
    assert formulas.renormalised_top_k_entropy(flat, K).item() == pytest.approx(1 - math.log(K), abs=1e-5)
    assert formulas.renormalised_top_k_entropy(flat, K) < formulas.renormalised_top_k_entropy(useful, K)


@given(st.lists(st.floats(-20, 20), min_size=12, max_size=12), st.integers(3, 12))
def test_ranges(values: list[float], k: int) -> None:
    logits = torch.tensor(values)
    for formula in (formulas.top_k_entropy, formulas.renormalised_top_k_entropy):
        assert 1 - math.log(k) - 1e-5 <= formula(logits, k).item() <= 1 + 1e-5
    assert -1e-5 <= formulas.entropy_reward(logits, k).item() <= 1 + 1e-5
    assert 0 <= formulas.top_k_mass(logits, k).item() <= 1 + 1e-5


@given(st.lists(st.floats(-10, 10), min_size=12, max_size=12), st.floats(0.05, 0.95))
def test_flattening_never_pays_by_default(values: list[float], factor: float) -> None:
    """Shrinking all logits towards each other never raises the default reward."""
    logits = torch.tensor(values)
    sharp = formulas.renormalised_top_k_entropy(logits, K)
    flat = formulas.renormalised_top_k_entropy(logits * factor, K)
    assert flat.item() <= sharp.item() + 1e-5


def test_ruled_out_tokens_do_not_poison_the_entropy() -> None:
    logits = torch.tensor([0.0, 0.0, -math.inf])
    assert formulas.entropy(logits).item() == pytest.approx(math.log(2), abs=1e-6)


def test_positions_and_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = Logits(torch.randn(4, 3, 50, generator=generator), torch.randn(4, 50, generator=generator))
    readings = {
        position: read_reward(logits, SearchSettings(reward_position=position)).reward  # type: ignore[arg-type]
        for position in ("latents", "answer", "both")
    }
    assert torch.allclose(readings["both"], (readings["latents"] * 3 + readings["answer"]) / 4, atol=2e-6)
    for reward in readings.values():
        assert torch.equal((reward * 1e6).round() / 1e6, reward)


@pytest.mark.parametrize("position", ["latents", "answer", "both"])
def test_the_first_token_and_the_top_k_mass_are_read_with_the_reward(position: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = Logits(torch.randn(4, 3, 50, generator=generator), torch.randn(4, 50, generator=generator))
    found = read_reward(logits, SearchSettings(reward_position=position))
    assert torch.allclose(found.first_token_probability, logits.answer.softmax(-1).max(-1).values.double(), atol=1e-6)
    read = {"latents": logits.latents, "answer": logits.answer[:, None]}
    positions = read.get(position, torch.cat([*read.values()], dim=1))
    expected = positions.softmax(-1).topk(K).values.sum(-1).mean(-1)
    assert torch.allclose(found.top_k_mass, expected.double(), atol=1e-6)


def test_logits_that_are_not_finite_have_no_reward() -> None:
    logits = torch.randn(3, 50)
    logits[1, 7] = math.nan
    reward = read_reward(Logits(logits[:, None], logits), SearchSettings()).reward
    assert reward.isnan().tolist() == [False, True, False]


def test_half_precision_is_scored_in_float32() -> None:
    logits = torch.randn(2, 1000).bfloat16()
    half = read_reward(Logits(logits[:, None], logits), SearchSettings()).reward
    full = read_reward(Logits(logits.float()[:, None], logits.float()), SearchSettings()).reward
    assert torch.equal(half, full)
