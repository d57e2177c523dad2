"""Load a checkpoint directory or hub id as a ``VisionLanguageModel``: safetensors only, no remote code."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from latent_tool.errors import LatentToolError, ModelLoadError, ModelNotFoundError, ModelNotSupportedError
from latent_tool.models.vlm import VisionLanguageModel

__all__ = ["EMBEDDED", "ModelSpec", "load"]

EMBEDDED = "embedded"
_EMBEDDED_FOLDER = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load it.

    Args:
        model: a checkpoint directory, a hub id, or ``"embedded"`` for the model that ships with the package.
        dtype: ``"auto"`` (the checkpoint's; the embedded model runs in float32), ``"float32"``, ``"bfloat16"``, ...
        device: for example ``"cpu"`` or ``"cuda:0"``; ``None`` leaves the model where it is loaded.
        device_map: passed to ``from_pretrained``; excludes ``device``.
        revision: branch, tag or commit of a hub id.
        local_files_only: never ask the hub.
    """

    model: str = EMBEDDED
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    local_files_only: bool = False


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading chatter off stderr; levels are restored."""
    logger = logging.getLogger("transformers")
    level, progress = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if progress:
            transformers.utils.logging.enable_progress_bar()


def load(spec: ModelSpec) -> VisionLanguageModel:
    """Load a model and its processor.

    Raises ``ModelNotFoundError``, ``ModelLoadError`` or ``ModelNotSupportedError``, each with a remedy.
    """
    source = _source(spec)
    where: dict[str, Any] = {"local_files_only": spec.local_files_only or spec.model == EMBEDDED}
    if spec.revision:
        where["revision"] = spec.revision
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            raise _explain(error, spec) from error
        _require_vision(config)
        processor = _load_processor(source, config, where)
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                source,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=_dtype(spec),
                device_map=spec.device_map,
                **where,
            )
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise _explain(error, spec) from error
        except Exception as error:  # safetensors raises its own class for a damaged file
            raise ModelLoadError(
                f"The weights of {spec.model!r} cannot be read ({type(error).__name__}).",
                "Save or download the checkpoint again.",
            ) from error
    model = model.eval().requires_grad_(False)
    if spec.device is not None and spec.device_map is None:
        model = model.to(spec.device)
    return VisionLanguageModel(model, processor, spec.model)


def _source(spec: ModelSpec) -> str:
    if spec.model == EMBEDDED:
        return str(_EMBEDDED_FOLDER)
    path = Path(spec.model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(
                f"The directory {spec.model!r} holds no model: config.json is missing.",
                "Give the folder that save_pretrained() wrote.",
            )
        return str(path)
    if path.is_file() or path.is_absolute() or spec.model.startswith((".", "~")):
        raise ModelNotFoundError(
            f"There is no model directory {spec.model!r}.", "Give the folder that save_pretrained() wrote."
        )
    return spec.model


def _dtype(spec: ModelSpec) -> Any:
    if spec.dtype == "auto":
        return torch.float32 if spec.model == EMBEDDED else "auto"
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelLoadError(f"{spec.dtype!r} is no floating point type.", "Use float32, bfloat16 or float16.")
    return dtype


def _require_vision(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelNotSupportedError(
            f"{config.model_type!r} is an encoder-decoder; the method needs a causal decoder over image tokens.",
            "Use a model such as LLaVA, Qwen-VL, SmolVLM or InternVL.",
        )
    if getattr(config, "vision_config", None) is None:
        raise ModelNotSupportedError(
            f"{config.model_type!r} is a text-only model: it has no vision part.",
            "Use a vision-language model such as LLaVA, Qwen-VL, SmolVLM or InternVL.",
        )
    if getattr(config.get_text_config(), "cross_attention_layers", None):
        raise ModelNotSupportedError(
            f"{config.model_type!r} reads the image through cross-attention; there are no image cells to inject.",
            "Use a model that puts image tokens into the decoder's input, such as LLaVA or Qwen-VL.",
        )


def _explain(error: Exception, spec: ModelSpec) -> LatentToolError:
    text = str(error)
    if isinstance(error, OSError) and ("safetensors" in text or "shard" in text or "No such file" in text):
        return ModelLoadError(
            f"The checkpoint {spec.model!r} has no complete safetensors weights.",
            "Save it again with save_pretrained(); pickle weights are not loaded.",
        )
    if isinstance(error, OSError):
        return ModelNotFoundError(
            f"There is no model {spec.model!r} on this machine, and it could not be fetched from the hub.",
            "Check the name, download the model first, or leave --model out to use the embedded model.",
        )
    if isinstance(error, ValueError | KeyError):
        if "trust_remote_code" in text or "custom code" in text:
            return ModelNotSupportedError(
                f"{spec.model!r} needs code from its repository, which is not run.",
                "Use a model that transformers supports natively.",
            )
        return ModelNotSupportedError(
            f"{spec.model!r} is no vision-language model that transformers can load as image-text-to-text.",
            "Use a model such as LLaVA, Qwen-VL, SmolVLM or InternVL.",
        )
    return ModelLoadError(
        f"The weights of {spec.model!r} do not fit its configuration ({type(error).__name__}).",
        "Save or download the checkpoint again.",
    )


def _load_processor(source: str, config: Any, where: dict[str, Any]) -> Any:
    """The processor for images and text; its video part, which needs torchvision, is left out where that is missing."""
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False, **where)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        try:
            processor = _image_only_processor(source, config, where)
        except ImportError as missing:
            raise ModelLoadError(
                f"The processor of {config.model_type!r} needs a package that is not installed: {missing}.",
                "Install torchvision beside your torch.",
            ) from missing
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ModelLoadError(
                f"The processor of {config.model_type!r} cannot be loaded ({error}).",
                "The checkpoint needs a tokenizer, an image processor and processor_config.json beside the weights.",
            ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ModelLoadError(
            "The checkpoint's processor has no image processor.",
            "Save the model's own AutoProcessor beside the weights.",
        )
    return processor


def _image_only_processor(source: str, config: Any, where: dict[str, Any]) -> Any:
    """Build the family's processor class from its image processor and tokenizer, without a video processor."""
    if is_torchvision_available():
        raise ValueError("torchvision is installed, so the processor must load as it is")
    name = PROCESSOR_MAPPING_NAMES[config.model_type]
    family = getattr(transformers, name)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
    image_processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **where)
    written, _ = family.get_processor_dict(source, **where)
    absent = [part for part in ("video_processor", "feature_extractor") if part in family.get_attributes()]

    class ImageOnly(family):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name in absent:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    ImageOnly.__name__ = name
    accepted = inspect.signature(family.__init__).parameters
    options = {key: value for key, value in written.items() if key in accepted}
    options |= {part: SimpleNamespace(model_input_names=[]) for part in absent}
    options |= {"image_processor": image_processor, "tokenizer": tokenizer}
    if options.get("chat_template") is None:
        options["chat_template"] = written.get("chat_template") or tokenizer.chat_template
    return ImageOnly(**options)
