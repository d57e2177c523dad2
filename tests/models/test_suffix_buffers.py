"""Rows that grow token by token in buffers, against their naive twin, which concatenates and keeps lists."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_tool.engine.engine import Engine
from latent_tool.models.prefix import Prefix
from latent_tool.models.shared_prefix import SharedRows
from latent_tool.models.suffix_cache import SuffixLayer


class Naive(SharedRows):
    """The obvious way: every token copies all columns, and every pass writes down all places anew."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.columns = self._places.tolist()

    def _next_places(self, length: int, pads: Any) -> Tensor:
        for row, pad in enumerate(pads):
            begin = self.lengths[row]
            self.columns[row] += [-1] * pad + list(range(begin, begin + length - pad))
            self.lengths[row] += length - pad
        self._places = torch.tensor(self.columns)
        self._padded = [-1 in row for row in self.columns]
        return self._places[:, -length:]

    def select(self, rows: Any) -> None:
        self.columns = [self.columns[row] for row in rows]
        super().select(rows)


def concatenate(self: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    if self.is_initialized:
        keys, values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
    if self.keep:
        self.keys, self.values, self.is_initialized = keys, values, True
    return keys, values


def pick(self: Any, index: Tensor) -> None:
    if self.keys is not None:
        self.keys, self.values = self.keys[index], self.values[index]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "length"), [(0, 70), (1, 150), (3, 70)])
def test_buffers_give_the_very_same_logits(
    engine: Engine, prefixes: list[Prefix], seed: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of different beginnings leave one after another; room is made twice, and over 150 tokens three times."""
    vlm, draw = engine.vlm, random.Random(seed)
    count = 6
    rows = [prefixes[0]] * 4 + [prefixes[1]] * 2
    stems = [prefixes[0].stems.find((3, 4)) if seed % 2 and row in (1, 2) else None for row in range(count)]
    begun = [vlm.written([7, 8, 9][: draw.randint(1, 3)]) for _ in range(count)]
    script = []
    live = count
    for _ in range(length):
        leaves = live > 2 and draw.random() < 4.5 / length
        going = sorted(draw.sample(range(live), live - 1)) if leaves else None
        live -= leaves
        script.append((going, [draw.randrange(20, 60) for _ in range(live)]))

    def run(kind: type[SharedRows]) -> list[Tensor]:
        batch = kind(vlm, rows, stems)
        logits = [batch.extend(begun, [-1])]
        for going, tokens in script:
            if going is not None:
                batch.select(going)
            logits.append(batch.write([[token] for token in tokens], [-1]))
        return logits

    found = run(SharedRows)
    with monkeypatch.context() as patch:
        patch.setattr(SuffixLayer, "update", concatenate)
        patch.setattr(SuffixLayer, "select", pick)
        expected = run(Naive)
    assert len(found) == 1 + length and all(map(torch.equal, found, expected))


@pytest.mark.slow
def test_room_is_made_in_few_steps_and_nothing_is_copied_in_between(engine: Engine, prefixes: list[Prefix]) -> None:
    batch = SharedRows(engine.vlm, [prefixes[0]] * 3)
    places: set[tuple[int, ...]] = set()
    for _ in range(200):
        batch.write([[5], [6], [7]], [-1])
        places.add(tuple(layer.keys.data_ptr() for layer in batch.cache.layers))
    assert len(places) <= 1 + 3  # the first token, and room for 64, 128 and 256
    before = [layer.keys.data_ptr() for layer in batch.cache.layers]
    batch.select([0, 2])
    assert [layer.keys.data_ptr() for layer in batch.cache.layers] == before
    assert [len(layer.keys) for layer in batch.cache.layers] == [2] * len(before)
