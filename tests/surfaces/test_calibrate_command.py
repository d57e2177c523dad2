"""``latent-tool calibrate`` on runs made by hand, and ``latent-tool ask`` with the files it writes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pictures import draw_shapes
from typer.testing import CliRunner

from latent_tool.calibration import Calibration
from latent_tool.calibration.configuration import configuration, fingerprint
from latent_tool.cli import app
from latent_tool.commands.calibrate import calibration_of, check_drift
from latent_tool.errors import CalibrationError, CalibrationMismatchError, DatasetError, SettingsError, TooFewItemsError
from latent_tool.evaluation.runs import load_run
from latent_tool.schema import ReasoningResult
from latent_tool.settings import Budget, SearchSettings

pytestmark = pytest.mark.disable_socket
METHODS = {
    "search": (SearchSettings(), Budget()),
    "greedy": (SearchSettings(latents=0), Budget()),
}


def run_folder(folder: Path, count: int, methods: tuple[str, ...] = ("search",), power: float = 1.0) -> Path:
    """A run of the embedded model as ``latent-tool eval`` would write it: a score is the probability of being right."""
    folder.mkdir()
    facts = {}
    for name in methods:
        settings, budget = METHODS[name]
        facts[name] = {
            "name": name,
            "kind": "answer",
            "settings": settings.model_dump(mode="json"),
            "budget": budget.model_dump(mode="json"),
            "generation": None,
            "sampling": None,
            "matches": None,
            "fingerprints": {
                score: fingerprint(score=score, settings=settings, budget=budget)
                for score in ("pooled_probability", "first_token_entropy", "reward")
            },
        }
    manifest = {
        "schema_version": "1",
        "latent_tool": "0.1.0",
        "dataset": {"name": "made up", "fingerprint": "0", "size": count},
        "model": {"name": "embedded", "dtype": "auto", **configuration(score="reward")["model"]},
        "batch": 16,
        "methods": facts,
    }
    (folder / "run.json").write_text(json.dumps(manifest))
    rng = random.Random(count)
    lines = []
    for number in range(count):
        chance = rng.betavariate(2.2, 0.4)
        right = rng.random() < chance
        for name in methods:
            lines.append(
                {
                    "id": str(number),
                    "method": name,
                    "question": "?",
                    "label": "red",
                    "answer": "red" if right else "blue",
                    "correct": right,
                    "scores": {"pooled_probability": chance**power, "first_token_entropy": 1 - chance, "reward": None},
                }
            )
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def changed(folder: Path, number: int, **changes: Any) -> None:
    """Change one line of a run."""
    lines = (folder / "items.jsonl").read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **changes})
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_a_file_for_the_reasoner(tmp_path: Path) -> None:
    folder, out = run_folder(tmp_path / "run", 600), tmp_path / "mine.json"
    done = invoke("calibrate", str(folder), "--out", str(out), "--target-error", "0.1")
    assert done.exit_code == 0, done.output
    assert "at most 10.0% errors" in done.output and "mine.json" in done.output
    made = Calibration.load(out)
    assert made.fingerprint == fingerprint(score="pooled_probability")
    assert made.configuration == configuration(score="pooled_probability")
    assert made.threshold is not None and made.items == 600
    assert made.provenance["method"] == "search" and made.provenance["dataset"] == "made up"
    told = invoke("calibrate", str(folder), "--out", str(out), "--target-error", "0.1", "--json")
    assert json.loads(told.output)["threshold"]["target_error"] == 0.1


def test_no_threshold_is_exit_code_three_and_a_file_without_one(tmp_path: Path) -> None:
    folder, out = run_folder(tmp_path / "run", 120), tmp_path / "mine.json"
    done = invoke("calibrate", str(folder), "--out", str(out), "--target-error", "0.01")
    assert done.exit_code == 3 and "no threshold" in done.output
    assert Calibration.load(out).threshold is None


def test_what_cannot_be_calibrated_is_a_typed_error(tmp_path: Path) -> None:
    few = load_run(run_folder(tmp_path / "few", 60))
    with pytest.raises(TooFewItemsError, match="100 are needed"):
        calibration_of(few)
    two = load_run(run_folder(tmp_path / "two", 150, ("search", "greedy")))
    with pytest.raises(SettingsError, match="2 methods"):
        calibration_of(two)
    with pytest.raises(SettingsError, match="random-latents"):
        calibration_of(two, method="random-latents")
    with pytest.raises(CalibrationError, match="no score 'reward'"):
        calibration_of(two, "reward", "search")
    assert calibration_of(two, method="greedy").fingerprint != calibration_of(two, method="search").fingerprint
    entropy = calibration_of(two, "first_token_entropy", "search")
    assert not entropy.higher_is_surer and entropy.fingerprint == fingerprint(score="first_token_entropy")
    for arguments in ((), ("--out", str(tmp_path / "a.json"), "--check-drift", str(tmp_path / "a.json"))):
        assert isinstance(invoke("calibrate", str(two.path), *arguments).exception, SettingsError)
    assert isinstance(invoke("calibrate", str(two.path), "--out", str(tmp_path / "a.txt")).exception, SettingsError)


def test_unlabelled_and_failed_rows(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", 200)
    failure = {"type": "ImageDecodeError", "message": "no image"}
    changed(folder, 0, label=None, correct=None)
    changed(folder, 1, answer=None, correct=None, scores={}, error=failure)
    changed(folder, 2, scores={"pooled_probability": None})
    made = calibration_of(load_run(folder))
    assert (made.items, made.unscored) == (197, 2)  # an answer that failed is never accepted; no label is no evidence
    whole = (folder / "items.jsonl").read_text()
    (folder / "items.jsonl").write_text(whole + '{"id": "torn')
    assert calibration_of(load_run(folder)) == made
    (folder / "items.jsonl").write_text(whole)
    changed(folder, 3, scores={"pooled_probability": "high"})
    with pytest.raises(DatasetError, match="line 4"):
        load_run(folder)


def test_a_run_that_is_not_complete_is_taken_on_demand_alone(tmp_path: Path) -> None:
    folder, out = run_folder(tmp_path / "run", 300), str(tmp_path / "mine.json")
    lines = (folder / "items.jsonl").read_text().splitlines(keepends=True)
    (folder / "items.jsonl").write_text("".join(lines[:200]))
    refused = invoke("calibrate", str(folder), "--out", out).exception
    assert isinstance(refused, CalibrationError) and "200 of 300" in str(refused) and "--partial" in refused.hint
    invoke("calibrate", str(folder), "--out", out, "--partial")
    assert Calibration.load(out).provenance["answered"] == "200 of 300"


def test_what_could_not_be_asked_is_no_item(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", 200)
    failure = {"type": "ImageDecodeError", "message": "no image"}
    changed(folder, 1, answer=None, correct=None, scores={}, error=failure, details={"asked": False})
    made = calibration_of(load_run(folder))
    assert (made.items, made.unscored) == (199, 0)


def test_drift_of_traffic(tmp_path: Path) -> None:
    made = calibration_of(load_run(run_folder(tmp_path / "run", 600)))
    made.save(tmp_path / "mine.json")
    same = run_folder(tmp_path / "same", 250)
    for number in range(250):  # traffic has no labels
        changed(same, number, label=None, correct=None) if number < 5 else None
    other = run_folder(tmp_path / "other", 250 + 1, power=4.0)
    done = invoke("calibrate", str(same), "--check-drift", str(tmp_path / "mine.json"))
    assert done.exit_code == 0 and "no drift" in done.output
    done = invoke("calibrate", str(other), "--check-drift", str(tmp_path / "mine.json"), "--json")
    assert done.exit_code == 3 and json.loads(done.output)["drifted"] is True
    with pytest.raises(CalibrationMismatchError):
        check_drift(made, load_run(run_folder(tmp_path / "greedy", 50, ("greedy",))))


def test_ask_with_a_calibration(tmp_path: Path) -> None:
    draw_shapes().save(tmp_path / "shapes.png")
    made = calibration_of(load_run(run_folder(tmp_path / "run", 600)), target_error=0.1)
    file = tmp_path / "mine.json"
    made.save(file)
    asked = ("ask", str(tmp_path / "shapes.png"), "what color is the circle?", "--json", "--calibration", str(file))
    done = invoke(*asked, "--min-confidence", "calibrated")
    assert done.stdout, done.exception
    result = ReasoningResult.model_validate_json(done.stdout)
    assert done.exit_code == (0 if result.accepted else 3)
    assert result.confidence_source == "calibrated" and made.threshold is not None
    assert result.min_confidence == made.threshold.probability
    assert result.confidence == made.probability(result.scores.pooled_probability)
    assert result.accepted == made.accepts(result.scores.pooled_probability)
    # Another budget is another configuration: an error before any work.
    assert isinstance(invoke(*asked, "--budget", "quick").exception, CalibrationMismatchError)
    assert isinstance(invoke(*asked[:-1], str(tmp_path / "nowhere.json")).exception, CalibrationError)
    assert isinstance(invoke(*asked[:-2], "--min-confidence", "calibrated").exception, CalibrationError)
    assert invoke(*asked, "--min-confidence", "very").exit_code == 2


def test_a_killed_write_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    made = calibration_of(load_run(run_folder(tmp_path / "run", 150)))
    large = made.model_copy(update={"provenance": {"note": "x" * 3_000_000}})
    large.save(file)
    code = (
        "from pathlib import Path; from latent_tool.calibration.calibration import Calibration\n"
        f"path = Path({str(file)!r}); made = Calibration.load(path); print('once', flush=True)\n"
        "while True: made.save(path)\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"once\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert Calibration.load(file) == large
