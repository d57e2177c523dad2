"""Runs on the embedded model: what is written, what is kept when a run is killed, and what the summary says of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import command
import pytest
from pictures import draw_shapes

from latent_tool import Budget, LatentReasoner, ReasoningResult
from latent_tool.about import what_it_is
from latent_tool.calibration import Calibration
from latent_tool.calibration.configuration import EMBEDDED_FOLDER, fingerprint
from latent_tool.engine.engine import Engine
from latent_tool.engine.job import Examined, Job
from latent_tool.errors import DatasetError, LatentToolError, ModelNotFoundError, SettingsError
from latent_tool.evaluation import Item, Match, Run, evaluate, load_dataset, load_run, parse_method
from latent_tool.evaluation.answers import answer_scores
from latent_tool.evaluation.report import html_report, markdown_report, tables
from latent_tool.evaluation.summary import fused_score, summarise
from latent_tool.evaluation.thumbnails import read_thumbnails
from latent_tool.evaluation.workers import BatchRows, Task, Worker
from latent_tool.schema import Grounding, TokenDependency
from latent_tool.scores import score_of
from latent_tool.settings import NoiseSettings, SamplingSettings, SearchSettings

pytestmark = pytest.mark.slow

SCENES = "scenes:held_out:5850000-5850006"
METHODS = ["greedy", "search:iterations=1,max_patches=2", "random-latents", "self-consistency:samples=3"]
SMALL = LatentReasoner(budget=Budget(iterations=1, max_patches=2, target_confidence=None))


def plain(run: Run) -> list[dict[str, Any]]:
    """The rows without their seconds."""
    return [row.model_dump(exclude={"seconds"}) for row in run.rows]


def assert_the_same(one: Run, other: Run) -> None:
    """The rows are the same; a number on the border of two rounded ones may be either."""
    for first, second in zip(plain(one), plain(other), strict=True):
        for row in (first, second):
            row["drawn"] = row["details"].pop("probabilities", [])
        assert first.pop("drawn") == pytest.approx(second.pop("drawn"), rel=2e-6)
        assert first.pop("scores") == pytest.approx(second.pop("scores"), abs=1.1e-3)
        assert first == second


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run that several tests look at."""
    return evaluate(SMALL, load_dataset(SCENES), METHODS, tmp_path_factory.mktemp("run"), name=SCENES, batch=3)


def test_one_row_for_every_item_and_method(whole: Run) -> None:
    assert whole.complete
    assert {(row.id, row.method) for row in whole.rows} == {
        (f"held_out-{seed}", method) for seed in range(5_850_000, 5_850_007) for method in whole.methods
    }
    for row in whole.rows:
        assert row.error is None and isinstance(row.correct, bool) and row.seconds > 0
        assert all(value is None or isinstance(value, float) for value in row.scores.values())
    greedy, search, drawn = (whole.of(name)[0] for name in ("greedy", METHODS[1], METHODS[3]))
    assert greedy.scores["reward"] is None and greedy.candidates == 0
    assert search.scores["reward"] is not None and search.candidates > 1
    assert search.scores["visual_dependency"] is not None and search.scores["masked_entropy_gain"] is not None
    assert len(drawn.details["votes"]) == 3 and drawn.scores["agreement"] in (1 / 3, 2 / 3, 1.0)


def test_scores_are_written_without_their_noise(whole: Run) -> None:
    """What is written by a run that was killed and went on is to be what would have been written without."""
    for row in whole.rows:
        for name, value in row.scores.items():
            nats = name in ("visual_dependency", "masked_entropy_gain")
            assert name == "agreement" or value is None or value == (round(value, 3) if nats else float(f"{value:.6g}"))
        assert all(each == float(f"{each:.6g}") for each in row.details.get("probabilities", []))


