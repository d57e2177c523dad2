"""Choose among the options of a question: what a state and the plain model say of each, and which one is the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from latent_tool.models.decoding import Decoded, ExtractedAnswer
from latent_tool.models.requests import ScoredOptions

__all__ = ["Chosen", "Said", "best_option", "choose"]

# What a state says: its answer as far as it was decoded, or what it gives to the options.
Said = Decoded | ScoredOptions

_ALMOST_ONE = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class Chosen:
    """The options of a question as texts, and their joint log-probabilities ``(n,)``, float32 on the CPU.

    ``log_probabilities``: by the state that was decoded; ``plain``: by the plain model; ``pool``: whether the options'
    probabilities are pooled over both; ``unsure``: whether the last option is the one that was added.
    """

    options: tuple[str, ...]
    log_probabilities: Tensor
    plain: Tensor
    pool: bool = True
    unsure: bool = False

    @cached_property
    def probabilities(self) -> list[float]:
        """Probability of every option among all of them; below 1, for the others have the rest, however little."""
        ours = self.log_probabilities.double()
        if self.pool:  # the geometric mean of both, as for free answers
            ours = (ours + self.plain.double()) / 2
        return [min(chance, _ALMOST_ONE) for chance in ours.softmax(-1).tolist()]

    @property
    def best(self) -> int:
        """The most probable option; of equal ones the first."""
        return max(range(len(self.options)), key=lambda option: self.probabilities[option])

    @property
    def probability(self) -> float:
        """Probability of the best option among all of them."""
        return self.probabilities[self.best]

    @property
    def mass(self) -> float:
        """Probability that the decoded state answers with any of the options."""
        return min(1.0, float(self.log_probabilities.double().logsumexp(-1).exp()))


def best_option(scored: ScoredOptions) -> tuple[int, float]:
    """Return the place of the first state's most probable option, and its probability among all of them."""
    probability, best = scored.log_probabilities[0].double().softmax(-1).max(-1)
    return int(best), float(probability)


def choose(
    options: Sequence[str], scored: ScoredOptions, plain: ScoredOptions, *, pool: bool = True, unsure: bool = False
) -> tuple[Chosen, Decoded, ExtractedAnswer]:
    """Choose the best option, and give it as if it had been decoded.

    Args:
        options: their texts.
        scored: by the state that is decoded, with the tokens.
        plain: by the plain model.
        pool, unsure: see ``Chosen``.
    """
    chosen = Chosen(tuple(options), scored.log_probabilities[0], plain.log_probabilities[0], pool, unsure)
    decoded = scored.decoded[0][chosen.best]
    text = options[chosen.best]
    return chosen, decoded, ExtractedAnswer(text, text, 0, len(decoded.tokens), True)
