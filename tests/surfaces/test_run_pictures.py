"""The pictures of a run after the run: found where they lie, counted once, looked at by the same weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from latent_tool import LatentReasoner
from latent_tool.calibration import Calibration
from latent_tool.calibration.configuration import configuration, fingerprint
from latent_tool.calibration.domain import NoDomainCheck
from latent_tool.cli import app
from latent_tool.commands.calibrate import _configuration, _domains, calibration_of, check_drift
from latent_tool.errors import CalibrationError, LatentToolError, SettingsError, TooFewItemsError
from latent_tool.evaluation import evaluate
from latent_tool.evaluation.columns import vlmevalkit_columns
from latent_tool.evaluation.datasets import load_dataset
from latent_tool.evaluation.domain import engine_of_run, items_of_run, one_each
from latent_tool.evaluation.runs import Source, load_run
from latent_tool.evaluation.synonyms import load_synonyms
from latent_tool.files import make_folder, require_writable, write_whole
from latent_tool.images.load import load_image
from latent_tool.integrations.http_server import read_token
from latent_tool.scenes import generate
from latent_tool.settings import Budget, ImagePolicy, SearchSettings

pytestmark = pytest.mark.disable_socket
PLAIN = SearchSettings(latents=0)


def write_data(folder: Path, pictures: int = 2, copies: int = 3) -> Path:
    """Questions about scenes, each picture in several files: the same bytes, other bytes, and asked about again."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(pictures):
        picture = generate(5_610_000 + number, "held_out").image
        for copy in range(copies):
            name = f"{number}-{copy}.png"
            picture.save(folder / name, compress_level=copy)
            for question in ("is there a circle?", "is there a square?"):
                lines.append({"image": name, "question": question, "answer": "yes"})
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "q.jsonl"


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_a_run_finds_its_data_wherever_both_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "here" / "data", pictures=1, copies=2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = invoke("eval", "data/q.jsonl", "--out", "runs/first", "--method", "greedy", "--no-visual", "--quiet")
    assert done.exit_code == 0, done.exception
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = load_run(tmp_path / "there" / "runs" / "first")
    assert [item.question for item in items_of_run(run)] == [row.question for row in run.rows]
    assert run.manifest.dataset.name == "q.jsonl"
    for file in run.path.rglob("*"):  # no path of this machine
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file
    # The same command goes on there, and a data set that is gone is an error, not a calibration without its check.
    monkeypatch.chdir(tmp_path / "there")
    again = invoke("eval", "data/q.jsonl", "--out", "runs/first", "--method", "greedy", "--no-visual", "--quiet")
    assert again.exit_code == 0, again.exception
    shutil.move(tmp_path / "there" / "data", tmp_path / "data")
    with pytest.raises(SettingsError, match="not found") as caught:
        calibration_of(run)
    assert "--data" in caught.value.hint and "--no-domain" in caught.value.hint
    with pytest.raises(SettingsError, match="not found"):
        check_drift(fitting(Calibration.load("embedded"), run.fingerprint("greedy", "pooled_probability")), run)
    assert len(items_of_run(run, str(tmp_path / "data" / "q.jsonl"))) == len(run.rows)


def test_who_does_not_say_where_the_data_lies_takes_nothing_away(tmp_path: Path) -> None:
    data = str(write_data(tmp_path / "data", pictures=1, copies=1))
    out = tmp_path / "run"
    arguments: dict[str, Any] = {"name": "q.jsonl", "visual": False, "report": False}
    done = invoke("eval", data, "--out", str(out), "--method", "greedy", "--no-visual", "--quiet")
    assert done.exit_code == 0, done.exception
    said = load_run(out).manifest.dataset.source
    assert said is not None
    reasoner = LatentReasoner(budget="standard")
    run = evaluate(reasoner, load_dataset(data), ["greedy", "reasoning"], out, **arguments)
    assert run.manifest.dataset.source == said and len(run.methods) == 2
    moved = said.model_copy(update={"data": "elsewhere/q.jsonl"})
    run = evaluate(reasoner, load_dataset(data), ["greedy"], out, source=moved, **arguments)
    assert run.manifest.dataset.source == moved
    # Other pictures of the same names are not those of the run, nor are those that are gone.
    evaluate(reasoner, load_dataset(data), ["greedy"], out, source=said, **arguments)
    run = load_run(out)
    assert len(items_of_run(run)) == 2
    picture = tmp_path / "data" / "0-0.png"
    former = picture.read_bytes()
    generate(5_620_000, "held_out").image.save(picture)
    for use in (items_of_run, lambda run: calibration_of(run, method="greedy")):
        with pytest.raises(SettingsError, match="pictures of 2 questions") as caught:
            use(run)
        assert "--data" in caught.value.hint and "again" in caught.value.hint
    picture.unlink()
    with pytest.raises(SettingsError, match="there is no image"):
        items_of_run(run)
    picture.write_bytes(former)
    assert len(items_of_run(run)) == 2


