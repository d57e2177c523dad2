"""The report page: its text and structure, and how it behaves in a real browser."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, contrast, luminance
from PIL import Image
from results import BLUE, HOSTILE, PAPER, QUESTION, RED, a_result, attended_result, hostile_result, scene

from latent_tool.errors import InputError
from latent_tool.schema import (
    CellAttention,
    ControlAnswer,
    Controls,
    ReasoningResult,
    TraceRow,
)
from latent_tool.settings import Budget, NoiseSettings, SearchSettings
from latent_tool.views import report as module
from latent_tool.views.chart import CHART_POINTS, reward_chart
from latent_tool.views.heat import HEAT_OPACITY, HEAT_STOPS
from latent_tool.views.layout import layout_of
from latent_tool.views.report import report_html, summary_html, write_report
from latent_tool.words import number_text


def unscored() -> ReasoningResult:
    return ReasoningResult(answer="a cat", raw_text="A cat.", confidence=None, confidence_source="unscored")


class Page(HTMLParser):
    """The elements of a page, their texts, and whether every one that was opened is closed in order."""

    VOID = frozenset({"meta", "link", "input", "br", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> str:
        return "".join(self.texts.get(tag, []))

    @property
    def all_text(self) -> str:
        return " ".join("".join(texts) for texts in self.texts.values())


def without_pictures(page: str) -> str:
    return re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", page)


# --- what is on the page ----------------------------------------------------------------------------------------------


def test_the_page_says_everything_about_the_result() -> None:
    page = Page(report_html(a_result(), scene(), question=QUESTION, names=["disc.png"]))
    text = " ".join(page.all_text.split())
    for part in (
        QUESTION,
        "blue",
        "0.93",
        "accepted",
        "answer probability: joint probability",
        "The image is small.",
        "disc.png",
        "12, 12, 24, 24",
        "not known",
        "1.1 nats",
        "43 % of the tokens",
        "latents off",
        "image noised",
        "Patches were accepted in round 2, 3, 7.",
        "all rounds of the budget were used",
        "the model ended its answer",
        "candidates scored",
        "search",
        "renormalised_top_k_entropy",
        "first token entropy",
    ):
        assert part in text, part


def test_a_result_that_was_not_scored_has_a_page() -> None:
    page = Page(report_html(unscored(), scene(), question=QUESTION))
    for part in ("not scored", "No patches were injected.", "There was no search.", "was not measured", "A cat."):
        assert part in page.all_text
    assert "accepted" not in page.all_text


def test_an_abstention_is_said() -> None:
    text = Page(report_html(a_result(accepted=False, abstained=True), scene(), question=QUESTION)).all_text
    assert "✗ abstained" in text and "✓ accepted" not in text


def test_the_noised_image_is_a_warning_only_if_the_answer_stays() -> None:
    other = ControlAnswer(answer="red", confidence=0.3, agrees=False)
    same = ControlAnswer(answer="blue", confidence=0.9, agrees=True)
    unsure = ControlAnswer(answer="blue", confidence=0.2, agrees=True)
    for noised, warned in ((other, False), (same, True), (unsure, False)):
        result = a_result(controls=Controls(latents_off=same, image_noised=noised))
        page = report_html(result, scene(), question=QUESTION)
        assert ("may not rest on the image at all" in page) is warned
        assert ("falls to less than half" in page) is (noised is unsure)


def test_patches_lie_where_their_boxes_are() -> None:
    page = Page(report_html(a_result(), scene(), question=QUESTION))
    layout = layout_of((60, 60), module.PICTURE_SIDE)
    scale = layout.width / 60
    hits = [attributes for attributes in page.of("rect") if attributes.get("class") == "hit"]
    links = [attributes for attributes in page.of("a") if attributes.get("class") == "mark"]
    boxes = [patch.box for patch in a_result().patches if patch.box is not None]
    assert len(hits) == len(links) == len(boxes) == 5
    for hit, (left, top, right, bottom) in zip(hits, boxes, strict=True):
        assert float(hit["x"] or "") == layout.left + left * scale
        assert float(hit["y"] or "") == layout.top + top * scale
        assert float(hit["width"] or "") == (right - left) * scale
        assert float(hit["height"] or "") == (bottom - top) * scale
    assert links[0]["href"] == "#patch-1"
    assert links[0]["aria-label"] == (
        "Patch 1: attention 0.052, gain 0.031, proposed by latent 1 in round 2, box 12, 12, 24, 24"
    )
    rows = [attributes["id"] for attributes in page.of("tr") if "id" in attributes]
    assert rows == [f"patch-{i}" for i in range(1, 7)]


def test_several_images_each_have_their_patches() -> None:
    other = Image.new("RGB", (24, 36), RED)
    moved = a_result().patches[4].model_copy(update={"image": 1, "box": (12.0, 24.0, 24.0, 36.0)})
    result = a_result(patches=[*a_result().patches[:4], moved], image_sizes=[(60, 60), (24, 36)])
    page = report_html(result, [scene(), other], question=QUESTION, names=["one.png", "two.png"])
    first, second = page.split("<figure>")[1:]
    assert first.count('class="hit"') == 4 and second.split("</figure>")[0].count('class="hit"') == 1
    assert "'images': ['one.png', 'two.png']" in "".join(Page(page).texts["code"])


def test_tokens_are_coloured_by_their_dependency() -> None:
    page = Page(report_html(a_result(), scene(), question=QUESTION))
    spans = [attributes for attributes in page.of("span") if "title" in attributes]
    assert [span["class"] for span in spans] == ["p0", "p1 above", "m1", "m2", "p5 above", "p0", "p4 above answers"]
    assert spans[4]["title"] == "S = 5.2 nats, probability 0.9"


def heat_of(page: str) -> Image.Image:
    """The layer of the heat map, as it is embedded."""
    found = re.search('class="heat"[^>]*href="data:image/png;base64,([^"]+)', page, re.DOTALL)
    assert found is not None
    return Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGBA")


def test_the_heat_map_lies_on_the_picture_and_says_what_it_is() -> None:
    html = report_html(attended_result(), scene(), question=QUESTION, names=["disc.png"])
    page, layout = Page(html), layout_of((60, 60), module.PICTURE_SIDE)
    picture, heat = page.of("image")
    assert [heat[name] for name in ("x", "y", "width", "height")] == [picture[n] for n in ("x", "y", "width", "height")]
    layer = np.asarray(heat_of(html))
    assert layer.shape[:2] == (layout.height, layout.width)
    scale = layout.width // 60
    assert tuple(layer[54 * scale, 54 * scale]) == (*HEAT_STOPS[-1], round(255 * HEAT_OPACITY[1]))
    assert tuple(layer[6 * scale, 6 * scale]) == (*HEAT_STOPS[0], round(255 * HEAT_OPACITY[0]))
    assert tuple(layer[54 * scale, 6 * scale])[:3] == HEAT_STOPS[2]
    assert heat["aria-label"] == (
        "Heat map, colours: attention of the latents to 25 image cells; the largest, 0.08, at box 48, 48, 60, 60"
    )
    assert "attention=True," in "".join(page.texts["code"])


def test_what_a_heat_map_cannot_show_is_said() -> None:
    plain = report_html(a_result(), scene(), question=QUESTION)
    assert "The attention to all image cells was not measured." in plain and 'id="heats"' not in plain
    cells = [CellAttention(image=0, cell=0, box=None, weight=0.1)]
    nowhere = report_html(a_result(attention=cells), scene(), question=QUESTION)
    assert "no heat map: the places of the 1 image cells are not known" in nowhere
    assert 'class="heat" x=' not in nowhere and nowhere.count("<image") == 1


def test_every_image_has_its_heat_map_in_one_scale() -> None:
    moved = [
        CellAttention(image=0, cell=0, box=(0.0, 0.0, 60.0, 60.0), weight=0.04),
        CellAttention(image=1, cell=1, box=(12.0, 0.0, 24.0, 36.0), weight=0.08),
    ]
    result = a_result(attention=moved, image_sizes=[(60, 60), (24, 36)])
    first, second = (
        np.asarray(heat_of(part))
        for part in report_html(result, [scene(), Image.new("RGB", (24, 36))], question=QUESTION).split("<figure>")[1:]
    )
    assert {tuple(pixel) for pixel in first.reshape(-1, 4)[:, :3]} == {HEAT_STOPS[2]}
    assert not second[:, : second.shape[1] // 2 - 1, 3].any()
    assert tuple(second[5, -5])[:3] == HEAT_STOPS[-1]


def test_wrong_images_are_refused() -> None:
    with pytest.raises(InputError, match="1 images, not 2 images"):
        report_html(a_result(), [scene(), scene()], question=QUESTION)
    with pytest.raises(InputError, match="not 2 names"):
        report_html(a_result(), scene(), question=QUESTION, names=["a", "b"])
    with pytest.raises(InputError, match="50 x 60"):
        report_html(a_result(), scene().resize((50, 60)), question=QUESTION)


# --- self-contained, safe, small --------------------------------------------------------------------------------------


def test_nothing_is_loaded_and_the_policy_names_exactly_what_is_inside() -> None:
    html = report_html(a_result(), scene(), question=QUESTION)
    page = Page(html)
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert name != "style" and not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href"):
                assert value is not None and value.startswith(("#", "data:"))
    assert "http://" not in html and "https://" not in html and "@import" not in html
    policy = next(m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    parts = dict(part.strip().split(" ", 1) for part in (policy or "").split(";"))
    for tag in ("style", "script"):
        inside = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert inside is not None
        digest = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
        assert parts.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert parts == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}


def test_hostile_text_stays_text() -> None:
    clean = Page(report_html(a_result(), scene(), question=QUESTION, names=["disc.png"]))
    page = Page(report_html(hostile_result(), scene(), question=HOSTILE, names=[HOSTILE]))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in clean.elements}
    assert len(page.of("script")) == len(page.of("style")) == 1 and page.of("img") == []
    assert page.text("script") == clean.text("script")
    shown = HOSTILE.replace("\u202e", "").replace("\u202c", "").replace("\x00\x1b", "\ufffd\ufffd")
    assert page.text("h1") == page.text("bdi") == shown.replace("\ud800", "\ufffd")
    assert "{{ 7 * 7 }}" in page.text("h1") and "49" not in page.text("h1")
    for tag in ("script", "style", "svg", "pre"):
        assert page.text(tag).count("hacked") == 0


def test_the_page_can_be_written_as_utf8() -> None:
    page = report_html(hostile_result(), scene(), question=HOSTILE, names=[HOSTILE])
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", page)
    page.encode("utf-8")


def test_the_largest_result_makes_a_page_below_300_kilobytes() -> None:
    text = "'<&>\"\U000e0001" * 4000
    many = a_result()
    grounding = many.grounding
    assert grounding is not None
    token = grounding.tokens[0].model_copy(update={"token": "\U000e0001" * 5 + "'" * 95})
    control = ControlAnswer(answer=text, confidence=0.5, agrees=True)
    patch, row = many.patches[0], many.trace[3]
    boxes = [(14.0 * (i % 64), 14.0 * (i // 64), 14.0 * (i % 64) + 14, 14.0 * (i // 64) + 14) for i in range(4096)]
    weights = np.random.default_rng(0).random(4096).tolist()
    result = hostile_result().model_copy(
        update={
            "answer": text,
            "raw_text": text,
            "model": text,
            "warnings": [text] * 50,
            "image_sizes": [(896, 896)],
            "attention": [
                CellAttention(image=0, cell=i, box=box, weight=weight)
                for i, (box, weight) in enumerate(zip(boxes, weights, strict=True))
            ],
            "patches": [patch.model_copy(update={"rank": i, "cell": i, "box": box}) for i, box in enumerate(boxes)],
            "trace": [row.model_copy(update={"round": i, "accepted": [i % 4096]}) for i in range(10_001)],
            "grounding": grounding.model_copy(update={"tokens": [token] * 32_768}),
            "controls": Controls(latents_off=control, image_noised=control),
        }
    )
    page = report_html(result, Image.new("RGB", (896, 896), PAPER), question=text, names=[text])
    assert len(without_pictures(page).encode()) < 300_000
    assert len(page.encode()) < 400_000  # the picture is of one colour: what is left is the heat map
    text = " ".join(Page(page).all_text.split())
    for part in ("3,996 more patches", "32,512 more tokens", "9,951 earlier rounds", "The question was longer"):
        assert part in text, part


def test_usual_pages_are_small_and_large_images_are_scaled_down() -> None:
    assert len(report_html(a_result(), scene(), question=QUESTION)) < 60_000
    noise = Image.effect_noise((3000, 1500), 80).convert("RGB")
    page = report_html(a_result(patches=[], image_sizes=[(3000, 1500)]), noise, question=QUESTION)
    picture = re.search('data:image/jpeg;base64,([^"]+)', page)
    assert picture is not None
    assert Image.open(io.BytesIO(base64.b64decode(picture[1]))).size == (1600, 800)


def test_small_images_are_embedded_without_loss_and_without_metadata() -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    stream = io.BytesIO()
    scene().save(stream, "PNG", exif=exif, icc_profile=b"profile of my camera")
    page = report_html(a_result(), Image.open(stream), question=QUESTION)
    picture = re.search('data:image/png;base64,([^"]+)', page)
    assert picture is not None
    content = base64.b64decode(picture[1])
    assert Image.open(io.BytesIO(content)).tobytes() == scene().tobytes()
    assert b"home" not in content and b"camera" not in content and b"iCCP" not in content and b"eXIf" not in content


def test_the_page_is_the_same_every_time_and_changes_nothing() -> None:
    image, result = scene(), a_result()
    before = image.tobytes(), result.model_dump_json()
    pages = {report_html(result, image, question=QUESTION) for _ in range(2)}
    assert len(pages) == 1
    assert (image.tobytes(), result.model_dump_json()) == before


def test_importing_the_module_loads_no_engine_of_templates_or_pictures() -> None:
    heavy = "('PIL', 'numpy', 'torch', 'jinja2')"
    code = f"import sys, latent_tool.views.report; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- how to get the same again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [QUESTION, HOSTILE, 'three """ quotes \\'])
