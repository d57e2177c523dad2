"""The study: its statistics on data made to have, or not to have, what it looks for; its files; the whole way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scripted_agents import small_reasoner

from latent_tool.errors import SettingsError
from latent_tool.evaluation.datasets import load_dataset
from latent_tool.evaluation.matching import Match
from latent_tool.evaluation.plots import COLOURS, INK, QUIET
from latent_tool.evaluation.study import (
    FAILS,
    HOLDS,
    UNKNOWN,
    Drawn,
    Question,
    analyse,
    attention_lift,
    markdown_study,
    study,
    verdict,
    word_f1,
    write_study,
)
from latent_tool.evaluation.study.observations import lacking
from latent_tool.evaluation.study.report import study_page
from latent_tool.statistics import Estimate, bootstrap

pytestmark = pytest.mark.disable_socket


def questions(count: int, sign: float, seed: int = 0) -> list[Question]:
    """Questions in which every observation is there (1), its opposite is (-1), or there is nothing (0)."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        right = rng.random() < 0.6
        tilt = sign if right else -sign
        sequences = []
        for _ in range(4):
            good = rng.random() < 0.5
            lean = sign if good else -sign
            sure = min(max(0.5 + 0.2 * lean + rng.gauss(0, 0.1), 0.01), 0.99)
            # One token in five depends on the image where the observation is there, four in five where its opposite is.
            share = 0.5 - 0.3 * sign
            values = tuple((3.0 if rng.random() < share else 0.0) + 0.3 * lean + rng.gauss(0, 0.05) for _ in range(10))
            sequences.append(
                Drawn(
                    correct=good,
                    confidence=sure,
                    reasoning="red circle",
                    quality=0.5 + 0.2 * sign * lean + rng.gauss(0, 0.1),
                    reasoning_dependency=values,
                    answer_dependency=values[:3],
                )
            )
        sure = min(max(0.5 + 0.2 * tilt + rng.gauss(0, 0.1), 0.01), 0.99)
        found.append(
            Question(
                id=str(number),
                correct=right,
                confidence=sure,
                rewards=tuple(0.5 + 0.1 * tilt * (1 + step) + rng.gauss(0, 0.2) for step in range(4)),
                grounding=sign * (sure - 0.5) + rng.gauss(0, 0.05),
                sequences=tuple(sequences),
            )
        )
    return found


@cache
def findings_of(count: int, draws: int) -> tuple[dict[str, Any], ...]:
    """What is found where every observation is there; reports of it only read it."""
    return tuple(analyse(questions(count, 1.0), draws=draws))


def shape_of(findings: Iterable[dict[str, Any]], name: str, noise: float = 3.0) -> dict[str, Any]:
    return {
        "schema_version": "1",
        "latent_tool": "0",
        "dataset": {"name": name, "fingerprint": "0", "size": 60},
        "model": "none",
        "samples": 4,
        "temperature": 1.0,
        "answered": 60,
        "right": 36,
        "problems": ["x: no label"],
        "findings": list(findings),
    }


@pytest.mark.slow
def test_what_is_there_holds_and_its_opposite_does_not() -> None:
    for sign, expected in ((1.0, HOLDS), (-1.0, FAILS)):
        verdicts = {each["key"]: each["verdict"] for each in analyse(questions(120, sign), draws=500)}
        assert len(verdicts) == 8  # 2 / 501 is below an eighth of 5 %
        assert verdicts == dict.fromkeys(verdicts, expected)


@pytest.mark.slow
def test_where_there_is_nothing_one_cannot_tell() -> None:
    """At 95 % a few intervals of many miss the null by chance, so that many data sets are looked at together."""
    names = ("dependency-and-accuracy", "confidence-and-accuracy", "confidence-and-reasoning", "rounds-widen-the-gap")
    verdicts = [
        each["verdict"]
        for seed in range(5)
        for each in analyse(questions(60, 0.0, seed), draws=200)
        if each["key"] in names
    ]
    assert verdicts.count(UNKNOWN) >= 15


