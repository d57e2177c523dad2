"""A toy model with a known objective, for testing the method without a network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from latent_tool.method.reward import Logits, read_reward
from latent_tool.settings import SearchSettings


@dataclass
class ToyModel:
    """Confidence grows as the latents near a target and as cells with a positive bonus are injected.

    The logit of token 0 is ``height - |T - target|^2 + sum of the bonuses of V``; all other logits are 0.
    """

    target: Tensor
    bonus: Tensor
    vocabulary: int = 12
    height: float = 9.0
    scored: list[tuple[Tensor, tuple[int, ...]]] = field(default_factory=list)
    attended: int = 0

    def objective(self, latents: Tensor, patches: tuple[int, ...]) -> float:
        gap = float((latents - self.target).pow(2).sum())
        return self.height - gap + sum(float(self.bonus[cell]) for cell in patches)

    async def logits(
        self,
        latents: Tensor,
        patches: tuple[tuple[int, ...], ...],
        *,
        answer_only: bool = False,
        attention: bool = False,
    ) -> Logits:
        return self.scores(latents, patches)

    def scores(self, latents: Tensor, patches: tuple[tuple[int, ...], ...]) -> Logits:
        assert len(latents) == len(patches)
        self.scored += [(row.clone(), cells) for row, cells in zip(latents, patches, strict=True)]
        first = torch.tensor([self.objective(row, cells) for row, cells in zip(latents, patches, strict=True)])
        answer = torch.zeros(len(latents), self.vocabulary)
        answer[:, 0] = first
        return Logits(answer[:, None].expand(-1, latents.shape[1], -1), answer)

    async def attention(self, latents: Tensor, patches: tuple[int, ...]) -> Tensor:
        return self.looked(latents, patches)

    def looked(self, latents: Tensor, patches: tuple[int, ...]) -> Tensor:
        self.attended += 1
        generator = torch.Generator().manual_seed(int(latents.abs().sum() * 1e3) % 2**31)
        return torch.rand(len(latents), len(self.bonus), generator=generator).softmax(-1)

    def reward(self, latents: Tensor, patches: tuple[int, ...], settings: SearchSettings) -> float:
        """The reward of one state, worked out on its own."""
        fresh = replace(self, scored=[], attended=0)
        return float(read_reward(fresh.scores(latents[None], (patches,)), settings).reward[0])


def toy(latents: int = 2, width: int = 3, cells: int = 10, seed: int = 0) -> ToyModel:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(latents, width, generator=generator)
    return ToyModel(target, torch.randn(cells, generator=generator) * 0.5)