@pytest.mark.parametrize(
    "settings", [a_result().settings, SearchSettings.paper(init_token=HOSTILE)], ids=["own", "paper"]
)
def test_the_snippet_asks_the_same_again(question: str, settings: SearchSettings) -> None:
    result = a_result(settings=settings)
    tree = ast.parse(module._snippet(result, question, ["disc.png"]))
    calls: dict[str, ast.Call] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            calls[node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")] = node
    request = ast.literal_eval(calls["invoke"].args[0])
    assert request == {"image": "disc.png", "question": question, "seed": 7, "min_confidence": 0.8}
    made: dict[str, Any] = {}
    for name, kind in (("Budget", Budget), ("SearchSettings", SearchSettings)):
        made[name] = kind(**{item.arg or "": ast.literal_eval(item.value) for item in calls[name].keywords})
    assert made == {"Budget": result.budget, "SearchSettings": result.settings}
    assert [item.arg for item in calls["LatentReasoner"].keywords] == [
        *("model", "budget", "settings", "grounding", "controls"),
    ]


def test_the_snippet_measures_what_was_measured() -> None:
    plain = a_result(grounding=None, controls=None)
    assert not {"grounding", "controls"} & set(re.findall(r"\w+", module._snippet(plain, QUESTION, ["a.png"])))
    result = a_result()
    assert result.grounding is not None
    strong = result.grounding.model_copy(update={"noise": NoiseSettings(strength=0.7)})
    assert "    grounding=True,\n    controls=True," in module._snippet(result, QUESTION, ["a.png"])
    text = module._snippet(a_result(grounding=strong), QUESTION, ["a.png"])
    assert "    grounding={'strength': 0.7}," in text


def test_the_snippet_names_the_images() -> None:
    assert "'images': ['a.png', 'b.png']" in module._snippet(a_result(), QUESTION, ["a.png", "b.png"])
    assert module._snippet(unscored(), QUESTION, ["a.png"]).startswith("from latent_tool import LatentReasoner\n")


# --- the chart and the numbers ----------------------------------------------------------------------------------------


def row(number: int, reward: float, accepted: list[int] | None = None) -> TraceRow:
    return TraceRow(
        round=number,
        reward=reward,
        best_reward=reward,
        mean_sampled_reward=None,
        top_k_mass=0.9,
        sigma=None,
        accepted=accepted or [],
        candidates=1,
        seconds=0.0,
    )


def points(line: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (point.split(",") for point in line.split())]


def test_the_chart_draws_rewards_upwards_and_marks_accepted_patches() -> None:
    chart = reward_chart([row(0, 0.1), row(1, 0.3, [4, 5]), row(2, 0.5)])
    assert chart is not None
    (x0, y0), (x1, y1), (x2, y2) = points(chart["best"])
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert [(mark["x"], mark["y"], mark["text"]) for mark in chart["marks"]] == [(x1, y1, "+2")]
    assert chart["summary"] == "The best reward goes from 0.1 in round 0 to 0.5 in round 2. " + (
        "Patches were accepted in round 1."
    )


@pytest.mark.parametrize(
    "rewards", [[0.5], [0.5, 0.5], [0.0, 0.0], [-3.0, -2.9], [1e-9, 2e-9], [1e6, 2e6], [0.1, float("nan"), 0.2]]
)
def test_any_rewards_fit_into_the_chart(rewards: list[float]) -> None:
    chart = reward_chart([row(i, reward) for i, reward in enumerate(rewards)])
    assert chart is not None
    assert all(70 <= x <= 624 and 24 <= y <= 244 for x, y in points(chart["best"] + " " + chart["current"]))
    assert 2 <= len(chart["ticks_y"]) <= 9
    assert len({tick["text"] for tick in chart["ticks_y"]}) == len(chart["ticks_y"])
    assert all(24 <= tick["at"] <= 244 for tick in chart["ticks_y"])


def test_the_chart_of_the_first_token_has_the_confidence_on_its_scale() -> None:
    rows = [
        row(i, 0.1 * i).model_copy(update={"first_token_probability": p}) for i, p in enumerate((0.25, None, 0.5, 1.0))
    ]
    chart = reward_chart(rows, confidence=0.75, threshold=0.5)
    assert chart is not None
    sure = chart["sure"]
    line, ticks = points(sure["line"]), {tick["text"]: tick["at"] for tick in sure["ticks"]}
    assert [x for x, _ in line] == [x for i, (x, _) in enumerate(points(chart["best"])) if i != 1]
    assert line[1][1] == ticks["0.5"] == sure["threshold"] and line[2][1] == ticks["1"]
    assert sure["final"]["x"] == line[-1][0]
    assert sure["final"]["y"] == pytest.approx((ticks["0.5"] + ticks["1"]) / 2, abs=0.1)
    assert sure["summary"] == (
        "The most probable first token goes from 0.25 to 1.00; the confidence of the answer is 0.75."
    )
    unscored = reward_chart(rows)
    assert unscored is not None and unscored["sure"]["final"] is None and unscored["sure"]["threshold"] is None


def test_results_without_the_first_token_have_no_chart_of_it() -> None:
    chart = reward_chart([row(0, 0.1), row(1, 0.3)], confidence=0.75)
    assert chart is not None and chart["sure"] is None
    old = [each.model_copy(update={"first_token_probability": None}) for each in a_result().trace]
    assert "How sure" not in report_html(a_result(trace=old), scene(), question=QUESTION)
    assert "How sure" in report_html(a_result(), scene(), question=QUESTION)


def test_no_finite_reward_no_chart() -> None:
    assert reward_chart([]) is None
    assert reward_chart([row(0, float("nan"))]) is None


def test_long_searches_are_thinned() -> None:
    chart = reward_chart([row(i, i / 10_000, [i]) for i in range(10_001)])
    assert chart is not None
    line = points(chart["best"])
    assert len(line) == CHART_POINTS and (line[0][0], line[-1][0]) == (92, 624)
    assert len(chart["marks"]) == 60


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\N{EN DASH}"),
        (0, "0"),
        (12345, "12,345"),
        (0.93, "0.93"),
        (0.123456, "0.123"),
        (-1.5, "\N{MINUS SIGN}1.5"),
        (123456.0, "123456"),
        (float("nan"), "not finite"),
    ],
)
def test_numbers_are_for_people(value: float | None, text: str) -> None:
    assert number_text(value) == text


