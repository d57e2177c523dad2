"""Rows that each have a cache of their own: for every model, at the price of a copy of the prefix a row."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from latent_tool.errors import ModelNotSupportedError
from latent_tool.models.attention import tap_attention
from latent_tool.models.cache import fork_cache
from latent_tool.models.prefill import Prefilling
from latent_tool.models.prefix import Prefix, Stem, Suffix
from latent_tool.models.rows import Rows

__all__ = ["OwnRows"]


class OwnRows(Rows):
    """Rows that run one after another, or, if no further pass follows, those of one suffix as a batch.

    Args:
        decoder: the model.
        prefixes: the prefix of every row.
        stems: nothing is known of any cells here.
        keep: whether another pass follows.
    """

    shared = False

    def __init__(
        self,
        decoder: Prefilling,
        prefixes: Sequence[Prefix],
        stems: Sequence[Stem | None] | None = None,
        keep: bool = True,
    ) -> None:
        if any(stem is not None for stem in stems or ()):
            raise ValueError("rows with a cache of their own begin right after the prefix")
        self.decoder = decoder
        self.prefixes = list(prefixes)
        self.keep = keep
        self.taps = {}
        self._tapped: dict[int, Tensor] = {}
        self._caches: list[DynamicCache | None] = [None] * len(prefixes)
        self._starts = [0] * len(prefixes)  # tokens after the prefix that are in the cache

    @staticmethod
    def known(prefix: Prefix, cells: Sequence[int]) -> Stem | None:
        return None

    def extend(self, suffixes: Sequence[Suffix], keep: Sequence[int]) -> Tensor:
        logits: list[Tensor] = []
        row = 0
        for suffix in suffixes:
            count = len(suffix.embeddings)
            together = not self.keep and not self.taps and len({id(each) for each in self.prefixes[row:][:count]}) == 1
            for part in [suffix] if together else suffix.split():
                logits.append(self._run(row, part, keep))
                row += len(part.embeddings)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _run(self, row: int, suffix: Suffix, keep: Sequence[int]) -> Tensor:
        """Run a suffix of one row, or of several that nothing follows."""
        prefix = self.prefixes[row]
        if not suffix.length:
            return prefix.last_logits.new_zeros(1, len(keep), len(prefix.last_logits))
        places = [max(suffix.length + place, 0) for place in keep]
        if row in self.taps:
            return self._run_tapped(row, suffix, places)
        output = self.decoder.continue_after(prefix, suffix, places, self._caches[row], self._starts[row])
        if self.keep:
            self._caches[row] = getattr(output, self.decoder.cache_name)
            self._starts[row] += suffix.length
        logits: Tensor = output.logits
        return logits

    def _run_tapped(self, row: int, suffix: Suffix, places: Sequence[int]) -> Tensor:
        """Run the suffix of one row, and read its attention; no further pass follows."""
        model, prefix = self.decoder.model, self.prefixes[row]
        with self.decoder.forward_pass(), tap_attention(model, self.taps[row], prefix.columns) as tap:
            given = {} if tap.switched else {"output_attentions": True}
            output = self.decoder.continue_after(prefix, suffix, places, self._caches[row], self._starts[row], **given)
        if not tap.switched:
            for layer in output.attentions or ():
                if layer is not None:
                    tap.add(layer[:, :, tap.rows].float())
        if not tap.layers:
            raise ModelNotSupportedError(
                f"{type(model).__name__} does not show its attention.",
                "Load it with attn_implementation='eager', or search without patches.",
            )
        self._tapped[row] = tap.mean()[0]
        logits: Tensor = output.logits
        return logits

    def write(self, tokens: Sequence[Sequence[int]], keep: Sequence[int]) -> Tensor:
        return self.extend([self.decoder.written(each) for each in tokens], keep)

    def fork(self, rows: Sequence[int]) -> OwnRows:
        forked = copy.copy(self)
        forked.taps, forked._tapped = {}, {}
        forked.select(rows)
        forked._caches = [None if cache is None else fork_cache(cache) for cache in forked._caches]
        return forked

    def select(self, rows: Sequence[int]) -> None:
        self.prefixes = [self.prefixes[row] for row in rows]
        self._caches = [self._caches[row] for row in rows]
        self._starts = [self._starts[row] for row in rows]

    def attention(self, row: int) -> Tensor:
        return self._tapped[row]

    def remember(self, cells: Sequence[tuple[int, ...]]) -> None:
        """Keep nothing: a cache ends with its row."""
