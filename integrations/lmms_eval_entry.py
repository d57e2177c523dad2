"""The entry point by which lmms-eval finds the model; imports none of it before it is asked for."""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """Say where the model is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="latent_tool", chat_class_path="latent_tool.integrations.lmms_eval.LatentTool")
