"""Data sets: every format, and every way in which a row can be wrong, named by its line."""

from __future__ import annotations

import base64
import csv
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from pictures import draw_shapes
from PIL import Image

from latent_tool.errors import DatasetError, ImageError, SettingsError
from latent_tool.evaluation.datasets import dataset_fingerprint, load_dataset, sample
from latent_tool.settings import ImagePolicy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    draw_shapes().save(tmp_path / "pictures" / "one.png")
    draw_shapes().resize((60, 40)).save(tmp_path / "pictures" / "two.png")
    return tmp_path


def jsonl(folder: Path, *rows: dict[str, Any] | str) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


ROW = {"id": "a", "image": "pictures/one.png", "question": "What colour?", "label": "red"}


def test_jsonl_with_everything_a_row_can_say(folder: Path) -> None:
    path = jsonl(
        folder,
        {**ROW, "type": "color", "boxes": [[0, 0, 10, 10]], "reasoning": "red circle"},
        "",
        {"id": 7, "images": ["pictures/one.png", "pictures/two.png"], "question": "Same?", "answer": True},
        {**ROW, "id": "c", "options": ["red", "blue"], "label": "B"},
        {**ROW, "id": "d", "match": "numeric:5%", "label": 3.5},
    )
    first, second, third, fourth = load_dataset(path)
    assert (first.id, first.label, first.type, first.line) == ("a", "red", "color", 1)
    assert first.boxes == ((0.0, 0.0, 10.0, 10.0),) and first.reasoning == "red circle"
    assert first.load()[0].size == (200, 150)
    assert (second.id, second.label, second.line) == ("7", "yes", 3)
    assert [image.size for image in second.load()] == [(200, 150), (60, 40)]
    assert third.match.kind == "choice" and third.match.right("blue", "B")
    assert str(fourth.match) == "numeric:5%" and fourth.label == "3.5"
    assert pickle.loads(pickle.dumps(first)).load()[0].size == (200, 150)


def test_csv(folder: Path) -> None:
    path = folder / "data.csv"
    path.write_text(
        "\ufeffid,image,question,label,options\n"
        'a,pictures/one.png,"What, exactly?",red,\n'
        'b,pictures/two.png,"Two\nlines?",A,red|blue\n'
    )
    first, second = load_dataset(path)
    assert (first.question, first.label, first.match.kind, first.line) == ("What, exactly?", "red", "exact", 2)
    assert (second.question, second.match.options) == ("Two\nlines?", ("red", "blue"))


def test_the_json_of_dmlr(folder: Path) -> None:
    rows = [
        {"prompt": "<image> Is it? ", "solution": "\\boxed{No}", "image_path": "pictures/one.png", "idx": 0},
        {"prompt": "How many?", "solution": "1,000", "image_path": "pictures/one.png", "idx": 1},
        {
            "prompt": "Which?\nOptions: (a) Open (b) Closed",
            "solution": "(b) Closed",
            "image_path": "pictures/two.png",
        },
    ]
    path = folder / "dmlr.json"
    path.write_text(json.dumps(rows, indent=2))
    first, second, third = load_dataset(path)
    assert (first.id, first.question, first.label, first.line) == ("0", "Is it?", "No", 2)
    assert second.match.right("1000", second.label or "")
    assert (third.id, third.match.options) == ("2", ("Open", "Closed"))
    assert third.match.right("B", third.label or "") and not third.match.right("A", third.label or "")


def test_a_folder_with_labels(folder: Path) -> None:
    pictures = folder / "pictures"
    (pictures / "labels.csv").write_text("file,label\none.png,red\n")
    with pytest.raises(DatasetError, match=r"no row is about the picture two\.png"):
        load_dataset(pictures, question="What colour?")
    (pictures / "labels.csv").write_text("file,label\none.png,red\ntwo.png,blue\n")
    assert [(item.question, item.label) for item in load_dataset(pictures, question="What colour?")] == [
        ("What colour?", "red"),
        ("What colour?", "blue"),
    ]
    (pictures / "labels.csv").unlink()
    with pytest.raises(DatasetError, match="no labels"):
        load_dataset(pictures)


