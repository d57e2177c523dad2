"""The playground on a real socket and in a real browser, with the embedded model and with one that follows a script."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from browser import Browser, contrast, luminance
from http_server import serving
from PIL import Image
from results import BLUE, HOSTILE, PAPER, QUESTION, a_result, attended_result, hostile_result, scene
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from latent_tool import Budget, LatentReasoner, ReasoningResult
from latent_tool.errors import InputError, MissingExtraError
from latent_tool.integrations.playground import create_playground
from latent_tool.schema import InjectedCell, ReasoningRequest, ReasoningStep
from latent_tool.testing import Feed, ScriptedReasoner
from latent_tool.views.heat import HEAT_OPACITY, HEAT_STOPS

SHAPES = Path(__file__).parents[2] / "examples" / "images" / "shapes.png"


class Script(Feed):
    """What the reasoner says, when the test says it; knows what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.reasoner = ScriptedReasoner(self, model="embedded")

    @property
    def asked(self) -> list[ReasoningRequest]:
        return self.reasoner.asked

    def clear(self) -> None:
        super().clear()
        self.reasoner.script.asked.clear()


def searching(number: int, cells: list[int] | None = None) -> ReasoningStep:
    """A round of the result of the tests of the report."""
    patches = {patch.cell: patch for patch in a_result().patches}
    row = a_result().trace[number]
    found = [patches[cell] for cell in (row.accepted if cells is None else cells)]
    injected = [InjectedCell(image=0, cell=patch.cell, box=patch.box) for patch in found]
    return ReasoningStep(phase="search", trace=row, injected=injected, iterations=10)


def until(condition: Callable[[], Any], what: str = "it", seconds: float = 30.0) -> Any:
    """Wait for what the page does; gives what ``condition`` gives."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.02)
    return found


class Page:
    """The playground as its visitor sees it."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.browser = browser
        self.url = url
        browser.visit(url, **options)
        until(lambda: browser.run("return document.body.dataset.ready"), "the page")

    def __getitem__(self, name: str) -> Any:
        return self.browser.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return str(self.browser.run("return document.getElementById(arguments[0]).textContent", name))

    def shown(self, name: str) -> bool:
        return bool(self[name].is_displayed())

    def bar(self) -> float:
        """How much of the gauge is filled, in [0, 1]."""
        return float(self["level-bar"].get_attribute("width")) / 298

    def count(self, selector: str) -> int:
        return int(self.browser.run("return document.querySelectorAll(arguments[0]).length", selector))

    def choose(self, path: Path) -> None:
        before = self.text("about")
        self["file"].send_keys(str(path))
        until(lambda: self.text("about") != before, "the picture")

    def ask(self, question: str = QUESTION) -> None:
        self["question"].clear()
        self["question"].send_keys(question)
        self["ask"].click()

    def answered(self) -> None:
        until(lambda: self.shown("why") or self.shown("problem"), "the answer")
        assert not self.shown("problem"), self.text("problem")

    def problem(self) -> str:
        until(lambda: self.shown("problem"), "a problem")
        return self.text("problem")

    def check(self) -> None:
        """Nothing to complain about, and nothing asked of anyone else."""
        assert self.browser.driver.get_log("browser") == []
        for url in self.browser.requests():
            assert url.startswith((self.url, "data:image/", "data:,", f"blob:{self.url}")), url


@pytest.fixture(scope="module")
def script_url() -> Iterator[tuple[Script, str]]:
    script = Script()
    # The desk copies the reasoner to give it its image policy; the copy shares the script.
    with serving(create_playground(script.reasoner)) as url:
        yield script, url + "/"


@pytest.fixture
def script(script_url: tuple[Script, str]) -> Script:
    script, _ = script_url
    script.clear()
    return script


@pytest.fixture
def url(script_url: tuple[Script, str]) -> str:
    return script_url[1]


