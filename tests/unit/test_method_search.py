"""The search on a toy model: states are scored as a whole, the best one is kept, and every limit holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy import ToyModel, toy

from latent_tool.errors import NumericalError
from latent_tool.method import search as search_module
from latent_tool.method.asking import Asking
from latent_tool.method.patches import propose
from latent_tool.method.policy import advantages, draw_noise, policy_gradient
from latent_tool.method.reward import Logits
from latent_tool.method.search import Outcome, Round, State, _Run, search
from latent_tool.settings import Budget, SearchSettings, SearchVariant

CALM = SearchSettings(sigma=0.3, eta=0.05, patches_per_latent=2, variant=SearchVariant(scale="absolute"))


async def _told(row: Round) -> None:
    """Nobody listens."""


def solve(
    model: ToyModel, how: SearchSettings = CALM, budget: Budget | None = None, seed: int = 0, **options: Any
) -> Outcome:
    start, within = options.pop("start", torch.zeros_like(model.target)), options.pop("within", 1.0)
    generator = torch.Generator().manual_seed(seed)
    # A toy replies at once: the search ends without a request.
    with patch.object(search_module, "_REFUSED_WITHIN", within):
        return Asking(search(model, start, how, budget or Budget(), generator=generator, **options)).outcome()


@pytest.mark.parametrize("how", [CALM, SearchSettings.paper(sigma=0.5, eta=0.05)], ids=["default", "paper"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_best_state_is_one_that_was_scored_and_its_reward_is_reproducible(how: SearchSettings, seed: int) -> None:
    model = toy(seed=seed)
    outcome = solve(model, how, Budget(iterations=6, max_patches=6), seed)
    best = outcome.best
    assert any(torch.equal(latents, best.latents) and cells == best.patches for latents, cells in model.scored)
    assert best.reward == pytest.approx(model.reward(best.latents, best.patches, how), abs=1e-6)
    assert best.reward >= max(row.reward for row in outcome.rounds)
    assert best.reward >= outcome.initial_reward
    assert outcome.candidates == len(model.scored)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_best_reward_never_falls_and_patches_come_only_with_a_gain(seed: int) -> None:
    model = toy(seed=seed)
    outcome = solve(model, CALM, Budget(iterations=8, max_patches=5), seed)
    bests = [row.best_reward for row in outcome.rounds]
    assert bests == sorted(bests)
    assert all(group.gain > 0 for group in outcome.injections)
    injected = tuple(cell for group in outcome.injections for cell in group.cells)
    assert injected == outcome.best.patches
    assert len(set(injected)) == len(injected) <= 5


def sequential_walk(
    model: ToyModel, latents: Tensor, patches: tuple[int, ...], how: SearchSettings, room: int
) -> tuple[int, ...]:
    """The walk as the paper describes it: one proposal after the other, each scored on its own."""
    attention = model.looked(latents, patches)
    current = model.reward(latents, patches, how)
    for latent in range(len(latents)):
        kind = how.variant.proposals
        (cells,) = propose(attention[latent : latent + 1], patches, how.patches_per_latent, kind, room - len(patches))
        if not cells:
            continue
        reward = model.reward(latents, patches + cells, how)
        if round(reward - current, 6) > how.min_gain:
            patches, current = patches + cells, reward
    return patches


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 4),
    room=st.integers(0, 9),
    proposals=st.sampled_from(["new", "top"]),
    min_gain=st.sampled_from([0.0, 0.05]),
)
@settings(max_examples=80, deadline=None)
def test_the_batched_walk_accepts_what_the_sequential_walk_accepts(
    seed: int, count: int, room: int, proposals: Any, min_gain: float
) -> None:
    model = toy(latents=5, cells=9, seed=seed)
    # eta = 0 leaves the latents where they are, so that one round is one walk from the start.
    how = CALM.but(eta=0, patches_per_latent=count, variant={"proposals": proposals}, min_gain=min_gain)
    outcome = solve(model, how, Budget(iterations=1, max_patches=room), seed)
    accepted = outcome.rounds[1].accepted if len(outcome.rounds) > 1 else ()
    assert accepted == sequential_walk(model, torch.zeros_like(model.target), (), how, room)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_what_was_refused_is_refused_again_where_the_latents_stay(seed: int, count: int) -> None:
    """Without steps a search that remembers ends as one that does not, and scores nothing twice."""
    how = CALM.but(samples=0, patches_per_latent=count)
    budget = Budget(iterations=4, max_patches=8)
    forgets, remembers = toy(latents=4, cells=9, seed=seed), toy(latents=4, cells=9, seed=seed)
    naive = solve(forgets, how, budget, seed, within=0)
    found = solve(remembers, how, budget, seed)
    assert (found.best.patches, found.injections) == (naive.best.patches, naive.injections)
    assert found.best.reward == naive.best.reward
    assert {cells for _, cells in remembers.scored} == {cells for _, cells in forgets.scored}
    accepted = [row.accepted for row in found.rounds if row.accepted]
    once = [cells for _, cells in remembers.scored]
    # What stood behind an accepted proposal in its batch was never refused, and may be scored again.
    assert len(once) - len(set(once)) <= 4 * len(accepted)
    assert len(once) <= len(forgets.scored)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_refusals_are_forgotten_once_the_latents_have_moved(seed: int) -> None:
    """Any step is too far: the walks are those of a search that remembers nothing."""
    budget = Budget(iterations=5, max_patches=6)
    found, naive = (
        solve(toy(latents=4, cells=9, seed=seed), CALM, budget, seed, within=within) for within in (1e-9, 0.0)
    )
    assert (found.best.patches, found.best.reward, found.injections) == (
        naive.best.patches,
        naive.best.reward,
        naive.injections,
    )
    assert found.candidates <= naive.candidates


def test_the_paper_s_proposals_are_scored_whatever_was_refused() -> None:
    counts = {
        within: solve(toy(latents=4, cells=9), SearchSettings.paper(sigma=0.5, eta=0.05), within=within).candidates
        for within in (0.0, 1e9)
    }
    assert counts[0.0] == counts[1e9]


@given(seed=st.integers(0, 10_000), within=st.sampled_from([0.2, 1.0, 3.0]))
@settings(max_examples=40, deadline=None)
def test_refusals_hold_within_the_stated_distance(seed: int, within: float) -> None:
    """A walk one proposal at a time, over every round, with a memory written down anew."""
    how = CALM.but(samples=0)
    model = toy(latents=4, cells=9, seed=seed)
    path = [0.15 * step * torch.randn(4, 3, generator=torch.Generator().manual_seed(seed + step)) for step in range(6)]
    refused: set[tuple[int, ...]] = set()
    reference: Tensor | None = None
    patches: tuple[int, ...] = ()
    run = _Run(model, how, Budget(max_patches=6), torch.Generator(), 1.0, lambda: None, _told, how.sigma)
    for latents in path:
        if len(patches) == 6:
            break  # no walk without room
        moved = math.inf if reference is None else float((latents - reference).pow(2).mean().sqrt())
        if moved > within * how.sigma:
            refused, reference = set(), latents
        attention = model.looked(latents, patches)
        current = model.reward(latents, patches, how)
        for latent in range(4):
            (cells,) = propose(attention[latent : latent + 1], patches, how.patches_per_latent, "new", 6 - len(patches))
            if not cells or patches + cells in refused:
                continue
            reward = model.reward(latents, patches + cells, how)
            if round(reward - current, 6) > how.min_gain:
                patches, current = patches + cells, reward
            else:
                refused.add(patches + cells)
        state = run.current.patches if run.current is not None else ()
        (run.current,) = Asking(run.score(latents[None], (state,))).outcome()
        with patch.object(search_module, "_REFUSED_WITHIN", within):
            walked = Asking(run.walk())
        assert walked.request is None and walked.result is None
        assert run.current is not None and run.current.patches == patches
        assert run.refused == refused


@dataclass
class Holes(ToyModel):
    """Has no finite reward at so many of 100 places, the start not among them."""

    holes: int = 0

    def objective(self, latents: Tensor, patches: tuple[int, ...]) -> float:
        place = int(latents.abs().sum() * 1e4)
        return math.nan if place and place % 100 < self.holes else super().objective(latents, patches)


def naive_search(
    model: ToyModel, how: SearchSettings, budget: Budget, seed: int, unit: float = 1.0
) -> tuple[State, list[float]]:
    """The whole method a state at a time: nothing rides, nothing is remembered; the best state, and every round's."""
    generator = torch.Generator().manual_seed(seed)
    latents, patches = torch.zeros_like(model.target), ()

    def scored(latents: Tensor, patches: tuple[int, ...]) -> State:
        return State(latents, patches, model.reward(latents, patches, how), 0.0, 0.0)

    def better(*states: State) -> State:
        return max((state for state in states if math.isfinite(state.reward)), key=lambda state: state.reward)

    best, bests, sigma, improved = scored(latents, ()), [], how.sigma, 0
    for number in range(1, budget.iterations + 1):
        before = best
        if budget.patience is not None and number - 1 - improved >= budget.patience:
            break
        if budget.target_reward is not None and best.reward >= budget.target_reward:
            break
        noise = draw_noise(how, tuple(latents.shape), generator)
        samples = [scored(latents + sigma * unit * each, patches) for each in noise]
        rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
        best = better(best, *samples)
        if how.eta:
            moved = scored(latents + how.eta * unit * policy_gradient(noise, advantages(rewards, how), sigma), patches)
            latents = moved.latents if math.isfinite(moved.reward) else latents
            best = better(best, moved)
        patches = sequential_walk(model, latents, patches, how, budget.max_patches)
        best = better(best, scored(latents, patches))
        sigma *= how.variant.sigma_decay
        improved = number if best is not before else improved
        bests.append(best.reward)
    return best, bests