def test_the_visual_dependency_is_that_of_the_answer_as_in_a_calibration() -> None:
    tokens = [TokenDependency(token=str(i), probability=0.5, dependency=float(i), in_answer=i > 0) for i in range(3)]
    grounding = Grounding(tokens=tokens, mean=1.0, share_above=0.5, noise=NoiseSettings())
    result = ReasoningResult(answer="a", raw_text="a", confidence=None, confidence_source="unscored")
    scores = answer_scores(result, Examined(grounding, 0.12345678, 0.0))
    assert scores["visual_dependency"] == 1.5
    assert scores["visual_dependency"] == score_of(
        result.model_copy(update={"grounding": grounding}), "visual_dependency"
    )
    assert scores["masked_entropy_gain"] == 0.123
    assert answer_scores(result, None)["visual_dependency"] is None


def test_every_answer_has_its_agreement_with_the_samples(whole: Run) -> None:
    votes = {row.id: row.details["votes"] for row in whole.of(METHODS[3])}
    for row in whole.of("greedy"):
        assert row.scores["agreement"] == votes[row.id].count(row.details["canonical"]) / 3


def test_the_random_control_has_at_least_the_evaluations_of_the_search(whole: Run) -> None:
    searched = {row.id: row.candidates for row in whole.of(METHODS[1])}
    for row in whole.of("random-latents"):
        assert searched[row.id] <= row.candidates < searched[row.id] + 8


def test_the_random_control_matches_a_search_that_the_run_has_already(engine: Engine, tmp_path: Path) -> None:
    items, searched = (
        load_dataset("scenes:held_out:5850000-5850002"),
        "search:iterations=2,samples=4,patches_per_latent=0",
    )
    evaluate(engine, items, ["greedy", searched], tmp_path, visual=False, report=False)
    both = evaluate(engine, items, ["random-latents"], tmp_path, visual=False, report=False)
    assert both.manifest.methods["random-latents"].matches == searched
    for row, other in zip(both.of("random-latents"), both.of(searched), strict=True):
        assert other.candidates <= row.candidates < other.candidates + 8
    again = evaluate(engine, items, ["random-latents", "search"], tmp_path, visual=False, report=False)
    assert again.manifest.methods["random-latents"].matches == searched


