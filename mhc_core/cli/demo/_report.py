"""The report: one self-contained page with charts, matrices and numbers."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from mhc_core.cli.demo._results import ITERATIONS, Column, smooth
from mhc_core.cli.demo._settings import STREAMS

__all__ = ["missing", "page"]

PACKAGE = "uplot-python"  # brings uPlot, https://github.com/leeoniya/uPlot, MIT licence
DRAWS = ("uplot/static/uPlot.iife.js", "uplot/static/uPlot.min.css")

HERE = Path(__file__).parent

Told = Mapping[str, Any]


def missing() -> str | None:
    """Return what the report lacks here, or None."""
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        return f"the report needs uPlot, which draws its lines: pip install {PACKAGE}"
    return None


def page(told: Told) -> str:
    """Return the page; ``told`` is the result of ``_results.results``."""
    script, style = (
        Path(str(distribution(PACKAGE).locate_file(file))).read_text("utf-8") for file in DRAWS
    )
    charts = {chart.name: chart.spec(told) for chart in CHARTS}
    shown = json.dumps({"variants": told["variants"], "charts": charts}, separators=(",", ":"))
    return _PAGE.format(
        title=html.escape(_title(told)),
        style=style + (HERE / "report.css").read_text("utf-8"),
        body="\n".join(_body(told, charts)),
        told=shown.replace("</", "<\\/"),
        library=script.replace("</", "<\\/"),
        script=(HERE / "report.js").read_text("utf-8"),
    )


# ---- lines --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A plot of one line for each variant, or of a dashed one beside it.

    Attributes
    ----------
    name, title, note
        Its name in the page, its title, and one sentence on how to read it.
    across, log
        The quantity on the x axis, and whether y is logarithmic.
    lines
        Keys of a variant's numbers, and the suffix of each line's name; the second line is dashed.
    """

    name: str
    title: str
    note: str
    across: str
    lines: Mapping[str, str]
    log: bool = False

    def spec(self, told: Told) -> dict[str, Any]:
        """Return the data that the script draws."""
        drawn = [
            {"name": f"{name}{suffix}", "of": name, "dashed": k > 0, "y": self._y(one, key)}
            for name, one in told["variants"].items()
            for k, (key, suffix) in enumerate(self.lines.items())
            if any(number is not None for number in self._y(one, key))
        ]
        return {"across": self.across, "log": self.log, "x": self._x(told), "lines": drawn}

    def _x(self, told: Told) -> list[int]:
        first, *_ = told["variants"].values()
        if self.across == "iterations":
            return list(ITERATIONS)
        if self.name == "looked":
            return first["looked"]
        return list(range(1, len(first[next(iter(self.lines))]) + 1))

    def _y(self, one: Told, key: str) -> Column:
        if self.across == "iterations":
            numbers: Column = one["sinkhorn"][key] if one["sinkhorn"] else []
        else:
            numbers = smooth(one[key]) if key == "loss" else one[key]
        return [None if self.log and not (number or 0) > 0 else number for number in numbers]


