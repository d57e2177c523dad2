"""Loading a checkpoint: what is passed through, what is refused, and what each error says."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_checkpoints import CHAT_TEMPLATE, FAMILIES, checkpoint, loaded, picture

from latent_tool.errors import (
    ContextLengthError,
    ImageError,
    LatentToolError,
    ModelError,
    ModelLoadError,
    ModelNotFoundError,
    ModelNotSupportedError,
)
from latent_tool.models import loading
from latent_tool.models.decoding import generation_rules
from latent_tool.models.loading import ModelSpec, load, load_weights
from latent_tool.models.vlm import VisionLanguageModel

QUESTION = "what is red?"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A LLaVA checkpoint of the test's own."""
    return Path(shutil.copytree(checkpoint("llava"), tmp_path / "model"))


def edit(folder: Path, name: str, **changes: Any) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **changes}))


def refused(kind: type[LatentToolError], spec: ModelSpec, *words: str) -> LatentToolError:
    with pytest.raises(kind) as caught:
        load(spec)
    assert type(caught.value) is kind
    assert caught.value.hint
    for word in words:
        assert word in str(caught.value)
    return caught.value


# ------------------------------------------------------------------------------------------------ what works


def test_dtype(copied):
    assert load(ModelSpec(model=str(copied))).dtype == torch.float32
    assert load(ModelSpec(model=str(copied), dtype="bfloat16")).dtype == torch.bfloat16
    refused(ModelLoadError, ModelSpec(model=str(copied), dtype="int8"), "int8", "bfloat16")


def test_the_best_device(monkeypatch):
    for gpu in (torch.xpu, torch.backends.mps, torch.cuda):
        monkeypatch.setattr(gpu, "is_available", lambda: False)
    seen = [loading.best_device()]
    for gpu in (torch.xpu, torch.backends.mps, torch.cuda):
        monkeypatch.setattr(gpu, "is_available", lambda: True)
        seen.append(loading.best_device())
    assert seen == ["cpu", "xpu", "mps", "cuda"]


def test_auto_takes_the_best_device_unless_something_else_decides(copied, monkeypatch):
    assert str(load_weights(ModelSpec(model=str(copied))).device) == loading.best_device()
    monkeypatch.setattr(loading, "best_device", lambda: "meta")  # a device that every torch has
    assert load_weights(ModelSpec(model=str(copied))).device.type == "meta"
    for spec in (ModelSpec(), ModelSpec(model=str(copied), device=None), ModelSpec(model=str(copied), device="cpu")):
        assert load_weights(spec).device.type == "cpu"
    for spec, quantized in ((ModelSpec(model="x", device_map="auto"), False), (ModelSpec(model="x"), True)):
        assert loading._device(spec, quantized=quantized) is None


def test_attention_implementation_and_device(copied):
    vlm = load(ModelSpec(model=str(copied), attn_implementation="eager", device="cpu"))
    assert vlm.model.config._attn_implementation == "eager"
    prefix = vlm.prefill(vlm.prepare([picture()], QUESTION))
    expected = loaded("llava")
    other = expected.prefill(expected.prepare([picture()], QUESTION))
    torch.testing.assert_close(prefix.last_logits, other.last_logits, atol=1e-4, rtol=1e-4)
    refused(ModelLoadError, ModelSpec(model=str(copied), attn_implementation="magic"), "magic", "sdpa")
    refused(ModelLoadError, ModelSpec(model=str(copied), attn_implementation="flash_attention_2"))
    refused(ModelLoadError, ModelSpec(model=str(copied), device="cuda:7"), "cuda:7")


