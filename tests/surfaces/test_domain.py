"""The domain check from the command to the answer: fitted from a run's pictures, and kept by every door."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from latent_tool import Budget, ChatLatentReasoner, ConfidenceRouter, LatentReasoner, LatentReasoningTool
from latent_tool.calibration import Calibration, DomainCheck, NoDomainCheck
from latent_tool.calibration.calibration import embedded_domain
from latent_tool.calibration.configuration import configuration, fingerprint
from latent_tool.cannot_tell import CANNOT_TELL, CANNOT_TELL_REASON
from latent_tool.cli import app
from latent_tool.evaluation.runs import load_run
from latent_tool.images.appearance import PIXEL_NUMBERS
from latent_tool.langchain.messages import messages_from_request
from latent_tool.models.looks import SPREAD
from latent_tool.scenes import generate
from latent_tool.schema import ReasoningRequest, ReasoningResult
from latent_tool.settings import SearchSettings

pytestmark = [pytest.mark.disable_socket, pytest.mark.slow]

SEEDS = "5200000-5200129"
FURTHER = "scenes:held_out:5201000-5201219"
PLAIN = SearchSettings(latents=0)
QUESTION = "is there a red square?"


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8))


def run_folder(folder: Path, data: str = f"scenes:held_out:{SEEDS}", first: int = 5_200_000) -> Path:
    """A run of the plain embedded model on scenes, answers made up: a score is the probability of being right."""
    folder.mkdir()
    budget = Budget(iterations=0)
    facts = {
        "name": "greedy",
        "kind": "answer",
        "settings": PLAIN.model_dump(mode="json"),
        "budget": budget.model_dump(mode="json"),
        "fingerprints": {
            "pooled_probability": fingerprint(score="pooled_probability", settings=PLAIN, budget=budget),
        },
    }
    from latent_tool.evaluation.datasets import load_dataset

    items = load_dataset(f"scenes:held_out:{SEEDS}")
    manifest = {
        "latent_tool": "0.1.0",
        "dataset": {"name": data, "fingerprint": "0", "size": len(items)},
        "model": {"name": "embedded", "dtype": "auto", **configuration(score="reward")["model"]},
        "batch": 16,
        "methods": {"greedy": facts},
    }
    (folder / "run.json").write_text(json.dumps(manifest))
    rng = random.Random(0)
    lines = []
    for place, item in enumerate(items):
        chance = rng.uniform(0.2, 0.999)
        abstains = place % 10 == 9
        row: dict[str, Any] = {"id": item.id, "method": "greedy", "question": item.question, "label": "red"}
        row |= {"images": item.images, "scores": {"pooled_probability": chance}}
        row["answer"], row["correct"] = (CANNOT_TELL, None) if abstains else ("red", rng.random() < chance)
        row["details"] = {"abstained": True} if abstains else {}
        lines.append(json.dumps(row) + "\n")
    (folder / "items.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration with a domain check, made by the command from a run and further pictures without labels."""
    folder = tmp_path_factory.mktemp("domain")
    run, out = run_folder(folder / "run"), folder / "mine.json"
    arguments = ["calibrate", str(run), "--out", str(out), "--target-error", "0.45", "--pictures", FURTHER]
    made = CliRunner().invoke(app, arguments)
    assert made.exit_code == 0, made.output
    assert "domain check at most 5.0% of questions like these are refused" in made.output
    assert "label nothing more" in made.output
    return out


@pytest.fixture(scope="module")
def calibration(file: Path) -> Calibration:
    return Calibration.load(file)


@pytest.fixture(scope="module")
def reasoner(calibration: Calibration) -> Iterator[LatentReasoner]:
    yield LatentReasoner(settings=PLAIN, budget=Budget(iterations=0), calibration=calibration, min_confidence=0.0)


def test_the_file_says_what_it_was_made_from(calibration: Calibration) -> None:
    check = calibration.domain
    assert (
        check is not None and check.held >= 79 and check.reference >= 100 and set(check.damages) == {"shrunk", "warped"}
    )
    assert calibration.provenance["domain"]["pictures"] == "further ones"
    assert calibration.unscored >= 10 and calibration.items >= 100  # those that cannot tell have no score


