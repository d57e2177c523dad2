"""The search over states: optimise the latents, inject the patches they attend to, keep the best state.

    score the initial latents
    repeat for every round
        1  T' = T + eps                   score N samples with the current patches V        (policy.py)
        2  T <- T + eta grad J            score the updated state, and in the same pass the samples around it
        3  attention of T to the cells    once, on the updated state
        4  for every latent in order      propose its top cells; keep V + proposal if the reward rises   (patches.py)

The search awaits what it needs of a ``LatentModel`` and never computes a forward pass, so that the passes of many
searches can share batches (asking.py). A state is a pair (T, V) that was scored together; nothing else is returned.

The samples of the next round ride with the updated state: one pass less. They are of use only if the walk in between
leaves that state as it is, as most walks do; else they are forgotten, and drawn with the same noise around what the
walk has led to. So the search finds what one finds that scores them when their round has come.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from latent_tool.errors import NumericalError
from latent_tool.method.patches import propose
from latent_tool.method.policy import advantages, draw_noise, policy_gradient
from latent_tool.method.reward import Logits, read_on_device, rounded, to_host
from latent_tool.settings import Budget, SearchSettings

__all__ = ["Injection", "LatentModel", "Outcome", "Round", "State", "search"]


# Proposals that were refused are new again once the latents have moved so many sigma, root mean square: as far as one
# sample of the noise. Most of a search's proposals were refused a round before, and are refused again.
_REFUSED_WITHIN = 1.0


@dataclass(frozen=True)
class State:
    """Latents ``(L, d)`` and injected cells that were scored together, and what their logits say."""

    latents: Tensor
    patches: tuple[int, ...]
    reward: float
    top_k_mass: float
    first_token_probability: float


@dataclass(frozen=True)
class Injection:
    """A group of cells that was accepted together."""

    cells: tuple[int, ...]
    attention: tuple[float, ...]
    latent: int
    gain: float


@dataclass(frozen=True)
class Round:
    """What happened in one round; round 0 is the scoring of the initial latents."""

    number: int
    reward: float
    best_reward: float
    mean_sampled_reward: float | None
    top_k_mass: float
    first_token_probability: float
    sigma: float | None
    accepted: tuple[int, ...]
    candidates: int
    discarded: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """The best state, how it was found, and what it cost."""

    best: State
    start: State
    injections: tuple[Injection, ...]
    rounds: tuple[Round, ...]
    candidates: int
    discarded: int
    stop_reason: str

    @property
    def initial_reward(self) -> float:
        """Reward of the initial latents without patches."""
        return self.start.reward


class LatentModel(Protocol):
    """What the search awaits of a model that has one image and question in its cache."""

    async def logits(
        self,
        latents: Tensor,
        patches: tuple[tuple[int, ...], ...],
        *,
        answer_only: bool = False,
        attention: bool = False,
    ) -> Logits:
        """Return the logits of ``N`` states.

        Args:
            latents: ``(N, L, d)``.
            patches: for every state, the cells injected before its latents.
            answer_only: the logits at the latents are not read.
            attention: the reply may bring the attention of the first state along, ``(1, L, C)``, which is needed next;
                if it does not, ``attention`` is awaited.
        """

    async def attention(self, latents: Tensor, patches: tuple[int, ...]) -> Tensor:
        """Return the attention ``(L, C)`` of latents ``(L, d)`` to the image cells, mean over heads and layers."""


async def _untold(row: Round) -> None:
    """Nobody listens to the rounds."""


async def _never(state: State) -> str | None:
    """No state ends the search."""
    return None


class _LimitReached(Exception):
    """A limit was reached inside a round."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


