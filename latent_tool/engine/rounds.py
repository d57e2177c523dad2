"""A round of the search as what crosses the API: a row of the trace, and a step for those who watch."""

from __future__ import annotations

from collections.abc import Sequence

from latent_tool.method.search import Round
from latent_tool.models.prefix import Cell
from latent_tool.schema import InjectedCell, ReasoningStep, TraceRow
from latent_tool.settings import Budget

__all__ = ["search_step", "trace_row"]


def trace_row(row: Round) -> TraceRow:
    """Return the row of the trace that a round makes."""
    return TraceRow(
        round=row.number,
        reward=row.reward,
        best_reward=row.best_reward,
        mean_sampled_reward=row.mean_sampled_reward,
        top_k_mass=row.top_k_mass,
        # Where the reward is read at the latents alone, nothing says that the answer's logits are finite.
        first_token_probability=min(1.0, row.first_token_probability) if row.first_token_probability >= 0 else None,
        sigma=row.sigma,
        accepted=list(row.accepted),
        candidates=row.candidates,
        discarded=row.discarded,
        seconds=row.seconds,
    )


def search_step(row: Round, cells: Sequence[Cell], budget: Budget) -> ReasoningStep:
    """Return the step that tells of a round; ``cells`` are those of the prompt."""
    return ReasoningStep(
        phase="search",
        trace=trace_row(row),
        injected=[InjectedCell(image=cells[cell].image, cell=cell, box=cells[cell].box) for cell in row.accepted],
        iterations=budget.iterations,
    )
