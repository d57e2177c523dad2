"""How confident a next-token distribution is: the quantity the search maximises.

Every formula maps logits ``(..., vocabulary)`` to one number per position ``(...)``; the reward of a state is the mean
over the positions it is read at. All probabilities come from the full softmax, computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latent_tool.settings import SearchSettings

__all__ = [
    "Logits",
    "Reading",
    "entropy",
    "entropy_of",
    "entropy_reward",
    "neg_log_probability",
    "read_on_device",
    "read_reward",
    "renormalised_top_k_entropy",
    "rounded",
    "to_host",
    "top_k_entropy",
    "top_k_mass",
]


class Logits(NamedTuple):
    """Next-token logits of ``N`` candidate states.

    ``latents``: ``(N, L, vocabulary)``, at the latent positions (``(N, 0, vocabulary)`` if they were not asked for).
    ``answer``: ``(N, vocabulary)``, at the position that predicts the first answer token (the last latent itself when
    nothing stands between). ``attention``: ``(n, L, C)`` of the latents of the first n states to the image cells, if it
    was read. ``options``: ``(N, n)``, joint log-probabilities of given answers, if the reward is read there.
    """

    latents: Tensor
    answer: Tensor
    attention: Tensor | None = None
    options: Tensor | None = None


class Reading(NamedTuple):
    """What the logits of ``N`` states say, each ``(N,)``, float64 on the CPU.

    ``reward``: what the search maximises. ``top_k_mass``: probability of the k most probable tokens, mean over the
    positions the reward is read at; of all options, if it is read there. ``first_token_probability``: of the most
    probable first answer token.
    """

    reward: Tensor
    top_k_mass: Tensor
    first_token_probability: Tensor


def entropy(logits: Tensor) -> Tensor:
    """Entropy ``H = - sum_w P(w) ln P(w)`` in nats; ``(..., vocabulary)`` -> ``(...)``."""
    return entropy_of(logits.float().log_softmax(-1))


def entropy_of(log_p: Tensor) -> Tensor:
    """Return the entropy in nats from log-probabilities of any number of tokens; ``(..., n)`` -> ``(...)``."""
    # A token ruled out has log-probability -inf and contributes 0, not NaN.
    return -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)


def _top_k_log_probabilities(logits: Tensor, k: int) -> Tensor:
    """Log-probabilities of the k most probable tokens, ``(..., k)``, from the full softmax."""
    logits = logits.float()
    top = logits.topk(min(k, logits.shape[-1]), dim=-1).values
    return top - logits.logsumexp(-1, keepdim=True)


def top_k_mass(logits: Tensor, k: int) -> Tensor:
    """Return the probability mass of the k most probable tokens, in [0, 1]."""
    return _top_k_log_probabilities(logits, k).exp().sum(-1)


def top_k_entropy(logits: Tensor, k: int) -> Tensor:
    """Return the paper's reward, ``1 - H_k`` with ``H_k(P) = - sum over the k most probable w of P(w) ln P(w)``.

    Lies in ``[1 - ln k, 1]`` for ``k >= 3``. **Not monotone**: for a flat distribution over a large vocabulary the
    top-k terms vanish and the reward tends to 1, so a search can win it by flattening.
    """
    log_p = _top_k_log_probabilities(logits, k)
    return 1 - entropy_of(log_p)


def renormalised_top_k_entropy(logits: Tensor, k: int) -> Tensor:
    """``1 - H(Q)``, ``Q`` the k largest probabilities over their sum; lowest, ``1 - ln k``, for uniform logits."""
    log_p = _top_k_log_probabilities(logits, k)
    return 1 - entropy_of(log_p - log_p.logsumexp(-1, keepdim=True))


def entropy_reward(logits: Tensor, k: int) -> Tensor:
    """``1 - H(P) / ln |V|`` over the full vocabulary, in [0, 1]; ``k`` is not used."""
    return 1 - entropy(logits) / math.log(logits.shape[-1])


def neg_log_probability(logits: Tensor, k: int) -> Tensor:
    """Minus the mean log-probability of the top k tokens, in nats; large for peaked *and* for flat distributions."""
    return -_top_k_log_probabilities(logits, k).mean(-1)


_FORMULAS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "top_k_entropy": top_k_entropy,
    "renormalised_top_k_entropy": renormalised_top_k_entropy,
    "entropy": entropy_reward,
    "neg_log_probability": neg_log_probability,
}


def read_reward(logits: Logits, settings: SearchSettings) -> Reading:
    """Reward of every candidate, rounded to 1e-6 so that the composition of a batch does not decide near-ties.

    A candidate whose logits are not finite gets a reward of NaN.
    """
    (read,) = to_host([read_on_device(logits, settings)])
    read = read.double()
    return Reading(rounded(read[0]), read[1], read[2])


def rounded(rewards: Tensor) -> Tensor:
    """Rewards rounded to 1e-6; float64 on the CPU, elsewhere as they are, for not every device knows float64."""
    rewards = rewards.double() if rewards.device.type == "cpu" else rewards
    return (rewards * 1e6).round() / 1e6


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Bring tensors of numbers to the CPU as float32, those of one device in one transfer."""
    found: list[Tensor | None] = [None] * len(tensors)
    for device in {each.device for each in tensors}:
        places = [place for place, each in enumerate(tensors) if each.device == device]
        flat = torch.cat([tensors[place].float().flatten() for place in places]).cpu()
        for place, part in zip(places, torch.split(flat, [tensors[place].numel() for place in places]), strict=True):
            found[place] = part.view(tensors[place].shape)
    return [each for each in found if each is not None]


def read_on_device(logits: Logits, settings: SearchSettings) -> Tensor:
    """Return what ``Reading`` holds of every candidate, ``(3, N)`` float32 on the logits' device, the reward not
    rounded.

    Read in the options, the reward is that of the distribution over the options alone: their log-probabilities are
    the logits, and no state can gain by flattening it.
    """
    if settings.reward_position == "options":
        if logits.options is None:
            raise ValueError("the reward is read in the options, which were not scored")
        rewards = _FORMULAS[settings.reward](logits.options, settings.top_k)  # (N,)
        first = _top_k_log_probabilities(logits.answer, 1)[:, 0].exp().to(rewards.device)
        return torch.stack([rewards, logits.options.exp().sum(-1), first])
    if settings.reward_position == "latents":
        positions = logits.latents
    elif settings.reward_position == "answer":
        positions = logits.answer[:, None]
    else:
        positions = torch.cat([logits.latents, logits.answer[:, None]], dim=1)
    per_position = _FORMULAS[settings.reward](positions, settings.top_k)  # (N, positions)
    top = _top_k_log_probabilities(positions, settings.top_k)  # (N, positions, k), most probable first
    # The answer's position is the last one, unless the reward is not read there.
    first = _top_k_log_probabilities(logits.answer, 1) if settings.reward_position == "latents" else top[:, -1]
    return torch.stack([per_position.mean(-1), top.exp().sum(-1).mean(-1), first[:, 0].exp()])