def test_a_run_in_a_folder_that_is_a_link_finds_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, far = tmp_path / "home", tmp_path / "disk" / "far" / "runs"
    data = write_data(home / "data", pictures=1, copies=1)
    far.mkdir(parents=True)
    (home / "runs").symlink_to(far)
    (home / "link").symlink_to(home / "data")
    (home / "named.jsonl").symlink_to(data)
    monkeypatch.chdir(home)
    for given in ("data/q.jsonl", "link/q.jsonl", str(data), "link/../data/q.jsonl", "named.jsonl", "data", "."):
        source = Source.of(Path("runs/first"), given)
        for folder in (Path("runs/first"), home / "runs" / "first", far / "first"):
            found = source.arguments(folder)["spec"]
            assert Path(found).samefile(given) and Path(found).name == Path(home / given).name


def test_pictures_and_questions_that_were_moved_apart(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", pictures=2, copies=1)
    table, pictures = tmp_path / "old" / "q.tsv", tmp_path / "old-pictures"
    table.parent.mkdir()
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    cells = [f"{place}\t{row['image']}\t{row['question']}\tyes\ta" for place, row in enumerate(rows)]
    table.write_text("\n".join(["index\timage_path\tquestion\tanswer\tcategory", *cells]))
    shutil.copytree(data.parent, pictures)
    out = tmp_path / "run"
    where = ("--preset", "pope", "--images", str(pictures))
    done = invoke("eval", str(table), *where, "--out", str(out), "--method", "greedy", "--no-visual", "--quiet")
    assert done.exit_code == 0, done.exception
    run = load_run(out)
    assert len(items_of_run(run)) == 4
    assert [row.images for row in run.rows] == [("0-0.png",), ("0-0.png",), ("1-0.png",), ("1-0.png",)]
    for file in run.path.rglob("*"):  # no path of this machine
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file
    shutil.move(table.parent, tmp_path / "new")
    shutil.move(pictures, tmp_path / "new-pictures")
    with pytest.raises(SettingsError) as caught:
        items_of_run(run, str(tmp_path / "new" / "q.tsv"))
    assert "--images" in caught.value.hint
    new = {"data": str(tmp_path / "new" / "q.tsv"), "images": tmp_path / "new-pictures"}
    assert len(items_of_run(run, **new)) == 4
    assert all(item.problem is None for item in items_of_run(run, **new))
    # The command takes them, too: what is wrong is that they are few.
    named = ("--data", str(new["data"]), "--images", str(new["images"]), "--preset", "pope")
    refused = invoke("calibrate", str(out), "--out", str(tmp_path / "mine.json"), *named).exception
    assert isinstance(refused, TooFewItemsError)


@pytest.mark.parametrize(
    ("above", "found"),
    [
        ("/home/ann/imgs/", True),
        ("C:\\data\\imgs\\", True),
        ("\\\\server\\imgs\\", True),
        ("/home/ann/imgs/1", False),  # /home/ann/imgs/10-0.png
        ("imgs/", False),
    ],
)
def test_an_older_run_has_the_whole_paths_of_a_benchmarks_pictures(above: str, found: bool, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", pictures=1, copies=1)
    table = tmp_path / "data" / "q.tsv"
    questions = [json.loads(line)["question"] for line in data.read_text().splitlines()]
    cells = [f"{place}\t0-0.png\t{question}\tyes\ta" for place, question in enumerate(questions)]
    table.write_text("\n".join(["index\timage_path\tquestion\tanswer\tcategory", *cells]))
    where = ("--preset", "pope", "--images", str(data.parent))
    out = tmp_path / "run"
    done = invoke("eval", str(table), *where, "--out", str(out), "--method", "greedy", "--no-visual", "--quiet")
    assert done.exit_code == 0, done.exception
    run = load_run(out)
    rows = (row.model_copy(update={"content": None, "images": (f"{above}0-0.png",)}) for row in run.rows)
    older = replace(run, rows=tuple(rows))
    if found:
        assert [item.id for item in items_of_run(older)] == [row.id for row in run.rows]
    else:
        with pytest.raises(SettingsError, match="2 questions of the run are not in"):
            items_of_run(older)


@pytest.mark.parametrize("flag", ["--data", "--images", "--preset"])
def test_pictures_that_nothing_would_look_at_are_refused(flag: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", pictures=1, copies=1)
    folder = made_run(tmp_path / "run", data)
    run = load_run(folder)
    shipped = Calibration.load("embedded")
    given = fitting(shipped, run.fingerprint("greedy", "pooled_probability"))
    without = {"domain": None, "no_domain": NoDomainCheck(reason="It was left out.")}
    bare = given.model_copy(update=without)
    file = tmp_path / "bare.json"
    shipped.model_copy(update=without).save(file)
    refused = invoke("calibrate", str(folder), "--check-drift", str(file), flag, "pope").exception
    assert isinstance(refused, SettingsError) and flag in refused.message and refused.hint
    name: Any = flag.removeprefix("--")
    with pytest.raises(SettingsError, match="no domain check"):
        check_drift(bare, run, **{name: "pope"})
    with pytest.raises(SettingsError, match="left out"):
        check_drift(given, run, domain=False, **{name: "pope"})


def fitting(calibration: Calibration, print_: str | None) -> Calibration:
    return calibration.model_copy(update={"fingerprint": print_, "score": "pooled_probability"})


def made_run(folder: Path, data: Path, **model: Any) -> Path:
    """A run on a data set, its answers made up."""
    folder.mkdir()
    items = load_dataset(data)
    quantized = {"quantization_config": model.get("quantization")}
    prints = {
        "pooled_probability": fingerprint(
            score="pooled_probability", settings=PLAIN, budget=Budget(iterations=0), **quantized
        )
    }
    facts = {"name": "greedy", "kind": "answer", "settings": PLAIN.model_dump(mode="json"), "fingerprints": prints}
    facts["budget"] = Budget(iterations=0).model_dump(mode="json")
    manifest = {
        "latent_tool": "0.1.0",
        "dataset": {"name": str(data), "fingerprint": "0", "size": len(items)},
        "model": {"name": "embedded", "dtype": "auto", **model, **configuration(score="reward")["model"]},
        "batch": 16,
        "methods": {"greedy": facts},
    }
    (folder / "run.json").write_text(json.dumps(manifest))
    rows = [{"id": item.id, "method": "greedy", "question": item.question, "answer": "yes"} for item in items]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_picture_counts_once_whatever_its_file(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    items = load_dataset(data)
    assert len(items) == 12 and len(one_each(items)) == 6  # six files
    assert one_each(items, but=items[:2]) == [items[2], items[4], items[6], items[8], items[10]]
    run = load_run(made_run(tmp_path / "run", data))
    domains = _domains(Calibration.load("embedded"), run, {})
    assert domains is not None and len(domains) == 2  # two pictures


def test_pictures_shared_by_questions_of_several_count_once(tmp_path: Path) -> None:
    write_data(tmp_path / "data", pictures=3, copies=1)
    pairs = [["0-0.png", "1-0.png"], ["1-0.png", "2-0.png"], ["2-0.png"]]
    lines = [{"images": pair, "question": "alike?", "answer": "yes"} for pair in pairs]
    (tmp_path / "data" / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = load_dataset(tmp_path / "data" / "pairs.jsonl")
    assert one_each(items) == [items[0], items[2]]


def test_quantized_weights_are_part_of_a_run(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", pictures=1, copies=1)
    run = load_run(made_run(tmp_path / "run", data, quantization="8bit"))
    described = _configuration(run, "greedy", "pooled_probability")
    assert described is not None and described["quantization"] == "8bit"
    odd = load_run(made_run(tmp_path / "odd", data, quantization="3bit"))
    with pytest.raises(SettingsError, match="3bit"):  # it is not looked at by other weights instead
        engine_of_run(odd)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--out", "a.json", "--no-domain", "--pictures", "scenes:hard"),
        ("--out", "a.json", "--no-domain", "--data", "scenes:hard"),
        ("--out", "a.json", "--no-domain", "--images", "pictures"),
        ("--out", "a.json", "--no-domain", "--preset", "mmstar"),
        ("--out", "a.json", "--no-domain", "--false-alarms", "0.05"),
        ("--out", "a.json", "--level", "0.05"),
        ("--check-drift", "a.json", "--pictures", "scenes:hard"),
        ("--check-drift", "a.json", "--target-error", "0.1"),
        ("--check-drift", "a.json", "--partial"),
    ],
)
def test_options_that_would_change_nothing_are_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "run").mkdir()
    refused = invoke("calibrate", str(tmp_path / "run"), *arguments).exception
    assert isinstance(refused, SettingsError) and "alone" in refused.message and refused.hint


NOWHERE = ["~nosuchuser/x", "a\0b", "\ud800.json", "x" * 5_000, "x/" * 5_000]


@pytest.mark.parametrize("path", NOWHERE, ids=lambda path: ascii(path)[:20])
def test_paths_that_no_file_can_have_are_typed_errors(path: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError):
        Calibration.load(path)
    for use in (
        lambda: load_dataset(path),
        lambda: load_run(path),
        lambda: load_synonyms(path),
        lambda: vlmevalkit_columns(path),
        lambda: read_token(Path(path)),
        lambda: load_image(path, ImagePolicy.local()),
        lambda: load_image(Path(path), ImagePolicy.untrusted(folders=(tmp_path,))),
        lambda: load_image("a.png", ImagePolicy.untrusted(folders=(Path(path),))),
        lambda: LatentReasoner(calibration=path),
        lambda: require_writable(Path(path), ".json"),
        lambda: write_whole(Path(path), b"x"),
        lambda: make_folder(path),
        lambda: LatentReasoner(model=path, local_files_only=True).engine(),
    ):
        with pytest.raises(LatentToolError) as caught:
            use()
        assert len(str(caught.value)) < 1_000
