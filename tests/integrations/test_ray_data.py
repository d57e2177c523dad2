"""Many questions through Ray Data: answered, resumed, and errors in their places."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from pictures import draw_shapes
from scripted_agents import CIRCLE, SQUARE, essence, small_reasoner

from latent_tool import ReasoningResult
from latent_tool.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    stream = io.BytesIO()
    draw_shapes().save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return [
        {"id": "path", "image": str(tmp_path / "a.png"), "question": CIRCLE},
        {"id": "bytes", "image": stream.getvalue(), "question": SQUARE, "seed": 1},
        {"id": "uri", "images": [uri], "question": CIRCLE, "seed": 2},
        {"id": "missing", "image": "nowhere.png", "question": CIRCLE},
    ]


def test_a_run_goes_on_where_it_ended(cluster: None, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    from latent_tool.integrations.ray_data import answer_all, read_answers

    out = tmp_path / "answers.jsonl"
    reasoner = small_reasoner()
    assert answer_all(rows[:2], reasoner, out, batch_size=2, num_cpus=0.5) == 2
    first = out.read_text()
    out.write_text(first + '{"id": "uri", "resu')  # killed while it wrote
    assert answer_all(rows, reasoner, out, batch_size=2, num_cpus=0.5) == 2
    assert out.read_text().startswith(first)
    assert answer_all(rows, reasoner, out) == 0
    answers = {each["id"]: each for each in read_answers(out)}
    assert sorted(answers) == sorted(row["id"] for row in rows)
    assert answers["missing"]["error"]["type"] == "ImageNotFoundError" and answers["missing"]["error"]["hint"]
    for row in rows[:3]:
        request = {key: value for key, value in row.items() if key != "id"}
        found = ReasoningResult.model_validate(answers[row["id"]]["result"])
        assert essence(found) == essence(reasoner.invoke(request))
    assert json.loads(first.splitlines()[0])["error"] is None


@pytest.mark.parametrize("wrong", [[{"question": CIRCLE}], [{"id": 1}], [{"id": "a"}, {"id": "a"}]])
def test_rows_need_ids(wrong: list[dict[str, Any]], tmp_path: Path) -> None:
    from latent_tool.integrations.ray_data import answer_all

    with pytest.raises(InputError):
        answer_all(wrong, small_reasoner(), tmp_path / "out.jsonl")
