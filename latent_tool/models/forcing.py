"""Teacher forcing: what the model says of given tokens after a state, some logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from latent_tool.errors import NumericalError
from latent_tool.method.reward import to_host
from latent_tool.models.continuing import Continuing, RowsKind, grouped
from latent_tool.models.own_rows import OwnRows
from latent_tool.models.prefix import Prefix, Suffix
from latent_tool.models.requests import TokenEntropies, TokenLogProbabilities
from latent_tool.models.rows import Rows

__all__ = ["teacher_forced"]

# Logits that are held at once: of several questions, if all fit, else of some tokens of one.
_MOST_LOGITS = 2**26


def teacher_forced(
    model: Continuing,
    requests: Sequence[TokenLogProbabilities | TokenEntropies],
    read: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """Return what is read of the logits that predict the tokens of every request after its state, ``(n,)`` on the CPU.

    Args:
        read: is given logits ``(m, vocabulary)``, float32, and the tokens ``(m,)`` they predict; gives ``(m,)``.

    Raises ``NumericalError`` if that is not finite.
    """
    suffixes = [
        model.suffix(
            each.prefix, None if each.latents is None else each.latents[None], [each.patches], each.tokens[:-1]
        )
        for each in requests
    ]
    # Of a suffix that begins with the answer, the first token is predicted by the prefix.
    counts = [min(len(each.tokens), suffix.length) for each, suffix in zip(requests, suffixes, strict=True)]
    tokens = [torch.tensor(list(each.tokens), dtype=torch.long) for each in requests]
    values: list[list[Tensor]] = [[] for _ in requests]

    def note(row: int, logits: Tensor) -> None:
        ahead, tokens[row] = tokens[row][: len(logits)], tokens[row][len(logits) :]
        values[row].append(read(logits.float(), ahead.to(logits.device)))

    for row, (each, count) in enumerate(zip(requests, counts, strict=True)):
        if count < len(each.tokens):
            note(row, each.prefix.last_logits[None])
    # A row without a suffix has nothing to run.
    asked = [row for row in grouped([each.prefix for each in requests]) if counts[row]]
    kind = model.kind_of_rows(requests[0].prefix)
    most = max(counts, default=0)
    fits = len(asked) * most * requests[0].prefix.last_logits.shape[-1] <= _MOST_LOGITS
    for batch in kind.batches(asked) if fits else [[row] for row in asked]:
        if not batch:
            continue
        count = max(counts[row] for row in batch)
        parts = [(requests[row].prefix, suffixes[row]) for row in batch]
        for logits in _in_pieces(model, kind, parts, count):
            for row, said in zip(batch, logits, strict=True):
                # A piece of one row is all its own; the rows of several are as long as the longest.
                note(row, said[max(len(said) - counts[row], 0) :])
    found = []
    for numbers in to_host([torch.cat(each) if each else torch.zeros(0) for each in values]):
        found.append(numbers)
        if not bool(found[-1].isfinite().all()):
            raise NumericalError(
                "The model's logits are not finite for this answer.", "Load the model in float32 or bfloat16."
            )
    return found


def _in_pieces(
    model: Continuing, kind: RowsKind, parts: Sequence[tuple[Prefix, Suffix]], count: int
) -> Iterator[Tensor]:
    """Logits ``(R, m, vocabulary)`` at the last ``count`` positions of rows, some positions at a time.

    Of several rows all positions fit.
    """
    most = max(1, _MOST_LOGITS // (len(parts) * parts[0][0].last_logits.shape[-1]))
    length = max(suffix.length for _, suffix in parts)
    first = length - count
    ends = [*range(first + most, length, most), length]
    # A single row shares its prefix with nobody: a cache of its own is faster.
    rows_kind = kind if len(parts) > 1 else OwnRows
    rows: Rows = rows_kind(model, [prefix for prefix, _ in parts], keep=len(ends) > 1)
    for begin, end in pairwise([0, *ends]):
        wanted = range(max(first - begin, 0) - (end - begin), 0)
        yield rows.extend([suffix.part(begin, end) for _, suffix in parts], wanted)
