"""Quantize weights as they are loaded: ``"8bit"`` by torchao, ``"4bit"`` by bitsandbytes, on a GPU or a CPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from latent_tool.errors import MissingExtraError, SettingsError

__all__ = ["NAMED", "named_quantization", "stored_bytes"]

NAMED = ("8bit", "4bit")


def named_quantization(name: str) -> Any:
    """Return what ``from_pretrained`` takes for ``"8bit"`` or ``"4bit"``.

    8 bit: one scale for every output of a layer, int8 weights, activations as they are. 4 bit: NF4 in blocks of 64.
    Raises ``SettingsError`` for another name and ``MissingExtraError`` where a package is missing.
    """
    if name not in NAMED:
        raise SettingsError(f"There is no quantization {name[:40]!r}.", f"Use {' or '.join(NAMED)}.")
    needed = ("accelerate", "torchao" if name == "8bit" else "bitsandbytes")
    if any(find_spec(package) is None for package in needed):
        raise MissingExtraError(f"Quantization to {name[0]} bit", "quantize")
    if name == "8bit":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2))
    from transformers import BitsAndBytesConfig

    half = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=half)


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return bytes that a tensor takes in memory; of a quantized one, those of its parts."""
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is None or type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor.numel() * tensor.element_size()
    return sum(stored_bytes(getattr(tensor, name)) for name in parts()[0])
