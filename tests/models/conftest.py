"""What several tests of the models begin with."""

from __future__ import annotations

import pytest
from pictures import draw_shapes

from latent_tool.engine.engine import Engine
from latent_tool.models.prefix import Prefix
from latent_tool.models.requests import Score


@pytest.fixture(scope="module")
def prefixes(engine: Engine) -> list[Prefix]:
    """Prefixes of two questions about two pictures; of injected cells of the first, keys and values are known."""
    found = [
        engine.vlm.prefill(engine.vlm.prepare([draw_shapes(kind)], question))
        for kind, question in (("circle", "what is left of the square?"), ("triangle", "what color is it?"))
    ]
    latents = engine.vlm.embed([5, 6])[None].expand(2, -1, -1)
    engine.vlm.score_many([Score(found[0], latents, ((3, 4), (3, 9)))])
    return found