# --- files and notebooks ----------------------------------------------------------------------------------------------


def test_the_file_holds_the_page_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    path.write_text("old")
    assert write_report(path, a_result(), scene(), question=QUESTION) == path
    assert path.read_text(encoding="utf-8") == report_html(a_result(), scene(), question=QUESTION)
    assert write_report(str(path), unscored(), scene(), question=QUESTION) == path
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.html"]


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "out.html", tmp_path / "folder"):
        with pytest.raises(InputError, match="cannot be written") as caught:
            write_report(path, a_result(), scene(), question=QUESTION)
        assert str(path) in caught.value.message and "folder" in caught.value.hint
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_page_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.html"
    path.write_text("old")

    def broken(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(InputError, match="No space left"):
        write_report(path, a_result(), scene(), question=QUESTION)
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["out.html"]


def test_the_summary_for_notebooks_is_short_and_escaped() -> None:
    page = Page(summary_html(a_result()))
    assert page.text("b") == "blue" and "0.93, accepted" in page.all_text and "The image is small." in page.all_text
    hostile = Page(summary_html(hostile_result()))
    assert {tag for tag, _ in hostile.elements} == {"table", "tr", "th", "td", "b", "small"}
    assert "not scored" in summary_html(unscored())


def test_the_embedded_model_says_once_what_it_is() -> None:
    note = "a small model of synthetic scenes; name a real one with --model"
    for result, early in ((a_result(), False), (a_result(accepted=False, abstained=True), True)):
        html = report_html(result, scene(), question=QUESTION)
        assert html.count(note) == 1
        assert (html.index(note) < html.index("</header>")) is early
    assert "synthetic" not in report_html(a_result(model="someone/something"), scene(), question=QUESTION)


@pytest.mark.parametrize("large", [1e308, -1e308, 1e101, float("inf"), float("nan"), 5e-324])
def test_rewards_that_no_chart_can_show(large: float) -> None:
    rows = a_result().trace
    for changed in ({"reward": large}, {"best_reward": large}, {"reward": -large, "best_reward": large}):
        for trace in ([row.model_copy(update=changed) for row in rows], [rows[0], rows[1].model_copy(update=changed)]):
            page = report_html(a_result(trace=trace), scene(), question=QUESTION)
            assert "inf," not in page and "nan," not in page


def test_images_are_what_a_question_takes(tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    scene().save(path)
    expected = report_html(a_result(), scene(), question=QUESTION)
    for reference in (path, str(path), path.read_bytes(), [path], (str(path),)):
        assert report_html(a_result(), reference, question=QUESTION) == expected


def test_a_notebook_shows_the_summary() -> None:
    assert a_result()._repr_html_() == summary_html(a_result())
    code = (
        "import sys; from latent_tool import ReasoningResult;"
        "r = ReasoningResult(answer='<i>a</i>', raw_text='', confidence=None, confidence_source='unscored');"
        "print('latent_tool.views.report' in sys.modules); print(r._repr_html_())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False\n<table>") and "&lt;i&gt;a" in done.stdout


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return write_report(tmp_path / "report.html", a_result(), scene(), question=QUESTION, names=["disc.png"])


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_picture_and_answer_in_both_schemes(browser: Browser, page: Path, scheme: str) -> None:
    browser.open(page, scheme=scheme)
    assert browser.driver.title == QUESTION
    assert browser.run("return document.querySelector('.answer').innerText") == "blue"
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) > 0.5) is (scheme == "light")
    for selector in ("body", ".quiet", ".kicker", ".good", "summary", "thead th", "pre", ".detail", ".chart text"):
        script = "const s = getComputedStyle(document.querySelector(arguments[0])); return [s.color, s.fill]"
        colour, fill = browser.run(script, selector)
        assert contrast(fill if "chart" in selector else colour, ground) >= 4.5, selector
    shot = np.asarray(browser.screenshot()).astype(int)

    def inside(selector: str) -> np.ndarray[Any, Any]:
        left, top, right, bottom = (round(edge) for edge in browser.box(selector))
        return shot[top + 3 : bottom - 3, left + 3 : right - 3]

    disc = inside("[data-patch='1'] .hit")
    assert (np.abs(disc[-10:, -10:] - BLUE) <= 2).all()  # the most attended patch is as it was
    assert (np.abs(disc[:3, :3] - PAPER) <= 2).all()
    corner = inside("[data-patch='5'] .hit")
    assert np.abs(corner[5, 5] - RED).max() < 70
    picture = inside(".picture image")
    assert (np.abs(picture[5, 5] - (np.array(PAPER) + 128) / 2) <= 2).all()  # veiled


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_coloured_tokens_stay_legible(browser: Browser, page: Path, scheme: str) -> None:
    browser.open(page, scheme=scheme)
    script = """
    const of = element => getComputedStyle(element);
    return [of(document.body).backgroundColor, of(document.body).color,
            ...[...document.querySelectorAll(".tokens span")].map(span => of(span).backgroundColor)];
    """
    ground, ink, *colours = browser.run(script)
    base = np.array([int(part) for part in re.findall(r"\d+", ground)])
    assert len(set(colours)) >= 5
    for colour in colours:
        red, green, blue, alpha = (float(part) for part in re.findall(r"[\d.]+", colour))
        mixed = base + alpha * (np.array([red, green, blue]) - base)
        assert contrast("rgb({:.0f}, {:.0f}, {:.0f})".format(*mixed), ink) >= 4.5, colour