WRONG: list[tuple[dict[str, Any] | str, str]] = [
    ("{not json", "not JSON"),
    ("[1, 2]", "not a JSON object"),
    ({**ROW, "image": "pictures/none.png"}, "no image pictures/none.png"),
    ({**ROW, "image": None}, "no image"),
    ({**ROW, "question": " "}, "no question"),
    ({**ROW, "label": ""}, "no label"),
    ({**ROW, "label": ["red"]}, "neither a text nor a number"),
    ({**ROW, "label": "purple", "options": ["red", "blue"]}, "not among the options"),
    ({**ROW, "options": ["red"]}, "fewer than two options"),
    ({**ROW, "label": "three", "match": "numeric"}, "not one number"),
    ({**ROW, "match": "nearly"}, "no answer matching"),
    ({**ROW, "boxes": [[1, 2, 3]]}, "boxes"),
    ({**ROW, "answer": "blue"}, "'label' and 'answer' are two names of one field"),
    ({**ROW, "images": ["pictures/one.png"]}, "'image' and 'images' are two names of one field"),
    ('{"id": "b", "image": "pictures/one.png", "question": "?", "label": "x", "label": "y"}', "'label' is given twice"),
    ('{"id": "b", "image": "pictures/one.png", "question": "?", "label": NaN}', "NaN is no JSON"),
    ("[" * 200_000, "nested too deeply"),
]


@pytest.mark.parametrize(("row", "problem"), WRONG)
def test_a_row_that_cannot_be_used_is_named_by_its_line(folder: Path, row: dict[str, Any] | str, problem: str) -> None:
    broken = row if isinstance(row, str) else {**row, "id": "b"}
    path = jsonl(folder, ROW, broken, {**ROW, "id": "z"})
    with pytest.raises(DatasetError) as caught:
        load_dataset(path)
    (named,) = caught.value.problems
    assert named.startswith("line 2: ") and problem in named
    assert "1 of 3 rows" in str(caught.value)
    kept = load_dataset(path, keep_going=True)
    assert [item.problem is None for item in kept] == [True, False, True]
    assert problem in str(kept[1].problem)
    with pytest.raises(DatasetError):
        kept[1].load()


def test_a_row_that_names_a_function_imports_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "trap.py").write_text("print('imported')\ndef f(answer, label): return True\n")
    monkeypatch.syspath_prepend(str(folder))
    path = jsonl(folder, {**ROW, "match": "trap:f"})
    with pytest.raises(DatasetError, match="data may name"):
        load_dataset(path)
    assert "trap" not in sys.modules and not capsys.readouterr().out
    with pytest.raises(DatasetError):  # a row's own rule comes first, and is refused
        load_dataset(path, match="trap:f")
    (item,) = load_dataset(jsonl(folder, ROW), match="trap:f")
    assert item.match.right("anything", "red")


@pytest.mark.parametrize("label", ["J. Smith", "U.S.", "a.m.", "B. quarter", "P. S.", "a", "Vitamin C."])
def test_labels_that_begin_with_a_letter_are_texts(folder: Path, label: str) -> None:
    (item,) = load_dataset(jsonl(folder, {**ROW, "label": label}))
    assert item.match.kind == "exact"
    assert item.match.right(label, item.label or "") and not item.match.right(label[0], "U.S.")


@pytest.mark.parametrize("label", ["(B)", "B.", "b)"])
def test_a_marked_letter_alone_is_a_choice(folder: Path, label: str) -> None:
    (item,) = load_dataset(jsonl(folder, {**ROW, "label": label}))
    assert item.match.kind == "choice" and item.match.right("The answer is B.", label)


@pytest.mark.parametrize("label", ["B", "(B)", "B. blue", "blue"])
@pytest.mark.parametrize("match", [None, "choice"])
def test_options_of_the_question_are_those_of_the_label(folder: Path, label: str, match: str | None) -> None:
    question = "Which? Options: A. red, B. blue"
    (item,) = load_dataset(jsonl(folder, {**ROW, "question": question, "label": label}), match=match)
    assert item.match.options == ("red", "blue")
    assert item.match.right("blue", label) and item.match.right("B", label) and not item.match.right("red", label)
    (named,) = load_dataset(jsonl(folder, {**ROW, "question": question, "label": label, "match": "choice"}))
    assert named.match == item.match
    (free,) = load_dataset(jsonl(folder, {**ROW, "question": question, "label": "neither of them"}))
    assert free.match.kind == "exact"
    with pytest.raises(DatasetError, match="not among the options"):
        load_dataset(jsonl(folder, {**ROW, "question": question, "label": "E"}))


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("$5$", "5"),
        ("The answer is $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("<think>no</think><answer> B </answer>", "B"),
        ("<answer>$\\boxed{No}$</answer>", "No"),
        ("$x$ and $y$", "x and y"),
        ("between $5 and $6", "between $5 and $6"),
        ("$1,200", "$1,200"),
    ],
)
def test_what_is_wrapped_around_a_label_is_taken_off(folder: Path, written: str, label: str) -> None:
    (item,) = load_dataset(jsonl(folder, {**ROW, "label": written}))
    assert item.label == label


