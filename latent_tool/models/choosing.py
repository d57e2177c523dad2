"""Which token follows, for many rows at once: logits processors, the most probable token, or one that is drawn.

All of it happens where the logits are. The host learns three numbers a row and token, in one transfer: the token, its
log-probability and the entropy, and never a vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latent_tool.method.reward import entropy_of, to_host
from latent_tool.models.decoding import GenerationRules
from latent_tool.settings import SamplingSettings

__all__ = ["Chooser", "Said", "choose", "draw", "seeded"]


class Said(NamedTuple):
    """The token that a row has written, what the model's own softmax said of it, and that softmax's entropy."""

    token: int
    log_probability: float
    entropy: float


class Chooser:
    """How one row chooses its tokens.

    Args:
        rules: the model's own generation rules.
        written: tokens that stand before, as the logits processors see them.
        room: tokens that will be written at most.
        sampling: how tokens are drawn; ``None``: the most probable one is taken.
        draws: the uniform numbers of the draws, the only source of randomness.
    """

    def __init__(
        self,
        rules: GenerationRules,
        written: Sequence[int],
        room: int,
        sampling: SamplingSettings | None = None,
        draws: torch.Generator | None = None,
    ) -> None:
        self.rules, self.sampling, self.draws = rules, sampling, draws
        self._written = list(written)
        self._room = room
        self._ids: Tensor | None = None  # the tokens for the logits processors, with room for those to come
        self._count = 0

    def processed(self, logits: Tensor) -> Tensor:
        """Return logits ``(vocabulary,)`` as the logits processors change them."""
        if self._ids is None:
            self._ids = torch.zeros(1, len(self._written) + self._room, dtype=torch.long, device=logits.device)
        if self._count < len(self._written):  # all of them at first, then the last one
            more = torch.tensor(self._written[self._count :], device=logits.device)
            self._ids[0, self._count : len(self._written)] = more
            self._count = len(self._written)
        scores: Tensor = self.rules.processors(self._ids[:, : self._count], logits[None].clone())
        return scores[0]

    def wrote(self, token: int) -> None:
        """Note the token that was chosen."""
        self._written.append(token)


def seeded(seed: int, number: int) -> torch.Generator:
    """Return the generator of an answer's draws, which depend on the seed and the answer's number alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


def choose(choosers: Sequence[Chooser], logits: Tensor) -> list[Said]:
    """Choose the next token of every row from logits ``(R, vocabulary)``; one transfer from the device for all."""
    logits = logits.float()
    log_p = logits.log_softmax(-1)
    scores = logits
    if any(each.rules.processors for each in choosers):
        scores = torch.stack(
            [each.processed(row) if each.rules.processors else row for each, row in zip(choosers, logits, strict=True)]
        )
    tokens = scores.argmax(-1)  # (R,)
    drawn: dict[SamplingSettings, list[int]] = {}
    for row, each in enumerate(choosers):
        if each.sampling is not None:
            drawn.setdefault(each.sampling, []).append(row)
    for sampling, rows in drawn.items():
        uniform = torch.cat([torch.rand(1, generator=choosers[row].draws) for row in rows]).to(scores.device)
        if len(rows) == len(choosers):
            tokens = draw(scores, sampling, uniform)
        else:
            places = torch.tensor(rows, device=scores.device)
            tokens = tokens.index_copy(0, places, draw(scores[places], sampling, uniform))
    said = log_p.gather(-1, tokens[:, None])[:, 0]
    # A token's number is exact in float32: no vocabulary has 2**24 tokens.
    read = to_host([torch.stack([tokens.float(), said, entropy_of(log_p)])])[0].tolist()
    found = [Said(int(token), said, entropy) for token, said, entropy in zip(*read, strict=True)]
    for each, (token, _, _) in zip(choosers, found, strict=True):
        each.wrote(token)
    return found


def draw(scores: Tensor, sampling: SamplingSettings, uniform: Tensor) -> Tensor:
    """Draw tokens ``(n,)`` from scores ``(n, vocabulary)``, by uniform numbers ``(n,)`` in [0, 1)."""
    chances = (scores / sampling.temperature).softmax(-1)
    places = None
    if sampling.top_p < 1:
        chances, places = chances.sort(dim=-1, descending=True)
        # A token stays if those before it do not hold the share already, so the first always does.
        chances = chances.masked_fill(chances.cumsum(-1) - chances >= sampling.top_p, 0.0)
    total = chances.cumsum(-1)
    last = total[:, -1:]
    # Below the last sum whatever the rounding, so that the token it falls on has a chance.
    at = torch.minimum(uniform[:, None] * last, last * (1 - 2**-23))
    index = (total <= at).sum(-1, keepdim=True)
    return (index if places is None else places.gather(-1, index))[:, 0]
