"""Describe what a score depends on, and name it by a fingerprint.

A calibration belongs to one configuration: model, prompt, settings, budget and score. This module knows settings and
where checkpoints lie; it loads no model and knows nothing of calibrations.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latent_tool.errors import ModelNotFoundError, SettingsError
from latent_tool.files import expanded
from latent_tool.settings import Budget, GenerationSettings, NoiseSettings, SearchSettings

__all__ = [
    "EMBEDDED_FOLDER",
    "configuration",
    "content_hash",
    "digest",
    "fingerprint",
    "is_folder",
    "plain_quantization",
]

# Raise this when the code changes what a score means, so that older calibrations no longer fit.
SCORING = 7
EMBEDDED_FOLDER = Path(__file__).parents[1] / "models" / "embedded"
# Files of a checkpoint folder that its answers do not depend on.
_NOT_THE_MODEL = {"calibration.json", "metrics.json"}
_MODEL_SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".tiktoken", ".py"}
# Fields of the settings that the plain model (no latents) depends on.
_PROMPT_FIELDS = ("latent_position", "thinking_markers")


def fingerprint(**what: Any) -> str:
    """SHA-256, in hex, of the canonical JSON of a ``configuration``; takes what that takes."""
    return digest(configuration(**what))


def digest(described: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of a configuration: the same for the same content in any order."""
    text = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def configuration(
    *,
    score: str,
    model: str = "embedded",
    revision: str | None = None,
    dtype: str = "auto",
    quantization_config: Any = None,
    system: str | None = None,
    images_first: bool = True,
    settings: SearchSettings | None = None,
    budget: Budget | None = None,
    generation: GenerationSettings | None = None,
    noise: NoiseSettings | None = None,
    method: str = "reasoner",
) -> dict[str, Any]:
    """Return what a score depends on besides the question and the seed, as plain JSON.

    This package counts up to its minor version. Not in it, since they leave scores alike but for rounding or are said
    to: the versions of torch and transformers, the device, threads and batches.

    Args:
        score: name of the score, such as ``"pooled_probability"``.
        model: ``"embedded"``, a checkpoint folder (known by its content, wherever it lies) or a hub id (known by its
            name and commit).
        settings, budget, generation: as the reasoner has them; ``None``: the defaults. ``deadline_s`` is left out: what
            a deadline cuts is not covered by a calibration. Without latents only what the plain model reads counts.
        noise: how the image is noised, for scores that need it.
        method: ``"reasoner"`` for what ``LatentReasoner`` does; anything else names another way to the answer.

    Raises ``ModelNotFoundError`` when a folder holds no model.
    """
    settings, budget = settings or SearchSettings(), budget or Budget()
    chosen = settings.model_dump(mode="json")
    limits = budget.model_dump(mode="json", exclude={"deadline_s"})
    if not settings.latents:
        chosen = {"latents": 0, **{name: chosen[name] for name in _PROMPT_FIELDS}}
        limits = {"max_new_tokens": budget.max_new_tokens}
    return {
        "scoring": SCORING,
        "latent_tool": ".".join(version("latent-tool").split(".")[:2]),
        "score": score,
        "method": method,
        "model": _model(model, revision),
        "dtype": "float32" if model == "embedded" and dtype == "auto" else dtype,
        "quantization": plain_quantization(quantization_config),
        "system": system,
        "images_first": images_first,
        "settings": chosen,
        "budget": limits,
        "generation": (generation or GenerationSettings()).model_dump(mode="json"),
        "noise": None if noise is None else noise.model_dump(mode="json"),
    }


def is_folder(model: str) -> bool:
    """Tell whether a model is known by its content; a hub id is known by its commit, once it was downloaded."""
    try:
        return model == "embedded" or os.path.isdir(expanded(model))
    except SettingsError:  # no path: loading it will say so
        return False


def plain_quantization(value: Any) -> Any:
    """Return a quantization as JSON types; ``None`` for none."""
    if value is None:
        return None
    return json.loads(json.dumps(value.to_dict() if hasattr(value, "to_dict") else value, default=str))


def _model(model: str, revision: str | None) -> dict[str, Any]:
    if is_folder(model):
        return {"content": content_hash(EMBEDDED_FOLDER if model == "embedded" else expanded(model))}
    return {"name": model, "revision": _commit(model, revision) or revision or "main"}


def content_hash(folder: Path) -> str:
    """SHA-256, in hex, of a checkpoint folder: names and content of its weights, configuration and tokenizer."""
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in _MODEL_SUFFIXES and path.name not in _NOT_THE_MODEL and path.is_file()
    )
    if not any(path.name == "config.json" for path in files):
        raise ModelNotFoundError(
            f"The directory {str(folder)!r} holds no model: config.json is missing.",
            "Give the folder that save_pretrained() wrote.",
        )
    whole = hashlib.sha256()
    for path in files:
        facts = path.stat()
        whole.update(f"{path.name}\0{_file_hash(path, facts.st_size, facts.st_mtime_ns)}\n".encode())
    return whole.hexdigest()


@lru_cache(maxsize=256)
def _file_hash(path: Path, size: int, modified: int) -> str:
    """SHA-256 of a file; read again only when its size or its time changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit(model: str, revision: str | None) -> str | None:
    """The commit that a hub id stands for in the local cache; ``None`` if it was never downloaded."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # no valid hub id; loading it will say so
        return None
    return Path(found).parent.name if isinstance(found, str) else None