@pytest.fixture
def picture_file(tmp_path: Path) -> Path:
    scene().save(tmp_path / "disc.png")
    return tmp_path / "disc.png"


@pytest.fixture
def done(browser: Browser, script: Script, url: str, picture_file: Path) -> Page:
    """The page with a picture, a question and its answer."""
    page = Page(browser, url)
    page.choose(picture_file)
    script.say(*(searching(number) for number in range(11)), ReasoningStep(phase="decode"), a_result())
    page.ask()
    page.answered()
    return page


# --- the embedded model -----------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_the_page_asks_the_model_and_writes_the_python_that_does_the_same(browser: Browser, tmp_path: Path) -> None:
    reasoner = LatentReasoner()
    (tmp_path / "shapes.png").write_bytes(SHAPES.read_bytes())
    with serving(create_playground(reasoner)) as url:
        page = Page(browser, url + "/")
        page.choose(tmp_path / "shapes.png")
        assert page.text("about") == "shapes.png, 288 \N{MULTIPLICATION SIGN} 240 pixels"
        question = "What is right of the red circle?"
        page["iterations"].clear()
        page["iterations"].send_keys("2")
        page["seed"].clear()
        page["seed"].send_keys("5")
        page["always"].click()
        page.ask(question)
        page.answered()
        budget = Budget().but(iterations=2, target_confidence=None)
        result = reasoner.invoke({"image": SHAPES, "question": question, "budget": budget, "seed": 5})
        assert page.text("answer") == result.answer
        boxes = browser.run("return [...document.querySelectorAll('#patches td:last-child')].map(e => e.textContent)")
        assert [tuple(float(edge) for edge in box.split(", ")) for box in boxes] == [
            patch.box for patch in result.patches
        ]
        assert page.count("#picture .patch") == len(result.patches)
        assert page.browser.run("return document.querySelector('#chart .best').points.numberOfItems") == 3
        page.check()
        code = page.text("python")
    namespace: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        exec(code, namespace)
    assert namespace["result"].answer == result.answer
    assert namespace["result"].confidence == pytest.approx(result.confidence, abs=1e-4)
    assert namespace["result"].patches == result.patches
    assert 'Budget.level("standard").but(iterations=2, target_confidence=None)' in code and "seed=5," in code


@pytest.mark.browser
def test_pictures_can_be_drawn_and_asked_about_with_the_keyboard_alone(browser: Browser) -> None:
    from selenium.webdriver import ActionChains

    with serving(create_playground(LatentReasoner(budget="quick"))) as url:
        page = Page(browser, url + "/")

        def press(*keys: str) -> None:
            ActionChains(browser.driver).send_keys(*keys).perform()

        def focused() -> str:
            script = "const e = document.activeElement; return e.id || e.dataset.kind || e.textContent"
            return str(browser.run(script))

        order = []
        for _ in range(30):
            press(Keys.TAB)
            order.append(focused())
            if order[-1] == "copy":
                break
        assert order[:6] == ["file", "shapes", "bars", "text", "question", "ask"]
        for name in ("level", "iterations", "max_patches", "always", "deadline_s", "seed", "threshold", "copy"):
            assert name in order, name
        browser.run("document.querySelector('[data-kind=bars]').focus()")
        press(Keys.ENTER)
        until(lambda: page.text("about").startswith("drawn-bars-"), "the drawing")
        assert page.shown("suggestions")
        assert page["question"].get_attribute("value") != ""
        browser.run("document.getElementById('question').focus()")
        press(Keys.ENTER)
        page.answered()
        assert "The picture was drawn with this answer in mind: " in page.text("known")
        assert re.search(r'"image": generate\(\d+, kind="bars"\)\.image,', page.text("python"))
        page.check()
        namespace: dict[str, Any] = {}
        exec(page.text("python"), namespace)
        assert namespace["result"].answer == page.text("answer")


# --- what happens while it runs ---------------------------------------------------------------------------------------