@dataclass(frozen=True)
class _Read:
    """States ``(N, L, d)`` that were scored, and what their logits say, ``(3, N)``; all on the model's device."""

    latents: Tensor
    patches: tuple[tuple[int, ...], ...]
    numbers: Tensor
    attention: Tensor | None

    def rows(self, start: int, stop: int) -> _Read:
        """Some of the states; attention is of the first one alone."""
        part = slice(start, stop)
        return _Read(self.latents[part], self.patches[part], self.numbers[:, part], None if start else self.attention)


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Root mean square of how far two latents are apart, ``()``."""
    return (one - other).pow(2).mean().sqrt()


@dataclass
class _Run:
    """One search under way: the current and the best state, and what was spent."""

    model: LatentModel
    settings: SearchSettings
    budget: Budget
    generator: torch.Generator
    unit: float
    stop: Callable[[], str | None]
    on_round: Callable[[Round], Awaitable[None]]
    sigma: float
    current: State | None = None
    best: State | None = None
    injections: list[Injection] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    sampled: float | None = None
    noise: Tensor | None = None  # (N, L, d), of the next round's samples, if they rode with a state ...
    ahead: tuple[State, _Read] | None = None  # ... and that state, and how they were scored around it
    candidates: int = 0
    discarded: int = 0
    refused: set[tuple[int, ...]] = field(default_factory=set)  # cells of states that a walk has turned down ...
    refused_at: Tensor | None = None  # ... near these latents
    attention: Tensor | None = None  # (1, L, C), of the state that was scored last, if it came with its logits
    drifted: float | None = None  # of the same state, how far it is from where cells were refused, root mean square
    started: float = field(default_factory=time.monotonic)

    def room(self) -> int:
        """Return how many candidates may still be scored."""
        limit = self.budget.max_candidates
        return 2**62 if limit is None else limit - self.candidates

    async def score(self, latents: Tensor, patches: tuple[tuple[int, ...], ...]) -> list[State | None]:
        """Score states in one batch; a state whose reward is not finite becomes ``None``."""
        read = await self.read(latents, patches)
        self.attention = self.drifted = None
        (numbers,) = to_host([read.numbers])
        return self.states(read, numbers)

    async def read(self, latents: Tensor, patches: tuple[tuple[int, ...], ...], attention: bool = False) -> _Read:
        """Score states in one batch, and leave what their logits say where it is: nobody waits for it yet."""
        if self.best is not None and (reason := self.stop()):
            raise _LimitReached(reason)
        if self.room() < len(patches):
            raise _LimitReached("max_candidates")
        answer_only = self.settings.reward_position == "answer"
        logits = await self.model.logits(latents, patches, answer_only=answer_only, attention=attention)
        self.candidates += len(patches)
        return _Read(latents, patches, read_on_device(logits, self.settings), logits.attention)

    def states(self, read: _Read, numbers: Tensor) -> list[State | None]:
        """States from what was read of their logits, ``numbers`` ``(3, N)`` on the CPU."""
        latents, patches = read.latents, read.patches
        rewards = rounded(numbers[0])
        states: list[State | None] = []
        for index, (reward, mass, first) in enumerate(
            zip(rewards.tolist(), numbers[1].tolist(), numbers[2].tolist(), strict=True)
        ):
            if not math.isfinite(reward):
                self.discarded += 1
                states.append(None)
                continue
            states.append(State(latents[index].clone(), patches[index], reward, mass, first))
        return states

    def keep(self, state: State | None) -> None:
        """Remember a state if it is the best so far."""
        if state is not None and (self.best is None or state.reward > self.best.reward):
            self.best = state

    def draw(self, state: State) -> Tensor:
        """Draw the noise of a round's samples, ``(N, L, d)``."""
        length, width = state.latents.shape
        return draw_noise(self.settings, (length, width), self.generator).to(state.latents)

    async def ascend(self, more: bool) -> None:
        """Take one step of the policy gradient; the updated state becomes the current one unless it is not finite.

        ``more``: another round may follow. Its samples ride, unless candidates are counted: none is spent on chance.
        """
        assert self.current is not None
        state, settings, unit = self.current, self.settings, self.unit
        if not settings.samples:
            return
        # 1. Samples around the latents, scored in one batch with the current patches, unless they rode with these.
        noise, self.noise = self.draw(state) if self.noise is None else self.noise, None
        ahead, self.ahead = self.ahead, None
        if ahead is not None and ahead[0] is state:
            sampled = ahead[1]
        else:
            sampled = await self.read(state.latents + self.sigma * unit * noise, (state.patches,) * len(noise))
        # 2. One step along the gradient, on the device: the host asks once what both passes have said.
        read: _Read | None = None
        limit: _LimitReached | None = None
        if settings.eta:
            weights = advantages(rounded(sampled.numbers[0]), settings)  # (N,)
            gradient = policy_gradient(noise, weights, self.sigma)  # (L, d)
            # sigma and eta are in units of `unit`: the gradient is one per unit, the step back in the latents' scale.
            latents = (state.latents + settings.eta * unit * gradient)[None]
            if more and self.budget.max_candidates is None:
                self.noise = self.draw(state)
                sigma = self.sigma * settings.variant.sigma_decay
                latents = torch.cat([latents, latents + sigma * unit * self.noise])
            try:
                read = await self.read(latents, (state.patches,) * len(latents), attention=self.may_inject(state))
            except _LimitReached as reached:
                limit = reached
        self.note(sampled, None if read is None else read.rows(0, 1))
        if limit is not None:
            raise limit
        if read is not None and self.noise is not None and self.current is not state:
            self.ahead = self.current, read.rows(1, len(read.patches))

    def note(self, sampled: _Read, updated: _Read | None) -> None:
        """Bring what the samples and the updated state have said to the host, in one transfer, and keep it."""
        asked = [sampled.numbers]
        attention = None if updated is None else updated.attention
        if updated is not None:
            asked.append(updated.numbers)
            if attention is not None:
                asked.append(attention)
            if self.refused_at is not None:
                asked.append(_distance(updated.latents[0], self.refused_at))
        numbers = to_host(asked)
        scored = self.states(sampled, numbers[0])
        for sample in scored:
            self.keep(sample)
        rewards = [sample.reward for sample in scored if sample is not None]
        self.sampled = math.fsum(rewards) / len(rewards) if rewards else None
        self.attention = self.drifted = None
        if updated is None:
            return
        (moved,) = self.states(updated, numbers[1])
        if moved is not None:
            self.current = moved
            self.keep(moved)
            self.attention = None if attention is None else numbers[2]
            self.drifted = None if self.refused_at is None else float(numbers[-1])

    def may_inject(self, state: State) -> bool:
        """Tell whether a walk from this state could add a cell."""
        return bool(self.settings.patches_per_latent) and len(state.patches) < self.budget.max_patches

    def remember_refusals(self, state: State) -> bool:
        """Forget what was refused once the latents have moved too far; whether refusals are remembered at all."""
        limit = _REFUSED_WITHIN * self.sigma * self.unit if self.settings.variant.proposals == "new" else 0.0
        if self.refused_at is not None and self.drifted is None:
            (drifted,) = to_host([_distance(state.latents, self.refused_at)])
            self.drifted = float(drifted)
        if self.drifted is None or self.drifted > limit:
            self.refused.clear()
            self.refused_at = state.latents
        return limit > 0

    async def walk(self) -> None:
        """Let every latent, in order, propose cells for the current state; keep a proposal if the reward rises.

        Proposals of the latents still to come are scored in one batch, and again only after one was accepted; the
        accepted groups are those of the walk that scores one proposal at a time. A state that was not accepted is
        never the best one: a walk that goes one by one might not have scored it.

        Cells that were refused are not scored again while the latents are near where that was: there, few proposals
        change from round to round, and what was refused is refused again.
        """
        assert self.current is not None
        settings = self.settings
        if not self.may_inject(self.current):
            return
        if reason := self.stop():
            raise _LimitReached(reason)
        # 3. The attention of the current state, which may have come with its logits.
        if self.attention is not None:
            (attention,) = self.attention
        else:
            (attention,) = to_host([await self.model.attention(self.current.latents, self.current.patches)])  # (L, C)
        # 4. The walk over the latents.
        remembers = self.remember_refusals(self.current)
        latent = 0
        while latent < len(attention):
            state = self.current
            room = self.budget.max_patches - len(state.patches)
            proposals = propose(
                attention[latent:], state.patches, settings.patches_per_latent, settings.variant.proposals, room
            )
            asked = [(latent + offset, cells) for offset, cells in enumerate(proposals) if cells]
            if remembers:  # and none is scored twice in one batch
                first = {cells: at for at, cells in reversed(asked)}
                asked = [
                    (at, cells)
                    for at, cells in asked
                    if state.patches + cells not in self.refused and first[cells] == at
                ]
            if len(asked) > self.room() > 0:
                asked = asked[: self.room()]
            if not asked:
                return
            scored = await self.score(
                state.latents.expand(len(asked), -1, -1), tuple(state.patches + cells for _, cells in asked)
            )
            for (latent, cells), proposed in zip(asked, scored, strict=True):
                if proposed is not None and round(proposed.reward - state.reward, 6) > settings.min_gain:
                    weights = tuple(float(attention[latent, cell]) for cell in cells)
                    gain = round(proposed.reward - state.reward, 6)
                    self.injections.append(Injection(cells, weights, latent, gain))
                    self.current = proposed
                    self.keep(proposed)
                    break
                if remembers:
                    self.refused.add(state.patches + cells)
            latent += 1

    async def close_round(self, number: int, sigma: float | None, injected: int) -> None:
        """Write the row of a round and tell it; ``injected`` is the number of groups there were before it."""
        assert self.current is not None and self.best is not None
        row = Round(
            number=number,
            reward=self.current.reward,
            best_reward=self.best.reward,
            mean_sampled_reward=self.sampled,
            top_k_mass=self.best.top_k_mass,
            first_token_probability=self.best.first_token_probability,
            sigma=sigma,
            accepted=tuple(cell for group in self.injections[injected:] for cell in group.cells),
            candidates=self.candidates,
            discarded=self.discarded,
            seconds=time.monotonic() - self.started,
        )
        self.rounds.append(row)
        await self.on_round(row)

    def limit_between_rounds(self, stale: int) -> str | None:
        """Return the reason to begin no further round; ``stale`` rounds went by without a better reward."""
        assert self.best is not None
        if self.budget.target_reward is not None and self.best.reward >= self.budget.target_reward:
            return "target_reward"
        if self.budget.patience is not None and stale >= self.budget.patience:
            return "patience"
        return None


