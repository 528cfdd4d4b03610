"""mhc demo's report: its numbers, its page, and the page in a real browser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import DESK, PHONE, SCHEMES, Browser, browser
from demo_runs import SIZES, VARIANTS, run, settings
from typer.testing import CliRunner

from mhc_core import diagnostics
from mhc_core.cli import app
from mhc_core.cli.demo import _model, _report, _results
from mhc_core.cli.demo._model import Kept
from mhc_core.cli.demo._train import Trained

STEPS, DEPTH = 12, 4
EVIL = "<b>&.txt"
LAYERS = {  # a variant's lists of one entry for each layer
    *("layer_forward", "layer_backward", "gain_forward", "gain_backward"),
    *("row_error", "column_error", "entropy", "similarity", "h_res", "products"),
}

Array = Any


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the command with all four variants."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / EVIL).write_text("It was a dark and stormy night. " * 50)
    files = ("--plot", str(folder / "out.png"), "--json", str(folder / "out.json"))
    words = ("--backend", "mlx-compiled", "--steps", str(STEPS), "--text", str(folder / EVIL))
    result = run(*SIZES, *words, "--out", str(folder), *files)
    assert result.exit_code == 0, result.output
    for word in (*VARIANTS, "gain forward", "ms a step", "MB a step"):
        assert word in result.output
    assert f"The report: {folder / 'report.html'}" in result.output
    return folder


@pytest.fixture(scope="module")
def told(out: Path) -> dict[str, Any]:
    """Return the report's numbers."""
    text = (out / "out.json").read_text()
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.fixture(scope="module")
def deep(told: dict[str, Any], out: Path) -> Path:
    """Write the report of a network of 64 layers, which are those of the small one, repeated."""
    assert told["variants"]["HC"].keys() >= LAYERS
    variants = {
        name: {k: v * (64 // DEPTH) if k in LAYERS else v for k, v in one.items()}
        for name, one in told["variants"].items()
    }
    settings = told["settings"] | {"depth": 64}
    file = out / "deep.html"
    file.write_text(_report.page(told | {"settings": settings, "variants": variants}), "utf-8")
    return file


# ---- numbers ------------------------------------------------------------------------------------


def test_every_variant_has_every_number(told: dict[str, Any]) -> None:
    assert list(told["variants"]) == list(VARIANTS)
    for name, one in told["variants"].items():
        n = 1 if name == "residual" else 4
        assert len(one["loss"]) == len(one["norm"]) == STEPS
        for key in ("gain_forward", "gain_backward", "layer_forward", "similarity", "entropy"):
            assert len(one[key]) == DEPTH
        for key in ("h_res", "products"):
            assert [len(matrix) for matrix in one[key]] == [n * n] * DEPTH
        assert one["looked"] == list(range(STEPS))
        assert one["seconds"] > 0
        assert one["memory"] > 0
        assert one["parameters"] > 2000
        assert (one["sinkhorn"] is not None) == (name in ("mHC", "single-pass"))
    assert set(told["variants"]["residual"]["gain_forward"]) == {1.0}
    for name in ("mHC", "single-pass"):
        gains = told["variants"][name]["gain_forward"] + told["variants"][name]["gain_backward"]
        assert all(0.99 < gain < 1.05 for gain in gains)
        errors = told["variants"][name]["sinkhorn"]
        assert len(errors["rows"]) == len(errors["columns"]) == 30
        assert max(errors["rows"][2:]) < 1e-5
        assert errors["columns"][19] < errors["columns"][0] / 3


def test_it_tells_of_the_machine_and_the_settings_but_not_of_folders(
    told: dict[str, Any], out: Path
) -> None:
    assert told["settings"]["depth"] == DEPTH
    assert told["settings"]["backend"] == "mlx-compiled"
    assert told["text"] == EVIL
    assert told["devices"]["mlx"]
    assert {"mhc-core", "mlx", "numpy"} <= set(told["versions"])
    assert told["machine"]["cores"] >= 1


def made(h_res: Array, streams: Array, loss: list[float]) -> dict[str, Any]:
    """Return the numbers of a training that never ran."""
    history = {name: np.array(loss) for name in ("loss", "norm")}
    history |= {"seconds": np.array([0.5, 0.1, 0.2])}
    history |= {name: np.array([1.0]) for name in ("gain_forward", "gain_backward")}
    history |= {"looked": np.array([0]), "memory": np.array([0])}
    parameters = _model.initial(settings(), "HC")
    trained = Trained(parameters=parameters, history=history, kept=Kept(streams, h_res))
    return _results.results(settings(), "text", "mhc demo", {"HC": trained})


def test_the_numbers_are_those_of_the_mappings() -> None:
    rng = np.random.default_rng(0)
    h_res = np.eye(4) + rng.normal(0, 0.2, (4, 1, 8, 4, 4))
    streams = rng.normal(size=(4, 1, 8, 4, 8))
    one = made(h_res, streams, [3.0, 2.0, 1.0])["variants"]["HC"]
    forward, backward = diagnostics.composite_gain(h_res)
    assert one["gain_forward"] == pytest.approx(forward.mean(axis=(1, 2)), rel=1e-4)
    assert one["gain_backward"] == pytest.approx(backward.mean(axis=(1, 2)), rel=1e-4)
    assert one["h_res"][2] == pytest.approx(h_res[2].mean(axis=(0, 1)).ravel(), rel=6e-3)
    ahead = h_res[2] @ h_res[1] @ h_res[0]
    assert one["products"][2] == pytest.approx(ahead.mean(axis=(0, 1)).ravel(), rel=6e-3)
    assert one["row_error"] == pytest.approx(
        np.abs(h_res.sum(-1) - 1).max(-1).mean(axis=(1, 2)), rel=1e-4
    )
    assert one["final_loss"] == 1.0
    assert one["memory"] is None


def test_a_training_that_went_wrong_is_still_told() -> None:
    broken = np.full((4, 1, 8, 4, 4), np.inf)
    with np.errstate(invalid="ignore"):
        told = made(broken, np.ones((4, 1, 8, 4, 8)), [3.0, math.nan, math.inf])
    assert told["variants"]["HC"]["loss"] == [3.0, None, None]
    assert told["variants"]["HC"]["gain_forward"] == [None] * 4
    page = _report.page(told)
    assert "more than numbers can hold" in page
    assert "NaN" not in shown(page)
    assert json.loads(shown(page))["variants"]["HC"]["final_loss"] is None


def test_lines_are_smoothed_by_a_running_mean() -> None:
    numbers = [float(k) for k in range(40)]
    assert _results.smooth(numbers) == [0.0, *(k - 0.5 for k in range(1, 40))]
    assert _results.smooth([1.0, None, 3.0, None] * 10)[:4] == [1.0, None, 3.0, None]


# ---- the page as text ---------------------------------------------------------------------------


def shown(page: str) -> str:
    (text,) = re.findall(r'<script type="application/json" id="told">(.*?)</script>', page, re.S)
    return text


def test_the_page_stands_by_itself_and_escapes(out: Path, told: dict[str, Any]) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)
    assert not re.search(r"\b(src|href)=|<link|<img|<iframe|@import|url\(", body)
    assert "&lt;b&gt;&amp;.txt" in body
    assert EVIL not in body
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in page
    assert page.count("</script>") == 3
    assert json.loads(shown(page))["variants"] == told["variants"]
    assert str(out) not in page
    assert len(page) < 400_000


def test_the_picture(out: Path) -> None:
    content = (out / "out.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 40_000


# ---- the page in a browser ----------------------------------------------------------------------

# Of every plot: how many of its pixels have the colour of one of its lines.
DRAWN = """
const close = (a, b) => a.every((value, k) => Math.abs(value - b[k]) < 8);
const hex = (text) => [1, 3, 5].map((k) => parseInt(text.slice(k, k + 2), 16));
return [...document.querySelectorAll(".plot")].map((box) => {
  const canvas = box.querySelector("canvas");
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const style = getComputedStyle(document.documentElement);
  const names = ["residual", "HC", "mHC", "single-pass"];
  const counts = names.map((name) => {
    const wanted = hex(style.getPropertyValue(`--${name}`).trim());
    let count = 0;
    for (let k = 0; k < pixels.length; k += 4) {
      if (pixels[k + 3] > 250 && close([pixels[k], pixels[k + 1], pixels[k + 2]], wanted)) count++;
    }
    return count;
  });
  const at = canvas.getBoundingClientRect();
  return [box.dataset.chart, at.width, at.height, ...counts];
});
"""

MATRICES = """
return [...document.querySelectorAll(".heat")].map((strip) => [
  strip.dataset.of, strip.dataset.kind,
  [...strip.querySelectorAll("svg")].map((svg) => [
    svg.querySelectorAll("rect").length, svg.getBoundingClientRect().width,
    Math.max(...[...svg.querySelectorAll("rect")].map((rect) => rect.getAttribute("fill-opacity"))),
  ]),
])
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Start one browser for all tests."""
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def check_plots(chromium: Browser, depth: int) -> None:
    drawn = {name: numbers for name, *numbers in chromium.ask(DRAWN)}
    assert set(drawn) == {chart.name for chart in _report.CHARTS}
    for name, (width, height, *pixels) in drawn.items():
        assert width > 250, name
        assert height > 200, name
        # the name beside a line is drawn in its colour, even where another line lies on it
        wanted = {"sinkhorn": pixels[2:], "errors": pixels[1:]}.get(name, pixels)
        assert min(wanted) > 20, f"{name}: {pixels}"
        assert max(wanted) > 150, f"{name}: {pixels}"
    strips = chromium.ask(MATRICES)
    assert [strip[:2] for strip in strips] == [
        [variant, kind] for kind in ("h_res", "products") for variant in VARIANTS[1:]
    ]
    for _, _, matrices in strips:
        assert len(matrices) == depth
        for rectangles, width, strongest in matrices:
            assert rectangles == 16
            assert width >= 40
            assert strongest > 0.2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("depth", [DEPTH, 64])
def test_the_report_in_a_browser(
    chromium: Browser, out: Path, deep: Path, depth: int, width: int, scheme: str
) -> None:
    chromium.open(deep if depth == 64 else out / "report.html", width, scheme)
    check_plots(chromium, depth)
    chromium.check(width, scheme)


def test_it_follows_the_reader_who_changes_the_scheme_or_turns_the_phone(
    chromium: Browser, out: Path
) -> None:
    chromium.open(out / "report.html", DESK, "light")
    chromium.prefer("dark")
    chromium.wait()
    check_plots(chromium, DEPTH)
    size = {"width": PHONE, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    chromium.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    chromium.wait()
    check_plots(chromium, DEPTH)
    chromium.check(PHONE, "dark")


# By how many pixels each reason in the table of what was left out runs out of its cell or the page.
REASONS = """
const tables = [...document.querySelectorAll("table")];
const skipped = tables.filter((table) => table.textContent.includes("because"));
const cells = skipped.flatMap((table) => [...table.querySelectorAll("tbody td:last-child")]);
const out = (cell) => Math.max(0, cell.getBoundingClientRect().right - innerWidth);
return cells.map((cell) => cell.scrollWidth - cell.clientWidth + out(cell));
"""


@pytest.fixture(scope="module")
def conformance_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write this library's other report, with a check that fails."""
    file = tmp_path_factory.mktemp("conformance") / "out.html"
    words = ["conformance", "numpy", "bug:dead-tail", "--op", "combine", "--op", "pre"]
    result = CliRunner().invoke(app, [*words, "--jobs", "1", "--report", str(file)])
    assert result.exit_code in (0, 1), result.output
    return file


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_conformance_report_in_a_browser(
    chromium: Browser, conformance_report: Path, width: int, scheme: str
) -> None:
    chromium.open(conformance_report, width, scheme)
    chromium.check(width, scheme)
    cells = chromium.ask("return [...document.querySelectorAll('td')].length")
    assert cells > 40
    hidden = chromium.ask(REASONS)
    assert hidden, "something was left out, and why is told"
    assert not any(hidden), "the reasons for what was left out are not cut off"