def test_noise_is_refused_and_a_scene_is_not(reasoner: LatentReasoner) -> None:
    """With any threshold or none; the noise's own question and another."""
    scene = generate(5_202_000, "held_out").image
    known, strange = reasoner.batch([{"image": each, "question": QUESTION} for each in (scene, noise())])
    assert known.domain is not None and not known.domain.refused and known.domain.p_value > 0.05
    assert strange.domain is not None and strange.domain.refused
    assert strange.accepted is False and strange.abstained is True
    assert (strange.abstain_reason or "").startswith("unlike the calibration's pictures (p = 0.0")
    assert ReasoningResult.model_validate_json(strange.model_dump_json()) == strange
    free = LatentReasoner(**{**dict(reasoner), "min_confidence": None})
    assert free.invoke({"image": noise(), "question": "?"}).accepted is False
    alone = reasoner.invoke({"image": noise(), "question": QUESTION})
    assert alone.domain is not None and alone.domain.parts == pytest.approx(strange.domain.parts)


def test_of_two_pictures_the_stranger_one_counts(reasoner: LatentReasoner) -> None:
    scene = generate(5_202_000, "held_out").image
    found = reasoner.invoke({"images": [scene, noise()], "question": QUESTION})
    assert found.domain is not None and found.domain.refused


def test_switched_off_it_is_visible(reasoner: LatentReasoner) -> None:
    off = LatentReasoner(**{**dict(reasoner), "check_domain": False})
    found = off.invoke({"image": noise(), "question": QUESTION})
    assert found.domain is None and any("switched off" in each for each in found.warnings)


def test_a_refused_question_climbs_the_router(reasoner: LatentReasoner) -> None:
    def second(_: ReasoningRequest) -> str:
        return "a storm"

    request = {"image": noise(), "question": QUESTION}
    for thresholds in (0.0, None, [0.0, None]):
        found = ConfidenceRouter(rungs=[reasoner, second], thresholds=thresholds).invoke(request)
        assert found.answer == "a storm" and found.accepted is True and found.abstain_reason is None
        assert found.route[0].decision == "unsure" and "unlike the calibration's" in found.route[0].reason
    alone = ConfidenceRouter(rungs=[reasoner], thresholds=0.0).invoke(request)
    assert alone.abstained is True and "unlike the calibration's" in (alone.abstain_reason or "")


def test_cannot_tell_climbs_the_router_whoever_says_it() -> None:
    def one(_: ReasoningRequest) -> str:
        return "I'm sorry, but I cannot determine that from the image."

    request = {"image": noise(), "question": QUESTION}
    found = ConfidenceRouter(rungs=[one, lambda _: "red"], thresholds=None).invoke(request)
    assert found.answer == "red" and found.route[0].reason == CANNOT_TELL_REASON
    alone = ConfidenceRouter(rungs=[one]).invoke(request)
    assert alone.accepted is False and alone.abstain_reason == CANNOT_TELL_REASON


def test_every_other_door_says_so(reasoner: LatentReasoner) -> None:
    tool = LatentReasoningTool(reasoner=reasoner)
    content = tool.invoke({"image": data_uri(noise()), "question": QUESTION})
    assert "NOT RELIABLE: the picture is unlike the calibration's pictures" in content
    request = ReasoningRequest(image=noise(), question=QUESTION)
    reply = ChatLatentReasoner(reasoner=reasoner).invoke(messages_from_request(request, [noise()]))
    assert reply.response_metadata["accepted"] is False
    assert "unlike" in reply.response_metadata["abstain_reason"] and reply.response_metadata["domain"]["refused"]


