"""Load a checkpoint directory or hub id as a ``VisionLanguageModel``: safetensors only, no remote code."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils.import_utils import is_torchvision_available

from latent_tool.about import EMBEDDED
from latent_tool.errors import (
    LatentToolError,
    ModelLoadError,
    ModelNotFoundError,
    ModelNotSupportedError,
    SettingsError,
)
from latent_tool.files import expanded
from latent_tool.models.decoding import generation_rules
from latent_tool.models.families import family as family_of
from latent_tool.models.hub import gated, hub_error
from latent_tool.models.limits import require_sane_configuration, require_sane_pictures
from latent_tool.models.quantization import named_quantization
from latent_tool.models.static_pass import Compile, as_compile
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.settings import PREFIX_CACHE_BYTES

__all__ = ["EMBEDDED", "ModelSpec", "best_device", "load", "load_weights"]

_EMBEDDED_FOLDER = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load it.

    Args:
        model: a checkpoint directory, a hub id, or ``"embedded"`` for the model that ships with the package.
        dtype: ``"auto"`` (the checkpoint's; the embedded model runs in float32), ``"float32"``, ``"bfloat16"``, ...
        device: for example ``"cpu"`` or ``"cuda:0"``. ``"auto"``: see ``best_device``, but where the model is loaded if
            there is a ``device_map`` or its weights are quantized; the embedded model stays on the CPU. ``None``: where
            the model is loaded.
        device_map: passed to ``from_pretrained``; excludes a ``device`` by name.
        revision: branch, tag or commit of a hub id.
        local_files_only: never ask the hub.
        token: access token for the hub; never shown.
        attn_implementation: passed to ``from_pretrained``; ``None``: what the model does best.
        quantization_config: ``"8bit"`` or ``"4bit"``, or passed to ``from_pretrained``, such as a
            ``BitsAndBytesConfig``.
        allow_pickle: also load weights that are pickled, which can run code. Only for files you trust.
        trust_remote_code: run code from the checkpoint's repository. Only for repositories you trust.
        prefix_cache_bytes: what the prefixes of images may take in memory, so that another question about the same
            image does not compute them again; 0: nothing is kept.
        compile: ``True`` runs passes after a prefix in fixed shapes, compiled by torch; ``"auto"``: on CUDA.
    """

    model: str = EMBEDDED
    dtype: str = "auto"
    device: str | None = "auto"
    device_map: str | Mapping[str, Any] | None = field(default=None, hash=False)
    revision: str | None = None
    local_files_only: bool = False
    token: str | bool | None = field(default=None, repr=False)
    attn_implementation: str | None = None
    quantization_config: Any = field(default=None, hash=False)
    allow_pickle: bool = False
    trust_remote_code: bool = False
    prefix_cache_bytes: int = PREFIX_CACHE_BYTES
    compile: Compile = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "compile", as_compile(self.compile))
        if self.prefix_cache_bytes < 0:
            raise SettingsError(
                f"prefix_cache_bytes is {self.prefix_cache_bytes}.", "Use a number of bytes, or 0 to keep nothing."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the chatter of loading, and of retries without a network, off stderr; levels are restored."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels, progress = [each.level for each in loggers], transformers.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if progress:
            transformers.utils.logging.enable_progress_bar()


def load(spec: ModelSpec) -> VisionLanguageModel:
    """Load a model and its processor.

    Raises ``ModelNotFoundError``, ``ModelLoadError`` or ``ModelNotSupportedError``, each with a remedy.
    """
    config = _load_config(spec)
    processor = _load_processor(spec, config)
    require_sane_pictures(processor.image_processor)
    model = load_weights(spec)
    try:
        generation_rules(model, 1)
    except Exception as error:  # transformers raises what it likes for values it does not understand
        raise ModelLoadError(
            f"The generation_config.json of {spec.model!r} cannot be used ({_first_line(error)}).",
            "Fix the file or remove it: without it the model's defaults are used.",
        ) from error
    try:
        return VisionLanguageModel(model, processor, spec.model, spec.prefix_cache_bytes, spec.compile)
    except LatentToolError:
        raise
    except Exception as error:  # a configuration may have any value anywhere
        raise ModelLoadError(
            f"The configuration of {spec.model!r} does not describe a usable model ({_first_line(error)}).",
            "Save or download the checkpoint again.",
        ) from error


def load_weights(spec: ModelSpec) -> PreTrainedModel:
    """Load the model alone, frozen and in evaluation mode; raises what ``load`` raises."""
    named = isinstance(spec.quantization_config, str)
    options: dict[str, Any] = {
        "dtype": _dtype(spec),
        "device_map": _where_quantized(spec) if named else spec.device_map,
        "attn_implementation": spec.attn_implementation,
        "quantization_config": named_quantization(spec.quantization_config) if named else spec.quantization_config,
        "use_safetensors": None if spec.allow_pickle else True,
    }
    given = {key: value for key, value in options.items() if value is not None}
    with _quiet():
        try:
            loader: Any = AutoModelForImageTextToText
            model, report = loader.from_pretrained(_source(spec), output_loading_info=True, **given, **_where(spec))
        except LatentToolError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
            raise _explain(error, spec) from error
        except Exception as error:  # safetensors raises its own class for a damaged file
            raise ModelLoadError(
                f"The weights of {spec.model!r} cannot be read ({type(error).__name__}).",
                "Save or download the checkpoint again.",
            ) from error
    lost = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    if lost:
        raise ModelLoadError(
            f"The checkpoint {spec.model!r} lacks {len(lost)} of the model's weights, {lost[0]!r} among them.",
            "Save or download the checkpoint again.",
        )
    model = model.eval().requires_grad_(False)
    device = _device(spec, quantized=getattr(model.config, "quantization_config", None) is not None)
    if device is not None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ModelLoadError(
                f"The model cannot be moved to device {device!r} ({error}).",
                "Use a device that torch sees on this machine and that has room for the model, such as cpu.",
            ) from error
    loaded: PreTrainedModel = model
    return loaded


def best_device() -> str:
    """Return the device that ``"auto"`` means: the first GPU that torch can use, or the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if torch.xpu.is_available() else "cpu"


def _device(spec: ModelSpec, *, quantized: bool) -> str | None:
    """Where to move the model; ``None``: it stays where it was loaded."""
    if spec.device_map is not None or isinstance(spec.quantization_config, str):
        return None
    if spec.device != "auto":
        return spec.device
    return None if quantized or spec.model == EMBEDDED else best_device()


def _where_quantized(spec: ModelSpec) -> Any:
    """Where weights go while they are quantized, since they may not be moved afterwards."""
    if spec.device_map is not None:
        return spec.device_map
    return {"": best_device() if spec.device in (None, "auto") else spec.device}


def _where(spec: ModelSpec) -> dict[str, Any]:
    """What every ``from_pretrained`` is told."""
    where: dict[str, Any] = {
        "local_files_only": spec.local_files_only or spec.model == EMBEDDED,
        "trust_remote_code": spec.trust_remote_code,
    }
    if spec.revision:
        where["revision"] = spec.revision
    if spec.token is not None:
        where["token"] = spec.token
    return where


def _load_config(spec: ModelSpec) -> Any:
    with _quiet():
        try:
            written, _ = PreTrainedConfig.get_config_dict(_source(spec), **_where(spec))
            require_sane_configuration(written)
            config = AutoConfig.from_pretrained(_source(spec), **_where(spec))
            _require_vision(config)
        except LatentToolError:
            raise
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise _explain(error, spec) from error
        except Exception as error:  # RecursionError of deep JSON, and whatever a configuration class raises
            raise ModelLoadError(
                f"The configuration of {spec.model!r} cannot be read ({_first_line(error)}).",
                "Save or download the checkpoint again.",
            ) from error
    return config


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200].rstrip(':')}"


_LONGEST_NAME = 200  # characters; hub ids have 96 at most


def _source(spec: ModelSpec) -> str:
    if spec.model == EMBEDDED:
        return str(_EMBEDDED_FOLDER)
    try:
        path = expanded(spec.model)
    except SettingsError as error:
        raise ModelNotFoundError(error.message, "Give the folder that save_pretrained() wrote.") from None
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(
                f"The directory {spec.model!r} holds no model: config.json is missing.",
                "Give the folder that save_pretrained() wrote.",
            )
        return str(path)
    long = len(spec.model) > _LONGEST_NAME
    if long or os.path.isfile(path) or path.is_absolute() or spec.model.startswith((".", "~")):
        raise ModelNotFoundError(
            f"There is no model directory {spec.model[:_LONGEST_NAME]!r}.",
            "Give the folder that save_pretrained() wrote.",
        )
    return spec.model


def _dtype(spec: ModelSpec) -> Any:
    if spec.dtype == "auto":
        return torch.float32 if spec.model == EMBEDDED else "auto"
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelLoadError(f"{spec.dtype!r} is no floating point type.", "Use float32, bfloat16 or float16.")
    return dtype


_INSTEAD = "Use a model such as LLaVA, Qwen-VL, SmolVLM or InternVL."


def _require_vision(config: Any) -> None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelNotSupportedError(
            f"{kind!r} is an encoder-decoder; the method needs a causal decoder over image tokens.", _INSTEAD
        )
    if getattr(config.get_text_config(), "cross_attention_layers", None):
        raise ModelNotSupportedError(
            f"{kind!r} reads the image through cross-attention; there are no image cells to inject.", _INSTEAD
        )
    if getattr(config, "vision_config", None) is None and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ModelNotSupportedError(f"{kind!r} is a text-only model: it has no vision part.", _INSTEAD)


# Packages that transformers asks for while it loads: how they are called in its messages, and how they are installed.
_PACKAGES = {
    "torchvision": "torchvision, the build that fits your torch (see pytorch.org)",
    "num2words": "num2words",
    "accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
    "flash_attn": "flash-attn",
    "flash-attn": "flash-attn",
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
}


def _missing_package(error: Exception, what: str) -> ModelLoadError:
    name = next((name for name in _PACKAGES if name in str(error).lower()), None)
    if name is None:
        return ModelLoadError(f"{what} needs a package that is not installed ({error}).", "Install it and try again.")
    return ModelLoadError(f"{what} needs {name}, which is not installed.", f"Install {_PACKAGES[name]}.")


def _explain(error: Exception, spec: ModelSpec) -> LatentToolError:
    text = str(error)
    if isinstance(error, ImportError):
        return _missing_package(error, f"Loading {spec.model!r}")
    if (known := hub_error(error, spec.model, spec.revision, spec.local_files_only)) is not None:
        return known
    if isinstance(error, ValueError | OSError) and any(f"{name}`" in text for name in ("accelerate", "bitsandbytes")):
        return _missing_package(error, f"Loading {spec.model!r}")
    if "gated repo" in text or "401 Client Error" in text or "403 Client Error" in text:
        return gated(spec.model)
    if isinstance(error, ValueError) and ("attn_implementation" in text or "attention implementation" in text.lower()):
        return ModelLoadError(
            f"{spec.model!r} cannot use the attention implementation {spec.attn_implementation!r}.",
            "Leave attn_implementation out, or use 'sdpa' or 'eager'.",
        )
    if isinstance(error, ValueError | KeyError) and ("trust_remote_code" in text or "custom code" in text):
        return ModelNotSupportedError(
            f"{spec.model!r} needs code from its repository, which is not run.",
            "Use a model that transformers supports natively, or set trust_remote_code=True in code if you trust it.",
        )
    if isinstance(error, OSError) and ("safetensors" in text or "shard" in text or "No such file" in text):
        return ModelLoadError(
            f"The checkpoint {spec.model!r} has no complete safetensors weights.",
            "Save it again with save_pretrained(); pickled weights are loaded only with allow_pickle=True in code.",
        )
    if isinstance(error, OSError):
        return ModelNotFoundError(
            f"There is no model {spec.model!r} on this machine, and it could not be fetched from the hub.",
            "Check the name, download the model first, or leave --model out to use the embedded model.",
        )
    if isinstance(error, ValueError | KeyError):
        return ModelNotSupportedError(
            f"{spec.model!r} is no vision-language model that transformers can load as image-text-to-text.", _INSTEAD
        )
    return ModelLoadError(
        f"The weights of {spec.model!r} do not fit its configuration ({type(error).__name__}).",
        "Save or download the checkpoint again.",
    )


def _load_processor(spec: ModelSpec, config: Any) -> Any:
    """The processor for images and text; its video part, which needs torchvision, is left out where that is missing."""
    what = f"The processor of {config.model_type!r}"
    with _quiet():
        try:
            whole: Any = AutoProcessor
            processor = whole.from_pretrained(_source(spec), **_where(spec))
        except Exception as error:  # each processor class raises what it likes
            try:
                processor = _image_only_processor(spec, config)
            except ImportError as missing:
                raise _missing_package(missing, what) from missing
            except Exception:
                raise ModelLoadError(
                    f"{what} cannot be loaded ({type(error).__name__}).",
                    "The checkpoint needs a tokenizer, preprocessor_config.json and processor_config.json beside the "
                    "weights.",
                ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ModelLoadError(
            "The checkpoint's processor has no image processor.",
            "Save the model's own AutoProcessor beside the weights.",
        )
    return processor


class _NoVideo:
    """Stands where a processor wants its video or audio part; has no settings."""

    model_input_names: tuple[str, ...] = ()
    num_frames = fps = None


def _image_only_processor(spec: ModelSpec, config: Any) -> Any:
    """Build the family's processor class from its image processor and tokenizer, without a video processor."""
    source, where = _source(spec), _where(spec)
    name = PROCESSOR_MAPPING_NAMES[config.model_type]
    family = getattr(transformers, name)
    part: Any = AutoImageProcessor
    tokenizer = AutoTokenizer.from_pretrained(source, **where)
    try:
        image_processor = part.from_pretrained(source, **where)
    except (OSError, ValueError) as error:
        row = family_of(config.model_type)
        if row is not None and "torchvision" in row.needs and not is_torchvision_available():
            raise ImportError(f"torchvision ({error})") from error
        raise
    written, _ = family.get_processor_dict(source, **where)
    absent = [name for name in ("video_processor", "feature_extractor") if name in family.get_attributes()]

    class ImageOnly(family):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name in absent:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    ImageOnly.__name__ = family.__name__
    accepted = inspect.signature(family.__init__).parameters
    options = {key: value for key, value in written.items() if key in accepted}
    options |= {name: _NoVideo() for name in absent}
    options |= {"image_processor": image_processor, "tokenizer": tokenizer}
    if options.get("chat_template") is None:
        options["chat_template"] = written.get("chat_template") or tokenizer.chat_template
    return ImageOnly(**options)