def test_verdicts_are_adjusted_for_the_number_of_statements() -> None:
    """With 200 draws no p value is below 2 / 201, which is not enough for eight statements at once."""
    found = analyse(questions(120, 1.0), draws=200)
    assert {each["verdict"] for each in found} == {UNKNOWN}
    assert min(each["p"] for each in found) == pytest.approx(8 * 2 / 201)


def test_too_few_questions_and_missing_truths_are_no_evidence() -> None:
    assert {each["verdict"] for each in analyse(questions(29, 1.0), draws=200)} == {UNKNOWN}
    # With fewer than 20 wrong answers nothing is said of right and wrong ones.
    wrong = 0
    mostly = []
    for each in questions(120, 1.0):
        wrong += not each.correct
        mostly.append(each.model_copy(update={"correct": each.correct or wrong > 19}))
    verdicts = {each["key"]: each["verdict"] for each in analyse(mostly, draws=500)}
    for key in ("confidence-and-accuracy", "rounds-right-above-wrong", "rounds-widen-the-gap"):
        assert verdicts[key] == UNKNOWN
    assert verdicts["few-reasoning-tokens"] == HOLDS
    blind = [
        each.model_copy(
            update={
                "grounding": None,
                "rewards": (),
                "sequences": tuple(one.model_copy(update={"quality": None}) for one in each.sequences),
            }
        )
        for each in questions(60, 1.0)
    ]
    verdicts = {each["key"]: each["verdict"] for each in analyse(blind, draws=200)}
    for key in ("confidence-and-reasoning", "confidence-and-attention", "rounds-right-above-wrong"):
        assert verdicts[key] == UNKNOWN
    with pytest.raises(SettingsError):
        analyse([])


def test_intervals_cover_the_truth() -> None:
    rng = random.Random(1)
    inside = 0
    for repeat in range(30):
        found = bootstrap([rng.gauss(2, 1) for _ in range(40)], lambda group: sum(group) / len(group), repeat)
        assert found is not None
        inside += found[1] <= 2 <= found[2]
    assert inside >= 24
    even = bootstrap([1.0, -1.0] * 20, lambda group: sum(group) / len(group))
    assert even is not None and even.p > 0.5
    sure = bootstrap([1.0, 2.0] * 20, lambda group: sum(group) / len(group), draws=500)
    assert sure is not None and sure.p == pytest.approx(2 / 501)
    assert bootstrap([1.0] * 29, lambda group: 1.0) is None  # too few
    assert bootstrap([1.0] * 40, lambda group: None) is None
    found = Estimate(0.2, 0.1, 0.3, 0.01)
    assert [verdict(found, p, null) for p, null in ((0.01, 0.0), (0.05, 0.0), (0.01, 0.4))] == [HOLDS, UNKNOWN, FAILS]
    assert [verdict(found, 0.01, null, above=False) for null in (0.0, 0.4)] == [FAILS, HOLDS]
    assert verdict(None, 0.01, 0.0) == UNKNOWN


def test_words_and_attention_by_hand() -> None:
    assert word_f1("Red  circle 3", "red circle 4") == pytest.approx(2 / 3)
    assert word_f1("", "red") == 0 and word_f1("red red", "red") == pytest.approx(2 / 3)
    cells = [(0.0, 0.0, 10.0, 10.0), (10.0, 0.0, 20.0, 10.0)]
    # The box covers half of the second cell, a quarter of the picture; that cell has 0.9 of the attention.
    assert attention_lift([0.1, 0.9], cells, [(15.0, 0.0, 20.0, 10.0)]) == pytest.approx(0.45 - 0.25)
    assert attention_lift([0.5, 0.5], cells, [(0.0, 0.0, 20.0, 10.0)]) == pytest.approx(0)
    assert attention_lift([0.1, 0.9], [None, cells[1]], [(0.0, 0.0, 5.0, 5.0)]) is None
    assert attention_lift([0.1, 0.9], cells, []) is None and attention_lift([], cells, [cells[0]]) is None


