"""The plug-ins for lmms-eval and VLMEvalKit: through the installed package, or through its documented interface."""

from __future__ import annotations

import abc
import csv
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pictures import draw_shapes

from latent_tool.errors import DatasetError, LatentToolError, QuestionError, UnsupportedError
from latent_tool.evaluation.columns import confidence_columns, lmms_eval_columns, vlmevalkit_columns
from latent_tool.integrations.evaluators import as_question

QUESTION = "what color is the circle?"


def as_documented() -> dict[str, ModuleType]:
    """What lmms-eval's model guide promises, and no more."""

    class lmms(abc.ABC):
        is_simple = True

        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}
            self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

        @abc.abstractmethod
        def loglikelihood(self, requests: Any) -> Any: ...

        @abc.abstractmethod
        def generate_until(self, requests: Any) -> Any: ...

        @abc.abstractmethod
        def generate_until_multi_round(self, requests: Any) -> Any: ...

    @dataclass
    class TokenCounts:
        input_tokens: int | None = None
        output_tokens: int | None = None

    @dataclass
    class GenerationResult:
        text: str
        token_counts: TokenCounts | None = None

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        chat_class_path: str | None = None

    modules = {
        name: ModuleType(name)
        for name in (
            "lmms_eval",
            "lmms_eval.api",
            "lmms_eval.api.model",
            "lmms_eval.api.instance",
            "lmms_eval.models",
            "lmms_eval.models.registry_v2",
        )
    }
    modules["lmms_eval.api.model"].lmms = lmms  # type: ignore[attr-defined]
    modules["lmms_eval.api.instance"].TokenCounts = TokenCounts  # type: ignore[attr-defined]
    modules["lmms_eval.api.instance"].GenerationResult = GenerationResult  # type: ignore[attr-defined]
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest  # type: ignore[attr-defined]
    return modules


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if importlib.util.find_spec("lmms_eval") is None:
        for name, module in as_documented().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "latent_tool.integrations.lmms_eval", raising=False)
    yield importlib.import_module("latent_tool.integrations.lmms_eval")
    sys.modules.pop("latent_tool.integrations.lmms_eval", None)


def request(document: int, task: str = "toy", messages: Any = None, **options: Any) -> Any:
    def to_messages(row: dict[str, Any]) -> Any:
        if messages is not None:
            return messages
        parts = [{"type": "image", "url": row["image"]}, {"type": "text", "text": row["question"]}]
        return [{"role": "user", "content": parts}]

    return SimpleNamespace(args=("context", to_messages, {"until": ["\n\n"], **options}, document, task, "test"))


ROWS = [{"image": draw_shapes(), "question": question} for question in (QUESTION, "what color is the square?")]


def test_lmms_eval(plugin: Any, tmp_path: Path) -> None:
    out = tmp_path / "out" / "c.jsonl"
    model = plugin.LatentTool(budget="quick", batch_size="2", confidences=str(out))
    model.task_dict = {"toy": {"test": ROWS}}
    answers = model.generate_until([request(0), request(1, max_new_tokens=8)])
    assert [answer.text for answer in answers] == ["red", "blue"]
    assert all(answer.token_counts.output_tokens > 0 for answer in answers)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["task"], line["doc_id"], line["answer"]) for line in lines] == [("toy", 0, "red"), ("toy", 1, "blue")]
    assert all(0 <= line["confidence"] <= 1 and line["confidence_source"] for line in lines)
    samples = tmp_path / "2026_samples_toy.jsonl"
    samples.write_text("".join(json.dumps({"doc_id": n, "exact_match": {"score": 1 - n}}) + "\n" for n in (0, 1)))
    columns = lmms_eval_columns(samples, out, "exact_match")
    assert columns["n"] == 2 and columns["accuracy"] == 0.5 and columns["auroc"] in (0.0, 0.5, 1.0)
    with pytest.raises(DatasetError, match="no number"):
        lmms_eval_columns(samples, out, "anls")
    (tmp_path / "2026_samples_other.jsonl").write_text(samples.read_text())
    with pytest.raises(DatasetError, match="No confidence"):
        lmms_eval_columns(tmp_path / "2026_samples_other.jsonl", out, "exact_match")
    for refuse in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UnsupportedError):
            refuse([])
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    shots = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    for messages in (video, shots):
        with pytest.raises(UnsupportedError):
            model.generate_until([request(0, messages=messages)])
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.parametrize(("given", "means"), [(None, "auto"), ("auto", "auto"), ("off", False), (False, False)])
def test_lmms_eval_says_whether_passes_are_compiled(plugin: Any, tmp_path: Path, given: Any, means: Any) -> None:
    assert plugin.LatentTool(compile=given, confidences=str(tmp_path / "c.jsonl")).reasoner.compile == means


