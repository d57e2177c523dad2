"""Headless Chromium, for the tests that look at pages, and what it takes to judge colours."""

from __future__ import annotations

import base64
import io
import json
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
REMEDY = "The browser tests need Chromium and Selenium: apt-get install chromium chromium-driver; pip install selenium."


class Browser:
    """Headless Chromium on one page at a time."""

    def __init__(self, profile: str) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for switch in (
            "headless",
            "no-sandbox",
            "disable-gpu",
            "disable-quic",
            "disable-dev-shm-usage",
            "no-first-run",
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
            "force-device-scale-factor=1",
            "window-size=1280,1000",
            f"user-data-dir={profile}",
        ):
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver: Any = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def visit(self, url: str, *, scheme: str = "light", media: str = "", width: int = 1280) -> None:
        """Open a page; what was logged before is forgotten."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.command("Emulation.setEmulatedMedia", media=media, features=[feature])
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        self.driver.get("about:blank")
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(url)

    def open(self, path: Path, *, scheme: str = "light", media: str = "", width: int = 1280) -> None:
        """Open a page from a file and check that it loads nothing and has nothing to complain about."""
        self.visit(path.as_uri(), scheme=scheme, media=media, width=width)
        time.sleep(0.2)  # a request that the page should not make would start after loading
        assert self.driver.get_log("browser") == []
        urls = self.requests()
        assert [url for url in urls if not url.startswith("data:")] == [path.as_uri()]

    def requests(self) -> list[str]:
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def command(self, name: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def screenshot(self) -> Image.Image:
        size = self.command("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.command("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of an element on the page, in CSS pixels."""
        script = (
            "const r = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [r.left + scrollX, r.top + scrollY, r.right + scrollX, r.bottom + scrollY]"
        )
        left, top, right, bottom = self.run(script, selector)
        return left, top, right, bottom


def luminance(colour: str) -> float:
    """Relative luminance of a CSS ``rgb(...)`` colour, as the accessibility guidelines define it."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@contextmanager
def opened() -> Iterator[Browser]:
    """A browser with a profile of its own. Fails, rather than skips, where there is none."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        pytest.fail(REMEDY)
    if not (Path(CHROMIUM).exists() and Path(DRIVER).exists()):
        pytest.fail(REMEDY)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            yield browser
        finally:
            browser.driver.quit()
