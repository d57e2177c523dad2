"""The prefix cache: built once per image and question, forked for every batch of candidates.

Keys and values are shared between forks: ``DynamicLayer.update`` concatenates and re-binds, it never writes in place.
States of linear-attention and convolution layers *are* written in place, so they are copied.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

__all__ = ["cache_name", "fork_cache", "join_caches", "new_cache"]

_STATES = ("conv_states", "recurrent_states")
_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")


def cache_name(model: PreTrainedModel) -> str:
    """Return what a model's forward pass and its output call the cache: transformers 5.24 has renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache in which key column ``j`` is position ``j`` in every attention layer.

    Sliding-window layers, which drop what leaves the window, become full ones; the sliding *mask* still applies.
    """
    cache = DynamicCache(config=model.config)
    full: type[Any] = DynamicLayer
    cache.layers = [full() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache


def fork_cache(cache: DynamicCache, batch: int = 1) -> DynamicCache:
    """Return an independent continuation of a cache of batch size 1, for ``batch`` sequences."""
    forked = copy.copy(cache)
    forked.layers = [_fork_layer(layer, batch) for layer in cache.layers]
    return forked


def join_caches(caches: Sequence[DynamicCache]) -> DynamicCache:
    """Return an independent continuation of several caches of batch size 1 and of one length, one sequence each.

    Different ones must have plain layers only.
    """
    if all(cache is caches[0] for cache in caches):
        return fork_cache(caches[0], len(caches))
    joined = fork_cache(caches[0])
    for layer, *every in zip(joined.layers, *(cache.layers for cache in caches), strict=True):
        layer.keys = torch.cat([each.keys for each in every])
        layer.values = torch.cat([each.values for each in every])
    return joined


def _fork_layer(layer: Any, batch: int) -> Any:
    forked = copy.copy(layer)
    if batch > 1 and getattr(layer, "keys", None) is not None and layer.keys.numel():
        forked.keys = layer.keys.expand(batch, *layer.keys.shape[1:])
        forked.values = layer.values.expand(batch, *layer.values.shape[1:])
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for name in _STATES:
            states = getattr(layer, name)
            copied = {
                key: None if value is None else value.expand(batch, *value.shape[1:]).clone()
                for key, value in states.items()
            }
            setattr(forked, name, copied)
        for name in _FLAGS:
            setattr(forked, name, dict(getattr(layer, name)))
        if batch > 1 and hasattr(forked, "batch_size"):
            forked.batch_size = batch
    return forked