def test_numbers_of_json_are_matched_as_numbers(folder: Path) -> None:
    number, text, flag = load_dataset(
        jsonl(folder, {**ROW, "label": 3.0}, {**ROW, "id": "b", "label": "3"}, {**ROW, "id": "c", "label": True})
    )
    assert number.match.right("3", number.label or "") and not number.match.right("4", number.label or "")
    assert (text.match.kind, flag.match.kind) == ("exact", "exact")


def test_csv_with_an_image_in_a_cell_and_with_columns_twice(folder: Path) -> None:
    noise = Image.effect_noise((500, 500), 90)
    noise.save(folder / "noise.png")
    uri = "data:image/png;base64," + base64.b64encode((folder / "noise.png").read_bytes()).decode()
    assert len(uri) > csv.field_size_limit()
    before = csv.field_size_limit()
    path = folder / "data.csv"
    path.write_text(f'image,question,label\n"{uri}",What?,noise\n')
    (item,) = load_dataset(path)
    assert item.load()[0].size == (500, 500)
    assert csv.field_size_limit() == before
    path.write_text("image,question,label,label\npictures/one.png,What?,red,blue\n")
    with pytest.raises(DatasetError, match="two columns of one name: label"):
        load_dataset(path)


def test_ids_used_twice(folder: Path) -> None:
    path = jsonl(folder, ROW, {**ROW, "id": "b"}, ROW)
    with pytest.raises(DatasetError, match="line 3: the id 'a' was used on line 1 already"):
        load_dataset(path)
    kept = load_dataset(path, keep_going=True)
    assert len({item.id for item in kept}) == 3


