"""The notebooks in examples/, executed, and what a notebook shows of results."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from results import HOSTILE, hostile_result

from latent_tool import ImagePolicy
from latent_tool.errors import ImageError, InputError
from latent_tool.evaluation.runs import Row, Run
from latent_tool.overlay import overlay
from latent_tool.schema import Choice
from latent_tool.testing import Reply, ScriptedReasoner
from latent_tool.views import notebook

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))
PICTURE = Image.new("RGB", (60, 48), "blue")


def ask(**fields: Any) -> dict[str, Any]:
    return {"image": PICTURE, "question": "What colour?", **fields}


def reasoner(**values: Any) -> ScriptedReasoner:
    return ScriptedReasoner(Reply("blue", 0.9, boxes=[(0, 0, 12, 12)]), **values)


# A process for each: nbclient and its kernel leave tasks behind in the loop of whoever calls them.
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
source, folder, executed = sys.argv[1:]
page = nbformat.read(source, as_version=4)
client = NotebookClient(page, timeout=300, startup_timeout=200, kernel_name="python3")
client.resources = {"metadata": {"path": folder}}
client.execute()
nbformat.write(page, executed)
"""


def execute(path: Path, folder: Path) -> list[str]:
    """Run a notebook in a folder; what it showed as HTML or PNG. Fails where a cell does, or writes to stderr."""
    executed = folder / "executed.ipynb"
    command = [sys.executable, "-c", EXECUTE, str(path), str(folder), str(executed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    shown = []
    for cell in json.loads(executed.read_text())["cells"]:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output["text"]
            data = output.get("data", {})
            if "text/html" in data:
                shown.append("".join(data["text/html"]))
            elif "image/png" in data:
                shown.append("<png>")
    return shown


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of this interpreter, whatever else the machine has."""
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    arguments = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": arguments, "display_name": "here", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert os.environ["JUPYTER_PATH"]


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, kernel: None, tmp_path: Path) -> None:
    """Nothing is written to stderr: no warning for want of ipywidgets either."""
    shown = execute(path, tmp_path)
    looked_for = {"ask_and_look": "<img", "is_the_confidence_to_be_trusted": "pooled_probability"}
    assert looked_for.get(path.stem, "<png>") in "".join(shown)
    if path.stem == "ask_and_look":
        assert shown.count("<png>") == 2 and shown[-1].count("<img") == 4
        assert (tmp_path / "why.html").exists()


def test_notebooks_are_committed_without_outputs() -> None:
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        assert '"outputs": [\n' not in path.read_text() and '"execution_count": null' in path.read_text()


def test_a_result_shows_its_picture() -> None:
    result = reasoner().invoke(ask())
    page = result._repr_html_()
    assert page.count("<img") == 1 and "data:image/png;base64," in page and "0.90" in page
    several = reasoner().invoke({"images": [PICTURE] * 6, "question": "?"})
    assert several._repr_html_().count("<img") == 4 and "2 more pictures" in several._repr_html_()
    assert overlay(result).size == overlay(result, PICTURE).size


def test_the_picture_is_no_part_of_the_result(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PICTURE.save(path)
    result = reasoner().invoke(ask(image=path))
    assert "_seen" not in result.model_dump_json() and result.model_copy()._repr_html_().count("<img") == 1
    for other in (pickle.loads(pickle.dumps(result)), type(result).model_validate(result.model_dump())):
        assert other == result and "<img" not in other._repr_html_()
        with pytest.raises(InputError, match="no picture at hand"):
            overlay(other)
    assert copy.deepcopy(result) == result
    path.unlink()
    assert "<img" not in result._repr_html_()
    with pytest.raises(ImageError):
        overlay(result)


def test_what_was_downloaded_is_not_downloaded_again() -> None:
    seen = notebook.Seen(["https://example.org/a.png"], ImagePolicy.untrusted(hosts=("example.org",)))
    assert "<img" not in seen.html(reasoner().invoke(ask()), "")


def test_hostile_text_is_escaped() -> None:
    hostile = hostile_result().model_copy(
        update={"choices": [Choice(text=HOSTILE, log_probability=-1.0, probability=1.0)], "abstain_reason": HOSTILE}
    )
    for page in (hostile._repr_html_(), notebook.results_html([hostile, ValueError(HOSTILE)])):
        assert "<script" not in page and "onerror=alert(1)&gt;" in page and "\x1b" not in page


def test_lists_and_columns_of_results_are_tables() -> None:
    import pandas

    results = reasoner().batch([ask(), ask(min_confidence=0.95)])
    assert notebook._list_html([1, 2]) is None and notebook._list_html([]) is None
    assert notebook._list_html([*results, "text"]) is None
    table = notebook._list_html([*results, InputError("gone")])
    assert table is not None and table.count("<img") == 2 and "abstained" in table and "InputError: gone" in table
    frame = pandas.DataFrame({"<b>": ["<i>", "y"], "result": results, "n": [1, 2]})
    page = notebook._frame_html(frame)
    assert page.count("<img") == 2 and "<i>" not in page and "<b>&lt;" not in page and "&lt;i&gt;" in page
    assert notebook._series_html(frame["result"]).count("<img") == 2
    assert notebook._series_html(frame["n"]) is None
    assert notebook._frame_html(frame[["n"]]) == frame[["n"]]._repr_html_()
    named = frame.set_index("<b>").rename_axis(index="<i>", columns="<img src=x>")  # as a hostile file may name them
    assert "<i>" not in notebook._frame_html(named) and "<img src=x>" not in notebook._frame_html(named)
    twice = pandas.concat([frame, frame], axis=1)
    assert notebook._frame_html(twice) == twice._repr_html_()
    assert notebook.results_html(results * 40).count("<tr>") == 51  # and says so


def test_a_run_is_a_data_frame() -> None:
    rows = (
        Row(id="1", method="search", question="?", label="a", answer="a", correct=True, scores={"reward": 0.5}),
        Row(id="2", method="search", question="?", error={"type": "OSError", "message": "gone"}),  # type: ignore[arg-type]
    )
    frame = Run(Path(), None, rows).dataframe()  # type: ignore[arg-type]
    assert list(frame["id"]) == ["1", "2"] and frame["reward"][0] == 0.5 and frame["error"][1] == "OSError: gone"
    assert Run(Path(), None, ()).dataframe().empty  # type: ignore[arg-type]