@pytest.mark.browser
def test_steps_arrive_one_by_one(browser: Browser, script: Script, url: str, picture_file: Path) -> None:
    page = Page(browser, url)
    page.choose(picture_file)
    page.ask()
    assert page["stop"].is_enabled() and not page["ask"].is_enabled()
    assert page.text("status") == "Looking at the picture …"
    script.say(ReasoningStep(phase="prefill"))
    seen = []
    for number in range(4):
        script.say(searching(number))
        until(lambda number=number: page.text("status").startswith(f"Round {number} of 10"), f"round {number}")
        first = f"{0.4 + 0.05 * number:.2f}"
        assert f"first token {first}" in page.text("status")
        assert page.text("verdict") == f"First token {first} so far, not yet a confidence"
        assert page.bar() == pytest.approx(float(first)) and page.count("#sure .final") == 0
        assert browser.run("return document.querySelector('#sure .best').points.numberOfItems") == number + 1
        points = browser.run("return document.querySelector('#chart .best').points.numberOfItems")
        seen.append((points, page.count("#picture .patch"), page.count("#chart circle")))
        assert not page.shown("answered")
    assert seen == [(1, 0, 0), (2, 0, 0), (3, 3, 1), (4, 4, 2)]
    script.say(ReasoningStep(phase="decode"))
    until(lambda: page.text("status") == "Answering …", "decoding")
    script.say(a_result())
    page.answered()
    assert page.text("answer") == "blue"
    assert page.text("verdict").startswith("Confidence 0.93") and page.bar() == pytest.approx(0.93)
    assert page.count("#picture .patch") == 5 and page.count("#patches tr") == 6  # one has no known place
    assert page["ask"].is_enabled() and not page["stop"].is_enabled()
    assert script.asked[0].question == QUESTION and script.asked[0].seed == 0
    page.check()


@pytest.mark.browser
@pytest.mark.parametrize("way", ["button", "key", "other picture", "page closed"])
def test_stopping_stops_the_search(browser: Browser, script: Script, url: str, picture_file: Path, way: str) -> None:
    page = Page(browser, url)
    page.choose(picture_file)
    page.ask()
    script.say(ReasoningStep(phase="prefill"), searching(0))
    until(lambda: page.text("status").startswith("Round 0"), "round 0")
    assert not script.cancelled.is_set()
    if way == "button":
        page["stop"].click()
    elif way == "key":
        page["question"].send_keys(Keys.ESCAPE)
    elif way == "other picture":
        scene().save(picture_file.with_name("other.png"))
        page.choose(picture_file.with_name("other.png"))
    else:
        browser.visit("about:blank")
    assert script.cancelled.wait(20)
    if way == "page closed":
        return
    if way != "other picture":
        assert page.text("status") == "Stopped."
    assert not page.shown("problem") and not page.shown("answered")
    script.say(a_result())
    page.ask()
    page.answered()
    page.check()


@pytest.mark.browser
def test_the_confidence_ends_on_the_scale_of_the_first_token(done: Page) -> None:
    """The diamond stands where the line would have to be to be as sure, and the threshold moves along."""
    script = """
    const line = [...document.querySelector("#sure .best").points].map(point => [point.x, point.y]);
    const path = name => document.querySelector("#sure " + name).getAttribute("d").match(/[\\d.]+/g).map(Number);
    return [line, path(".final"), path(".threshold"), document.getElementById("sure").getAttribute("aria-label")];
    """
    line, (x, top, *_), (_, threshold, *_), label = done.browser.run(script)
    assert len(line) == 11 and x == pytest.approx(line[-1][0], abs=0.1)
    (_, low), (_, high) = line[0], line[10]  # 0.40 and 0.90
    scale = (low - high) / 0.5
    assert top + 9 == pytest.approx(high - 0.03 * scale, abs=0.1)
    assert threshold == pytest.approx(low - 0.1 * scale, abs=0.1)
    assert label == "First token 0.40 in round 0, 0.90 in round 10; confidence of the answer 0.93"
    done["threshold"].send_keys(Keys.END)
    assert done.browser.run(script)[2][1] == pytest.approx(low - 0.6 * scale, abs=0.1)


