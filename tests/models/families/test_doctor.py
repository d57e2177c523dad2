"""The doctor finds every family sound, and planted faults where they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageOps
from tiny_checkpoints import CHAT_TEMPLATE, checkpoint, loaded, picture

from latent_tool.checkup import doctor
from latent_tool.checkup.checks import CHECKS, Patient, check_boxes, check_prefix, check_prefix_attention
from latent_tool.checkup.run import examine
from latent_tool.models import shared_prefix
from latent_tool.models.prefix_attention import PrefixAttention
from latent_tool.models.vlm import VisionLanguageModel


def test_every_family_is_sound(vlm: VisionLanguageModel) -> None:
    told: list[str] = []
    vlm.prefill(vlm.prepare([picture()], "?"))  # transformers leaves hooks of its own at a model's first pass
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in vlm.model.modules()]
    weights = [weight.clone() for weight in vlm.model.parameters()]
    report = examine(vlm, lambda finding: told.append(finding.check))
    assert report.ok, [finding for finding in report.findings if finding.status == "failed"]
    assert told == list(CHECKS) == [finding.check for finding in report.findings]
    assert report.family == vlm.model.config.model_type
    for check in ("picture", "prefix cache", "decoding", "boxes", "latents", "attention", "several pictures", "reward"):
        assert report.finding(check).status == "ok", report.finding(check)
    assert report.finding("boxes").figures["hits"] == report.finding("boxes").figures["cells"] >= 4
    assert report.finding("shared prefix").status == ("ok" if vlm._shares else "off")
    attention = report.finding("prefix attention")
    assert attention.said.startswith("attention over the shared prefix: ")
    fused = vlm._shares and vlm.model.config.get_text_config().to_dict().get("attn_logit_softcapping") is None
    assert attention.status == ("ok" if fused else "off"), attention
    if fused:
        assert "fused kernel in float32 (faster than written out on CPUs" in attention.said
        assert attention.figures["difference"] < 1e-5 and attention.figures["ratio"] > 0
    rest = sum(weight.numel() * 4 for weight in [*vlm.model.parameters(), *vlm.model.buffers()])
    assert report.finding("memory").figures["model_bytes"] == pytest.approx(rest, rel=0.01)
    assert all(report.finding("speed").figures[name] > 0 for name in ("step_ms", "token_ms", "view_ms"))
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in vlm.model.modules()]
    assert all(torch.equal(weight, before) for weight, before in zip(vlm.model.parameters(), weights, strict=True))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("llava"), tmp_path / "model"))


def failed(report: Any) -> set[str]:
    return {finding.check for finding in report.findings if finding.status == "failed"}


def test_a_template_that_drops_the_image(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("@IMAGE@", ""))
    report = doctor(str(copied))
    assert not report.ok and {"picture", "prefix cache", "decoding"} <= failed(report)
    assert "drops the image" in report.finding("picture").said and report.finding("picture").remedy


def test_a_model_that_cannot_be_loaded(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    report = doctor(str(copied))
    assert [finding.check for finding in report.findings] == ["loading"]
    assert not report.ok and "safetensors" in report.findings[0].said and report.findings[0].remedy


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("move", [ImageOps.mirror, ImageOps.flip])
def test_a_processor_that_moves_the_picture(family: str, move: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = loaded(family)
    processor = vlm.processor.image_processor
    preprocess = processor.preprocess

    def moved(images: Any, *args: Any, **kwargs: Any) -> Any:
        return preprocess([[move(image) for image in each] for each in images], *args, **kwargs)

    monkeypatch.setattr(processor, "preprocess", moved)
    found = check_boxes(Patient(vlm))
    assert found.status == "failed" and found.figures["hits"] < found.figures["cells"]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "qwen3_5"])
def test_a_cache_that_is_not_exact(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = loaded(family)
    patient = Patient(vlm)
    assert check_prefix(patient).status == "ok"
    for layer in patient.prefix.cache.layers:
        if isinstance(getattr(layer, "keys", None), torch.Tensor):
            monkeypatch.setattr(layer, "keys", layer.keys.roll(1, dims=2))  # every key one position further
    found = check_prefix(patient)
    assert found.status == "failed" and found.remedy


def test_latents_that_reach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = loaded("llava")
    patient = Patient(vlm)
    suffix = vlm.suffix
    monkeypatch.setattr(
        vlm, "suffix", lambda prefix, latents, *rest: suffix(prefix, None if latents is None else latents * 0, *rest)
    )
    assert CHECKS["latents"](patient).status == "failed"


def test_decoding_that_differs_from_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = loaded("llava")
    generate = vlm.model.generate
    monkeypatch.setattr(vlm.model, "generate", lambda **given: generate(**given).roll(1, dims=1))
    found = CHECKS["decoding"](Patient(vlm))
    assert found.status == "failed" and found.remedy


def test_what_a_check_raises_is_its_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fall(_patient: Patient) -> Any:
        raise ZeroDivisionError("on purpose")

    def starve(_patient: Patient) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in CHECKS:
        monkeypatch.setitem(CHECKS, name, starve if name == "memory" else fall)
    report = examine(loaded("llava"))
    assert failed(report) == set(CHECKS)
    assert "ZeroDivisionError: on purpose" in report.finding("boxes").said
    assert "quantize" in report.finding("memory").remedy


@pytest.mark.parametrize(
    ("attention", "status", "said"),
    [
        (PrefixAttention("written out", "torch has none"), "off", "written out in float32 (torch has none)"),
        (PrefixAttention("fused kernel", "it claims", lambda q, *_: (q, q[..., 0])), "failed", "but off by"),
    ],
)
def test_how_the_prefix_is_attended_to(
    attention: PrefixAttention, status: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without a kernel says so and is sound; a kernel whose numbers are wrong is found out."""
    patient = Patient(loaded("qwen2_5_vl"))
    assert patient.vlm.shares_prefixes(patient.prefix)
    monkeypatch.setattr(shared_prefix, "attention_for", lambda *_: attention)
    found = check_prefix_attention(patient)
    assert found.status == status and said in found.said
    assert found.remedy