@given(
    seed=st.integers(0, 10_000),
    room=st.sampled_from([0, 3, 9]),
    decay=st.sampled_from([1.0, 0.8]),
    patience=st.sampled_from([None, 1, 2]),
    proposals=st.sampled_from(["new", "top"]),
    target=st.sampled_from([None, None, -0.2]),
    eta=st.sampled_from([0.05, 0.05, 0.0]),
    unit=st.sampled_from([1.0, 0.3]),
    holes=st.sampled_from([0, 10, 30]),
    counted=st.booleans(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_samples_that_ride_find_what_those_find_that_wait(
    seed: int,
    room: int,
    decay: float,
    patience: int | None,
    proposals: Any,
    target: float | None,
    eta: float,
    unit: float,
    holes: int,
    counted: bool,
) -> None:
    """With ``max_candidates``, none rides."""
    variant = {"sigma_decay": decay, "proposals": proposals, "scale": "absolute"}
    how = CALM.but(patches_per_latent=1, eta=eta, variant=variant)
    most = 10_000 if counted else None
    budget = Budget(iterations=6, max_patches=room, patience=patience, target_reward=target, max_candidates=most)
    made = toy(latents=3, cells=9, seed=seed)
    model = Holes(made.target, made.bonus, holes=holes)
    found = solve(model, how, budget, seed, within=0, unit=unit)
    assert found.candidates == len(model.scored)
    best, bests = naive_search(Holes(made.target, made.bonus, holes=holes), how, budget, seed, unit)
    assert (found.best.patches, len(found.rounds) - 1) == (best.patches, len(bests))
    torch.testing.assert_close(found.best.latents, best.latents)
    assert [row.best_reward for row in found.rounds[1:]] == pytest.approx(bests, abs=2e-6)


def test_samples_ride_where_the_walk_leaves_the_state_and_where_candidates_are_not_counted() -> None:
    class Counting(ToyModel):
        def scores(self, latents: Tensor, patches: tuple[tuple[int, ...], ...]) -> Logits:
            passes.append(len(latents))
            return super().scores(latents, patches)

    passes: list[int] = []
    made = toy(seed=3)
    for budget, expected in (
        (Budget(iterations=4, max_patches=0), [1, 8, 9, 9, 9, 1]),
        (Budget(iterations=4, max_patches=0, max_candidates=99), [1, 8, 1, 8, 1, 8, 1, 8, 1]),
    ):
        passes.clear()
        outcome = solve(Counting(made.target, made.bonus), budget=budget)
        assert passes == expected
        assert outcome.candidates == sum(passes)


def test_the_default_climbs() -> None:
    model = toy(seed=3)
    outcome = solve(model, CALM.but(patches_per_latent=0), Budget(iterations=60))
    before = float(model.target.pow(2).sum())
    after = float((outcome.best.latents - model.target).pow(2).sum())
    assert after < before / 3


def test_nothing_of_the_callers_changes() -> None:
    model = toy()
    start = torch.zeros_like(model.target)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    outcome = solve(model, start=start)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(start, torch.zeros_like(start))
    outcome.best.latents.add_(1)
    assert torch.equal(start, torch.zeros_like(start))


def test_the_seed_decides_everything() -> None:
    first, again, other = (solve(toy(), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.best.latents, again.best.latents)
    assert not torch.equal(first.best.latents, other.best.latents)


def test_no_iterations_score_the_start_alone() -> None:
    model = toy()
    outcome = solve(model, budget=Budget(iterations=0))
    assert (outcome.candidates, outcome.best.patches, outcome.stop_reason) == (1, (), "iterations")
    assert torch.equal(outcome.best.latents, torch.zeros_like(model.target))
    assert outcome.initial_reward == outcome.best.reward
    assert model.attended == 0


@given(limit=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_max_candidates(limit: int) -> None:
    model = toy(latents=3)
    outcome = solve(model, budget=Budget(iterations=4, max_candidates=limit))
    assert len(model.scored) == outcome.candidates <= limit
    if outcome.stop_reason == "iterations":
        assert len(outcome.rounds) == 5
    else:
        assert outcome.stop_reason == "max_candidates"


def test_target_reward() -> None:
    target = (solve(toy(seed=3), budget=Budget(iterations=0)).initial_reward + 1) / 2
    outcome = solve(toy(seed=3), budget=Budget(iterations=500, target_reward=target))
    assert outcome.stop_reason == "target_reward"
    assert outcome.best.reward >= target
    assert outcome.rounds[-2].best_reward < target
    already = solve(toy(seed=3), budget=Budget(iterations=500, target_reward=-5.0))
    assert (already.stop_reason, already.candidates) == ("target_reward", 1)


def test_patience() -> None:
    model = toy()
    frozen = CALM.but(eta=0, sigma=1e-9, patches_per_latent=0)
    outcome = solve(model, frozen, Budget(iterations=100, patience=3), start=model.target)
    assert outcome.stop_reason == "patience"
    assert len(outcome.rounds) == 1 + 3


def test_max_patches() -> None:
    model = toy(cells=30)
    model.bonus = torch.ones(30)
    outcome = solve(model, CALM.but(patches_per_latent=4), Budget(iterations=10, max_patches=7))
    assert len(outcome.best.patches) == 7
    assert solve(model, budget=Budget(max_patches=0)).best.patches == ()


def test_a_stop_takes_effect_before_the_next_batch() -> None:
    model = toy()
    asked = 0

    def stop() -> str | None:
        nonlocal asked
        asked += 1
        return "deadline" if asked > 3 else None

    outcome = solve(model, budget=Budget(iterations=100), stop=stop)
    assert outcome.stop_reason == "deadline"
    # The start, a batch of samples, an update and the samples with it; then the attention was to be read.
    assert outcome.candidates <= 1 + CALM.samples + 1 + CALM.samples + len(model.target)
    assert outcome.rounds[-1].best_reward == outcome.best.reward


@pytest.mark.parametrize("passes", range(1, 16))
def test_whatever_a_stop_cuts_what_was_found_is_told(passes: int) -> None:
    """Also of a round whose samples had been scored with the state before."""
    left = iter(range(passes))
    outcome = solve(
        toy(seed=3),
        budget=Budget(iterations=9, max_patches=0),
        stop=lambda: None if next(left, None) is not None else "deadline",
    )
    assert outcome.rounds[-1].best_reward == outcome.best.reward
    assert [row.number for row in outcome.rounds] == list(range(len(outcome.rounds)))


def test_a_stop_at_once_still_gives_the_start() -> None:
    outcome = solve(toy(), stop=lambda: "deadline")
    assert (outcome.candidates, outcome.stop_reason) == (1, "deadline")


class Faulty(ToyModel):
    """Loses some of its candidates to NaN."""

    def scores(self, latents: Tensor, patches: tuple[tuple[int, ...], ...]) -> Logits:
        first = not self.scored
        logits = super().scores(latents, patches)
        answer = logits.answer.clone()
        if not first:
            answer[::2] = math.nan
        return Logits(answer[:, None].expand(-1, latents.shape[1], -1), answer)


def test_candidates_that_are_not_finite_are_discarded_and_counted() -> None:
    model = toy()
    outcome = solve(Faulty(model.target, model.bonus), budget=Budget(iterations=4))
    assert outcome.discarded > 0
    assert math.isfinite(outcome.best.reward)
    assert outcome.best.latents.isfinite().all()


def test_a_start_that_is_not_finite_is_an_error() -> None:
    model = toy()
    model.height = math.nan
    with pytest.raises(NumericalError, match="finite"):
        solve(model)


def test_proposals() -> None:
    attention = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.4, 0.1, 0.1, 0.4]])
    assert propose(attention, (), 2, "new", 9) == [(1, 2), (0, 3)]
    assert propose(attention, (1,), 2, "new", 9) == [(2, 3), (0, 3)]
    assert propose(attention, (1,), 2, "top", 9) == [(2,), (0, 3)]
    assert propose(attention, (), 2, "new", 1) == [(1,), (0,)]
    assert propose(attention, (0, 1, 2, 3), 2, "new", 9) == [(), ()]


def test_without_samples_the_latents_stay_and_patches_may_come() -> None:
    model = toy(seed=3)
    how = CALM.but(samples=0)
    outcome = solve(model, how, Budget(iterations=5, max_patches=6), start=torch.full_like(model.target, 0.1))
    assert all(torch.equal(latents, torch.full_like(model.target, 0.1)) for latents, _ in model.scored)
    assert outcome.best.patches and outcome.best.reward > outcome.initial_reward


def test_without_a_step_draws_are_around_the_start_and_the_best_one_is_kept() -> None:
    model = toy(seed=3)
    how = CALM.but(eta=0, patches_per_latent=0, samples=6, variant={"antithetic": False, "baseline": "none"})
    outcome = solve(model, how, Budget(iterations=4))
    assert outcome.candidates == len(model.scored) == 1 + 4 * 6
    rewards = [model.reward(latents, cells, how) for latents, cells in model.scored]
    assert outcome.best.reward == pytest.approx(max(rewards), abs=1e-6)
    drawn = torch.stack([latents for latents, _ in model.scored[1:]])
    assert float(drawn.pow(2).mean().sqrt()) == pytest.approx(how.sigma, rel=0.3)  # start at 0, never moved