@pytest.mark.browser
def test_searches_that_do_not_know_the_first_token_are_followed(
    browser: Browser, script: Script, url: str, picture_file: Path
) -> None:
    page = Page(browser, url)
    page.choose(picture_file)
    page.ask()
    step = searching(1)
    assert step.trace is not None
    row = step.trace.model_copy(update={"first_token_probability": None})
    script.say(step.model_copy(update={"trace": row}))
    until(lambda: page.text("status").startswith("Round 1"), "round 1")
    assert "first token" not in page.text("status") and page.text("verdict").strip() == "" and page.bar() == 0
    script.say(a_result(trace=[row]))
    page.answered()
    assert page.count("#sure .final") == 1
    page.check()


# --- the heat map -----------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_the_heat_map_lies_on_the_picture(browser: Browser, script: Script, url: str, picture_file: Path) -> None:
    page = Page(browser, url)
    page.choose(picture_file)
    assert not page.shown("heat-row")
    script.say(attended_result())
    page.ask()
    page.answered()
    assert "25 cells, mean over latents, heads and layers" in page.text("heat-about")
    assert page.count("#picture .heat") == 0 and page.count("#picture .veil") == 1
    page["heat"].send_keys(Keys.SPACE)
    assert page.count("#picture .heat") == 1 and page.count("#picture .veil") == 0
    time.sleep(0.3)  # the layer is decoded
    shot = np.asarray(browser.screenshot()).astype(int)
    left, top, right, _ = browser.box("#picture image")
    cell = (right - left) / 5
    for (column, row), colour, share in (((4, 4), (200, 30, 30), 1.0), ((0, 4), PAPER, 0.5), ((0, 0), PAPER, 0.0)):
        x, y = round(left + (column + 0.5) * cell), round(top + (row + 0.5) * cell)
        heat = np.array(HEAT_STOPS[round(share * 4)])
        opacity = HEAT_OPACITY[0] + share * (HEAT_OPACITY[1] - HEAT_OPACITY[0])
        expected = np.array(colour) + opacity * (heat - np.array(colour))
        assert np.abs(shot[y - 3 : y + 3, x - 3 : x + 3] - expected).max() <= 4, (column, row)
    page["heat"].send_keys(Keys.SPACE)
    assert page.count("#picture .heat") == 0 and page.count("#picture .veil") == 1
    page.check()


@pytest.mark.browser
def test_attention_that_was_not_measured_is_not_drawn_but_said(done: Page) -> None:
    assert done.shown("heat-row") and not done.shown("heat")
    assert done.text("heat-about") == "The attention to all cells was not measured: latent-tool play --attention does."


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_the_gate_decides_anew_as_the_threshold_moves(done: Page, script: Script) -> None:
    assert done.text("verdict") == "Confidence 0.93 (answer probability): ✓ accepted"
    slider = done["threshold"]
    slider.send_keys(Keys.END)
    assert done.text("threshold-value") == "1.00"
    assert "✗ abstained" in done.text("verdict")
    label = "return document.getElementById('gauge').getAttribute('aria-label')"
    assert done.browser.run(label) == "Confidence 0.93 of 1 (answer probability), threshold 1"
    slider.send_keys(*[Keys.ARROW_LEFT] * 7)
    assert done.text("threshold-value") == "0.93" and "✓ accepted" in done.text("verdict")
    assert "min_confidence=0.93," in done.text("python")
    assert len(script.asked) == 1  # without asking again
    script.say(a_result())
    done.ask()
    done.answered()
    assert script.asked[1].min_confidence == 0.93


