"""Benchmarks' own files: VLMEvalKit's tables, parquet shards, presets, and what is measured of groups."""

from __future__ import annotations

import base64
import csv
import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from latent_tool.errors import DatasetError, ImageTooLargeError, SettingsError
from latent_tool.evaluation.datasets import dataset_fingerprint, load_dataset, sample, tables
from latent_tool.evaluation.datasets.benchmarks import PRESETS
from latent_tool.evaluation.measures import benchmark_measures
from latent_tool.evaluation.runs import Row
from latent_tool.settings import ImagePolicy


def png(colour: str, width: int = 12, height: int = 8) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(written, "PNG")
    return written.getvalue()


def b64(colour: str) -> str:
    return base64.b64encode(png(colour)).decode()


def tsv(folder: Path, *rows: dict[str, Any], name: str = "data.tsv", delimiter: str = "\t") -> Path:
    path = folder / name
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


ROW = {"index": 1, "image": b64("red"), "question": "What colour?", "answer": "red"}
CHOICE = {**ROW, "A": "red", "B": "blue", "C": "", "D": "", "answer": "A", "category": "colour", "hint": "Look."}


def colour(item: Any) -> Any:
    return item.load()[0].getpixel((0, 0))


def test_a_table_of_vlmevalkit(tmp_path: Path) -> None:
    rows = [CHOICE, {**CHOICE, "index": 2, "image": "1", "answer": "B", "question": "Two\nlines?"}]
    first, second = load_dataset(tsv(tmp_path, *rows))
    assert (first.id, first.label, first.type, first.line, second.line) == ("1", "A", "colour", 2, 3)
    assert first.question.startswith("Look.\nWhat colour?\nOptions:\nA. red\nB. blue\n")
    assert first.match.kind == "choice" and first.match.options == ("red", "blue")
    assert first.match.right("red", "A") and not second.match.right("red", "B")
    assert colour(first) == colour(second) == (255, 0, 0)  # the second row has the first one's picture
    assert "<image of line 2>" in first.images
    assert colour(pickle.loads(pickle.dumps(first))) == (255, 0, 0)


def test_several_pictures_and_several_answers(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / "images" / f"{name}.png").write_bytes(png("blue"))
    both = {**ROW, "image": str([b64("red"), b64("green")]), "answer": "['red', \"it's red\"]"}
    named = {**ROW, "index": 2, "image": "", "image_path": "['a.png', 'images/b.png']"}
    first, second = load_dataset(tsv(tmp_path, both, named))
    assert [image.getpixel((0, 0)) for image in first.load()] == [(255, 0, 0), (0, 128, 0)]
    assert first.match.answers == ("red", "it's red") and first.match.right("it's red", first.label or "")
    assert [image.getpixel((0, 0)) for image in second.load()] == [(0, 0, 255)] * 2
    jsonl = tmp_path / "data.jsonl"
    jsonl.write_text(
        json.dumps({"image": "images/a.png", "question": "?", "answers": ["no", "blue", "blue"], "match": "vqa"})
    )
    (item,) = load_dataset(jsonl)
    assert item.label == "blue" and item.match.credit("no", "blue") == pytest.approx(1 / 3)