def test_all_wrong_rows_are_listed(folder: Path) -> None:
    path = jsonl(folder, *[{**ROW, "id": str(number), "label": ""} for number in range(9)])
    with pytest.raises(DatasetError) as caught:
        load_dataset(path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [f"line {n}" for n in range(1, 10)]
    assert len(load_dataset(path, unlabelled=True)) == 9
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


def test_broken_csv_and_json_say_where(folder: Path) -> None:
    path = folder / "data.csv"
    path.write_text("id,image,question,label\na,pictures/one.png,What?,red\nb,pictures/one.png,What?\n")
    with pytest.raises(DatasetError, match="line 3: 4 columns are named, but there are fewer"):
        load_dataset(path)
    path.write_text("id,image,question,label\na,pictures/one.png,What?,red,more\n")
    with pytest.raises(DatasetError, match="line 2: 4 columns are named, but there are more"):
        load_dataset(path)
    path.write_text("name,text\n1,2\n")
    with pytest.raises(DatasetError, match="no column for the image"):
        load_dataset(path)
    path = folder / "data.json"
    path.write_text(json.dumps([ROW], indent=1)[:-2] + ",\n {broken")
    with pytest.raises(DatasetError, match="not JSON from here on"):
        load_dataset(path)
    path.write_text("{}")
    with pytest.raises(DatasetError, match="no JSON list"):
        load_dataset(path)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for spec in ("nowhere.jsonl", str(tmp_path)):
        with pytest.raises(DatasetError):
            load_dataset(tmp_path / spec)
    for spec in ("scenes:no_split", "scenes:hard:9-3", "scenes:hard:x", "easy-vqa:validation"):
        with pytest.raises(SettingsError):
            load_dataset(spec)
    (tmp_path / "data.txt").write_text("")
    with pytest.raises(DatasetError):
        load_dataset(tmp_path / "data.txt")


def test_the_image_policy_holds_for_files_of_the_data_set(folder: Path) -> None:
    path = jsonl(folder, {**ROW, "image": str(folder / "pictures" / ".." / "outside.png")})
    draw_shapes().save(folder / "outside.png")
    policy = ImagePolicy.untrusted(folders=(folder / "pictures",))
    with pytest.raises(DatasetError, match="image policy"):
        load_dataset(path, policy=policy)
    assert load_dataset(jsonl(folder, ROW), policy=policy)[0].load()


def test_a_file_that_is_no_image_is_found_when_it_is_opened(folder: Path) -> None:
    (folder / "pictures" / "bad.png").write_bytes(b"nothing")
    (item,) = load_dataset(jsonl(folder, {**ROW, "image": "pictures/bad.png"}))
    with pytest.raises(ImageError):
        item.load()


def test_scenes_are_seeds_with_one_question_each() -> None:
    items = load_dataset("scenes:hard:5860000-5860009")
    assert [item.id for item in items] == sorted({item.id for item in items})
    assert len(items) == 10
    assert all(item.id.startswith("hard-58600") and item.type != "describe" and item.reasoning for item in items)
    again = load_dataset("scenes:hard:5860000-5860009")
    assert dataset_fingerprint(items) == dataset_fingerprint(again)
    assert items[0].load()[0].tobytes() == again[0].load()[0].tobytes()
    assert len(load_dataset("scenes")) == 100


def test_easy_vqa() -> None:
    items = load_dataset("easy-vqa", limit=50)
    assert len(items) == 50
    assert {item.type for item in items} <= {"exist", "color", "shape"}
    assert items[0].load()[0].size == (64, 64)
    assert [item.id for item in items] == [item.id for item in load_dataset("easy-vqa:test", limit=50)]


def test_samples_are_drawn_without_replacement_and_keep_their_order() -> None:
    items = load_dataset("scenes:held_out:5860000-5860029")
    drawn = sample(items, 10)
    assert len({item.id for item in drawn}) == 10
    assert [item.id for item in drawn] == sorted(item.id for item in drawn)
    assert sample(items, 100) == items
    assert sample(items, 10, seed=1) != drawn
    with pytest.raises(SettingsError):
        sample(items, 0)


def test_the_fingerprint_changes_with_whatever_a_result_depends_on(folder: Path) -> None:
    before = dataset_fingerprint(load_dataset(jsonl(folder, ROW)))
    assert before == dataset_fingerprint(load_dataset(jsonl(folder, ROW)))
    changes: list[dict[str, Any]] = [
        {"label": "blue"},
        {"question": "Which?"},
        {"image": "pictures/two.png"},
        {"match": "choice", "options": ["red", "x"]},
    ]
    for change in changes:
        assert dataset_fingerprint(load_dataset(jsonl(folder, {**ROW, **change}))) != before


HOSTILE: list[tuple[str, str]] = [
    ('"image": "~nosuchuser/x"', "no image"),
    ('"image": "' + "x" * 5000 + '.png"', "no image"),
    ('"image": "a\\u0000b.png"', "no image"),
    ('"image": "pictures/one.png", "boxes": ' + "[" * 500 + "]" * 500, "boxes"),
    ('"image": "pictures/one.png", "boxes": "' + "[" * 100_000 + '"', "boxes"),
    ('"image": "pictures/one.png", "boxes": [[0, 0, 1, 1e400]]', "too large"),
    ('"image": "pictures/one.png", "boxes": [[0, 0, 1, ' + "9" * 5000 + "]]", "too long"),
    ('"image": "pictures/one.png", "options": ["a", 1e400]', "too large"),
    ('"image": "pictures/one.png", "type": ["a"]', "type is neither"),
    ('"image": "pictures/one.png", "id": {"a": 1}', "id is neither"),
    ('"image": "pictures/one.png", "reasoning": "\\ud800"', "surrogate"),
    ('"image": "data:image/png;base64,\\ud800"', "surrogate"),
    ('"image": "pictures/one.png", "extra": -Infinity', "-Infinity is no JSON"),
    ('"image": ["pictures/one.png", 3]', "no image"),
]


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_no_row_ends_the_reading_of_the_others(folder: Path, form: str) -> None:
    bad = ['{"question": "What?", "label": "red", ' + fields + "}" for fields, _ in HOSTILE]
    bad += [
        '{"image": "pictures/one.png", "question": "?", "label": 1e400}',
        '{"id": "\\udfff", "label": "\\ud800"}',
    ]
    lines = [json.dumps(ROW), *bad, json.dumps({**ROW, "id": "z"})]
    path = folder / f"data.{form}"
    path.write_text("\n".join(lines) if form == "jsonl" else "[" + ",\n".join(lines) + "]")
    items = load_dataset(path, keep_going=True)
    assert [item.line for item in items] == list(range(1, len(lines) + 1))
    assert [item.problem is None for item in items] == [True, *[False] * len(bad), True]
    for item, (_, problem) in zip(items[1:], HOSTILE, strict=False):
        assert problem in str(item.problem)
    for item in items:  # and everything about them can be written
        item.id.encode(), item.question.encode(), str(item.label).encode(), str(item.problem).encode()
    with pytest.raises(DatasetError) as caught:
        load_dataset(path)
    assert len(caught.value.problems) == len(bad)


def test_names_of_data_sets_that_no_file_can_have() -> None:
    for spec in ("~nosuchuser/data.jsonl", "x" * 5000, "a\0b.jsonl"):
        with pytest.raises((DatasetError, SettingsError)):
            load_dataset(spec)


def test_an_id_that_looks_like_the_one_given_to_a_second_row(folder: Path) -> None:
    path = jsonl(folder, {**ROW, "id": "a (line 3)"}, ROW, ROW, {**ROW, "id": "a (line 3)"})
    kept = load_dataset(path, keep_going=True)
    assert len({item.id for item in kept}) == 4 and sum(item.problem is not None for item in kept) == 2


@pytest.mark.slow
def test_hostile_lines_take_no_more_than_their_length(folder: Path) -> None:
    """Every one of these took seconds to minutes when work grew with the square of the line."""
    keys = ", ".join(f'"k{number}": 1' for number in range(60_000))
    lines = [
        '{"image": "pictures/one.png", "question": "What?", "label": "red", ' + keys + "}",
        json.dumps({**ROW, "id": "b", "label": "\\boxed{" * 200_000}),
        json.dumps({**ROW, "id": "c", "label": "<answer>" * 200_000 + "red"}),
        json.dumps({**ROW, "id": "d", "question": "options: A. x " * 100_000}),
    ]
    (folder / "data.jsonl").write_text("\n".join(lines))
    assert len(load_dataset(folder / "data.jsonl")) == 4
    (folder / "data.json").write_text("[" + ",\n".join(['{"x": 1}'] * 60_000) + "]")
    assert load_dataset(folder / "data.json", keep_going=True)[-1].line == 60_000
    (folder / "data.csv").write_text(",".join(["image", *[f"k{number}" for number in range(60_000)]]) + "\n")
    with pytest.raises(DatasetError, match="no questions"):
        load_dataset(folder / "data.csv")


@pytest.mark.parametrize(
    ("options", "label", "right", "wrong"),
    [
        (["2", "4", "3"], 2, "3", "2"),  # ScienceQA: an index, counted from 0
        (["2", "4", "3"], 0, "2", "4"),
        (["red", "blue", "green"], 1, "blue", "red"),
        (["red", "blue", "green"], 1.0, "B", "A"),
        (["red", "blue", "green"], "2", "green", "blue"),
        ([2, 3, 4], 3, "3", "4"),
        (["A. red", "B. blue"], 1, "blue", "red"),
        (["A. red", "B. blue"], "B. blue", "blue", "A"),
        (["yes", "no"], True, "yes", "no"),
        (["1", "2", "3"], "2", "2", "3"),
    ],
)
def test_a_number_as_the_label_of_a_choice(
    folder: Path, options: list[Any], label: Any, right: str, wrong: str
) -> None:
    (item,) = load_dataset(jsonl(folder, {**ROW, "choices": options, "label": label}))
    assert item.match.right(right, item.label or "") and not item.match.right(wrong, item.label or "")


def test_a_number_that_may_be_an_option_or_an_index_is_an_error(folder: Path) -> None:
    for options, label in (([2, 3, 4], 2), ([1, 0], 1)):
        with pytest.raises(
            DatasetError, match=r"line 1: the label \d is the text of one option and the index of another"
        ):
            load_dataset(jsonl(folder, {**ROW, "options": options, "label": label}))
    # In text, a number is the option of that text, unless other rows of the file show that it is an index.
    doubtful = {**ROW, "id": "b", "options": ["4", "2", "3"], "label": "2"}
    (item,) = load_dataset(jsonl(folder, doubtful))
    assert item.match.right("2", item.label or "")
    with pytest.raises(DatasetError, match="line 1: the label 2 is the text"):
        load_dataset(jsonl(folder, doubtful, {**ROW, "options": ["red", "blue", "green"], "label": "2"}))
    with pytest.raises(DatasetError, match="not among the options"):
        load_dataset(jsonl(folder, {**ROW, "options": ["red", "blue"], "label": 2}))


def test_items_name_their_pictures(folder: Path) -> None:
    uri = "data:image/png;base64," + base64.b64encode((folder / "pictures" / "one.png").read_bytes()).decode()
    both, hidden = load_dataset(
        jsonl(folder, {**ROW, "images": ["pictures/one.png", uri], "image": None}, {**ROW, "id": "b"})
    )
    assert both.images[0] == "pictures/one.png" and both.images[1].startswith("<data URI of")
    assert hidden.images == ("pictures/one.png",)
    assert load_dataset("scenes:hard:5860000-5860000")[0].images == ("scenes:hard:5860000-5860000",)