@pytest.mark.browser
def test_an_answer_without_a_score_is_not_accepted(
    browser: Browser, script: Script, url: str, picture_file: Path
) -> None:
    page = Page(browser, url)
    page.choose(picture_file)
    script.say(a_result(confidence=None, confidence_source="unscored", patches=[], trace=[]))
    page.ask()
    page.answered()
    assert page.text("verdict").startswith("Not scored: ✗ abstained")
    assert page.shown("no-patches")
    page.check()


@pytest.mark.browser
def test_budgets_reach_the_reasoner(browser: Browser, script: Script, url: str, picture_file: Path) -> None:
    page = Page(browser, url)
    page.choose(picture_file)
    page["level"].send_keys("thorough")
    assert page["iterations"].get_attribute("value") == "40"
    assert page["always"].is_selected() and not page["always"].is_enabled()
    assert 'budget="thorough",' in page.text("python")
    page["max_patches"].clear()
    page["max_patches"].send_keys("3")
    page["deadline_s"].send_keys("2.5")
    script.say(a_result())
    page.ask()
    page.answered()
    found = script.asked[0].budget
    assert found == Budget.level("thorough").but(max_patches=3, deadline_s=2.5)
    call = re.search(r"budget=(Budget.*),\n", page.text("python"))
    assert call is not None
    assert eval(call[1], {"Budget": Budget}) == found


# --- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_errors_are_shown_with_their_remedy(browser: Browser, script: Script, tmp_path: Path, url: str) -> None:
    page = Page(browser, url)
    page["ask"].click()  # a question is required: the browser says so
    assert script.asked == []
    page.ask()
    assert "There is no picture yet." in page.problem()
    scene().save(tmp_path / "disc.png")
    page.choose(tmp_path / "disc.png")
    script.say(InputError("The <b>question</b> is odd.", "Ask another."))
    page.ask()
    assert page.problem() == "The <b>question</b> is odd. Ask another."
    script.say(searching(0), InputError("It broke later.", "Again."))
    page.ask()
    until(lambda: page.text("problem") == "It broke later. Again.", "the late error")
    script.say(RuntimeError("secret"))
    page.ask()
    until(lambda: "The service failed." in page.text("problem"), "the bug")
    assert "secret" not in page.text("problem")
    script.say(a_result())
    page.ask()
    page.answered()


