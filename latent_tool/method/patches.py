"""Which image cells each latent proposes to inject: the ones it attends to most."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from torch import Tensor

__all__ = ["propose"]


def propose(
    attention: Tensor, injected: Collection[int], count: int, kind: Literal["new", "top"], room: int
) -> list[tuple[int, ...]]:
    """Cells proposed by every latent, best first, given what is already injected.

    Args:
        attention: ``(L, C)``, attention of the latents to the image cells.
        injected: cells injected so far.
        count: cells a latent looks at.
        kind: ``"new"``: its top ``count`` cells not yet injected; ``"top"``: its top ``count`` cells, of which the new
            ones are proposed.
        room: cells that may still be injected; longer proposals are cut.
    """
    taken = set(injected)
    proposals = []
    for ranking in attention.argsort(dim=-1, descending=True, stable=True).tolist():
        if kind == "new":
            cells = [cell for cell in ranking if cell not in taken][:count]
        else:
            cells = [cell for cell in ranking[:count] if cell not in taken]
        proposals.append(tuple(cells[:room]))
    return proposals
