"""Rows behind shared prefixes whose passes run in fixed shapes, compiled, where there is a shape for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from latent_tool.models.shared_prefix import SharedRows
from latent_tool.models.static_pass import (
    COLUMNS,
    KEPT,
    LENGTHS,
    Grid,
    Pass,
    Shape,
    StaticPasses,
    SuffixBuffers,
    bucket,
    prefix_bucket,
)

__all__ = ["StaticRows"]


class StaticRows(SharedRows):
    """Rows that run in compiled passes where they can, and as ``SharedRows``, which they equal, where they cannot.

    What follows the prefixes stands in the buffers of a pass until other rows need these, or a pass runs that is not
    compiled: then it is copied out.
    """

    _held: SuffixBuffers | None = None
    _grid: Grid | None = None
    _slots: Sequence[int] = ()
    _at: Tensor | None = None  # the slots, on the device

    def _extend(self, suffixes: Sequence[Tensor], keep: Sequence[int]) -> Tensor:
        passes: StaticPasses | None = self.decoder.static
        with self.decoder.forward_pass():
            if passes is not None:
                before = dict(self.__dict__)
                try:
                    logits = self._extend_fixed(passes, suffixes, keep)
                    if logits is not None:
                        return logits
                except Exception as error:  # a compiler raises what it likes
                    for name in ("_held", "_grid", "_slots", "_at"):  # keys and values are where they are
                        before.pop(name, None)
                    self.__dict__.update(before)
                    first = str(error).strip().partition("\n")[0][:200]
                    self.leave()
                    passes.give_up(f"{type(error).__name__}: {first}")
            self.leave()
            return super()._extend(suffixes, keep)

    def _extend_fixed(self, passes: StaticPasses, suffixes: Sequence[Tensor], keep: Sequence[int]) -> Tensor | None:
        """Run embeddings in a compiled pass; ``None``: there is none for them, and nothing has changed."""
        length = bucket(max(part.shape[1] for part in suffixes), LENGTHS)
        kept = bucket(len(keep), KEPT)
        taps = {(at.start, at.stop) for at in self.taps.values()}
        if length is None or kept is None or not keep or len(taps) > 1:
            return None
        used = self._places.shape[1]
        grid, slots, columns = self._grid, list(self._slots), None
        if self._held is not None and self._held.columns >= used + length:
            columns = self._held.columns
        else:
            columns = bucket(used + length, COLUMNS)
            placed = Grid.of(self.blocks)
            if placed is None:
                return None
            grid, slots = placed
        if columns is None or grid is None:
            return None
        longest = max(cache.layers[0].keys.shape[2] for cache in grid.caches)
        shape = Shape(grid.prefixes, grid.rows, prefix_bucket(longest), columns, length, kept, next(iter(taps), None))
        if not passes.fits(shape, grid.caches[0]):
            return None
        given = self.prefixes[0].positions
        axes = () if given is None else tuple(given.shape[:-2])
        fixed = passes.at(shape, grid, axes)
        expected = None
        if not fixed.ran:
            self.leave()
            expected = self._uncompiled(suffixes, keep)
        self._enter(fixed.suffix, grid, slots)
        logits = self._run_fixed(passes, fixed, suffixes, keep)
        if expected is not None:
            self._require_same(logits, expected)
        if not self._keeps:
            fixed.suffix.give(None)
            self._held = None
        return logits

    def _run_fixed(self, passes: StaticPasses, fixed: Pass, suffixes: Sequence[Tensor], keep: Sequence[int]) -> Tensor:
        """Run embeddings in a pass whose buffers hold these rows."""
        length = fixed.shape.length
        pads = [length - part.shape[1] for part in suffixes for _ in range(len(part))]
        places = self._next_places(length, pads)
        parts = [torch.nn.functional.pad(part, (0, 0, length - part.shape[1], 0)) for part in suffixes]
        positions = self._starts[:, None] + places.clamp_min(0)
        wanted = [length + place for place in keep]
        at = self._at
        assert at is not None
        fixed.fill(
            at,
            parts[0] if len(parts) == 1 else torch.cat(parts),
            positions.expand(*fixed.positions.shape[:-2], *positions.shape),
            wanted + wanted[-1:] * (fixed.shape.kept - len(wanted)),
            self._places,
            length,
        )
        logits, attention = passes.run(fixed, at)
        if attention is not None:
            for row in self.taps:
                columns = self.prefixes[row].columns
                self._tapped[row] = [attention[row][:, columns.to(attention.device)]]
        return logits[:, : len(keep)]

    def _uncompiled(self, suffixes: Sequence[Tensor], keep: Sequence[int]) -> Tensor:
        """What the plain pass gives for the same, without a change to these rows."""
        twin = copy.copy(self)
        twin.cache = copy.copy(self.cache)
        twin.cache.layers = [layer.fork() for layer in self.cache.layers]
        twin._place_buffer = twin._places = self._places.clone()
        twin._masks, twin._tapped = {}, {}
        return SharedRows._extend(twin, suffixes, keep)

    def _require_same(self, found: Tensor, expected: Tensor) -> None:
        """Raise ``RuntimeError`` if logits differ by more than rounding, at positions that have a meaning."""
        found, expected = found[:, -1].float(), expected[:, -1].float()
        tolerance = (1e-3 if self.decoder.dtype == torch.float32 else 5e-2) * max(1.0, float(expected.abs().max()))
        if not bool((found - expected).abs().max() <= tolerance):
            raise RuntimeError("the compiled pass differs from the plain one")

    # ------------------------------------------------------------------ whose buffers they are

    @property
    def _keeps(self) -> bool:
        """Whether keys and values are needed after this pass."""
        return any(layer.keep for layer in self.cache.layers)

    def _enter(self, buffers: SuffixBuffers, grid: Grid, slots: list[int]) -> None:
        """Bring keys and values into buffers; other rows that are there leave."""
        if self._held is buffers and buffers.owner is self:
            return
        self.leave()
        owner = buffers.owner
        if owner is not None:
            owner.leave()
        buffers.give(None)
        torch._foreach_zero_(buffers.every)  # whatever stood there: a masked NaN is still one
        used = self._places.shape[1]
        at = torch.tensor(slots, device=self.decoder.device)
        for own, layer in zip(buffers.layers, self.cache.layers, strict=True):
            if used and layer.is_initialized:
                own.keys[:, :, :used].index_copy_(0, at, layer.keys)
                own.values[:, :, :used].index_copy_(0, at, layer.values)
        buffers.give(self)
        self._held, self._grid, self._slots, self._at = buffers, grid, slots, at
        for layer in self.cache.layers:
            if layer.keep:
                layer.release()

    def leave(self) -> None:
        """Copy keys and values out of the buffers of a pass, if they are there."""
        held, self._held = self._held, None
        if held is None or held.owner is not self:
            return
        held.give(None)
        used = self._places.shape[1]
        at = self._at
        with torch.inference_mode():
            for own, layer in zip(held.layers, self.cache.layers, strict=True):
                layer.hold(own.keys[at, :, :used], own.values[at, :, :used])

    def fork(self, rows: Sequence[int]) -> StaticRows:
        with self.decoder.forward_pass():
            self.leave()
            forked = super().fork(rows)
        assert isinstance(forked, StaticRows)
        return forked

    def select(self, rows: Sequence[int]) -> None:
        with self.decoder.forward_pass():
            if self._held is not None:
                self._slots = [self._slots[row] for row in rows]
                self._at = torch.tensor(self._slots, device=self.decoder.device)
            super().select(rows)

    def remember(self, cells: Sequence[tuple[int, ...]]) -> None:
        with self.decoder.forward_pass():
            self.leave()
            super().remember(cells)