@pytest.mark.browser
def test_a_file_that_is_no_picture_is_refused_by_the_service(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("this is no picture")
    with serving(create_playground(LatentReasoner(budget="quick"))) as url:
        page = Page(browser, url + "/")
        page.choose(tmp_path / "text.png")
        assert "this browser cannot show it" in page.text("about")
        page.ask()
        assert "image" in page.problem().lower()
        page["iterations"].clear()
        page["iterations"].send_keys("201")  # above the ceiling: the browser refuses
        page["ask"].click()
        assert browser.run("return document.getElementById('iterations').matches(':invalid')")
    page["iterations"].clear()
    page["iterations"].send_keys("2")
    page["ask"].click()
    until(lambda: "latent-tool play still running?" in page.text("problem"), "the service is gone")


@pytest.mark.browser
def test_hostile_text_stays_text(browser: Browser, script: Script, url: str, tmp_path: Path) -> None:
    name = "<img src=x onerror='window.hacked=1'>\u202e.png"
    scene().save(tmp_path / name)
    page = Page(browser, url)
    page.choose(tmp_path / name)
    assert page.text("about").startswith("<img src=x onerror='window.hacked=1'>.png, 60")
    elements = page.count("*")
    sent = json.dumps(hostile_result().model_dump(mode="json")).replace("\\ud800", "")  # is no text a model can write
    script.say(searching(0), ReasoningResult.model_validate_json(sent))
    unseen = "\u200b\u00ad\u2028\U000e0041\ue000"
    question = HOSTILE.replace("\x00", "").replace("\x1b", "").replace("\ud800", "") + unseen + "\\"
    browser.run(
        "const e = document.getElementById('question'); e.value = arguments[0]; "
        "e.dispatchEvent(new Event('input', {bubbles: true}))",
        question,
    )
    page["ask"].click()
    page.answered()
    assert browser.run("return window.hacked") is None
    assert browser.run("return document.scripts.length") == 1
    assert page.count("img") == 0 and page.count("*") > elements
    shown = page.text("answer")
    assert shown.startswith("<img src=x onerror=alert(1)>\"'</script><script>window.hacked = 1</script>")
    assert not {"\u202e", "\x00", "\x1b"} & set(page.text("answered") + page.text("warnings") + page.text("tokens"))
    code = page.text("python")
    assert not {"\u202e", "\u202c", *unseen} & set(code)
    call = next(
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "invoke"
    )
    assert ast.literal_eval(call.args[0]) == {"image": name, "question": question}
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    page.check()


@pytest.mark.browser
def test_the_policy_forbids_scripts_styles_and_requests(browser: Browser, url: str) -> None:
    Page(browser, url)
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


# --- how it looks -----------------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_in_both_schemes(
    browser: Browser, script: Script, url: str, picture_file: Path, scheme: str
) -> None:
    page = Page(browser, url, scheme=scheme)
    page.choose(picture_file)
    script.say(searching(0), a_result())
    page.ask()
    page.answered()
    style = "const s = getComputedStyle(document.querySelector(arguments[0])); return s[arguments[1]]"
    ground = browser.run(style, "body", "backgroundColor")
    assert (luminance(ground) > 0.5) is (scheme == "light")
    for selector in ("body", ".quiet", ".good", "legend", "thead th", "pre", ".detail", "button", "select", "input"):
        assert contrast(browser.run(style, selector, "color"), ground) >= 4.5, selector
    for selector in ("#ask", ".chip", "pre"):
        own = browser.run(style, selector, "backgroundColor")
        assert contrast(browser.run(style, selector, "color"), own) >= 4.5, selector
    assert contrast(browser.run(style, ".chart text", "fill"), ground) >= 4.5
    for selector in ("#question", "#level", ".button"):
        assert contrast(browser.run(style, selector, "borderColor"), ground) >= 3, selector
    page.check()


def patch_pixels(page: Page, number: int) -> np.ndarray[Any, Any]:
    """The screen inside a patch."""
    page.browser.run("scrollTo(0, 0)")
    shot = np.asarray(page.browser.screenshot()).astype(int)
    left, top, right, bottom = (round(edge) for edge in page.browser.box(f"#picture [data-patch='{number}'] rect"))
    return shot[top + 4 : bottom - 4, left + 4 : right - 4]


@pytest.mark.browser
def test_patches_lie_on_their_pixels(done: Page) -> None:
    disc = patch_pixels(done, 1)  # the upper left quarter of the disc
    assert (np.abs(disc[-8:, -8:] - BLUE) <= 2).all()
    assert (np.abs(disc[:3, :3] - PAPER) <= 2).all()
    shot = np.asarray(done.browser.screenshot()).astype(int)
    left, top, _, _ = (round(edge) for edge in done.browser.box("#picture image"))
    assert (np.abs(shot[top + 5, left + 5] - (np.array(PAPER) + 128) / 2) <= 2).all()  # veiled


@pytest.mark.browser
def test_a_photo_on_its_side_is_shown_upright_with_its_patches(
    browser: Browser, script: Script, url: str, tmp_path: Path
) -> None:
    upright = Image.new("RGB", (60, 40), PAPER)
    upright.paste(BLUE, (48, 0, 60, 12))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", exif=exif, quality=95, subsampling=0)
    page = Page(browser, url)
    page.choose(tmp_path / "photo.jpg")
    assert page.text("about") == "photo.jpg, 60 \N{MULTIPLICATION SIGN} 40 pixels"
    patch = a_result().patches[0].model_copy(update={"box": (48.0, 0.0, 60.0, 12.0)})
    script.say(a_result(patches=[patch], image_sizes=[(60, 40)]))
    page.ask()
    page.answered()
    inside = patch_pixels(page, 1)
    assert np.abs(inside - BLUE).mean() < 12  # as far as JPEG goes