def test_what_is_passed_to_transformers(copied, monkeypatch):
    seen: list[dict[str, Any]] = []

    def fake(_source: str, **options: Any) -> Any:
        seen.append(options)
        raise OSError("nothing here")

    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", fake)
    quantization = object()
    spec = ModelSpec(
        model="someone/something",
        dtype="float16",
        device_map="auto",
        revision="abc",
        local_files_only=True,
        token="secret",
        attn_implementation="sdpa",
        quantization_config=quantization,
    )
    with pytest.raises(ModelNotFoundError):
        load_weights(spec)
    assert seen[0] == {
        "output_loading_info": True,
        "dtype": torch.float16,
        "device_map": "auto",
        "revision": "abc",
        "local_files_only": True,
        "token": "secret",
        "attn_implementation": "sdpa",
        "quantization_config": quantization,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    assert "secret" not in repr(spec)
    with pytest.raises(ModelNotFoundError):
        load_weights(ModelSpec(model="someone/something", allow_pickle=True, trust_remote_code=True))
    assert "use_safetensors" not in seen[1]
    assert seen[1]["trust_remote_code"] is True


def test_a_spec_is_a_key_whatever_it_holds():
    quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    specs = [ModelSpec(device_map={"": "cpu"}, quantization_config=quantization) for _ in range(2)]
    assert len({*specs, ModelSpec()}) == 2


def test_a_processor_that_save_pretrained_wrote(copied):
    """One file for tokenizer options, image processor and processor, as newer versions write it."""
    processor = transformers.AutoProcessor.from_pretrained(copied)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        (copied / name).unlink()
    processor.save_pretrained(copied)
    assert not (copied / "preprocessor_config.json").exists()
    vlm = load(ModelSpec(model=str(copied)))
    assert len(vlm.prepare([picture()], QUESTION).cells) == 16


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_a_processor_with_a_video_part_that_save_pretrained_wrote(family, tmp_path):
    folder = Path(shutil.copytree(checkpoint(family), tmp_path / "model"))
    nested = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    edit(folder, "processor_config.json", image_processor=nested, video_processor={"fps": 2})
    vlm = load(ModelSpec(model=str(folder)))
    expected = loaded(family).prepare([picture()], QUESTION)
    assert torch.equal(vlm.prepare([picture()], QUESTION).tensors["input_ids"], expected.tensors["input_ids"])


def test_loading_leaves_no_trace(copied):
    level = transformers.utils.logging.get_verbosity()
    bar = transformers.utils.logging.is_progress_bar_enabled()
    state = torch.get_rng_state()
    load(ModelSpec(model=str(copied)))
    refused(ModelNotFoundError, ModelSpec(model=str(copied / "nothing")))
    assert transformers.utils.logging.get_verbosity() == level
    assert transformers.utils.logging.is_progress_bar_enabled() == bar
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_printed(copied, capfd):
    load(ModelSpec(model=str(copied)))
    assert capfd.readouterr() == ("", "")


def test_the_model_is_frozen(copied):
    model = load(ModelSpec(model=str(copied))).model
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


# ------------------------------------------------------------------------------------------------ what is refused


def test_there_is_no_such_model(tmp_path):
    refused(ModelNotFoundError, ModelSpec(model=str(tmp_path)), "config.json")
    refused(ModelNotFoundError, ModelSpec(model=str(tmp_path / "nothing")), "nothing")
    refused(ModelNotFoundError, ModelSpec(model="no-one/no-such-model", local_files_only=True), "no-such-model")


def test_a_damaged_configuration(copied):
    (copied / "config.json").write_text("{not json")
    refused(ModelNotFoundError, ModelSpec(model=str(copied)))


def _set(folder: Path, file: str, path: str, value: Any) -> None:
    """Set one value of a JSON file, whose path is written with dots."""
    values = inner = json.loads((folder / file).read_text())
    *outer, last = path.split(".")
    for name in outer:
        inner = inner[name]
    inner[last] = value
    (folder / file).write_text(json.dumps(values))


@pytest.mark.parametrize("depth", [900, 100_000])
@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_files_that_are_nested_too_deeply(file, depth, copied):
    (copied / file).write_text('{"a":' * depth + "1" + "}" * depth)
    if depth > 1000 or file == "config.json":
        refused(ModelLoadError, ModelSpec(model=str(copied)))
    else:
        with contextlib.suppress(LatentToolError):
            load(ModelSpec(model=str(copied)))


@pytest.mark.parametrize("text", ["[1]", "7", "null", '"x"'])
def test_a_configuration_that_has_no_names(text, copied):
    (copied / "config.json").write_text(text)
    with pytest.raises(LatentToolError) as caught:
        load(ModelSpec(model=str(copied)))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.num_hidden_layers", 10**9),
        ("text_config.num_hidden_layers", 10**400),
        ("vision_config.num_hidden_layers", 5000),
        ("text_config.num_hidden_layers", -3),
        ("text_config.num_hidden_layers", "4"),
        ("text_config.num_attention_heads", 0),
        ("text_config.vocab_size", 10**12),
        ("text_config.hidden_size", -64),
        ("text_config.max_position_embeddings", -1),
        ("text_config.max_position_embeddings", 10**18),
        ("text_config.rope_parameters", 7),
        ("text_config.hidden_act", [1]),
        ("text_config", "x"),
        ("vision_config", []),
        ("vision_config.image_size", 10**9),
        ("vision_config.image_size", [10**9, 10**9]),
        ("vision_config.patch_size", 0),
        ("vision_feature_layer", 99),
        ("vision_feature_layer", [0, -99]),
        ("image_token_index", "x"),
        ("dtype", "evil"),
        ("quantization_config", 7),
        ("model_type", ["llava"]),
    ],
)
def test_an_absurd_configuration(path, value, copied):
    _set(copied, "config.json", path, value)
    with pytest.raises(LatentToolError) as caught:
        load(ModelSpec(model=str(copied)))
    assert caught.value.hint
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "values",
    [
        {"eos_token_id": ["x"]},
        {"repetition_penalty": "x"},
        {"repetition_penalty": -1.0},
        {"bad_words_ids": [[]], "num_beams": 3},
        {"sequence_bias": 7},
    ],
)
def test_absurd_generation_settings(values, copied):
    (copied / "generation_config.json").write_text(json.dumps(values))
    with contextlib.suppress(ModelLoadError):
        vlm = load(ModelSpec(model=str(copied)))
        generation_rules(vlm.model, 5)


