"""Rows behind shared prefixes whose passes run in fixed shapes, compiled, where there is a shape for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from latent_tool.models.attention import mean_over_layers
from latent_tool.models.memory import out_of_memory
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
                failure: str | None = None
                before = dict(self.__dict__)
                try:
                    logits = self._extend_fixed(passes, suffixes, keep)
                    if logits is not None:
                        return logits
                except Exception as error:  # a compiler raises what it likes
                    first = str(error).strip().partition("\n")[0][:200]
                    failure, no_memory = f"{type(error).__name__}: {first}", out_of_memory(error)
                # Outside the handler, whose traceback holds on to the tensors of the attempt.
                if failure is not None:
                    for name in ("_held", "_grid", "_slots", "_at"):  # keys and values are where they are
                        before.pop(name, None)
                    self.__dict__.update(before)
                    self._tapped.clear()
                    if no_memory:
                        passes.make_room(failure)
                    else:
                        passes.give_up(failure)
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
        if fixed.unproven:
            self.leave()
            expected = self._uncompiled(suffixes, keep)
        self._enter(fixed.suffix, grid, slots)
        logits = self._run_fixed(passes, fixed, suffixes, keep)
        if expected is not None and self._require_same(suffixes, keep, logits, expected):
            fixed.unproven -= 1
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

    def _uncompiled(self, suffixes: Sequence[Tensor], keep: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """What the plain pass gives for the same, without a change to these rows: logits, and attention by row."""
        twin = copy.copy(self)
        twin.cache = copy.copy(self.cache)
        twin.cache.layers = [layer.fork() for layer in self.cache.layers]
        twin._place_buffer = twin._places = self._places.clone()
        twin._masks, twin._tapped = {}, {}
        logits = SharedRows._extend(twin, suffixes, keep)
        return logits, {row: mean_over_layers(layers) for row, layers in twin._tapped.items()}

    def _require_same(
        self, suffixes: Sequence[Tensor], keep: Sequence[int], found: Tensor, plain: tuple[Tensor, dict[int, Tensor]]
    ) -> bool:
        """Say whether a pass was compared with the plain one, where both say something.

        Raises ``RuntimeError`` if they differ by more than rounding.
        """
        expected, attention = plain
        share = 1e-3 if self.decoder.dtype == torch.float32 else 2e-2
        # Before a shorter row's first token stands padding, which means nothing; neither do infinite logits.
        lengths = [part.shape[1] for part in suffixes for _ in range(len(part))]
        meant = torch.tensor([[-place <= length for place in keep] for length in lengths], device=found.device)
        meant = meant[..., None] & expected.isfinite()
        pairs = [(found.float()[meant], expected.float()[meant])]
        pairs += [(self._tapped[row][0].float(), each.float()) for row, each in attention.items()]
        for one, other in pairs:
            if not other.numel() or not bool(other.isfinite().all()):
                continue
            if not bool((one - other).abs().max() <= share * max(1.0, float(other.abs().max()))):
                raise RuntimeError("the compiled pass differs from the plain one")
        return pairs[0][1].numel() > 0

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
        """Copy keys and values out of the buffers of a pass, if they are there; all of them, or none."""
        held, at = self._held, self._at
        if held is None or held.owner is not self:
            self._held = None
            return
        used = self._places.shape[1]
        with torch.inference_mode():
            copies = [(own.keys[at, :, :used], own.values[at, :, :used]) for own in held.layers]
        for layer, (keys, values) in zip(self.cache.layers, copies, strict=True):
            layer.hold(keys, values)
        held.give(None)
        self._held = None

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
