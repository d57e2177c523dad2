"""What is published of models on the hub: parameters, licence, context; and what their weights take in memory.

Parameters and licence of the rows that are ``checked`` were compared with published pages (sizes of the files, cards)
as of ``AS_OF``; all others were written down from memory, which every table marks. What was not certain is ``None``.
This module needs neither torch nor transformers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from latent_tool.errors import SettingsError

__all__ = ["AS_OF", "BYTES", "PUBLISHED", "Published", "fitting", "parse_size"]

AS_OF = "2026-11"
# Bytes of a parameter: quantized models keep embeddings, norms and scales in 16 bits.
BYTES = {"bf16": 2.0, "8bit": 1.1, "4bit": 0.65}
# What a question needs beside the weights: prefix cache, candidates, vision tower at work.
ROOM = 1.2


@dataclass(frozen=True)
class Published:
    """One checkpoint on the hub.

    Args:
        model: its id.
        family: its model type.
        billions: parameters in thousand millions; ``None``: not certain.
        licence: as its card names it.
        context: tokens that its configuration or card says; ``None``: not certain.
        gated: its conditions have to be accepted on the hub first.
        checked: parameters and licence were compared with what is published; otherwise they are from memory.
    """

    model: str
    family: str
    billions: float | None
    licence: str
    context: int | None
    gated: bool = False
    checked: bool = False

    def gigabytes(self, precision: str) -> float | None:
        """Return what its weights take, in 10^9 bytes."""
        return None if self.billions is None else self.billions * BYTES[precision]

    def fits(self, gigabytes: float) -> str | None:
        """Return the best precision in which it answers questions in so much memory; ``None`` if there is none."""
        for precision in BYTES:
            needed = self.gigabytes(precision)
            if needed is not None and needed * ROOM <= gigabytes:
                return precision
        return None


PUBLISHED = (
    Published("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "smolvlm", 0.51, "apache-2.0", 8192),
    Published("LiquidAI/LFM2-VL-1.6B", "lfm2_vl", 1.6, "lfm1.0", 32_768),
    Published("thisisiron/Ovis2-1B-hf", "ovis2", None, "apache-2.0", None),
    Published("Qwen/Qwen3-VL-2B-Instruct", "qwen3_vl", 2.1, "apache-2.0", 262_144),
    Published("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "smolvlm", 2.2, "apache-2.0", 8192, checked=True),
    Published("google/paligemma2-3b-mix-448", "paligemma", 3.0, "gemma", 8192, gated=True),
    Published("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", 3.8, "qwen-research", 128_000, checked=True),
    Published("google/gemma-3-4b-it", "gemma3", 4.3, "gemma", 131_072, gated=True),
    Published("Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl", 4.4, "apache-2.0", 262_144),
    Published("google/gemma-4-e2b-it", "gemma4", 5.1, "apache-2.0", 131_072),
    Published("llava-hf/llava-1.5-7b-hf", "llava", 7.1, "llama2", 4096),
    Published("llava-hf/llava-v1.6-mistral-7b-hf", "llava_next", 7.6, "apache-2.0", 32_768),
    Published("OpenGVLab/InternVL3-8B-hf", "internvl", 7.9, "qwen", 32_768),
    Published("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava_onevision", 8.0, "apache-2.0", 32_768),
    Published("Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl", 8.3, "apache-2.0", 32_768),
    Published("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", 8.3, "apache-2.0", 128_000),
    Published("HuggingFaceM4/Idefics3-8B-Llama3", "idefics3", 8.5, "apache-2.0", None),
    Published("CohereForAI/aya-vision-8b", "aya_vision", 8.6, "cc-by-nc-4.0", 16_384, gated=True),
    Published("Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl", 8.8, "apache-2.0", 262_144, checked=True),
    Published("Qwen/Qwen3.5-9B", "qwen3_5", 9.0, "apache-2.0", 262_144),
    Published("zai-org/GLM-4.1V-9B-Thinking", "glm4v", 10.3, "mit", 65_536),
    Published("google/gemma-3-12b-it", "gemma3", 12.2, "gemma", 131_072, gated=True),
    Published("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral3", 24.0, "apache-2.0", 131_072),
    Published("google/gemma-3-27b-it", "gemma3", 27.4, "gemma", 131_072, gated=True),
    Published("Qwen/Qwen2.5-VL-72B-Instruct", "qwen2_5_vl", 73.4, "qwen", 128_000),
)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gb|gib|g|mb|mib|m)?", re.IGNORECASE)


def parse_size(text: str) -> float:
    """Return the 10^9 bytes of a size such as ``8GB``, ``24 GiB`` or ``900MB``. Raises ``SettingsError``."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or not 0 < float(found[1]) < 1e6:
        raise SettingsError(f"{text[:40]!r} is no size.", "Write 8GB, 24GiB or 900MB.")
    unit = (found[2] or "gb").lower()
    scale = {"gib": 2**30 / 1e9, "mib": 2**20 / 1e9, "mb": 1e-3, "m": 1e-3}.get(unit, 1.0)
    return float(found[1]) * scale


def fitting(gigabytes: float | None) -> list[tuple[Published, str | None]]:
    """Return the models that answer questions in so much memory, each with the best precision that fits; all for
    ``None``.
    """
    if gigabytes is None:
        return [(each, None) for each in PUBLISHED]
    return [(each, how) for each in PUBLISHED if (how := each.fits(gigabytes)) is not None]