@pytest.mark.parametrize(
    ("family", "path", "value"),
    [
        ("llava", "size", {"shortest_edge": 30_000}),
        ("llava", "crop_size", {"height": 10**6, "width": 10**6}),
        ("llava", "crop_size", {"height": -5, "width": 8}),
        ("qwen2_5_vl", "size", {"shortest_edge": 10**12, "longest_edge": 10**13}),
        ("smolvlm", "size", {"longest_edge": 10**7}),
    ],
)
def test_pictures_would_be_enlarged_absurdly(family, path, value, tmp_path):
    folder = Path(shutil.copytree(checkpoint(family), tmp_path / "model"))
    edit(folder, "preprocessor_config.json", **{path: value})
    refused(ModelLoadError, ModelSpec(model=str(folder)), "preprocessor_config.json")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "clip"])
def test_models_that_do_not_read_images_and_write_text(kind, copied):
    config = transformers.AutoConfig.for_model(kind)
    config.save_pretrained(copied)
    refused(ModelNotSupportedError, ModelSpec(model=str(copied)))


@pytest.mark.parametrize(
    ("kind", "word"), [("mllama", "cross-attention"), ("florence2", "encoder-decoder"), ("t5", "encoder-decoder")]
)
def test_architectures_that_do_not_fit(kind, word, copied):
    transformers.AutoConfig.for_model(kind).save_pretrained(copied)
    refused(ModelNotSupportedError, ModelSpec(model=str(copied)), word, "LLaVA")


def test_missing_weights(copied):
    (copied / "model.safetensors").unlink()
    refused(ModelLoadError, ModelSpec(model=str(copied)), "safetensors")


def test_a_missing_shard(copied):
    (copied / "model.safetensors").unlink()
    load_weights(ModelSpec(model=str(checkpoint("llava")))).save_pretrained(copied, max_shard_size="300KB")
    shards = sorted(copied.glob("model-*.safetensors"))
    assert len(shards) > 2
    load(ModelSpec(model=str(copied)))
    shards[1].unlink()
    refused(ModelLoadError, ModelSpec(model=str(copied)))


def test_weights_that_are_not_in_any_shard(copied):
    """Transformers would draw them at random and say so in a warning only."""
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    lost = next(name for name in weights if "layers.2" in name and "q_proj" in name)
    del weights[lost]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    refused(ModelLoadError, ModelSpec(model=str(copied)), "q_proj")


def test_a_truncated_file(copied):
    data = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(ModelLoadError, ModelSpec(model=str(copied)))


def test_weights_of_another_size(copied):
    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 96
    (copied / "config.json").write_text(json.dumps(config))
    refused(ModelLoadError, ModelSpec(model=str(copied)))


