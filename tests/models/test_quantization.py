"""Quantized weights on the exact path; and what is said without the packages, the hub, access or room."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tiny_checkpoints import checkpoint

from latent_tool.checkup import doctor
from latent_tool.errors import (
    DiskFullError,
    HubUnreachableError,
    LatentToolError,
    MissingExtraError,
    ModelAccessError,
    ModelNotFoundError,
    SettingsError,
)
from latent_tool.models import loading
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.quantization import stored_bytes


@pytest.mark.parametrize(("name", "package", "share"), [("8bit", "torchao", 0.45), ("4bit", "bitsandbytes", 0.45)])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_quantized_model_is_exact_against_itself(family: str, name: Any, package: str, share: float) -> None:
    pytest.importorskip(package)
    pytest.importorskip("accelerate")
    report = doctor(str(checkpoint(family)), quantize=name, device="cpu")
    assert report.ok, [finding for finding in report.findings if finding.status == "failed"]
    assert "quantized" in report.finding("device").said
    whole = sum(map(stored_bytes, load(ModelSpec(model=str(checkpoint(family)))).model.parameters()))
    assert report.finding("memory").figures["model_bytes"] < share * whole + 200_000


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_without_its_package_quantization_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latent_tool.models.quantization.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"\[quantize\]"):
        load(ModelSpec(model=str(checkpoint("llava")), quantization_config=name))


def test_a_quantization_that_there_is_not() -> None:
    with pytest.raises(SettingsError, match="8bit or 4bit"):
        load(ModelSpec(model=str(checkpoint("llava")), quantization_config="2bit"))


def test_quantized_weights_go_where_they_stay() -> None:
    named = {"quantization_config": "8bit"}
    assert loading._where_quantized(ModelSpec(model="x", device="cuda:1", **named)) == {"": "cuda:1"}
    assert loading._where_quantized(ModelSpec(model="x", device_map="auto", **named)) == "auto"
    assert loading._device(ModelSpec(model="x", device="cuda:1", **named), quantized=True) is None
    assert importlib.util.find_spec("latent_tool.models.quantization") is not None
    assert stored_bytes(torch.zeros(3, dtype=torch.bfloat16)) == 6


def _response(kind: type[Exception], status: int) -> Callable[[], Exception]:
    def make() -> Exception:
        answer = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/a/b"))
        return kind(f"{status} Client Error", response=answer)  # type: ignore[call-arg]

    return make


CASES: list[tuple[Callable[[], Exception], dict[str, Any], type[LatentToolError], str]] = [
    (_response(RepositoryNotFoundError, 401), {}, ModelNotFoundError, "spelling"),
    (lambda: HFValidationError("Repo id must be in the form"), {}, ModelNotFoundError, "spelling"),
    (_response(RevisionNotFoundError, 404), {"revision": "v9"}, ModelNotFoundError, "branch"),
    (_response(GatedRepoError, 403), {}, ModelAccessError, "hf auth login"),
    (lambda: LocalEntryNotFoundError("cannot find"), {}, HubUnreachableError, "network"),
    (lambda: ConnectionError("refused"), {}, HubUnreachableError, "network"),
    (lambda: LocalEntryNotFoundError("cannot find"), {"local_files_only": True}, ModelNotFoundError, "hf download"),
    (lambda: OfflineModeIsEnabled("offline"), {}, ModelNotFoundError, "hf download"),
    (lambda: OSError(errno.ENOSPC, "No space left on device"), {}, DiskFullError, "HF_HOME"),
]


@pytest.mark.parametrize(("make", "fields", "kind", "remedy"), CASES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_four_errors_for_four_things(
    make: Callable[[], Exception],
    fields: dict[str, Any],
    kind: type[LatentToolError],
    remedy: str,
    wrapped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the hub's client raises them, and as transformers wraps them."""

    def fail(*_args: Any, **_given: Any) -> Any:
        if wrapped:
            raise OSError("We have a problem with a/b and its safetensors") from make()
        raise make()

    monkeypatch.setattr(loading.PreTrainedConfig, "get_config_dict", fail)
    with pytest.raises(LatentToolError) as caught:
        load(ModelSpec(model="a/b", **fields))
    assert type(caught.value) is kind and remedy in caught.value.hint
    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", fail)
    with pytest.raises(kind):
        loading.load_weights(ModelSpec(model="a/b", **fields))
