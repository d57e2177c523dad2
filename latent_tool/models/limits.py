"""Refuse a model folder that asks for absurd amounts, before anything is built from it.

Transformers builds what a configuration says: a thousand million layers, or pictures of a thousand megapixels, and then
never comes back. The limits are far above those of any model that exists. This module knows names and numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from latent_tool.errors import ModelLoadError

__all__ = ["require_sane_configuration", "require_sane_pictures"]

_DEEPEST = 40
_MOST_VALUES = 1_000_000
_MOST_LAYERS = 1024
_LARGEST_SIDE = 16_384
_MOST_PIXELS = 2**27
_LARGEST = 2**40

_LAYERS = ("layers", "depth")
_SIDES = ("image_size", "height", "width")
_COUNTS = ("size", "heads", "dim", "embeddings", "channels", "hidden", *_LAYERS)


def require_sane_configuration(values: Any) -> None:
    """Raise ``ModelLoadError`` unless the values of a ``config.json`` can be those of a model."""
    if not isinstance(values, Mapping):
        raise _absurd("config.json", f"holds a {type(values).__name__} instead of named values")
    for name, number in _numbers(values, "config.json"):
        most = _MOST_LAYERS if name.endswith(_LAYERS) else _LARGEST_SIDE if name.endswith(_SIDES) else _LARGEST
        if name.endswith(_COUNTS) and not 0 <= number <= most:
            raise _absurd("config.json", f"says {name} is {_short(number)}")
    for part in (values, *(value for value in values.values() if isinstance(value, Mapping))):
        _require_layer(part)


def _require_layer(values: Mapping[str, Any]) -> None:
    """The layers whose features are taken must be layers that the vision tower has."""
    tower = values.get("vision_config")
    layers = tower.get("num_hidden_layers") if isinstance(tower, Mapping) else None
    chosen = values.get("vision_feature_layer")
    for layer in chosen if isinstance(chosen, list) else [chosen]:
        if isinstance(layer, int) and isinstance(layers, int) and not -layers - 1 <= layer <= layers:
            raise _absurd("config.json", f"takes features of layer {_short(layer)} of {layers}")


def require_sane_pictures(image_processor: Any) -> None:
    """Raise ``ModelLoadError`` if an image processor would enlarge every picture to an absurd size."""
    values = image_processor.to_dict()
    # Families that place pictures on a grid of merged patches write pixel counts where others write sides; only the
    # least count enlarges anything.
    counted = "merge_size" in values or "min_pixels" in values
    for where in ("size", "crop_size", "pad_size", "max_image_size", "min_pixels"):
        for name, number in _numbers({where: values.get(where)}, "preprocessor_config.json"):
            if counted and name in ("longest_edge", "max_pixels"):
                continue
            if not 0 <= number <= (_MOST_PIXELS if counted else _LARGEST_SIDE):
                raise _absurd("preprocessor_config.json", f"says {name} is {_short(number)}")


def _numbers(values: Mapping[str, Any], file: str) -> Iterator[tuple[str, int | float]]:
    """Every number of nested values, with the name that it, or the list it is in, stands under."""
    waiting: list[tuple[str, Any, int]] = [("", values, 0)]
    seen = 0
    while waiting:
        name, value, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST_VALUES:
            raise _absurd(file, "is nested too deeply" if depth > _DEEPEST else "holds too many values")
        if isinstance(value, Mapping):
            waiting.extend((str(key), inner, depth + 1) for key, inner in value.items())
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            waiting.extend((name, inner, depth + 1) for inner in value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def _short(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) and abs(number) < 10**15 else f"{float(min(number, 10**300)):.3g}"


def _absurd(file: str, what: str) -> ModelLoadError:
    return ModelLoadError(
        f"The model's {file} {what}.", "Save or download the checkpoint again, or use one from a source you trust."
    )
