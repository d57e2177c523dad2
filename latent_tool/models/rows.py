"""Rows that continue prefixes: what scoring, attention, decoding and teacher forcing are written over.

There are two kinds: rows that share their prefixes and run as one batch (``shared_prefix.SharedRows``), and rows that
each have a cache of their own (``own_rows.OwnRows``), for models whose layers do not fit the first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, TypeVar

from torch import Tensor

from latent_tool.models.prefix import Prefix, Stem, Suffix

__all__ = ["Beginning", "Rows", "RowsT"]

T = TypeVar("T")
RowsT = TypeVar("RowsT", bound="Rows")


class Beginning(NamedTuple):
    """Where a row begins: after a prefix, with what is known of its cells and the suffix that is still to be run."""

    prefix: Prefix
    stem: Stem | None
    suffix: Suffix


class Rows(ABC):
    """Rows that each continue a prefix.

    ``taps``: rows whose attention to the image cells is to be read in the next pass, and at which positions, counted
    from the end of the row.
    """

    # Whether rows run together behind prefixes that are not copied, and what they compute of cells outlives them.
    shared: ClassVar[bool]
    taps: dict[int, slice]

    @classmethod
    def batches(cls, requests: Sequence[T]) -> list[Sequence[T]]:
        """Return the requests in groups whose rows may run together: all of them, or each alone."""
        return [requests] if cls.shared else [[each] for each in requests]

    @staticmethod
    @abstractmethod
    def known(prefix: Prefix, cells: Sequence[int]) -> Stem | None:
        """Return what is known of cells that are injected after a prefix."""

    @abstractmethod
    def extend(self, suffixes: Sequence[Suffix], keep: Sequence[int]) -> Tensor:
        """Run the next embeddings of every row; logits ``(R, len(keep), vocabulary)``.

        Args:
            suffixes: of one or more adjacent rows each; their lengths may differ.
            keep: where logits are wanted, counted from the end of a row (-1 is its last position), ascending. What
                stands there of a row that is shorter has no meaning.
        """

    @abstractmethod
    def write(self, tokens: Sequence[Sequence[int]], keep: Sequence[int]) -> Tensor:
        """Run the next tokens of every row, equally many of each; logits ``(R, len(keep), vocabulary)``."""

    @abstractmethod
    def fork(self: RowsT, rows: Sequence[int]) -> RowsT:
        """Return rows that go on from some of these, each as often as it is named, and leave these as they are.

        ``rows`` are in ascending order.
        """

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows only, given in ascending order."""

    @abstractmethod
    def attention(self, row: int) -> Tensor:
        """Return the attention ``(positions, C)`` of a tapped row, mean over layers and heads, float32."""

    @abstractmethod
    def remember(self, cells: Sequence[tuple[int, ...]]) -> None:
        """Keep what the first pass computed of the cells that every row begins with, where that is of use later."""
