"""Every test here that asks for ``vlm`` runs once per model family."""

from __future__ import annotations

import pytest
from tiny_checkpoints import FAMILIES, loaded

from latent_tool.models.vlm import VisionLanguageModel


@pytest.fixture(params=list(FAMILIES))
def vlm(request: pytest.FixtureRequest) -> VisionLanguageModel:
    """A tiny model of one family, loaded from disk as a user would; shared, so tests leave it as it was."""
    return loaded(request.param)