CHARTS = (
    Chart(
        name="loss",
        title="Loss",
        note="Nats a byte, as a running mean over a twentieth of the steps. Lower is better.",
        across="step",
        lines={"loss": ""},
    ),
    Chart(
        name="norm",
        title="Norm of the gradient",
        note="Of all parameters together, before it is clipped to 1. Spikes mean trouble.",
        across="step",
        lines={"norm": ""},
        log=True,
    ),
    Chart(
        name="gain_forward",
        title="Gain of the signal, from the first layer to here",
        note="The largest absolute row sum of H_l ... H_1, as a mean over the tokens.",
        across="layer",
        lines={"gain_forward": ""},
        log=True,
    ),
    Chart(
        name="gain_backward",
        title="Gain of the gradient, from the last layer back to here",
        note="The largest absolute column sum of H_L ... H_l, as a mean over the tokens.",
        across="layer",
        lines={"gain_backward": ""},
        log=True,
    ),
    Chart(
        name="looked",
        title="The gain over the whole depth, while training",
        note="The largest absolute row sum of the product of all layers.",
        across="step",
        lines={"looked_forward": ""},
        log=True,
    ),
    Chart(
        name="layers",
        title="Gain of each layer alone",
        note="What a single H_res does to the signal. A little more than 1, many times, is a lot.",
        across="layer",
        lines={"layer_forward": ""},
    ),
    Chart(
        name="sinkhorn",
        title="Distance from doubly stochastic after t iterations",
        note="The worst sum of a row or a column, of any layer and token, minus 1. "
        "20 iterations are what mHC uses.",
        across="iterations",
        lines={"columns": " columns", "rows": " rows"},
        log=True,
    ),
    Chart(
        name="errors",
        title="Distance from doubly stochastic, as trained",
        note="The same of every layer, as a mean over the tokens: of its columns, and dashed, of "
        "its rows.",
        across="layer",
        lines={"column_error": "", "row_error": " rows"},
        log=True,
    ),
    Chart(
        name="similarity",
        title="How alike the streams are",
        note="The mean cosine of all pairs. At 1, n streams are no more than one.",
        across="layer",
        lines={"similarity": ""},
    ),
    Chart(
        name="entropy",
        title="How much each layer mixes",
        note="The mean entropy of the rows of H_res: 0 leaves the streams apart, log n mixes all.",
        across="layer",
        lines={"entropy": ""},
    ),
)

SECTIONS = (
    (
        "Does it learn?",
        "The same transformer, the same start and the same text; only the connections differ.",
        ("loss", "norm"),
    ),
    (
        "Does the residual path stay quiet?",
        "From one layer to a later one, the residual path multiplies the streams by all H_res in "
        "between. The gain of that product says how much a signal, or a gradient, can be amplified "
        "on the way: 1 for a residual connection, and 1 for doubly stochastic matrices, however "
        "many they are.",
        ("gain_forward", "gain_backward", "looked", "layers"),
    ),
    (
        "How exact is the projection?",
        "Sinkhorn normalises the columns and then the rows, again and again. The rows, done last, "
        "sum to 1; the columns come closer with every iteration.",
        ("sinkhorn", "errors"),
    ),
    (
        "What do the streams do?",
        f"Each network but the residual one carries {STREAMS} streams.",
        ("similarity", "entropy"),
    ),
)


# ---- the page -----------------------------------------------------------------------------------


def _body(told: Told, charts: Told) -> Iterable[str]:
    s = told["settings"]
    yield f"<h1>{html.escape(_title(told))}</h1>"
    yield f'<p class="lead">{html.escape(_finding(told))}</p>'
    yield (
        f'<p class="soft">{s["steps"]} steps of {s["batch"]} &times; {s["context"]} bytes of '
        f"{html.escape(told['text'])}, width {s['width']}, backend {s['backend']}, seed "
        f"{s['seed']}. {told['date'][:10]}.</p>"
    )
    yield f'<div class="tiles">{"".join(_tile(*one) for one in told["variants"].items())}</div>'
    for title, words, names in SECTIONS:
        figures = [_figure(chart) for chart in CHARTS if chart.name in names]
        if any(charts[name]["lines"] for name in names):
            yield _section(title, words, figures)
    yield from _matrices(told)
    yield _costs(told)
    yield _facts(told)


def _section(title: str, words: str, figures: Iterable[str]) -> str:
    grid = f'<div class="grid">{"".join(figures)}</div>'
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(words)}</p>{grid}</section>"


def _figure(chart: Chart) -> str:
    title, note = html.escape(chart.title), html.escape(chart.note)
    plot = f'<div class="plot" data-chart="{chart.name}" role="img" aria-label="{title}"></div>'
    return f"<figure><figcaption><h3>{title}</h3><p>{note}</p></figcaption>{plot}</figure>"


def _title(told: Told) -> str:
    ways = len(told["variants"])
    counted = {1: "one way", 2: "two ways", 3: "three ways", 4: "four ways"}[ways]
    return f"One transformer of {told['settings']['depth']} layers, connected {counted}"


