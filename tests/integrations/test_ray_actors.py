"""Evaluations on a Ray cluster: the run of this process, gone on with after a stop, whole when actors are lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pictures import draw_shapes
from PIL import Image
from ray_cluster import free_ports
from scripted_agents import CIRCLE, plain

from latent_tool import LatentReasoner
from latent_tool.errors import DatasetError, ServiceUnavailableError, SettingsError
from latent_tool.evaluation import Item, Run, evaluate, load_dataset, load_run
from latent_tool.evaluation.runs import Source

pytestmark = pytest.mark.filterwarnings("ignore")

SCENES = "scenes:held_out:5850000-5850006"
METHODS = ["greedy", "search:iterations=1,max_patches=2", "random-latents", "self-consistency:samples=3"]


def lines(folder: Path) -> list[Any]:
    """The file of answers in its order, without what time they took.

    The first forward pass of a process differs in the last digit of float32, and every actor has one of its own.
    """
    return [plain(json.loads(line)) for line in (folder / "items.jsonl").read_bytes().splitlines()]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of this process, which the others must equal."""
    out = tmp_path_factory.mktemp("local")
    source = Source.of(out, SCENES)
    return evaluate(LatentReasoner(), load_dataset(SCENES), METHODS, out, name=SCENES, batch=2, source=source)


def test_the_command_on_a_cluster_makes_the_local_run(cluster: None, local: Run, tmp_path: Path) -> None:
    import ray

    methods = [part for method in METHODS for part in ("--method", method)]
    on_ray = ["--ray", "--actors", "2", "--num-cpus", "0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "latent_tool.cli", "eval", SCENES, "--out", "run", "--batch", "2", *methods, *on_ray],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    assert done.returncode == 0 and done.stderr.count("note: ") == 1, done.stderr
    assert lines(tmp_path / "run") == lines(local.path)
    assert (tmp_path / "run" / "run.json").read_bytes() == (local.path / "run.json").read_bytes()
    summary = json.loads((tmp_path / "run" / "summary.json").read_bytes())
    assert [facts["labelled"] for facts in summary["methods"].values()] == [7, 7, 7, 7]


class Stop(Exception):
    """Somebody ends the run."""


def test_a_stopped_run_goes_on_with_nothing_lost_or_done_twice(cluster: None, local: Run, tmp_path: Path) -> None:
    from latent_tool.integrations.ray_actors import actors

    def go_on(count: int, stop_at: int | None = None) -> list[int]:
        told: list[int] = []

        def progress(done: int, total: int, name: str) -> None:
            told.append(done)
            if done == stop_at:
                raise Stop

        evaluate(
            LatentReasoner(),
            load_dataset(SCENES),
            METHODS,
            tmp_path,
            name=SCENES,
            batch=2,
            workers=actors(count, num_cpus=0.5),
            report=False,
            progress=progress,
        )
        return told

    with pytest.raises(Stop):
        go_on(2, stop_at=12)  # between two methods of the second batch
    written = (tmp_path / "items.jsonl").read_bytes()
    assert written.count(b"\n") == 12
    with (tmp_path / "items.jsonl").open("ab") as file:
        file.write(b'{"id": "held_out-5850003", "method": "sel')
    assert go_on(1)[0] == 12
    assert (tmp_path / "items.jsonl").read_bytes().startswith(written)
    assert lines(tmp_path) == lines(local.path)
    assert go_on(1) == [28]


def test_what_a_killed_actor_had_in_hand_is_answered_by_another(cluster: None, tmp_path: Path) -> None:
    from latent_tool.integrations.ray_actors import actors

    picture, flag = draw_shapes(), tmp_path / "killed"

    def once() -> tuple[Image.Image, ...]:
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return (picture,)

    items = [Item(str(number), CIRCLE, "red", once if number == 1 else lambda: (picture,)) for number in range(4)]
    run = evaluate(
        LatentReasoner(),
        items,
        ["greedy"],
        tmp_path / "run",
        batch=1,
        workers=actors(2, num_cpus=0.5),
        visual=False,
        report=False,
    )
    assert flag.exists() and run.complete
    assert [(row.id, row.error) for row in run.rows] == [(str(number), None) for number in range(4)]


def test_a_batch_that_kills_every_actor_ends_the_run(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps what it has, and does not go round for ever."""
    from latent_tool.integrations import ray_actors

    monkeypatch.setattr(ray_actors, "LOST_AT_MOST", 1)
    picture = draw_shapes()
    deadly = Item("deadly", CIRCLE, "red", lambda: os.kill(os.getpid(), signal.SIGKILL))
    items = [Item("good", CIRCLE, "red", lambda: (picture,)), deadly]
    workers = ray_actors.actors(num_cpus=0.5)
    with pytest.raises(ServiceUnavailableError, match="questions 2 to 2"):
        evaluate(LatentReasoner(), items, ["greedy"], tmp_path, batch=1, workers=workers, visual=False, report=False)
    assert [row.id for row in load_run(tmp_path).rows] == ["good"]


def test_what_is_wrong_is_told_by_its_type(cluster: None, tmp_path: Path) -> None:
    from latent_tool.integrations.ray_actors import actors

    draw_shapes().save(tmp_path / "shapes.png")
    row = {"image": "shapes.png", "question": CIRCLE, "label": "red"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    items = load_dataset(tmp_path / "data.jsonl")
    workers = actors(num_cpus=0.5)
    (tmp_path / "shapes.png").unlink()  # as on a node that has not got the folder
    with pytest.raises(DatasetError, match="has not got the image") as caught:
        evaluate(LatentReasoner(), items, ["greedy"], tmp_path / "run", workers=workers, report=False)
    assert "every node" in caught.value.hint
    assert load_run(tmp_path / "run").rows == ()
    for wrong in ({"count": 0}, {"num_gpus": -1.0}):
        with pytest.raises(SettingsError):
            actors(**wrong)  # type: ignore[arg-type]


def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    done = subprocess.run(
        [sys.executable, "-m", "latent_tool.cli", "eval", SCENES, "--out", str(tmp_path / "run"), "--ray", "--quiet"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}"},
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "The Ray cluster cannot be reached" in done.stderr and "Check RAY_ADDRESS" in done.stderr