@pytest.mark.browser
def test_neighbours_have_no_border_between_them_at_any_width(browser: Browser, page: Path) -> None:
    for width in (1111, 420):
        browser.open(page, width=width)
        shot = np.asarray(browser.screenshot()).astype(int)
        left, top, _, _ = browser.box("[data-patch='1'] .hit")
        _, _, right, bottom = browser.box("[data-patch='4'] .hit")
        seam = shot[round(top) + 20 : round(bottom) - 20, round((left + right) / 2) - 4 : round((left + right) / 2) + 4]
        assert seam[..., 2].min() > 150 and seam[..., 0].max() < 80, width  # all of it is the blue of the disc


@pytest.mark.browser
def test_pointing_at_a_patch_tells_about_it(browser: Browser, page: Path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    browser.open(page)
    marks = browser.driver.find_elements(By.CSS_SELECTOR, "a.mark")
    assert len(marks) == 5
    browser.run("arguments[0].scrollIntoView({block: 'center'})", marks[1])
    ActionChains(browser.driver).move_to_element(marks[1]).perform()
    detail = browser.driver.find_element(By.ID, "detail")
    assert detail.text.startswith("Patch 2: attention 0.047")
    stroke = "return getComputedStyle(arguments[0].querySelector('.hit')).stroke"
    assert browser.run(stroke, marks[1]) == "rgb(0, 0, 0)"
    assert browser.run("return document.querySelector('tr.on').id") == "patch-2"
    row = browser.driver.find_element(By.ID, "patch-5")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", row)
    ActionChains(browser.driver).move_to_element(row).perform()
    assert detail.text.startswith("Patch 5:")
    assert browser.run(stroke, marks[4]) == "rgb(0, 0, 0)"
    assert browser.run(stroke, marks[1]) == "none"


@pytest.mark.browser
def test_the_keyboard_reaches_every_patch(browser: Browser, page: Path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    seen = []
    for _ in range(6):
        ActionChains(browser.driver).send_keys(Keys.TAB).perform()
        seen.append(browser.run("return document.activeElement.dataset.patch || document.activeElement.id"))
    assert seen == ["marks", "1", "2", "3", "4", "5"]
    assert browser.run("return document.getElementById('detail').innerText").startswith("Patch 5:")
    stroke = "return getComputedStyle(document.activeElement.querySelector('.hit')).stroke"
    assert browser.run(stroke) == "rgb(0, 0, 0)"
    ActionChains(browser.driver).send_keys(Keys.ENTER).perform()
    assert browser.run("return document.querySelector(':target').id") == "patch-5"


@pytest.mark.browser
def test_the_marks_can_be_taken_off(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.getElementById('marks').click()")
    assert browser.run("return [...document.querySelectorAll('.mark')].every(m => !m.getClientRects().length)")
    shot = np.asarray(browser.screenshot()).astype(int)
    left, top, right, bottom = (round(edge) for edge in browser.box(".picture image"))
    assert (np.abs(shot[top + 5 : top + 20, left + 5 : right - 5] - PAPER) <= 2).all()
    assert (np.abs(shot[bottom - 12 : bottom - 4, left + 5 : right - 5] - PAPER) <= 90).any()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_heat_map_is_laid_over_the_picture_with_the_keyboard(browser: Browser, tmp_path: Path, scheme: str) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    path = write_report(tmp_path / "report.html", attended_result(), scene(), question=QUESTION)
    browser.open(path, scheme=scheme)
    visible = "return [...document.querySelectorAll('.heat')].map(e => e.getClientRects().length > 0)"
    assert set(browser.run(visible)) == {False}
    before = np.asarray(browser.screenshot()).astype(int)
    ActionChains(browser.driver).send_keys(Keys.TAB, Keys.TAB, Keys.SPACE).perform()
    assert browser.run("return document.activeElement.id") == "heats"
    assert set(browser.run(visible)) == {True}
    shot = np.asarray(browser.screenshot()).astype(int)
    left, top, right, _ = browser.box(".picture image")
    cell = (right - left) / 5

    def middle(column: int, row: int) -> tuple[slice, slice]:
        x, y = round(left + (column + 0.5) * cell), round(top + (row + 0.5) * cell)
        return slice(y - 3, y + 3), slice(x - 3, x + 3)

    for at, colour, share in (((4, 4), RED, 1.0), ((0, 4), PAPER, 0.5), ((0, 0), PAPER, 0.0)):
        heat = np.array(HEAT_STOPS[round(share * 4)])
        opacity = HEAT_OPACITY[0] + share * (HEAT_OPACITY[1] - HEAT_OPACITY[0])
        expected = np.array(colour) + opacity * (heat - np.array(colour))
        assert np.abs(shot[middle(*at)] - expected).max() <= 3, at
        assert np.abs(before[middle(*at)] - expected).max() > 3, at
    browser.command("Emulation.setEmulatedMedia", media="print")
    assert set(browser.run(visible)) == {True}
    assert browser.run("return getComputedStyle(document.getElementById('heats')).display") == "none"


@pytest.mark.browser
def test_hostile_text_does_nothing_in_the_browser(browser: Browser, tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", hostile_result(), scene(), question=HOSTILE, names=[HOSTILE])
    browser.open(path)
    assert browser.run("return window.hacked === undefined && document.scripts.length === 1")
    assert browser.run("return document.images.length") == 0
    assert "<script>window.hacked" in browser.run("return document.querySelector('h1').innerText")
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.browser
def test_the_policy_forbids_scripts_styles_and_requests(browser: Browser, page: Path) -> None:
    browser.open(page)
    script = """
    const done = arguments[0], blocked = [];
    document.addEventListener("securitypolicyviolation", event => blocked.push(event.effectiveDirective));
    const script = document.createElement("script");
    script.textContent = "window.hacked = 1";
    document.body.append(script);
    const image = new Image();
    image.src = "https://example.invalid/pixel.png";
    document.body.setAttribute("style", "color: red");
    fetch("https://example.invalid/").catch(() => setTimeout(() => done([window.hacked || 0, blocked.sort()]), 100));
    """
    hacked, blocked = browser.driver.execute_async_script(script)
    assert hacked == 0
    assert blocked == ["connect-src", "img-src", "script-src-elem", "style-src-attr"]


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 420, 800, 1280, 1920])
def test_nothing_is_wider_than_the_window(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.run("return document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_pictures_links_and_tables_have_names(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.command("Accessibility.enable")
    nodes = browser.command("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored", False)
    ]
    for role, name in named:
        if role in ("link", "image", "img", "checkbox", "region", "heading"):
            assert name, role
    names = "\n".join(name for _, name in named)
    for part in (
        "disc.png, the image that was asked about, 60 by 60 pixels",
        "Patch 1: attention 0.052",
        "Confidence 0.93 of 1, threshold 0.8",
        "Reward per round. The best reward goes from",
    ):
        assert part in names, part


@pytest.mark.browser
def test_print_is_black_on_white_and_complete(browser: Browser, page: Path) -> None:
    browser.open(page, scheme="dark", media="print")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("return [...document.querySelectorAll('details')].every(part => part.open)")
    assert browser.run("return getComputedStyle(document.querySelector('.scroll.tall')).maxHeight") == "none"
    assert base64.b64decode(browser.command("Page.printToPDF", printBackground=False)["data"]).startswith(b"%PDF")