@pytest.mark.browser
def test_pointing_at_a_patch_tells_about_it(done: Page) -> None:
    from selenium.webdriver import ActionChains

    mark = done.browser.driver.find_element(By.CSS_SELECTOR, "#picture [data-patch='2']")
    ActionChains(done.browser.driver).move_to_element(mark).perform()
    assert done.text("detail").startswith(
        "Patch 2: attention 0.047, gain 0.027, proposed by latent 1, box 24, 12, 36, 24"
    )
    assert done.browser.run("return document.querySelector('#patches [data-patch=\"2\"]').className") == "on"
    done.browser.run("document.querySelector('#picture [data-patch=\"3\"]').focus()")
    assert done.text("detail").startswith("Patch 3:")
    names = done.browser.run("return [...document.querySelectorAll('.on')].map(e => e.dataset.patch)")
    assert "3" in names


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 800, 1920])
def test_nothing_is_wider_than_the_window(
    browser: Browser, script: Script, url: str, picture_file: Path, width: int
) -> None:
    page = Page(browser, url, width=width)
    page.choose(picture_file)
    script.say(a_result())
    page.ask()
    page.answered()
    assert browser.run("return document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_everything_that_can_be_used_has_a_name(done: Page) -> None:
    done.browser.command("Accessibility.enable")
    nodes = done.browser.command("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")
    ]
    kinds = {"button", "textbox", "spinbutton", "slider", "combobox", "image", "img", "region", "heading", "group"}
    for role, name in named:
        assert role not in kinds or name, (role, named)
    text = "\n".join(f"{role} {name}" for role, name in named)
    for part in (
        "slider Accept from",
        "textbox Question",
        "button Stop",
        "combobox budget",
        "Patch 1: attention 0.052",
    ):
        assert part in text, part


@pytest.mark.browser
def test_a_picture_can_be_dropped_and_pasted(browser: Browser, url: str, picture_file: Path) -> None:
    page = Page(browser, url)
    give = """
    const bytes = Uint8Array.from(atob(arguments[0]), char => char.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], arguments[2], {type: "image/png"}));
    document.dispatchEvent(arguments[1] === "drop" ? new DragEvent("drop", {dataTransfer: transfer, cancelable: true})
      : new ClipboardEvent("paste", {clipboardData: transfer}));
    """
    content = base64.b64encode(picture_file.read_bytes()).decode()
    for kind in ("drop", "paste"):
        browser.run(give, content, kind, f"{kind}.png")
        until(lambda kind=kind: page.text("about") == f"{kind}.png, 60 \N{MULTIPLICATION SIGN} 60 pixels", kind)
    browser.run("document.dispatchEvent(new DragEvent('drop', {dataTransfer: new DataTransfer(), cancelable: true}))")
    assert "no file" in page.problem()
    page.check()


@pytest.mark.browser
def test_the_report_is_saved(done: Page, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    done.browser.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    done["save"].click()
    page = until(lambda: next(iter(folder.glob("report.html")), None), "the report")
    until(lambda: "</html>" in page.read_text(encoding="utf-8"), "the whole report")
    content = page.read_text(encoding="utf-8")
    assert QUESTION in content and "disc.png" in content and "12, 12, 24, 24" in content


# --- the service beneath ----------------------------------------------------------------------------------------------


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url) as found:
        yield found