def test_lmms_eval_finds_the_model(plugin: Any) -> None:
    from latent_tool.integrations.lmms_eval_entry import manifest

    found = manifest()
    module, _, name = found.chat_class_path.rpartition(".")
    assert (found.model_id, module) == ("latent_tool", "latent_tool.integrations.lmms_eval")
    assert getattr(plugin, name).is_simple is False
    named = {each.value for each in entry_points(group="lmms_eval.models")}
    assert not named or "latent_tool.integrations.lmms_eval_entry:manifest" in named


def test_vlmevalkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latent_tool.integrations.vlmevalkit import LatentToolVLM, register

    draw_shapes().save(tmp_path / "a.png")
    with pytest.raises(LatentToolError, match="not installed"):
        register()
    modules = {name: ModuleType(name) for name in ("vlmeval", "vlmeval.config", "vlmeval.inference")}
    modules["vlmeval"].inference = modules["vlmeval.inference"]  # type: ignore[attr-defined]
    modules["vlmeval.config"].supported_VLM = known = {}  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    register("plain", budget="quick")
    modules["vlmeval.inference"]._is_structured_record = lambda _: True  # type: ignore[attr-defined]
    register("with records", budget="quick")
    message = [{"type": "image", "value": str(tmp_path / "a.png")}, {"type": "text", "value": QUESTION}]
    assert known["plain"]().generate(message=message, dataset="Toy") == "red"
    model = known["with records"]()
    model.set_dump_image(lambda _: None)
    assert isinstance(model, LatentToolVLM) and not model.is_api and not model.use_custom_prompt("Toy")
    said = model.generate(message=[str(tmp_path / "a.png"), QUESTION], dataset="Toy")
    assert set(said) == {"prediction", "extra_records"} and said["prediction"] == "red"
    assert 0 <= said["extra_records"]["confidence"] <= 1
    result = tmp_path / "result.tsv"
    with result.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "prediction", "hit", "extra_records"])
        for number, (hit, confidence) in enumerate([(1, 0.9), (0, 0.2), (1, 0.8)]):
            writer.writerow([number, "a", hit, str({**said["extra_records"], "confidence": confidence})])
    columns = vlmevalkit_columns(result)
    assert columns["auroc"] == 1.0 and columns["coverage"] == pytest.approx(2 / 3)
    with pytest.raises(DatasetError, match="Row 1"):
        vlmevalkit_columns(result, metric="score")
    with pytest.raises(UnsupportedError):
        model.generate(message=[{"type": "video", "value": "a.mp4"}])
    with pytest.raises(QuestionError):
        model.generate(message="what is it?")


def test_columns() -> None:
    columns = confidence_columns([0.9, 0.8, None, 0.3], [True, True, True, False])
    assert (columns["n"], columns["missing"], columns["auroc"], columns["coverage"]) == (4, 1, 1.0, 0.5)
    assert columns["ece"] == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    assert confidence_columns([0.5], [True])["auroc"] is None
    assert confidence_columns([None], [True])["coverage"] is None


def test_pictures_between_texts_are_named_where_they_stood() -> None:
    one, other = draw_shapes(), draw_shapes()
    first = as_question([("image", one), ("image", other), ("text", "Same?")], "Be brief.", 7)
    assert first.question == "Same?" and len(first.images or []) == 2 and first.system == "Be brief."
    assert first.budget is not None
    between = as_question(
        [("text", "Is"), ("image", one), ("text", "like"), ("image", other), ("text", "?")], None, None
    )
    assert between.question == "Is\n(picture 1)\nlike\n(picture 2)\n?"
    with pytest.raises(QuestionError):
        as_question([("text", "?")], None, None)
