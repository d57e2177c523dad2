"""Scores and attention of states after a prefix, over rows that share it where the model's layers allow that.

All passes are exact: they equal one full forward over ``[prefix | V | opening | T | closing, tail | answer]``. Whether
rows may share prefixes is found out once, by comparing both kinds of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latent_tool.method.reward import Logits
from latent_tool.models.memory import out_of_memory
from latent_tool.models.own_rows import OwnRows
from latent_tool.models.prefill import Prefilling
from latent_tool.models.prefix import Prefix, Stem, Stems, Suffix, common_length
from latent_tool.models.requests import Attend, Score
from latent_tool.models.rows import Beginning, Rows
from latent_tool.models.shared_prefix import SharedRows, hides_exactly, install, installed, layers_fit
from latent_tool.models.static_pass import Compile, StaticPasses
from latent_tool.models.static_rows import StaticRows

__all__ = ["Continuing", "RowsKind", "grouped"]

RowsKind = type[SharedRows] | type[OwnRows]


class Continuing(Prefilling):
    """A model and its processor, and what comes after a prefix."""

    def __init__(self, model: PreTrainedModel, processor: Any, prefix_cache_bytes: int, compile: Compile) -> None:
        super().__init__(model, prefix_cache_bytes)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        # None: not known before the first question.
        per_layer = getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None)
        self._shares: bool | None = None if not per_layer and install(model) else False
        self.static = None if self._shares is False else StaticPasses.wanted(self, compile)

    # ------------------------------------------------------------------ rows

    def shares_prefixes(self, prefix: Prefix) -> bool:
        """Tell whether rows of this model can share a prefix without copying it; checked against rows of their own
        once.
        """
        # The lock: while another question reads its attention, another attention is set than the one installed.
        with self._lock:
            if self._shares is False or not installed(self.model):
                return False
            if self._shares is None:
                self._shares = self._sharing_is_exact(prefix)
            return self._shares and layers_fit(prefix.cache)

    def kind_of_rows(self, prefix: Prefix) -> RowsKind:
        """Return the kind of rows that continue a prefix."""
        if not self.shares_prefixes(prefix):
            return OwnRows
        return SharedRows if self.static is None else StaticRows

    def beginning(
        self,
        kind: RowsKind,
        prefix: Prefix,
        latents: Tensor | None,
        cells: Sequence[int],
        written: Sequence[int] = (),
    ) -> Beginning:
        """Return where the row of a state begins.

        Args:
            kind: of rows.
            prefix: what the state follows.
            latents: ``(L, d)``, or ``None`` for the plain model.
            cells: those that are injected.
            written: tokens after the latents.

        Without latents all cells are run: nothing else might be left to run, and nothing is known of the last one's
        logits.
        """
        if latents is None:
            return Beginning(prefix, None, self.suffix(prefix, None, [cells], written))
        stem = kind.known(prefix, cells)
        rest = cells if stem is None else cells[len(stem.cells) :]
        return Beginning(prefix, stem, self.suffix(prefix, latents[None], [rest], written))

    def begin(self, kind: RowsKind, beginnings: Sequence[Beginning]) -> tuple[Rows, Tensor]:
        """Return rows that have run what they begin with, and the logits ``(R, vocabulary)`` that follow it."""
        rows: Rows = kind(self, [each.prefix for each in beginnings], [each.stem for each in beginnings])
        logits = torch.stack([each.prefix.last_logits for each in beginnings])
        if any(each.suffix.length for each in beginnings):
            after = rows.extend([each.suffix for each in beginnings], [-1])[:, -1]
            begun = torch.tensor([each.suffix.length > 0 for each in beginnings], device=after.device)
            logits = torch.where(begun[:, None], after, logits)
        return rows, logits

    def _sharing_is_exact(self, prefix: Prefix) -> bool:
        """Compare both kinds of rows on states of different length, then on one that begins with cells seen before."""
        if not layers_fit(prefix.cache):
            return False
        tokens = prefix.inputs.tensors["input_ids"][0, :2].tolist()
        latents = self.embed(tokens)[None]
        prefix = replace(prefix, stems=Stems())
        windows = getattr(self.model.config.get_text_config(), "sliding_window", None) is not None
        for patches in ([(), (0,)], [(0, 0)]):
            request = Score(prefix, latents.expand(len(patches), -1, -1), patches)
            (exact,) = self.score_behind(OwnRows, [request])
            expected = exact.answer.float()
            try:
                (logits,) = self.score_behind(SharedRows, [request])
                if windows and not hides_exactly(prefix.cache):
                    return False
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
                if out_of_memory(error):
                    raise
                return False
            tolerance = 1e-3 if self.dtype == torch.float32 else 5e-2
            tolerance *= max(1.0, float(expected.abs().max()))
            if not bool((logits.answer.float() - expected).abs().max() <= tolerance):
                return False
        return True

    # ------------------------------------------------------------------ scoring

    def score(self, prefix: Prefix, latents: Tensor, patches: Sequence[Sequence[int]]) -> Logits:
        """Return logits of ``N`` states at the latents and where the answer begins; latents ``(N, L, d)``."""
        return self.score_many([Score(prefix, latents, patches)])[0]

    def score_many(self, requests: Sequence[Score]) -> list[Logits]:
        """``score`` for several questions: in one batch where prefixes can be shared, else one after another."""
        kind = self.kind_of_rows(requests[0].prefix)
        return [logits for some in kind.batches(requests) for logits in self.score_behind(kind, some)]

    def score_behind(self, kind: RowsKind, requests: Sequence[Score]) -> list[Logits]:
        """Score states in one pass of rows of a kind; of several questions only where the kind is shared."""
        prefixes: list[Prefix] = []
        stems: list[Stem | None] = []
        suffixes: list[Suffix] = []
        ran: list[tuple[int, ...]] = []  # the cells of every row
        taps: dict[int, slice] = {}
        places = {-1}
        asked: list[tuple[int, list[int], range]] = []
        for request in requests:
            cells = [tuple(each) for each in request.patches]
            stem = kind.known(request.prefix, min(cells, key=len)[: common_length(cells)])
            known = 0 if stem is None else len(stem.cells)
            groups = _by_length(cells)
            for members in groups:
                latents = request.latents if len(groups) == 1 else request.latents[members]
                suffixes.append(self.suffix(request.prefix, latents, [cells[row][known:] for row in members]))
            inputs = request.prefix.inputs
            after = len(inputs.markers.closing) + len(inputs.tail)
            at_latents = range(-after - request.latents.shape[1], -after)
            if not request.answer_only:
                places.update(at_latents)
            first, order = len(prefixes), [row for members in groups for row in members]
            asked.append((first, order, at_latents))
            if kind.shared:
                wanted = (first + row for row, state in enumerate(order) if state < request.attended)
                taps.update(dict.fromkeys(wanted, _positions(at_latents)))
            prefixes += [request.prefix] * len(cells)
            stems += [stem] * len(cells)
            ran += [cells[row] for row in order]
        added = any(
            len(cells) > (0 if stem is None else len(stem.cells)) for cells, stem in zip(ran, stems, strict=True)
        )
        keep = sorted(places)
        rows: Rows = kind(self, prefixes, stems, keep=kind.shared and added)
        rows.taps.update(taps)
        logits = rows.extend(suffixes, keep)
        rows.remember(ran)
        found = []
        for request, (first, order, at_latents) in zip(requests, asked, strict=True):
            part = logits[first : first + len(order)]
            read = None
            if request.attended and kind.shared:
                read = torch.stack(
                    [rows.attention(first + order.index(state)) for state in range(min(request.attended, len(order)))]
                )
            if order != sorted(order):
                part = part[torch.tensor(order, device=part.device).argsort()]
            begin = 0 if request.answer_only else keep.index(at_latents.start)
            count = 0 if request.answer_only else len(at_latents)
            found.append(Logits(part[:, begin : begin + count], part[:, -1], read))
        return found

    # ------------------------------------------------------------------ attention

    def attend(self, prefix: Prefix, latents: Tensor, patches: Sequence[int]) -> Tensor:
        """Return the attention ``(L, C)`` of the latents ``(L, d)`` to the image cells, mean over heads and layers,
        float32.
        """
        return self.attend_many([Attend(prefix, latents, patches)])[0]

    def attend_many(self, requests: Sequence[Attend]) -> list[Tensor]:
        """``attend`` for several questions."""
        kind = self.kind_of_rows(requests[0].prefix)
        found: list[Tensor] = []
        for some in kind.batches(requests):
            begun = [self.beginning(kind, each.prefix, each.latents, each.patches) for each in some]
            rows: Rows = kind(self, [each.prefix for each in begun], [each.stem for each in begun], keep=False)
            for row, each in enumerate(begun):
                at = each.suffix.latents
                rows.taps[row] = _positions(range(at.start - each.suffix.length, at.stop - each.suffix.length))
            rows.extend([each.suffix for each in begun], [-1])
            found += [rows.attention(row) for row in range(len(begun))]
        return found


def _positions(at: range) -> slice:
    """Positions that are counted from the end, as a slice."""
    return slice(at.start, at.stop or None)


def grouped(prefixes: Sequence[Prefix]) -> list[int]:
    """Return indices in an order in which equal prefixes stand together; the same order whenever it is asked for."""
    first: dict[int, int] = {}
    for index, prefix in enumerate(prefixes):
        first.setdefault(id(prefix), index)
    return sorted(range(len(prefixes)), key=lambda index: first[id(prefixes[index])])


def _by_length(patches: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of states that inject the same number of cells."""
    groups: dict[int, list[int]] = {}
    for index, cells in enumerate(patches):
        groups.setdefault(len(cells), []).append(index)
    return list(groups.values())
