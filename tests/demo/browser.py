"""A real headless Chromium, and the checks that every page must pass in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SCHEMES = ("light", "dark")
PHONE, DESK = 390, 1200

# Every element with text of its own that is shown: its text, the size of its font, and the contrast
# of its colour with what is behind it, as WCAG 2 defines it.
TEXTS = """
const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
function rgba(colour) {
  pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
  return pen.getImageData(0, 0, 1, 1).data;
}
const base = matchMedia("(prefers-color-scheme: dark)").matches ? "#121212" : "#ffffff";
function behind(element) {
  for (let e = element; e; e = e.parentElement) {
    const colour = rgba(getComputedStyle(e).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return rgba(base);
}
function light(colour) {
  const [r, g, b] = [...colour].slice(0, 3).map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
return [...document.body.querySelectorAll("*")].filter((element) =>
  !["SCRIPT", "STYLE", "TITLE"].includes(element.tagName)
  && element.checkVisibility()
  && [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())
).map((element) => {
  const style = getComputedStyle(element);
  const pair = [light(rgba(style.color)), light(behind(element))].sort((a, b) => b - a);
  const text = element.textContent.trim().slice(0, 40);
  return [text, parseFloat(style.fontSize), (pair[0] + 0.05) / (pair[1] + 0.05)];
});
"""


def _missing() -> str | None:
    try:
        import selenium  # noqa: F401  # pyright: ignore
    except ImportError:
        return "selenium is not installed: pip install selenium"
    there = any(map(shutil.which, BROWSERS)) and shutil.which("chromedriver")
    return None if there else "no Chromium is here: apt-get install chromium chromium-driver"


class Browser:
    """The browser, at any width and in either colour scheme."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
        for option in (*OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = Service(executable_path=shutil.which("chromedriver"))
        self.driver: Any = webdriver.Chrome(options=options, service=service)

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Show a page anew, with an empty console log."""
        self.driver.get_log("browser")
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.prefer(scheme)
        self.driver.get(page.resolve().as_uri())

    def prefer(self, scheme: str) -> None:
        """Let the reader prefer light or dark pages."""
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def ask(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def wait(self) -> None:
        """Let the page draw."""
        frame = "(done) => requestAnimationFrame(() => setTimeout(done, 50))"
        self.ask(f"return new Promise({frame})")

    def check(self, width: int, scheme: str) -> None:
        """Check on the open page what must hold for every page."""
        own = "willReadFrequently"  # what reading the pixels twice brings about, in tests alone
        said = [line for line in self.driver.get_log("browser") if own not in line["message"]]
        assert not said, json.dumps(said, indent=1)
        loaded = self.ask("return performance.getEntriesByType('resource').map((r) => r.name)")
        assert not loaded, "a page stands by itself"
        assert self.ask("return document.documentElement.scrollWidth") <= width
        texts = self.ask(TEXTS)
        assert len(texts) > 20
        for text, size, contrast in texts:
            assert size >= 12, f"{text!r} is {size} px large"
            assert contrast >= 4.5, f"{text!r} has a contrast of {contrast:.1f} in {scheme}"
        lit = self.ask(
            "const c = document.createElement('canvas').getContext('2d');"
            "c.fillStyle = getComputedStyle(document.body).color; c.fillRect(0, 0, 1, 1);"
            "return c.getImageData(0, 0, 1, 1).data[0]"
        )
        assert (lit > 128) == (scheme == "dark"), "text is light on dark, dark on light"


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start the browser; without one, skip, but fail in CI, which must have one."""
    if reason := _missing():
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    started = Browser(profile)
    try:
        yield started
    finally:
        started.driver.quit()