def test_pictures_stay_in_the_file(tmp_path: Path) -> None:
    """What is held of a table is a place in it, and a changed table is found out."""
    path = tsv(tmp_path, *[{**ROW, "index": number} for number in range(50)])
    items = load_dataset(path)
    assert max(len(pickle.dumps(item)) for item in items) < 3000
    assert len({item.content for item in items}) == 1
    path.write_bytes(path.read_bytes().replace(b64("red").encode(), b64("blue").encode()))
    with pytest.raises(DatasetError, match="was changed"):
        items[3].load()
    path.unlink()
    with pytest.raises(DatasetError, match="was changed"):
        items[3].load()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image": "", "image_path": "../outside.png"}, "outside the folder"),
        ({"image": "", "image_path": "/etc/passwd"}, "outside the folder"),
        ({"image": "", "image_path": "link.png"}, "outside the folder"),
        ({"image": "", "image_path": "none.png"}, "no image none.png"),
        ({"image": "", "image_path": "a\0b.png"}, "no image"),
        ({"image": "", "image_path": "x" * 5000}, "no image"),
        ({"image": "https://example.org/a.png"}, "a URL"),
        ({"image": "file:///etc/passwd"}, "a URL"),
        ({"image": "data:image/png;base64,AAAA"}, "a URL"),
        ({"image": ""}, "no image"),
        ({"question": ""}, "no question"),
        ({"answer": ""}, "no label"),
        ({"answer": "C", "A": "red", "B": "blue"}, "not among the options"),
        ({"answer": "[" * 1000 + "]" * 1000, "A": "1", "B": "2"}, "not among the options"),
        ({"image": b64("red")[:-8] + "!!!!????"}, "no image"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(png("red"))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    if "\0" in change.get("image_path", ""):
        change = {**change, "image_path": "a\\0b.png"}
    path = tsv(folder, {**ROW, "A": "", "B": "", "image_path": ""}, {**ROW, "A": "", "B": "", "index": 2, **change})
    good, bad = load_dataset(path, keep_going=True)
    assert good.problem is None and problem in str(bad.problem)
    with pytest.raises(DatasetError, match="line 3: "):
        load_dataset(path)


def test_another_folder_for_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(png("red"))
    (tmp_path / "a").mkdir()
    path = tsv(tmp_path / "a", {**ROW, "image": "", "image_path": "a.png"})
    with pytest.raises(DatasetError, match="no image"):
        load_dataset(path)
    (item,) = load_dataset(path, images=tmp_path / "elsewhere")
    assert colour(item) == (255, 0, 0)


def test_rows_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell of any size costs no more memory than a row may take, and harms no other row."""
    monkeypatch.setattr(tables, "MOST_ROW", 20_000)
    path = tsv(tmp_path, ROW, {**ROW, "index": 2, "image": "A" * 3_000_000}, {**ROW, "index": 3})
    before = csv.field_size_limit()
    first, second, third = load_dataset(path, keep_going=True)
    assert (first.problem, third.problem) == (None, None) and "MB" in str(second.problem)
    assert (second.line, third.line) == (3, 4) and colour(third) == (255, 0, 0)
    assert csv.field_size_limit() == before
    path.write_text('index\timage\tquestion\tanswer\n1\t"' + "\n".join("A" * 60 for _ in range(1000)))
    (broken,) = load_dataset(path, keep_going=True)
    assert "MB" in str(broken.problem)


def test_a_picture_of_more_bytes_than_the_policy_allows(tmp_path: Path) -> None:
    noise = io.BytesIO()
    Image.effect_noise((80, 80), 90).save(noise, "PNG")
    policy = ImagePolicy.local(max_bytes=1000)
    path = tsv(tmp_path, {**ROW, "image": base64.b64encode(noise.getvalue()).decode()})
    with pytest.raises(DatasetError, match=r"line 2: an image has .* bytes; at most 1,000"):
        load_dataset(path, policy=policy)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no columns"),
        ("index\timage\timage\n", "two columns of one name"),
        ("index\timage\tquestion\tanswer\n1\tx\n", "4 columns are named, but there are 2"),
        ('index\timage\tquestion\tanswer\n1\t"a"b\tc\td\n', "not a table from here on"),
        ("index\timage\tquestion\tanswer\n", "no questions"),
        ("index\timage\tquestion\tanswer\n1\t\xff\tc\td\n", "surrogate"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "data.tsv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DatasetError, match=said):
        load_dataset(tmp_path / "data.tsv")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rest=st.one_of(
        st.binary(max_size=200),
        st.text(alphabet="\t\n\r\"'[],\\x00Aa1=é", max_size=120).map(lambda text: text.encode("utf-8", "replace")),
    ),
    preset=st.sampled_from([None, *PRESETS]),
)
def test_whatever_stands_in_a_table_is_a_row_or_a_data_set_error(tmp_path: Path, rest: bytes, preset: Any) -> None:
    columns = b"index\timage\timage_path\tquestion\tanswer\tA\tB\tchoices\tprecision\tanswer_type\n"
    (tmp_path / "data.tsv").write_bytes(columns + rest)
    try:
        items = load_dataset(tmp_path / "data.tsv", keep_going=True, preset=preset)
    except DatasetError as error:
        assert error.hint
    else:
        assert all(item.problem for item in items)  # no picture is in any of them


def test_a_small_picture_in_base64_that_is_huge_once_decoded(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (19_000, 19_000)).save(bomb, "PNG", optimize=True)
    assert len(bomb.getvalue()) < 200_000
    (item,) = load_dataset(tsv(tmp_path, {**ROW, "image": base64.b64encode(bomb.getvalue()).decode()}))
    with pytest.raises(ImageTooLargeError):
        item.load()


# ------------------------------------------------------------------------------------------------ presets


def test_presets_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no preset"):
        load_dataset(tsv(tmp_path, ROW), preset="mmsta")
    with pytest.raises(SettingsError, match="preset"):
        load_dataset("scenes", preset="pope")
    assert set(PRESETS) == {"mmstar", "mmvp", "pope", "vstar", "hrbench", "chartqa", "textvqa", "mathvista"}


def test_mmvp_comes_in_pairs_and_its_pictures_by_number(tmp_path: Path) -> None:
    (tmp_path / "MMVP Images").mkdir()
    rows = []
    for number in range(1, 7):
        (tmp_path / "MMVP Images" / f"{number}.jpg").write_bytes(png("red"))
        right = "(a)" if number % 2 else "(b)"
        rows.append({"Index": number, "Question": "Open?", "Options": "(a) Open (b) Closed", "Correct Answer": right})
    path = tsv(tmp_path, *rows, name="Questions.csv", delimiter=",")
    items = load_dataset(path, preset="mmvp")
    assert [item.group for item in items] == ["1", "1", "2", "2", "3", "3"]
    assert items[0].match.options == ("Open", "Closed") and items[1].match.right("closed", items[1].label or "")
    assert "(a)" not in items[0].question and "A. Open" in items[0].question
    drawn = sample(items, 5)
    assert len(drawn) == 4 and len({item.group for item in drawn}) == 2
    with pytest.raises(SettingsError, match="group"):
        sample(items, 1)
    tsv(tmp_path, *rows[:3], name="Questions.csv", delimiter=",")
    with pytest.raises(DatasetError, match="pairs"):
        load_dataset(path, preset="mmvp")


def test_hr_bench_turns_its_options(tmp_path: Path) -> None:
    options = ["red", "blue", "green", "black"]
    rows = []
    for question in range(2):
        for turn in range(4):
            turned = options[turn:] + options[:turn]
            rows.append(
                {
                    **ROW,
                    "index": 4 * question + turn,
                    "image": b64(["red", "blue"][question]),
                    "question": "What colour is the sign?",
                    **dict(zip("ABCD", turned, strict=True)),
                    "answer": "ABCD"[turned.index("blue")],
                    "category": "single",
                    "cycle_category": turn,
                }
            )
    items = load_dataset(tsv(tmp_path, *rows), preset="hrbench")
    assert [item.group for item in items] == ["0"] * 4 + ["4"] * 4
    assert all(item.match.right("blue", item.label or "") for item in items)


def test_text_vqa_chart_qa_pope_and_vstar(tmp_path: Path) -> None:
    people = ["coca cola"] * 2 + ["coke"] * 8
    (item,) = load_dataset(tsv(tmp_path, {**ROW, "answer": str(people)}), preset="textvqa")
    assert item.label == "coke" and item.match.credit("Coca Cola", "coke") == pytest.approx(0.6)
    one = load_dataset(tsv(tmp_path, {**ROW, "answer": "coke"}), preset="textvqa")[0]
    assert one.match.answers == ("coke",)
    chart = load_dataset(tsv(tmp_path, {**ROW, "answer": "['14']", "split": "human"}), preset="chartqa")[0]
    assert chart.type == "human" and chart.match.right("14.5", chart.label or "")
    pope = load_dataset(tsv(tmp_path, {**ROW, "answer": "Yes"}), preset="pope")[0]
    assert pope.match.right("Yes, there is.", "Yes") and pope.question.endswith("Answer yes or no.")
    (tmp_path / "a.png").write_bytes(png("red"))
    lines = tmp_path / "test.jsonl"
    asked = "What colour?\n(A) red\n(B) blue\nAnswer with the option's letter from the given choices directly."
    lines.write_text(
        json.dumps({"image": "a.png", "text": asked, "label": "A", "category": "direct", "question_id": 0})
    )
    star = load_dataset(lines, preset="vstar")[0]
    assert star.match.options == ("red", "blue") and star.match.right("red", "A")
    own = load_dataset(tsv(tmp_path, {**ROW, "answer": "Yes"}), preset="pope", match="exact")[0]
    assert own.match.kind == "exact"  # what the caller names comes first


def test_math_vista_says_by_the_row_what_is_right(tmp_path: Path) -> None:
    def row(number: int, answer: str, **facts: Any) -> dict[str, Any]:
        every = {
            "choices": "",
            "question_type": "free_form",
            "answer_type": "text",
            "precision": "",
            "task": "geometry",
        }
        return {**ROW, "index": number, "answer": answer, **every, **facts}

    rows = [
        row(1, "14 cm", choices="['12 cm', '14 cm']", question_type="multi_choice"),
        row(2, "1.2", answer_type="float", precision="1.0"),
        row(3, "7", answer_type="integer"),
        row(4, "Tuesday"),
    ]
    items = load_dataset(tsv(tmp_path, *rows), preset="mathvista")
    assert [str(item.match) for item in items] == ["choice", "rounded:1", "rounded:0", "exact"]
    for item, right, wrong in zip(items, ("B", "1.24", "7.0", "tuesday"), ("A", "1.3", "8", "Monday"), strict=True):
        assert item.match.right(right, item.label or "") and not item.match.right(wrong, item.label or "")


# ------------------------------------------------------------------------------------------------ parquet


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], group: int = 20) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=group)


def stored(number: int) -> dict[str, Any]:
    picture = {"bytes": png(f"#0000{number:02x}"), "path": f"{number}.png"}
    return {"id": f"q{number}", "image": picture, "question": "?", "answer": "yes", "category": "a"}


def test_parquet_shards(tmp_path: Path) -> None:
    rows = [stored(number) for number in range(100)]
    write_parquet(tmp_path / "test-00000-of-00002.parquet", rows[:55])
    write_parquet(tmp_path / "test-00001-of-00002.parquet", rows[55:])
    items = load_dataset(tmp_path, preset="pope")
    assert [item.id for item in items] == [f"q{number}" for number in range(100)]
    assert [item.line for item in items] == list(range(1, 101))
    assert [colour(item)[2] for item in items] == list(range(100))
    assert colour(items[37])[2] == 37  # in any order
    assert dataset_fingerprint(items) == dataset_fingerprint(
        load_dataset(tmp_path / "test-00001-of-00002.parquet", preset="pope")
    )
    (tmp_path / "test-00000-of-00002.parquet").unlink()
    with pytest.raises(DatasetError, match="1 of 2 shards are missing"):
        load_dataset(tmp_path, preset="pope")


def test_a_folder_of_shards_may_have_a_dot_in_its_name(tmp_path: Path) -> None:
    folder, pictures = tmp_path / "MMBench_v1.1", tmp_path / "pictures"
    for each in (folder, pictures):
        each.mkdir()
    (pictures / "0.png").write_bytes(png("#000000"))
    row = {"index": "0", "image_path": "0.png", "question": "?", "answer": "yes", "category": "a"}
    write_parquet(folder / "test.parquet", [row])
    (item,) = load_dataset(folder, images=pictures)
    assert colour(item) == (0, 0, 0)
    (tmp_path / "a.jsonl").write_text("{}")
    for spec in (tmp_path / "a.jsonl", "scenes", "a\0b.json", "x" * 5_000 + ".csv"):
        with pytest.raises(SettingsError):
            load_dataset(spec, images=pictures)


def test_parquet_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png("red"))
    rows = [
        {"index": 1, "image": b64("blue"), "question": "?", "answer": "1", "A": "x", "B": "y"},
        {"index": 2, "image": "p.png", "question": "?", "answer": "B", "A": "x", "B": "y"},
        {"index": 3, "image": "../p.png", "question": "?", "answer": "B", "A": "x", "B": "y"},
    ]
    write_parquet(tmp_path / "data.parquet", rows)
    first, second, third = load_dataset(tmp_path / "data.parquet", keep_going=True)
    assert first.problem is None and colour(first) == (0, 0, 255) and first.match.right("y", "B")
    assert colour(second) == (255, 0, 0) and "outside the folder" in str(third.problem)
    listed = [
        {"pid": "1", "images": [{"bytes": png("red"), "path": None}] * 2, "query": "?", "answers": ["a", "b", "b"]}
    ]
    write_parquet(tmp_path / "data.parquet", listed)
    (item,) = load_dataset(tmp_path / "data.parquet")
    assert len(item.load()) == 2 and item.label == "b" and item.match.right("a", "b")


def test_parquet_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for content in (b"", b"PAR1" * 100, b"nothing at all"):
        (tmp_path / "data.parquet").write_bytes(content)
        with pytest.raises(DatasetError, match="cannot be read"):
            load_dataset(tmp_path / "data.parquet")
    write_parquet(tmp_path / "data.parquet", [stored(number) for number in range(40)])
    whole = (tmp_path / "data.parquet").read_bytes()
    damaged = whole[:500] + b"\0" * 1500 + whole[2000:]
    (tmp_path / "data.parquet").write_bytes(damaged)
    with pytest.raises(DatasetError):
        load_dataset(tmp_path / "data.parquet")
    write_parquet(tmp_path / "train.parquet", [stored(1)])
    with pytest.raises(DatasetError, match="several tables"):
        load_dataset(tmp_path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from latent_tool.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match=r"\[datasets\]"):
        load_dataset(tmp_path / "data.parquet")


# ------------------------------------------------------------------------------------------------ measures


def answered(number: int, label: str, answer: str | None, **facts: Any) -> Row:
    right = None if answer is None else answer == label
    said = {"canonical": answer} if answer is not None else {}
    return Row(
        id=str(number), method="m", question="?", label=label, answer=answer, correct=right, details=said, **facts
    )


def test_f1_of_yes() -> None:
    pairs = [("yes", "yes")] * 6 + [("yes", "no")] * 2 + [("no", "yes")] * 3 + [("no", "no")] * 4 + [("no", "a dog")]
    measures = benchmark_measures([answered(number, *pair) for number, pair in enumerate(pairs)])
    assert measures is not None and measures["groups"] is None and measures["credit"] is None
    precision, recall = 6 / 9, 6 / 8
    assert measures["yes_no"] == pytest.approx(
        {"n": 16, "precision": precision, "recall": recall, "f1": 12 / 17, "yes": 9 / 16}
    )
    assert benchmark_measures([answered(1, "yes", "yes"), answered(2, "red", "red")]) is None


def test_groups_count_only_when_all_is_right() -> None:
    rows = [answered(number, "a", said, group=str(number // 2)) for number, said in enumerate("aaabbb" + "a")]
    rows[-1] = answered(6, "a", None, group="3")
    measures = benchmark_measures(rows)
    assert measures is not None and (measures["groups"]["n"], measures["groups"]["value"]) == (4, 0.25)


def test_credit_is_the_mean_of_all_that_were_asked() -> None:
    rows = [answered(number, "a", "a", credit=credit) for number, credit in enumerate((1.0, 0.5, 0.0))]
    measures = benchmark_measures([*rows, answered(3, "a", None)])
    assert measures is not None and measures["credit"]["value"] == pytest.approx(0.375)
    assert measures["credit"]["low"] < 0.375 < measures["credit"]["high"]