def test_the_command_says_so(file: Path, tmp_path: Path) -> None:
    noise().save(tmp_path / "noise.png")
    arguments = ["ask", str(tmp_path / "noise.png"), QUESTION, "--latents", "0", "--iterations", "0", "-q"]
    asked = CliRunner().invoke(app, [*arguments, "--calibration", str(file), "--min-confidence", "0"])
    assert asked.exit_code == 3
    assert "The picture is unlike the calibration's pictures" in " ".join(asked.output.split())
    off = CliRunner().invoke(app, [*arguments, "--calibration", str(file), "--no-check-domain"])
    told = " ".join(off.output.split())  # the model itself may say that it cannot tell
    assert "switched off" in told and "unlike" not in told


def test_without_a_calibration_the_embedded_model_has_its_own() -> None:
    """A note beside its answer; a threshold is not reached."""
    assert embedded_domain() is not None, "the shipped calibration has no domain check of these weights"
    plain = LatentReasoner(settings=PLAIN, budget="quick")
    scene = generate(5_202_001, "held_out").image
    known, strange = plain.batch([{"image": each, "question": QUESTION} for each in (scene, noise())])
    assert known.domain is not None and not known.domain.refused and not known.warnings
    assert strange.domain is not None and strange.domain.refused and strange.unsure
    assert any("unlike what this model knows" in each for each in strange.warnings)
    gated = LatentReasoner(settings=PLAIN, budget="quick", min_confidence=0.0)
    found = gated.invoke({"image": noise(), "question": QUESTION})
    assert found.accepted is False and found.abstain_reason
    routed = ConfidenceRouter(rungs=[plain, lambda _: "a storm"], thresholds=0.0)
    assert routed.invoke({"image": noise(), "question": QUESTION}).answer == "a storm"


def test_a_run_whose_pictures_are_not_found_says_so(tmp_path: Path) -> None:
    """Nobody named them: a file without a check, which says why. Named in vain: an error."""
    run = run_folder(tmp_path / "run", data="gone.jsonl")
    out = tmp_path / "mine.json"
    made = CliRunner().invoke(app, ["calibrate", str(run), "--out", str(out), "--target-error", "0.45"])
    assert made.exit_code == 0 and "no domain check: The pictures of the run are not found" in made.output
    found = Calibration.load(out)
    assert isinstance(found.no_domain, NoDomainCheck) and found.lacks is not None and "--data" in found.lacks
    wrong = CliRunner().invoke(app, ["calibrate", str(run), "--out", str(out), "--data", "scenes:hard"])
    assert wrong.exit_code != 0
    left = CliRunner().invoke(app, ["calibrate", str(run), "--out", str(out), "--target-error", "0.45", "--no-domain"])
    assert left.exit_code == 0 and "left out" in left.output


def test_a_run_of_its_own_shares_its_items(tmp_path: Path) -> None:
    """Too few for that here: it says how many pictures more, without labels, would do."""
    run = run_folder(tmp_path / "run")
    out = tmp_path / "mine.json"
    made = CliRunner().invoke(app, ["calibrate", str(run), "--out", str(out), "--target-error", "0.45"])
    assert made.exit_code == 0 and "More pictures need no labels" in made.output
    assert Calibration.load(out).domain is None


def test_a_run_counts_what_cannot_be_told(tmp_path: Path) -> None:
    from latent_tool.evaluation.report import write_reports
    from latent_tool.evaluation.summary import summarise

    run = load_run(run_folder(tmp_path / "run"))
    facts = summarise(run)["methods"]["greedy"]
    right, count = sum(row.correct is True for row in run.rows), len(run.rows)
    silent = count // 10
    assert facts["abstained"] == silent and facts["answered"]["value"] == pytest.approx(1 - silent / count)
    assert facts["error_answered"] == pytest.approx(1 - right / (count - silent))
    assert facts["scores"]["pooled_probability"]["missing"] == silent
    write_reports(run.path, summarise(run))
    assert f"{silent} of {count} questions that it cannot be told" in (run.path / "report.md").read_text()


def data_uri(picture: Image.Image) -> str:
    import base64
    import io

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_a_check_of_another_model_is_an_error(reasoner: LatentReasoner) -> None:
    assert isinstance(reasoner.calibration, Calibration) and isinstance(reasoner.calibration.domain, DomainCheck)
    assert reasoner.calibration.domain.size == 192 + SPREAD + PIXEL_NUMBERS
