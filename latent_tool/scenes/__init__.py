"""The synthetic world of the embedded model: see ``latent_tool.scenes.shapes``."""

from latent_tool.scenes.shapes import (
    _ENDINGS as _ENDINGS,
)
from latent_tool.scenes.shapes import (
    _OPENINGS as _OPENINGS,
)
from latent_tool.scenes.shapes import (
    _STREAM as _STREAM,
)
from latent_tool.scenes.shapes import (
    CHARACTERS,
    COLORS,
    QUESTION_TYPES,
    SEEDS_PER_SPLIT,
    SHAPES,
    UNSEEN_COMBINATIONS,
    Assets,
    Box,
    Question,
    Scene,
    SceneKind,
    SceneObject,
    Split,
    bar_questions,
    generate,
    location,
    plural,
    tenths,
)

__all__ = [
    "CHARACTERS",
    "COLORS",
    "QUESTION_TYPES",
    "SEEDS_PER_SPLIT",
    "SHAPES",
    "UNSEEN_COMBINATIONS",
    "Assets",
    "Box",
    "Question",
    "Scene",
    "SceneKind",
    "SceneObject",
    "Split",
    "bar_questions",
    "generate",
    "location",
    "plural",
    "tenths",
]