def test_pickled_weights_are_loaded_only_if_asked_for(copied):
    from safetensors.torch import load_file

    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    refused(ModelLoadError, ModelSpec(model=str(copied)), "allow_pickle")
    vlm = load(ModelSpec(model=str(copied), allow_pickle=True))
    assert len(vlm.prepare([picture()], QUESTION).cells) == 16


def test_code_from_the_repository_is_not_run(copied):
    (copied / "evil.py").write_text("raise SystemExit('code was run')\n")
    edit(copied, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    refused(ModelNotSupportedError, ModelSpec(model=str(copied)), "trust_remote_code")


def test_a_processor_without_image_processor(copied):
    (copied / "preprocessor_config.json").unlink()
    refused(ModelLoadError, ModelSpec(model=str(copied)), "processor")


def test_a_checkpoint_without_tokenizer(copied):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    refused(ModelLoadError, ModelSpec(model=str(copied)), "processor")


@pytest.mark.parametrize("family", ["mistral3", "lfm2_vl"])
def test_a_processor_that_needs_torchvision_says_so(family):
    refused(ModelLoadError, ModelSpec(model=str(checkpoint(family))), "torchvision")


def test_a_missing_package_is_named(monkeypatch):
    def missing(*_args: Any, **_options: Any) -> Any:
        raise ImportError("Package `num2words` is required to run SmolVLM processor.")

    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", missing)
    monkeypatch.setattr(loading, "_image_only_processor", missing)
    refused(ModelLoadError, ModelSpec(model=str(checkpoint("smolvlm"))), "num2words")
    error = loading._explain(ValueError("Using a `device_map` requires `accelerate`."), ModelSpec(model="x"))
    assert "Install accelerate" in error.hint


def test_a_gated_model_names_the_token():
    error = loading._explain(OSError("You are trying to access a gated repo."), ModelSpec(model="a/b"))
    assert isinstance(error, ModelNotFoundError)
    assert "token" in error.hint


# ------------------------------------------------------------------------------------------------ after loading


def test_a_template_that_drops_the_image(copied):
    (copied / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("@IMAGE@", ""))
    vlm = load(ModelSpec(model=str(copied)))
    with pytest.raises(ModelLoadError, match="drops the image"):
        vlm.prepare([picture()], QUESTION)


def test_image_or_question_too_large_for_the_context(tmp_path):
    folder = Path(shutil.copytree(checkpoint("qwen2_5_vl"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 60
    (folder / "config.json").write_text(json.dumps(config))
    vlm = load(ModelSpec(model=str(folder)))
    assert vlm.context_length == 60
    assert vlm.prepare([picture()], QUESTION).length < 60
    for image, question in ((picture(400, 400), QUESTION), (picture(), QUESTION * 10)):
        with pytest.raises(ContextLengthError) as caught:
            vlm.prepare([image], question)
        assert "60" in caught.value.message
        assert "smaller" in caught.value.hint


@pytest.mark.parametrize("size", [(2000, 3), (4000, 10), (3, 700)])
def test_an_image_too_thin_for_the_processor(size):
    """The image is at fault, not the checkpoint: the caller can fix it."""
    vlm = loaded("qwen2_5_vl")
    with pytest.raises(ImageError, match="aspect ratio") as caught:
        vlm.prepare([picture(), picture(*size)], QUESTION)
    assert not isinstance(caught.value, ModelError)
    assert f"{size[0]} x {size[1]}" in caught.value.message
    assert "Crop" in caught.value.hint and "pad" in caught.value.hint
    assert vlm.prepare([picture(), picture(1900, 10)], QUESTION).cells


def test_a_processor_that_takes_no_image_at_all_is_the_checkpoints_fault(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("absolute aspect ratio must be smaller than 0")

    vlm = loaded("qwen2_5_vl")
    monkeypatch.setattr(vlm.processor.image_processor, "preprocess", refuse)
    with pytest.raises(ModelLoadError, match="processor"):
        vlm.prepare([picture()], QUESTION)


def test_every_family_is_refused_or_loaded_without_a_raw_error():
    """The table names every family that loads here; nothing else than the package's own errors comes out."""
    for family in FAMILIES:
        try:
            assert isinstance(load(ModelSpec(model=str(checkpoint(family)))), VisionLanguageModel)
        except LatentToolError as error:
            assert family in ("mistral3", "lfm2_vl")
            assert "torchvision" in str(error)
