"""Make the pictures of the README from the embedded model: overlay, heat map, report page and playground.

    make pictures

Pages are photographed in Chromium, in light and in dark.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser, opened  # noqa: E402
from http_server import serving  # noqa: E402

from latent_tool import LatentReasoner, ReasoningResult  # noqa: E402
from latent_tool.integrations.playground import create_playground  # noqa: E402
from latent_tool.views.overlay import overlay  # noqa: E402
from latent_tool.views.report import write_report  # noqa: E402

IMAGES = ROOT / "docs" / "images"
EXAMPLES = ROOT / "examples" / "images"
# The first one that has patches to show is shown.
QUESTIONS = (
    ("shapes.png", "What is below the blue square?"),
    ("shapes.png", "What is right of the red circle?"),
    ("chart.png", "Which bar is tallest?"),
    ("number.png", "What number is this?"),
)
SCHEMES = {"light": "", "dark": "-dark"}
WIDTH, HEIGHT = 1180, 900


def main() -> None:
    reasoner = LatentReasoner(attention=True, grounding=True, controls=True, min_confidence=0.5)
    name, question, result = choose(reasoner)
    print(f"{name}: {question} {result.answer} ({result.confidence:.3f}), {len(result.patches)} patches")
    with Image.open(EXAMPLES / name) as picture:
        overlay(result, picture).save(IMAGES / "overlay.png", optimize=True)
        overlay(result, picture, heatmap=True).save(IMAGES / "heatmap.png", optimize=True)
        with tempfile.TemporaryDirectory() as folder, opened() as browser:
            page = write_report(Path(folder) / "report.html", result, picture, question=question, names=[name])
            for scheme, ending in SCHEMES.items():
                browser.visit(page.as_uri(), scheme=scheme, width=WIDTH)
                photograph(browser, f"report{ending}.png")
            with serving(create_playground(reasoner)) as url:
                for scheme, ending in SCHEMES.items():
                    play(browser, url, scheme, EXAMPLES / name, question)
                    photograph(browser, f"playground{ending}.png")


def choose(reasoner: LatentReasoner) -> tuple[str, str, ReasoningResult]:
    answered = [
        (name, asked, reasoner.invoke({"image": EXAMPLES / name, "question": asked})) for name, asked in QUESTIONS
    ]
    return next((each for each in answered if each[2].patches), answered[0])


def play(browser: Browser, url: str, scheme: str, image: Path, question: str) -> None:
    """Ask the question on the page, as a visitor does."""
    browser.visit(url, scheme=scheme, width=WIDTH)
    until(lambda: browser.run("return document.body.dataset.ready"))
    find = browser.driver.find_element
    find("id", "file").send_keys(str(image))
    until(lambda: image.name in find("id", "about").text)
    find("id", "question").send_keys(question)
    find("id", "ask").click()
    until(lambda: find("id", "why").is_displayed())
    browser.run("document.activeElement.blur()")
    time.sleep(1)  # patches fade in


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("The page did not do what was expected.")
        time.sleep(0.05)


def photograph(browser: Browser, name: str) -> None:
    """The upper part of the page, in few colours, so that the file is small."""
    whole = browser.screenshot()
    part = whole.crop((0, 0, whole.width, min(HEIGHT, whole.height)))
    part.quantize(256, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    main()
