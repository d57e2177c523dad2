"""The cache has one name in transformers 5.23 and another in 5.24; each model is asked for its own."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from latent_tool.models.cache import cache_name


class Before(torch.nn.Module):
    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> ModelOutput: ...


class After(torch.nn.Module):
    def forward(self, input_ids: Any = None, cache: Any = None, **kwargs: Any) -> ModelOutput: ...


def test_each_model_is_given_the_cache_by_its_own_name() -> None:
    assert cache_name(Before()) == "past_key_values"  # type: ignore[arg-type]
    assert cache_name(After()) == "cache"  # type: ignore[arg-type]
