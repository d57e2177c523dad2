"""The pass over rows behind a shared prefix under ``torch.compile``: one graph without breaks, and the same numbers.

The backend is ``eager``: the graph is captured whole (``fullgraph=True``) and run by torch's own kernels. That needs no
C++ compiler, and is what every backend begins with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from naive_model import CLOSE, QUESTION, draw_latents
from tiny_checkpoints import loaded, picture
from torch import Tensor

from latent_tool.models.prefix import Prefix, Stems
from latent_tool.models.requests import Score
from latent_tool.models.shared_prefix import SharedRows
from latent_tool.models.vlm import VisionLanguageModel


def passes(vlm: VisionLanguageModel, prefix: Prefix) -> list[Tensor]:
    """States of different lengths with their attention, and a token of each of two rows."""
    prefix = replace(prefix, stems=Stems())
    (scored,) = vlm.score_many([Score(prefix, draw_latents(vlm, 3), [(), (1, 2), (3,)], attention=True)])
    assert scored.attention is not None
    rows = SharedRows(vlm, [prefix] * 2)
    return [scored.answer, scored.latents, scored.attention, rows.write([[5], [6]], [-1])]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "smolvlm"])
def test_the_pass_behind_a_shared_prefix_is_one_graph(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = loaded(family)
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    assert vlm.shares_prefixes(prefix)
    expected = passes(vlm, prefix)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(vlm.model.forward, fullgraph=True, backend=count)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(vlm.model, "forward", compiled)
            found = passes(vlm, prefix)
    finally:
        torch._dynamo.reset()
    assert 1 <= graphs <= 2  # one a pass at most
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