def test_the_random_control_needs_a_search_that_has_ended(whole: Run, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((whole.path / "run.json").read_bytes())
    (tmp_path / "items.jsonl").write_bytes((whole.path / "items.jsonl").read_bytes().split(b"\n")[0] + b"\n")
    with pytest.raises(SettingsError, match="has not answered every question"):
        evaluate(SMALL, load_dataset(SCENES), ["random-latents"], tmp_path, name=SCENES, batch=3, report=False)


def test_an_agreement_is_bound_to_its_sampler(whole: Run) -> None:
    other = whole.manifest.methods[METHODS[3]].model_copy(update={"fingerprints": {"agreement": "0" * 64}})
    changed = whole.manifest.model_copy(update={"methods": {**whole.manifest.methods, METHODS[3]: other}})
    again = Run(whole.path, changed, whole.rows)
    assert whole.fingerprint("greedy", "agreement") != again.fingerprint("greedy", "agreement")
    assert whole.fingerprint("greedy", "reward") == again.fingerprint("greedy", "reward")
    assert whole.fingerprint(METHODS[3], "agreement") == whole.manifest.methods[METHODS[3]].fingerprints["agreement"]


def test_every_pair_of_methods_is_compared_on_common_questions(whole: Run) -> None:
    rows = [row.model_copy(update={"correct": place % 3 == 0}) for place, row in enumerate(whole.rows)]
    left = next(place for place, row in enumerate(rows) if row.method == "random-latents")
    run = Run(whole.path, whole.manifest, tuple(rows[:left] + rows[left + 1 :]))
    summary = summarise(run)
    pairs = {(pair["method"], pair["against"]): pair for pair in summary["pairs"]}
    greedy, search, drawn, samples = METHODS
    assert set(pairs) == {
        (search, greedy), (drawn, greedy), (samples, greedy), (search, drawn), (search, samples), (drawn, samples)
    }  # fmt: skip
    found = pairs[search, drawn]
    right = {name: {row.id: row.correct for row in run.of(name)} for name in (search, drawn)}
    common = set(right[search]) & set(right[drawn])
    assert found["n"] == len(common) == 6
    assert found["fixed"] == sum(bool(right[search][each]) and not right[drawn][each] for each in common)
    assert found["broken"] == sum(bool(right[drawn][each]) and not right[search][each] for each in common)
    gain = (found["fixed"] - found["broken"]) / 6
    assert found["gain"]["value"] == pytest.approx(gain) and found["gain"]["low"] <= gain <= found["gain"]["high"]
    for report in (markdown_report(summary), html_report(summary)):
        assert "Methods against each other" in report


def test_the_table_of_kinds_says_how_many_each_method_was_asked(whole: Run) -> None:
    rows = [row.model_copy(update={"type": str(place % 2)}) for place, row in enumerate(whole.rows)]
    table = next(
        each for each in tables(summarise(Run(whole.path, whole.manifest, tuple(rows[:-3])))) if "kind" in each[1]
    )
    assert table[1] == ["kind", *whole.methods]  # the random control comes last
    assert [sum(int(row[column].split("(")[1][:-1]) for row in table[2]) for column in (1, 4)] == [7, 6]


def test_the_page_of_the_embedded_model(whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything there, and with what a run may lack: greedy, answers, a calibration that fits."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import evaluation as page

    rows = tuple(row.model_copy(update={"correct": place % 5 > 0}) for place, row in enumerate(whole.rows))
    run = Run(whole.path, whole.manifest, rows)
    shipped = Calibration.load("embedded")
    own = run.fingerprint(METHODS[1], "pooled_probability")
    fits = shipped.model_copy(update={"fingerprint": own, "score": "pooled_probability", "configuration": None})
    text = page.document({"held-out scenes": run, "hard scenes": run}, 1, fits)
    assert "is not complete" not in text and "promise kept" in text and "none is made" in text
    scored = [row.scores["pooled_probability"] for row in run.of(METHODS[1])]
    assert f"| {sum(map(fits.accepts, scored))} (" in text
    assert "nothing to measure" in page.document({"held-out scenes": run}, 1, shipped)
    few = {name: facts for name, facts in run.manifest.methods.items() if name != "greedy"}
    bare = Run(
        run.path,
        run.manifest.model_copy(update={"methods": few}),
        tuple(row for row in rows if row.method != "greedy")[:-2],
    )
    text = page.document({"held-out scenes": bare}, 1, shipped)
    assert "**held-out scenes is not complete**: of 7 questions have an answer: " in text


def test_the_manifest_names_data_model_and_configuration(whole: Run) -> None:
    facts = whole.manifest
    assert facts.dataset.size == 7 and facts.dataset.name == SCENES and len(facts.dataset.fingerprint) == 64
    prints = [method.fingerprints["answer_probability"] for method in facts.methods.values()]
    assert len(set(prints)) == 4
    assert len(facts.model["content"]) == 64


def test_the_same_call_again_answers_nothing_again(whole: Run, tmp_path: Path) -> None:
    before = (whole.path / "items.jsonl").read_bytes()
    told: list[tuple[int, int]] = []
    again = evaluate(
        SMALL,
        load_dataset(SCENES),
        METHODS,
        whole.path,
        name=SCENES,
        batch=3,
        report=False,
        progress=lambda done, total, _: told.append((done, total)),
    )
    assert (whole.path / "items.jsonl").read_bytes() == before
    assert plain(again) == plain(whole)
    assert told == [(28, 28)]


FULL_DISK = """
import resource, sys
from latent_tool.errors import SettingsError
from latent_tool.evaluation.journal import Journal
from pathlib import Path
path = Path(sys.argv[1])
journal = Journal(path)
journal.append([{"id": "a"}])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    journal.append([{"id": "x" * 10000}])
except SettingsError as error:
    print("typed:", error)
assert [line for line in Journal(path).lines] == [b'{"id": "a"}']
"""


def test_a_full_disk_is_a_typed_error_and_spoils_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "items.jsonl")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and "cannot be written" in done.stdout, done.stderr


@pytest.mark.parametrize("share", [0.21, 0.83])
def test_a_file_cut_anywhere_is_completed_to_the_same_rows(whole: Run, tmp_path: Path, share: float) -> None:
    """A kill may leave a torn line, or a batch of which only some rows were written."""
    written = (whole.path / "items.jsonl").read_bytes()
    (tmp_path / "run.json").write_bytes((whole.path / "run.json").read_bytes())
    (tmp_path / "items.jsonl").write_bytes(written[: int(len(written) * share)])
    resumed = evaluate(SMALL, load_dataset(SCENES), METHODS, tmp_path, name=SCENES, batch=3, report=False)
    assert_the_same(resumed, whole)


KILLED = f"""
import os, signal, sys
from latent_tool import Budget, LatentReasoner
from latent_tool.evaluation import evaluate, load_dataset
def progress(done, total, name):
    if done >= 6:
        os.kill(os.getpid(), signal.SIGKILL)
reasoner = LatentReasoner(budget=Budget(iterations=1, max_patches=2, target_confidence=None))
evaluate(reasoner, load_dataset({SCENES!r}), ["greedy", "search"], sys.argv[1], batch=2, progress=progress)
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], timeout=200)
    assert done.returncode == -9
    with pytest.raises(FileNotFoundError):
        (tmp_path / "killed" / "summary.json").read_bytes()
    partial = load_run(tmp_path / "killed")
    assert not partial.complete and len(partial.rows) == 6
    with (tmp_path / "killed" / "items.jsonl").open("ab") as file:
        file.write(b'{"id": "held_out-5850003", "method": "gre')
    assert len(load_run(tmp_path / "killed").rows) == 6
    evaluate(SMALL, load_dataset(SCENES), ["greedy", "search"], tmp_path / "killed", batch=2)
    resumed = load_run(tmp_path / "killed")
    whole = evaluate(SMALL, load_dataset(SCENES), ["greedy", "search"], tmp_path / "whole", batch=2, report=False)
    assert resumed.complete and len(resumed.rows) == 14
    assert [(row.id, row.method) for row in resumed.rows] == [(row.id, row.method) for row in whole.rows]
    for one, other in zip(resumed.rows, whole.rows, strict=True):
        assert (one.answer, one.correct, one.candidates) == (other.answer, other.correct, other.candidates)
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
    for name in ("summary.json", "report.md"):
        assert (tmp_path / "killed" / name).exists()


def test_several_processes_give_the_same_answers(tmp_path: Path) -> None:
    items = load_dataset(SCENES)
    alone = evaluate(SMALL, items, ["greedy"], tmp_path / "alone", batch=2, visual=False, report=False)
    crowd = evaluate(SMALL, items, ["greedy"], tmp_path / "crowd", batch=2, processes=2, visual=False, report=False)
    assert [(row.id, row.answer) for row in crowd.rows] == [(row.id, row.answer) for row in alone.rows]
    for one, other in zip(alone.rows, crowd.rows, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


def test_others_may_answer_the_batches(engine: Engine, whole: Run, tmp_path: Path) -> None:
    """What they are given can be sent elsewhere; what they give back is written in its order."""
    import pickle

    ended = []

    def workers(open_worker: Callable[[], Worker], tasks: Sequence[Task]) -> Generator[BatchRows, None, None]:
        try:
            worker = pickle.loads(pickle.dumps(open_worker))()
            for task in pickle.loads(pickle.dumps(tasks)):
                yield list(worker.answer(task))
        finally:
            ended.append(True)

    items = load_dataset(SCENES)
    run = evaluate(SMALL, items, METHODS, tmp_path, name=SCENES, batch=3, report=False, workers=workers)
    assert [(row.id, row.method, row.answer) for row in run.rows] == [
        (row.id, row.method, row.answer) for row in whole.rows
    ]
    assert (tmp_path / "run.json").read_bytes() == (whole.path / "run.json").read_bytes() and ended == [True]
    with pytest.raises(SettingsError, match="beside other workers"):
        evaluate(SMALL, items, ["greedy"], tmp_path, processes=2, workers=workers)
    with pytest.raises(SettingsError, match="need a reasoner"):
        evaluate(engine, items, ["greedy"], tmp_path, workers=workers)


def test_further_methods_are_added_and_other_runs_refused(engine: Engine, tmp_path: Path) -> None:
    items = load_dataset("scenes:held_out:5850000-5850002")
    evaluate(engine, items, ["greedy"], tmp_path, visual=False, report=False)
    both = evaluate(engine, items, ["greedy", "reasoning"], tmp_path, visual=False, report=False)
    assert both.methods == ("greedy", "reasoning") and both.complete
    with pytest.raises(SettingsError, match="another dataset"):
        evaluate(engine, items[:2], ["greedy"], tmp_path, visual=False, report=False)
    with pytest.raises(SettingsError, match="another seed"):
        evaluate(engine, items, ["greedy"], tmp_path, visual=False, report=False, seed=3)
    changed = parse_method("reasoning")
    with pytest.raises(SettingsError, match="other settings"):
        evaluate(
            engine,
            items,
            [type(changed)("reasoning", "answer", SearchSettings(latents=2), Budget(iterations=0))],
            tmp_path,
            visual=False,
            report=False,
        )
    with pytest.raises(SettingsError, match="no method"):
        both.of("search")


def test_no_method_finds_the_images_in_the_cache_that_another_filled(engine: Engine, tmp_path: Path) -> None:
    """Otherwise the first method would pay for the images alone, and seconds could not be compared."""
    items = load_dataset("scenes:held_out:5850000-5850003")
    engine.answer(Job(items[0].load(), items[0].question, settings=SearchSettings(latents=0)))
    hits = engine.vlm.prefix_cache.hits
    evaluate(engine, items, ["greedy", "reasoning", "self-consistency:samples=2"], tmp_path, visual=False, report=False)
    assert engine.vlm.prefix_cache.hits == hits


def test_a_run_that_is_being_written_is_left_alone(engine: Engine, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SettingsError, match="Another process"):
            evaluate(engine, load_dataset(SCENES), ["greedy"], tmp_path)


def test_lines_that_were_changed_are_named(whole: Run, tmp_path: Path) -> None:
    lines = (whole.path / "items.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run.json").write_bytes((whole.path / "run.json").read_bytes())
    (tmp_path / "items.jsonl").write_bytes(
        b"".join([lines[0], b"{}\n", lines[0], lines[1].replace(b"greedy", b"other")])
    )
    with pytest.raises(DatasetError) as caught:
        load_run(tmp_path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["line 2", "line 3", "line 4"]
    with pytest.raises(SettingsError, match="holds no run"):
        load_run(tmp_path / "nothing")


def fails(answer: str, label: str) -> bool:
    """A rule that raises for some answers."""
    raise RuntimeError("no such thing")


def test_errors_are_rows_and_the_run_goes_on(engine: Engine, tmp_path: Path) -> None:
    draw_shapes().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [
        {"id": "good", "image": "good.png", "question": "What colour is the circle?", "label": "red"},
        {"id": "bad picture", "image": "bad.png", "question": "What?", "label": "red"},
        {"id": "no picture", "image": "none.png", "question": "What?", "label": "red"},
        {"id": "no rule", "image": "good.png", "question": "What colour is the circle?", "label": "a"},
        {"id": "too long", "image": "good.png", "question": "What? " * 4000, "label": "red"},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = load_dataset(tmp_path / "data.jsonl", keep_going=True)
    items[3] = replace(items[3], match=Match.parse("test_evaluation_runs:fails"))
    run = evaluate(
        engine, items, ["greedy", "self-consistency:samples=2"], tmp_path / "out", visual=False, report=False
    )
    errors = [None if row.error is None else row.error.type for row in run.of("greedy")]
    assert errors == [None, "ImageDecodeError", "DatasetError", "RuntimeError", "ContextLengthError"]
    assert [row.correct for row in run.of("greedy")][1:] == [None] * 4
    assert run.of("greedy")[2].details["line"] == 3
    summary = summarise(run)
    facts = summary["methods"]["greedy"]
    # An answer that failed is not a right one, and never accepted; what could not be asked is nobody's fault.
    assert (facts["errors"], facts["broken_rows"], facts["labelled"], facts["accuracy"]["n"]) == (4, 2, 3, 3)
    assert facts["accuracy"]["value"] <= 1 / 3
    assert [error["line"] for error in summary["errors"] if error["method"] == "greedy"] == [2, 3, 4, 5]
    scores = facts["scores"]["answer_probability"]
    assert (scores["n"], scores["missing"]) == (1, 2)
    assert run.of("greedy")[0].correct and scores["coverage"] == pytest.approx(1 / 3)
    for report in (markdown_report(summary), html_report(summary)):
        assert "no such thing" in report and "none.png" in report


def test_visual_scores_that_fail_are_counted_and_quoted(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        type(engine), "examine_many", lambda self, outcomes, noise: [RuntimeError("no noise today")] * len(outcomes)
    )
    run = evaluate(engine, load_dataset("scenes:held_out:5850000-5850001"), ["greedy"], tmp_path, report=False)
    summary = summarise(run)
    assert summary["methods"]["greedy"]["visual_errors"] == {"count": 2, "first": "RuntimeError: no noise today"}
    for report in (markdown_report(summary), html_report(summary)):
        assert "no noise today" in report


def hub_cache(folder: Path, name: str) -> str:
    """A cache of the hub that holds the embedded model under another name; gives back its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = folder / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(EMBEDDED_FOLDER, home / "snapshots" / commit)
    return commit


def test_a_hub_model_is_known_by_its_commit_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing was downloaded yet: the commit is known only once the model was loaded."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    commits: list[str] = []
    load = LatentReasoner.engine

    def downloads(self: LatentReasoner) -> Engine:
        if not commits:
            commits.append(hub_cache(cache, self.model))
        return load(self)

    monkeypatch.setattr(LatentReasoner, "engine", downloads)
    reasoner = LatentReasoner(model="someone/small", local_files_only=True)
    items = load_dataset("scenes:held_out:5850000-5850000")
    for _ in range(2):  # the second call goes on with the first's run
        run = evaluate(reasoner, items, ["greedy"], tmp_path / "out", visual=False, report=False)
    assert run.manifest.model["revision"] == commits[0]
    assert run.fingerprint("greedy", "answer_probability") == fingerprint(
        score="answer_probability", model="someone/small", settings=SearchSettings(latents=0)
    )


def test_a_model_that_is_not_there_spoils_no_folder(tmp_path: Path) -> None:
    items, out = load_dataset("scenes:held_out:5850000-5850000"), tmp_path / "out"
    with pytest.raises(ModelNotFoundError):
        evaluate(LatentReasoner(model="embeded", local_files_only=True), items, ["greedy"], out, report=False)
    assert not (out / "run.json").exists()
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    with pytest.raises(LatentToolError):
        evaluate(LatentReasoner(model=str(broken)), items, ["greedy"], out, report=False)
    assert evaluate(SMALL, items, ["greedy"], out, visual=False, report=False).complete


def test_unlabelled_questions_are_scored_and_in_no_accuracy(engine: Engine, tmp_path: Path) -> None:
    picture = draw_shapes()
    items = [Item("one", "What colour is the circle?", None, lambda: (picture,))]
    run = evaluate(engine, items, ["greedy"], tmp_path, report=False)
    (row,) = run.rows
    assert row.correct is None and row.error is None and row.scores["answer_probability"] is not None
    facts = summarise(run)["methods"]["greedy"]
    assert facts["accuracy"] is None and facts["unlabelled"] == 1 and facts["scores"] == {}


def test_missing_scores_are_counted_and_never_0(whole: Run) -> None:
    rows = []
    for place, row in enumerate(whole.rows):
        scores = {**row.scores, "visual_dependency": None} if place % 2 else dict(row.scores)
        rows.append(row.model_copy(update={"scores": scores}))
    run = Run(whole.path, whole.manifest, tuple(rows))
    values, right, missing = run.column("greedy", "visual_dependency")
    assert missing > 0 and len(values) == len(right) == 7 - missing
    assert summarise(run)["methods"]["greedy"]["scores"]["visual_dependency"]["missing"] == missing
    with pytest.raises(SettingsError, match="no score"):
        run.column("greedy", "anwser_probability")


def test_reports_come_from_the_summary_alone(whole: Run) -> None:
    summary = json.loads((whole.path / "summary.json").read_text())
    assert summary == json.loads(json.dumps(summarise(whole)))
    assert (whole.path / "report.md").read_text() == markdown_report(summary)
    page = (whole.path / "report.html").read_text()
    wrong = [question["id"] for question in summary["wrong"]["shown"]]
    assert page == html_report(summary, read_thumbnails(whole.path, wrong))
    assert "<svg" in page and "<script" not in page
    assert all(part.startswith("data:image/jpeg;base64,") for part in page.split('src="')[1:])
    assert page.count("<img") == len(wrong) and page.count("src=") == len(wrong)
    assert not [part for part in page.split('href="')[1:] if not part.startswith("#")]
    for name in METHODS:
        assert name in page


def test_the_report_shows_its_errors_first(engine: Engine, tmp_path: Path) -> None:
    """Pictures, questions, labels and every method's answer; the surest wrong answer first; kinds to choose from."""
    items = [
        replace(item, label="nothing" if place % 2 else item.label, type=f"kind {place % 3}")
        for place, item in enumerate(load_dataset("scenes:held_out:5850000-5850003"))
    ]
    items[3] = replace(items[3], loader=lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    run = evaluate(engine, items, ["greedy", "search:iterations=1"], tmp_path, visual=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    shown = summary["wrong"]["shown"]
    assert items[1].id in [question["id"] for question in shown] and items[3].id not in [one["id"] for one in shown]
    surest = [max(answer["confidence"] for answer in one["answers"] if answer["correct"] is False) for one in shown]
    assert surest == sorted(surest, reverse=True)
    page = (tmp_path / "report.html").read_text()
    assert page.index("Wrong answers") < page.index("Methods")
    for question in shown:
        assert [answer["method"] for answer in question["answers"]] == list(run.methods)
        assert question["images"][0].startswith("scenes:held_out:") and question["images"][0] in page
    assert page.count("<img") == len(shown) and page.count("data-kind=") >= len(shown)
    assert {row.images for row in run.rows} == {item.images for item in items}
    assert json.loads((tmp_path / "items.jsonl").read_text().splitlines()[0])["images"] == list(items[0].images)


def test_names_of_users_are_shown_as_text(engine: Engine, tmp_path: Path) -> None:
    picture = draw_shapes()
    item = Item("<b>|x", "What?", "red", lambda: (_ for _ in ()).throw(ValueError("<script>alert(1)</script>")))
    other = Item("b", "What?", "red", lambda: (picture,), type="<i>|kind")
    run = evaluate(engine, [item, other], ["greedy"], tmp_path, name="<u>", visual=False, report=False)
    page = html_report(summarise(run))
    assert "<script>" not in page and "<u>" not in page and "<b>|x" not in page
    assert "&lt;b>\\|x" in markdown_report(summarise(run))


def test_the_fused_score_is_predicted_out_of_fold() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.7
    useful, noise = rng.normal(size=400) + 1.5 * right, rng.normal(size=400)
    from latent_tool.statistics import auroc

    fused = fused_score([list(row) for row in zip(useful, noise, strict=True)], right.tolist(), [False, False])
    assert auroc(fused, right.tolist()) == pytest.approx(auroc(useful.tolist(), right.tolist()), abs=0.02)
    # Noise alone must not look better than chance, as it would if answers had a part in their own prediction.
    nothing = fused_score(rng.normal(size=(400, 8)).tolist(), right.tolist(), [False] * 8)
    assert auroc(nothing, right.tolist()) < 0.6


# --- methods -----------------------------------------------------------------------------------------------------


def test_methods_by_name() -> None:
    assert parse_method("greedy").settings.latents == 0
    assert parse_method("reasoning").budget.iterations == 0
    assert parse_method("search").settings == SearchSettings()
    assert parse_method("search:paper").settings == SearchSettings.paper()
    assert parse_method("search:latents=4,sigma=0.5,budget=quick").budget == Budget.level("quick")
    assert parse_method("search:latents=4").settings.latents == 4
    assert parse_method("search-no-patches").settings.patches_per_latent == 0
    assert parse_method("patches-no-search").settings.samples == 0
    assert parse_method("random-draw").settings.variant.init_noise == SearchSettings().sigma
    sampling = parse_method("self-consistency:samples=5,temperature=1,think=false").sampling
    assert sampling == SamplingSettings(samples=5, temperature=1.0, think=False)
    matched = parse_method("random-latents", seen=(parse_method("search:paper"),))
    assert matched.matches == "search:paper" and matched.settings.eta == 0
    assert matched.budget_for(20).iterations == 3


@pytest.mark.parametrize(
    "text", ["guess", "search:fast", "search:paper,default", "search:speed=3", "search:sigma=x", "search:budget=huge"]
)
def test_methods_that_are_not_known(text: str) -> None:
    with pytest.raises(SettingsError):
        parse_method(text)


def test_samples_share_the_prefix_and_depend_on_the_seed_alone(engine: Engine) -> None:
    picture = draw_shapes()
    sampling = SamplingSettings(samples=4, temperature=3.0)
    jobs = [Job((picture,), "What colour is the circle?", seed=seed) for seed in (0, 0, 1)]
    first, again, other = engine.sample_many(jobs, sampling)
    assert not isinstance(first, Exception) and not isinstance(again, Exception) and not isinstance(other, Exception)
    assert [each.tokens for each in first.decoded] == [each.tokens for each in again.decoded]
    assert [each.tokens for each in first.decoded] != [each.tokens for each in other.decoded]
    (alone,) = engine.sample_many(jobs[:1], sampling)
    assert not isinstance(alone, Exception)
    assert [each.tokens for each in alone.decoded] == [each.tokens for each in first.decoded]
    assert len({each.tokens for each in first.decoded}) > 1
    assert first.usage.generated_tokens == sum(len(each.tokens) for each in first.decoded)


def test_cold_samples_are_the_greedy_answer(engine: Engine) -> None:
    job = Job((draw_shapes(),), "What colour is the circle?", settings=SearchSettings(latents=0))
    (drawn,) = engine.sample_many([job], SamplingSettings(samples=3, temperature=1e-4, think=False))
    assert not isinstance(drawn, Exception)
    greedy = engine.answer(job)
    assert all(each.tokens == greedy.decoded.tokens for each in drawn.decoded)
    assert drawn.probabilities == pytest.approx([engine.result(greedy).confidence] * 3, abs=1e-4)
    (nucleus,) = engine.sample_many([job], SamplingSettings(samples=3, temperature=5.0, top_p=1e-6, think=False))
    assert not isinstance(nucleus, Exception)
    assert all(each.tokens == greedy.decoded.tokens for each in nucleus.decoded)


def test_examining_an_answer_afterwards_gives_what_the_engine_reports(engine: Engine) -> None:
    noise = NoiseSettings(draws=2)
    job = Job((draw_shapes(),), "What colour is the circle?", budget=Budget(iterations=1), grounding=noise)
    outcome = engine.answer(job)
    (examined,) = engine.examine_many([outcome], noise)
    assert not isinstance(examined, Exception) and examined.grounding is not None and outcome.grounding is not None
    assert examined.grounding.mean == pytest.approx(outcome.grounding.mean, abs=1e-5)
    assert examined.masked_entropy_gain is not None


def test_noise_at_the_start_moves_the_latents_once(engine: Engine) -> None:
    picture = draw_shapes()
    still, moved, again = (
        engine.answer(
            Job(
                (picture,),
                "What colour is the circle?",
                settings=SearchSettings(variant={"init_noise": noise}),
                budget=Budget(iterations=0),
            )
        )
        for noise in (0.0, 0.3, 0.3)
    )
    assert still.latents is not None and moved.latents is not None and again.latents is not None
    spread = float((moved.latents - still.latents).pow(2).mean().sqrt()) / engine.vlm.embedding_rms()
    assert spread == pytest.approx(0.3, rel=0.1)
    assert moved.latents.equal(again.latents)


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    asked = ("eval", "scenes:held_out:5850000-5850003", "--out", "run", "--method", "greedy", "--json")
    done = command.run(*asked, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "note: " + what_it_is("embedded") + "\n"
    assert json.loads(done.stdout)["methods"]["greedy"]["labelled"] == 4
    assert (tmp_path / "run" / "report.html").exists()
    refused = command.run(*asked, "--seed", "4", folder=tmp_path)
    assert refused.returncode == 2 and "another seed" in refused.stderr and refused.stdout == ""