def _finding(told: Told) -> str:
    """Return a sentence that states the gains."""
    said = [
        f"{_short(one['gain_forward'][-1])} times in {name}"
        for name, one in told["variants"].items()
        if name != "residual"
    ]
    if not said:
        return "A residual connection passes every signal on as it is."
    depth = told["settings"]["depth"]
    return f"Over {depth} layers, the residual path can amplify a signal {', '.join(said)}."


def _short(number: float | None) -> str:
    if number is None:
        return "more than numbers can hold"
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.2f}"


def _tile(name: str, one: Told) -> str:
    numbers = {
        "loss at the end, nats a byte": _plain(one["final_loss"]),
        "gain of the signal": _short(one["gain_forward"][-1]),
        "gain of the gradient": _short(one["gain_backward"][0]),
        "parameters": f"{one['parameters'] / 1e6:.2f} M",
    }
    rows = "".join(
        f"<div><dt>{head}</dt><dd>{number}</dd></div>" for head, number in numbers.items()
    )
    what = html.escape(one["what"])
    return (
        f'<div class="card" data-of="{name}"><h3 class="name">{name}</h3>'
        f'<p class="soft">{what}</p><dl class="numbers">{rows}</dl></div>'
    )


def _plain(number: float | None) -> str:
    return "none" if number is None else f"{number:.3f}"


def _matrices(told: Told) -> Iterable[str]:
    """Yield a section for each kind of matrix, with places for the pictures of every layer's."""
    names = [name for name in told["variants"] if name != "residual"]
    if not names:
        return
    for kind, title, words in (
        ("h_res", "H_res of every layer", "Row i says what stream i becomes. "),
        ("products", "The products H_l ... H_1", "What has become of the streams by layer l. "),
    ):
        more = (
            "Strong colour is 1 or, where an entry is larger, the largest entry; amber is "
            "negative. Below each: the layer, and \u00d7 its gain. Means over the tokens."
        )
        strips = (
            f'<figure class="wide" data-of="{name}"><figcaption><h3 class="name">{name}</h3>'
            f'</figcaption><div class="heat" data-of="{name}" data-kind="{kind}"></div></figure>'
            for name in names
        )
        yield _section(title, words + more, strips)


def _costs(told: Told) -> str:
    ways = told["variants"]
    bars = [_bars("Milliseconds of a step", {k: 1e3 * v["seconds"] for k, v in ways.items()})]
    memory = {k: v["memory"] / 1e6 for k, v in ways.items() if v["memory"]}
    if memory:
        bars.append(_bars("Megabytes of a step", memory))
    words = (
        "Small models on a CPU say little of large ones on a GPU, where mHC's share is a few per "
        "cent; mhc bench measures that. Times are medians; bytes are what JAX's compiler plans for "
        "a step, or the most that MLX held in one."
    )
    return _section("What does it cost here?", words, bars)


def _bars(title: str, numbers: Mapping[str, float]) -> str:
    most = max(numbers.values())
    rows = "".join(
        f'<span class="name" data-of="{name}">{name}</span>'
        f'<i data-of="{name}" style="width:{100 * number / most:.1f}%"></i>'
        f'<span class="value">{number:.4g}</span>'
        for name, number in numbers.items()
    )
    return (
        f'<figure><figcaption><h3>{title}</h3></figcaption><div class="bars">{rows}</div></figure>'
    )


def _facts(told: Told) -> str:
    facts = {"command": told["command"], "date": told["date"], "text": told["text"]}
    facts |= told["settings"] | {"SHA-256 of the text": told["settings"]["text"]}
    facts["text"] = told["text"]
    for group in ("machine", "devices", "versions"):
        facts |= told[group]
    rows = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in facts.items()
    )
    return f"<details><summary>Run it again</summary><table>{rows}</table></details>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="told">{told}</script>
<script>{library}</script>
<script>{script}</script>
</body>
</html>
"""