async def search(
    model: LatentModel,
    initial: Tensor,
    settings: SearchSettings,
    budget: Budget,
    *,
    generator: torch.Generator,
    unit: float = 1.0,
    stop: Callable[[], str | None] = lambda: None,
    on_round: Callable[[Round], Awaitable[None]] = _untold,
    enough: Callable[[State], Awaitable[str | None]] = _never,
) -> Outcome:
    """Search for the state with the highest reward.

    Args:
        model: scores states and reads their attention.
        initial: ``(L, d)`` initial latents, ``L >= 1``; never changed.
        settings: how to search.
        budget: limits on rounds, candidates and patches, target reward and patience.
        generator: CPU generator the noise is drawn from; the only source of randomness.
        unit: what ``sigma`` is measured in, for example the RMS of the model's embeddings.
        stop: called before every batch but the first; returns a stop reason to end the search with the best so far.
        on_round: awaited with the row of every round as soon as the round is over.
        enough: awaited with the initial state before the first round; returns a stop reason where there is nothing to
            search for.

    Raises ``NumericalError`` when the initial state has no finite reward.
    """
    run = _Run(model, settings, budget, generator, unit, stop, on_round, settings.sigma)
    (run.current,) = await run.score(initial.detach().float()[None], ((),))
    run.keep(run.current)
    if run.current is None or run.best is None:
        raise NumericalError(
            "The model's logits are not finite for the initial latents.",
            "Load the model in float32 or bfloat16, or start the latents elsewhere (init).",
        )
    start = run.current
    await run.close_round(0, None, 0)

    reason: str | None = None
    improved = 0  # the round in which the best reward last rose
    rounds = range(1, budget.iterations + 1)
    if rounds and run.limit_between_rounds(0) is None and (reason := await enough(run.best)):
        rounds = range(0)
    for number in rounds:
        if reason := run.limit_between_rounds(number - 1 - improved):
            break
        best, scored, injected = run.best, run.candidates, len(run.injections)
        run.sampled = None
        try:
            await run.ascend(more=number < budget.iterations)
            await run.walk()
        except _LimitReached as limit:
            reason = limit.reason
        if run.best is not best:
            improved = number
        if run.candidates > scored or run.sampled is not None:
            await run.close_round(number, run.sigma, injected)
        if reason:
            break
        run.sigma *= settings.variant.sigma_decay
    kept = set(run.best.patches)
    return Outcome(
        best=run.best,
        start=start,
        injections=tuple(group for group in run.injections if kept.issuperset(group.cells)),
        rounds=tuple(run.rounds),
        candidates=run.candidates,
        discarded=run.discarded,
        stop_reason=reason or run.limit_between_rounds(0) or "iterations",
    )