def test_every_file_has_a_strict_policy(client: httpx.Client) -> None:
    for path, kind in (("/", "text/html"), ("/play/play.js", "text/javascript"), ("/play/play.css", "text/css")):
        reply = client.get(path)
        assert reply.status_code == 200 and reply.headers["content-type"].startswith(kind)
        policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in reply.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in reply.text
    page = client.get("/").text
    assert " style=" not in page and not re.search(r"\son\w+=", page)


def test_scenes_are_drawn(client: httpx.Client) -> None:
    for kind in ("shapes", "bars", "text"):
        found = client.get("/play/scene", params={"kind": kind, "seed": 3}).json()
        assert (found["kind"], found["seed"]) == (kind, 3)
        assert found["questions"] and found["image"].startswith("data:image/png;base64,")
    for params in ({"kind": "photos"}, {"kind": "shapes", "seed": "-1"}, {"seed": "9" * 40}, {"seed": "²"}):
        reply = client.get("/play/scene", params=params)
        assert reply.status_code == 422 and reply.json()["hint"], params


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Host": "evil.example"}, 400), ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403)],
)
def test_other_pages_and_names_are_refused(client: httpx.Client, headers: dict[str, str], status: int) -> None:
    for method, path in (("GET", "/"), ("GET", "/play/setup"), ("POST", "/play/report"), ("POST", "/v1/ask")):
        assert client.request(method, path, headers=headers).status_code == status, path


def test_files_of_this_machine_cannot_be_asked_about(client: httpx.Client, picture_file: Path) -> None:
    body = {"image": str(picture_file), "question": QUESTION, "result": a_result().model_dump(mode="json")}
    reply = client.post("/play/report", json=body)
    assert (reply.status_code, reply.json()["type"]) == (422, "ImageNotAllowedError")
    with serving(create_playground(LatentReasoner())) as other:
        reply = httpx.post(f"{other}/v1/ask", json={"image": str(picture_file), "question": QUESTION})
    assert (reply.status_code, reply.json()["type"]) == (422, "ImageNotAllowedError")


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"image": 1}', json.dumps({"result": {"answer": 1}}).encode()])
def test_a_report_needs_a_result(client: httpx.Client, body: bytes) -> None:
    reply = client.post("/play/report", content=body)
    assert reply.status_code == 422 and reply.json()["message"].startswith("This is no question with its result")


def test_a_report_needs_the_picture_of_its_result(client: httpx.Client) -> None:
    stream = io.BytesIO()
    scene().resize((50, 60)).save(stream, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    body = {"image": uri, "question": QUESTION, "result": a_result().model_dump(mode="json")}
    reply = client.post("/play/report", json=body)
    assert reply.status_code == 422 and "50 x 60" in reply.json()["message"]


# --- the command ------------------------------------------------------------------------------------------------------


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "latent_tool.cli", "play", "--no-open", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_the_command_serves_this_machine_until_it_is_interrupted() -> None:
    process = started("--port", "0", "--budget", "quick", "--min-confidence", "0.7", "--attention", "--compile", "off")
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url), process.communicate(timeout=60)
        setup = until(lambda: httpx.get(url + "play/setup", timeout=60).json(), "the page")
        assert (setup["level"], setup["min_confidence"], setup["model"]) == ("quick", 0.7, "embedded")
        assert setup["arguments"] == {"compile": False, "attention": True}
        taken = started("--port", url.rstrip("/").rpartition(":")[2])
        out, errors = taken.communicate(timeout=120)
        assert taken.returncode == 2 and out == "" and "--port" in errors and "Traceback" not in errors
    finally:
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and "Traceback" not in errors


def test_only_this_machine_can_reach_it() -> None:
    from latent_tool.commands.play import HOST
    from latent_tool.integrations.http_server import bind

    with bind(HOST, 0) as listener:
        assert listener.family == socket.AF_INET and listener.getsockname()[0] == "127.0.0.1"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from latent_tool.commands.play import play

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtraError, match="playground") as caught:
        play()
    assert "[serve]'" in caught.value.hint
