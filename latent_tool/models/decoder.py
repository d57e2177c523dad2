"""The causal decoder of a loaded model: where it is, what it embeds, and one forward pass at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latent_tool.models.cache import cache_name
from latent_tool.models.threads import one_thread

__all__ = ["Decoder"]

# Parameters up to which a model is computed with one thread: twice the embedded model's, half of the smallest others'.
_SMALL = 30_000_000


class Decoder:
    """A frozen model's decoder, its input embeddings, and the lock that lets one forward pass run at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache_name = cache_name(model)
        self._lock = threading.RLock()
        self._embedding = model.get_input_embeddings()
        self._embedding_rms: float | None = None
        self._small: bool | None = None
        # Its passes in fixed shapes (static_pass.StaticPasses), where it is compiled.
        self.static: Any = None

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        device: torch.device = self._embedding.weight.device
        return device

    def places(self, keep: Sequence[int]) -> Tensor:
        """Return positions at which the model computes logits, as it takes them.

        Where its layers are on several devices, they are on the CPU: such an index fits a tensor of any device.
        """
        several = len(set((getattr(self.model, "hf_device_map", None) or {}).values())) > 1
        return torch.tensor(list(keep), device="cpu" if several else self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the decoder's activations."""
        dtype: torch.dtype = self._embedding.weight.dtype
        return dtype

    @property
    def width(self) -> int:
        """Numbers in an input embedding."""
        return int(self._embedding.weight.shape[-1])

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Input embeddings ``(n, d)`` of tokens."""
        ids = torch.tensor(list(tokens), dtype=torch.long, device=self.device)
        with torch.inference_mode():
            embeddings: Tensor = self._embedding(ids)
        return embeddings

    def embedding_rms(self) -> float:
        """Return the root mean square of the input embeddings' entries (over at most 4,096 tokens spread over the
        vocabulary).
        """
        if self._embedding_rms is None:
            size = self._embedding.weight.shape[0]
            tokens = range(0, size, max(1, size // 4096))
            self._embedding_rms = float(self.embed(tokens).float().pow(2).mean().sqrt())
        return self._embedding_rms

    def mean_embedding(self) -> Tensor:
        """Return the mean input embedding ``(d,)`` over the same tokens."""
        size = self._embedding.weight.shape[0]
        return self.embed(range(0, size, max(1, size // 4096))).float().mean(0)

    @property
    def small(self) -> bool:
        """Whether the model is so small, and on the CPU, that several threads win nothing."""
        if self._small is None:
            count = sum(parameter.numel() for parameter in self.model.parameters())
            self._small = count <= _SMALL and self.device.type == "cpu"
        return self._small

    @contextmanager
    def few_threads(self) -> Iterator[None]:
        """Compute with one thread if the model is small; see ``threads``."""
        with one_thread() if self.small else nullcontext():
            yield

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Allow one forward pass at a time, without gradients; a small model's with one thread."""
        with self._lock, self.few_threads(), torch.inference_mode():
            yield