class Page(HTMLParser):
    """What a page says, and what it would fetch from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.links = "", []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.links += [given[name] for name in ("src", "href") if name in given and not given[name].startswith("#")]

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.mark.slow
def test_both_reports_say_the_same(tmp_path: Path) -> None:
    found = shape_of(findings_of(60, 200), "<b>mine</b> | yours")
    write_study(tmp_path, found)
    page, text = Page((tmp_path / "study.html").read_text()), (tmp_path / "study.md").read_text()
    assert not page.links and "<b>mine</b>" in page.words
    for each in found["findings"]:
        for report in (text, page.words):
            assert each["claim"] in report and each["verdict"] in report
            assert f"{each['interval']['value']:.3f} [{each['interval']['low']:.3f}" in report
    assert (tmp_path / "study.html").read_text().count("<svg") == 7
    assert json.loads((tmp_path / "study.json").read_text()) == found
    assert markdown_study(found) == text


@pytest.mark.slow
def test_the_whole_way_on_the_embedded_model(tmp_path: Path) -> None:
    items = load_dataset("scenes:held_out:3900000-3900002")
    told: list[tuple[int, int]] = []
    reasoner = small_reasoner(iterations=2)
    found = study(reasoner, items, tmp_path / "out", samples=3, batch=2, progress=lambda *at: told.append(at))
    assert (found["answered"], found["problems"], told) == (3, [], [(2, 3), (3, 3)])
    assert {each["verdict"] for each in found["findings"]} == {UNKNOWN}  # three questions are no evidence
    tokens = next(each for each in found["findings"] if each["key"] == "few-reasoning-tokens")
    assert sum(tokens["plot"]["y"]) > 0
    rounds = next(each for each in found["findings"] if each["key"] == "rounds-right-above-wrong")
    assert [row[0] for row in rounds["rows"]] == ["0", "1", "2"]


def fails(answer: str, label: str) -> bool:
    """A rule that raises for one label."""
    if label == "never":
        raise RuntimeError("no such thing")
    return answer == label


def test_errors_belong_to_their_items_and_answers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = load_dataset("scenes:held_out:3900000-3900002")
    items[1] = replace(items[1], label="never", match=Match.parse("test_study:fails"))
    items[2] = replace(items[2], loader=lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    reasoner, out = small_reasoner(iterations=1), tmp_path / "out"
    found = study(reasoner, items, out, samples=2, batch=2, system="Be brief.")
    assert (found["answered"], found["system"]) == (1, "Be brief.")
    assert [problem.split(": ", 1)[1] for problem in found["problems"]] == [
        "RuntimeError: no such thing",
        "ZeroDivisionError: division by zero",
    ]
    # As after a kill: one answer, and a torn line.
    lines = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    (out / "answers.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])
    told: list[tuple[int, int]] = []
    again = study(reasoner, items, out, samples=2, batch=2, system="Be brief.", progress=lambda *at: told.append(at))
    assert told == [(3, 3)] and again["findings"] == found["findings"] and again["problems"] == found["problems"]
    monkeypatch.setattr(type(reasoner.engine()), "answer_many", lambda *arguments: 1 / 0)
    assert study(reasoner, items, out, samples=2, batch=2, system="Be brief.")["findings"] == found["findings"]
    with pytest.raises(SettingsError, match="another study"):
        study(reasoner, items, out, samples=3, batch=2, system="Be brief.")


def test_the_dependency_of_drawn_tokens_is_that_of_the_engine() -> None:
    """A greedy draw without thinking is the plain answer, whose dependency the engine measures itself."""
    from latent_tool.engine.job import Job
    from latent_tool.settings import NoiseSettings, SamplingSettings, SearchSettings

    (item,) = load_dataset("scenes:held_out:3900001-3900001")
    engine = small_reasoner().engine()
    noise = NoiseSettings(draws=2)
    job = Job(item.load(), item.question, settings=SearchSettings(latents=0), grounding=noise)
    plain = engine.answer(job)
    drawn = engine.sample_many([job], SamplingSettings(samples=1, temperature=1e-4, think=False))
    (found,) = engine.dependency_many([each for each in drawn if not isinstance(each, Exception)], noise, think=False)
    assert not isinstance(found, Exception) and found[0] is not None and plain.grounding is not None
    assert [t.token for t in found[0].tokens] == [t.token for t in plain.grounding.tokens]
    for one, other in zip(found[0].tokens, plain.grounding.tokens, strict=True):
        assert one.dependency == pytest.approx(other.dependency, abs=1e-3)
    small = small_reasoner()
    searched = engine.answer(Job(item.load(), item.question, settings=small.settings, budget=small.budget))
    weights, nothing = engine.attention_many([searched, plain])
    assert not isinstance(weights, Exception) and len(weights) == len(searched.inputs.cells)
    assert min(weights) >= 0 and 0 < sum(weights) <= 1.001 and nothing == []


@pytest.mark.slow
def test_a_killed_study_leaves_nothing_that_reads_as_whole(tmp_path: Path) -> None:
    """A process that writes the same reports again and again is killed: what is there is whole."""
    findings = tmp_path / "findings.json"
    findings.write_text(json.dumps(shape_of(findings_of(60, 200), "mine")))
    out = tmp_path / "out"
    out.mkdir()
    code = (
        "import json, sys; from pathlib import Path\n"
        "from latent_tool.evaluation.study import report as study\n"
        f"found = json.loads(Path({str(findings)!r}).read_text())\n"
        "found['problems'] = ['long: ' + 'x' * 4_000_000]\n"  # writing takes time
        "study.study_page = lambda found: '<html>' + found['problems'][0] + '</html>'\n"
        f"study.write_study(Path({str(out)!r}), found); print('once', flush=True)\n"
        f"while True: study.write_study(Path({str(out)!r}), found)\n"
    )
    for wait in (0.0, 0.03, 0.1):
        for path in out.iterdir():
            path.unlink()
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"once\n"
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        whole = json.loads((out / "study.json").read_text())
        assert len(whole["problems"][0]) == 4_000_006
        assert (out / "study.html").read_text().endswith("</html>")
        assert (out / "study.md").read_text().endswith("\n")
        named = {path.name for path in out.iterdir() if not path.name.startswith(".")}
        assert named == {"study.json", "study.html", "study.md"}


@pytest.mark.slow
def test_few_questions_say_how_many_it_would_take() -> None:
    found = shape_of(analyse(questions(12, 1.0), draws=50), "few")
    by_key = {each["key"]: each for each in found["findings"]}
    assert {each["verdict"] for each in found["findings"]} == {UNKNOWN}
    assert "about 30 questions like these; there are 12" in by_key["few-reasoning-tokens"]["lacking"]
    page, text = study_page(found), markdown_study(found)
    assert page.count("It would take about") == text.count("It would take about") == 8
    assert page.count("<table") == text.count("\n|---") == 1 and "<svg" not in page  # only the summary
    enough = shape_of(findings_of(120, 50), "many")
    assert {each["lacking"] for each in enough["findings"]} == {None} and study_page(enough).count("<svg") == 7


@pytest.mark.parametrize(
    ("of", "groups", "flags", "said"),
    [
        (10, 0, None, "None of the 10 questions has what this needs"),
        (100, 10, None, "about 300 questions"),
        (40, 40, [True] * 40, "No answer is wrong, so there is nothing to compare: ask harder"),
        (40, 40, [False] * 40, "No answer is right, so there is nothing to compare: ask easier"),
        (200, 200, [True] * 196 + [False] * 4, "4 answers are wrong, of at least 20. It would take about 1000"),
        (200, 200, [True] * 100 + [False] * 100, "hardly differ"),
    ],
)
def test_what_is_lacking(of: int, groups: int, flags: list[bool] | None, said: str) -> None:
    assert said in lacking(of, groups, flags)


@pytest.mark.slow
def test_plots_take_the_colours_of_the_page() -> None:
    page = study_page(shape_of(findings_of(120, 50), "many"))
    assert "prefers-color-scheme: dark" in page and "var(--line-1)" in page and "var(--ink)" in page
    assert not [stand_in for stand_in in (INK, QUIET, *COLOURS) if stand_in in page]
