"""Passes in fixed shapes, in every family, and under ``torch.compile``: one graph a shape, and the same numbers.

The backend is ``eager``: the graph is captured whole (``fullgraph=True``) and run by torch's own kernels. That needs no
C++ compiler, and is what every backend begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive_model import CLOSE, QUESTION, draw_latents
from tiny_checkpoints import loaded, picture
from torch import Tensor

from latent_tool.models.prefix import Prefix, Stems
from latent_tool.models.requests import Decode, Score
from latent_tool.models.static_pass import Pass, StaticPasses
from latent_tool.models.vlm import VisionLanguageModel


class Uncompiled(StaticPasses):
    """The passes in fixed shapes, with nothing compiled."""

    def _compiled(self, function: Callable[[Pass], Any]) -> Callable[[Pass], Any]:
        return function


@contextmanager
def with_passes(vlm: VisionLanguageModel, passes: StaticPasses) -> Iterator[StaticPasses]:
    vlm.static = passes
    try:
        yield passes
    finally:
        vlm.static = None


def answers(vlm: VisionLanguageModel, prefix: Prefix) -> list[Tensor]:
    """States of different lengths with and without their attention, and the tokens of two answers that begin alike."""
    found = []
    latents = draw_latents(vlm, 4)
    for count, cells in ((3, [(), (1, 2), (3,)]), (2, [(1,), (3, 3, 1)]), (4, [()] * 4)):
        for read in (count, 1, 0):
            (scored,) = vlm.score_many([Score(replace(prefix, stems=Stems()), latents[:count], cells, attended=read)])
            found += [scored.answer, scored.latents, *([] if scored.attention is None else [scored.attention])]
    for decoded in vlm.decode_many([Decode(prefix, latents[0], (), 8), Decode(prefix, latents[1], (1,), 6)]):
        assert not isinstance(decoded, Exception)
        found += [torch.tensor(decoded.tokens), decoded.log_probabilities]
    return found


def few(vlm: VisionLanguageModel, prefix: Prefix) -> list[Tensor]:
    """States of different lengths with their attention, and tokens of rows, one of which leaves: two shapes."""
    latents = draw_latents(vlm, 4)
    found = []
    for count, cells in ((3, [(), (1, 2), (3,)]), (2, [(1,), (3, 3, 1)]), (4, [()] * 4)):
        (scored,) = vlm.score_many([Score(replace(prefix, stems=Stems()), latents[:count], cells, attended=count)])
        assert scored.attention is not None
        found += [scored.answer, scored.latents, scored.attention]
    rows = vlm.kind_of_rows(prefix)(vlm, [prefix] * 4)
    for step in range(6):
        if step == 3:
            rows.select([0, 2, 3])
        found.append(rows.write([[5 + step]] * (4 if step < 3 else 3), [-1]))
    return found


def test_passes_in_fixed_shapes_equal_the_plain_ones(vlm: VisionLanguageModel) -> None:
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    expected = answers(vlm, prefix)
    with with_passes(vlm, Uncompiled(vlm)) as passes:
        found = answers(vlm, prefix)
    assert passes.failure is None
    assert bool(passes.passes) == vlm.shares_prefixes(prefix)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_as_many_graphs_are_compiled_as_there_are_shapes(family: str) -> None:
    """Each is captured whole, once, whatever the rows, lengths and tokens; the same numbers as without.

    A decoder whose positions have three numbers, and Llama's, which others have, too; that the fixed shapes give the
    same numbers is tried above, in every family.
    """
    vlm = loaded(family)
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    graphs = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    other = vlm.prefill(vlm.prepare([picture()], QUESTION + " and what is blue?"))
    expected = [*few(vlm, prefix), *few(vlm, other)]
    try:
        with with_passes(vlm, StaticPasses(vlm, backend=count)) as passes:
            found = few(vlm, prefix)
            compiled = graphs
            found += few(vlm, other)
    finally:
        torch._dynamo.reset()
    assert passes.failure is None
    assert compiled == graphs == len(passes.passes) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
