"""What a model is called, and what is left of this machine's paths, where others read it."""

from __future__ import annotations

import pytest

from latent_tool.about import model_name, what_it_is
from latent_tool.words import without_places


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("embedded", "embedded"),
        ("Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"),
        ("checkpoints/mine", "checkpoints/mine"),
        ("/home/ann/models/mine", "mine"),
        ("/home/ann/models/mine/", "mine"),
        ("~/mine", "mine"),
        ("../../models/mine", "mine"),
        ("./mine", "mine"),
        (r"C:\Users\ann\mine", "mine"),
        (r"\\server\share\mine", "mine"),
        ("/home/ann/embedded", "embedded (a folder)"),
        ("/", " (a folder)"),
    ],
)
def test_a_model_is_called_by_its_name(model: str, name: str) -> None:
    assert model_name(model) == name
    assert (what_it_is(model_name(model)) is not None) == (model == "embedded")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The directory '/tmp/a b/mine' holds no model.", "The directory 'mine' holds no model."),
        ("cannot read /tmp/x/y.json: gone", "cannot read y.json: gone"),
        ('open("/usr/lib/z")', 'open("z")'),
        (r"'C:\Users\ann\mine' is gone", "'mine' is gone"),
        ("'~/mine' is gone", "'mine' is gone"),
        ("Ask POST /v1/ask, see /openapi.json", "Ask POST /v1/ask, see /openapi.json"),
        ("https://example.org/usr/lib and http://127.0.0.1:8000/tmp/x", None),
        ("Qwen/Qwen3 and 1/2 and ./a/b", None),
        ("'/v1/ask' is known", None),
    ],
)
def test_paths_of_this_machine_are_left_out(text: str, left: str | None) -> None:
    assert without_places(text) == (text if left is None else left)
