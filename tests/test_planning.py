"""``mhc plan`` and its formulas, against counted and measured bytes."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mhc_core import DEEPSEEK_V4, HY_V4
from mhc_core.cli import app
from mhc_core.planning import LAYOUTS, MODELS, Model, Quantity, plan, total

KERNELS = (Path(__file__).parents[1] / "docs/kernels.md").read_text(encoding="utf-8")
SMALL = Model(layers=4, channels=64, variant=DEEPSEEK_V4)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "200"})


# ---- the formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "name"), [(DEEPSEEK_V4, ""), (HY_V4, ", no H_res")])
def test_traffic_is_what_the_table_of_kernels_calls_ideal(variant: Any, name: str) -> None:
    """Compare with the table in docs/kernels.md, which comes from the ops' declarations."""
    one = plan(Model(layers=1, channels=4096, variant=variant), tokens=64)
    for part, row in (("forward", f"combine_pre{name}"), ("backward", f"combine_pre vjp{name}")):
        (cells,) = re.findall(rf"^\| \*\*{row}\*\* \|(.*)\|$", KERNELS, re.MULTILINE)
        ideal = cells.split("|")[-2].strip().replace(",", "")
        mine = total([q for q in one.traffic if q.name.startswith(part)])
        assert f"{mine / one.sublayers / 1024:.1f}" == ideal


def test_what_is_kept_is_what_jax_keeps() -> None:
    """Compare with the bytes that jax.vjp of a stack holds for its backward pass."""
    jax: Any = pytest.importorskip("jax", reason="JAX is not installed")
    import jax.numpy as jnp

    import mhc_core as mhc

    tokens, n, C, m = 48, SMALL.n, SMALL.channels, SMALL.columns
    keys = jax.random.split(jax.random.key(0), 9)
    x = jax.random.normal(keys[8], (tokens, n, C))
    phi = [jax.random.normal(key, (m, n * C)) / 16 for key in keys[:8]]
    scale, bias = jnp.ones(3), jnp.zeros(m)

    def stack(x: Any, phi: Any, scale: Any, bias: Any) -> Any:
        h, h_post, h_res = mhc.pre(x, phi[0], scale, bias, DEEPSEEK_V4)
        for own in phi[1:]:  # each layer is h^2, which keeps h
            x, h, _, h_post, h_res = mhc.combine_pre(
                x, h * h, h_post, h_res, own, scale, bias, DEEPSEEK_V4
            )
        return mhc.combine(x, h * h, h_post, h_res)

    parameters = (phi, scale, bias)
    _, pullback = jax.vjp(stack, x, *parameters)
    held = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(pullback)}
    for leaf in jax.tree.leaves(parameters):
        held.pop(leaf.unsafe_buffer_pointer(), None)
    kept = sum(leaf.nbytes for leaf in held.values())
    planned = total(plan(SMALL, tokens=tokens, itemsize=4).kept)
    assert planned <= kept * 1.02
    assert kept <= planned * 1.02


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_optimum_is_least(name: str, layout: Any) -> None:
    model = MODELS[name]
    best = plan(model, tokens=4096, devices=8, layout=layout)
    assert best.segment == best.optimum
    for segment in range(1, best.sublayers + 1):
        other = plan(model, tokens=4096, devices=8, layout=layout, segment=segment)
        assert total(other.recomputed) >= total(best.recomputed)
    assert total(best.recomputed) < total(best.kept)


def test_a_stack_chooses_a_segment_near_the_optimum() -> None:
    from mhc_backends.nn_common import segment

    for model in MODELS.values():
        best = plan(model, tokens=4096)
        auto = plan(model, tokens=4096, segment=segment("auto", model.n, best.sublayers))
        assert total(auto.recomputed) < 1.05 * total(best.recomputed)


def test_devices_share_what_the_layout_shares() -> None:
    model, tokens, devices = MODELS["deepseek-v4-flash"], 4096, 8

    def sizes(quantities: tuple[Quantity, ...]) -> list[int]:
        return [one.size for one in quantities]

    alone = plan(model, tokens=tokens)
    assert alone.communication == ()
    by = {name: plan(model, tokens=tokens, devices=devices, layout=name) for name in LAYOUTS}
    assert by["data"].communication == by["sequence"].communication
    streams, mappings = sizes(alone.kept)
    assert sizes(by["data"].kept) == [streams // devices, mappings // devices]
    assert sizes(by["channels"].kept) == [streams // devices, mappings]
    assert by["data"].parameters == alone.parameters
    phi = 4 * alone.sublayers * model.columns * model.n * model.channels
    saved = alone.parameters[0].size - by["channels"].parameters[0].size
    assert saved == phi - phi // devices
    assert by["pipeline"].sublayers == 2 * 6  # of 43 layers, 6 on the fullest of 8


def test_a_stage_sends_streams_and_in_one_pass_the_mix() -> None:
    sizes: dict[str, Any] = {"layers": 4, "channels": 64}
    for devices, sides in ((2, 1), (4, 2)):
        plain, single = (
            plan(
                Model(**sizes, single_pass=one),
                tokens=10,
                devices=devices,
                layout="pipeline",
            )
            for one in (False, True)
        )
        assert plain.sent == sides * 10 * 4 * 64 * 2
        assert single.sent == plain.sent + sides * 10 * 4 * 4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tokens": 0}, "plan: tokens is 0; needs"),
        ({"devices": 3, "layout": "channels"}, "plan: devices is 3; needs a divisor of C=64"),
        ({"devices": 5, "layout": "pipeline"}, "plan: devices is 5; needs at most 4, the layers"),
        ({"layout": "diagonal"}, "plan: layout is 'diagonal'; needs 'data' or"),
        ({"segment": -1}, "plan: segment is -1; needs"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        plan(SMALL, **{"tokens": 8, **wrong})


# ---- the command ---------------------------------------------------------------------------------


def test_the_table_has_every_layout_and_the_formulas() -> None:
    done = run("--model", "v4-pro", "--tokens", "65536", "--bandwidth", "3350", "--link", "450")
    assert done.exit_code == 0, done.output
    for words in (*LAYOUTS, "L T (n + 2) C s", "2 (D - 1) / D x 4 L T (m + 1)", "at 450 GB/s"):
        assert words in done.output
    assert re.search(r"L, sublayers +│ +122 ", done.output)


def test_the_json_and_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    picture = tmp_path / "plan.png"
    words = ("--model", "hy-v4", "--devices", "5", "--bandwidth", "100", "--plot", str(picture))
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(record["layouts"]) == set(LAYOUTS) - {"channels"}
    assert record["left_out"] == [
        "channels is left out: devices is 5; needs a divisor of C=6144 for channels"
    ]
    data = record["layouts"]["data"]
    moved = sum(one["size"] for one in data["traffic"])
    assert data["seconds"] == {"traffic": moved / 100 / 1e9}


def test_a_measured_bandwidth_is_that_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy 1 MiB under a clock that goes on by 1/4 s: three copies a turn, read and written."""
    from mhc_core.cli.bench import _library, _timing

    clock = itertools.count(step=0.25)
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(_library.Library, "copied_bytes", 1 << 20)
    record = json.loads(run("--model", "hy-v4", "--bandwidth", "measured", "--json").stdout)
    assert record["bandwidth_gb_per_s"] == pytest.approx(3 * 2 * (1 << 20) / 0.25 / 1e9)
    data = record["layouts"]["data"]
    moved = sum(one["size"] for one in data["traffic"]) / 1e9
    assert data["seconds"] == {"traffic": pytest.approx(moved / record["bandwidth_gb_per_s"])}


def test_a_link_is_measured_between_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tests/test_sharded.py`` measures one between 8 devices."""
    pytest.importorskip("jax", reason="JAX is not installed")
    import jax

    monkeypatch.setattr(jax, "device_count", lambda: 1)
    done = run("--model", "hy-v4", "--link", "measured")
    assert done.exit_code == 2
    assert "--link is 'measured'; needs two devices, JAX has 1 here: give GB/s" in done.output


def test_a_config_is_read_by_its_family(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "hc_mult": 2}
    file.write_text(json.dumps({"model_type": "hy_v4", **sizes}))
    for path in (file, tmp_path):
        record = json.loads(run("--model", str(path), "--devices", "2", "--json").stdout)
        assert [record[key] for key in ("layers", "C", "n", "m")] == [3, 64, 2, 4]
        assert record["single_pass"] is False
    file.write_text(json.dumps({"model_type": "deepseek_v41", **sizes}))
    record = json.loads(run("--model", str(file), "--devices", "2", "--json").stdout)
    assert (record["m"], record["single_pass"]) == (8, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model nope", "--model is 'nope'; needs a config.json or its folder, or one of deep"),
        ("--model v4-pro --layout x", "--layout is 'x'; needs one of data, sequence"),
        (
            "--model v4-pro --devices 3 --layout channels",
            "--devices is 3; needs a divisor of C=7168 for channels",
        ),
        ("--model v4-pro --tokens 0", "--tokens"),
        ("--model v4-pro --link -3", "--link is '-3'; needs GB/s above 0, or 'measured'"),
        ("--model v4-pro --bandwidth x", "--bandwidth is 'x'; needs GB/s above 0"),
        ("--model v4-pro --plot x.nothing", "--plot is 'x.nothing'; needs a name"),
        ("", "--model"),
    ],
)
def test_a_wrong_line_ends_in_one_line(words: str, said: str) -> None:
    done = run(*words.split())
    assert done.exit_code == 2
    assert said in done.output
    assert len(done.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "needs a JSON object"),
        ('{"num_hidden_layers": 3}', "it has no hc_mult, hidden_size"),
        (
            '{"num_hidden_layers": 3, "hidden_size": -1, "hc_mult": 4}',
            "hidden_size is -1; needs",
        ),
        (
            '{"model_type": "qwen4_exp", "num_hidden_layers": 3, "hidden_size": 8, "hc_count": 4}',
            "Qwen4-Exp has gated residuals",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    done = run("--model", str(file))
    assert done.exit_code == 2
    assert said in done.output
    assert "--model" in done.output
    assert len(done.output.splitlines()) == 1


# ---- the page ------------------------------------------------------------------------------------


def test_the_table_of_the_page_is_the_plan() -> None:
    from mhc_core.cli.plan._table import amount

    page = (Path(__file__).parents[1] / "docs/scaling.md").read_text(encoding="utf-8")
    rows = {tuple(cells.split(" | ")) for cells in re.findall(r"^\| (.*) \|$", page, re.MULTILINE)}
    for name, model in MODELS.items():
        for layout in ("data", "channels", "pipeline"):
            one = plan(model, tokens=65536, devices=8, layout=layout)
            sizes = (amount(total(one.kept)), f"{one.optimum}", amount(total(one.recomputed)))
            label = "data, sequence" if layout == "data" else layout
            assert (name, label, *sizes, amount(one.moved), amount(one.sent)) in rows
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (said,) = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)
    assert done.stdout.decode().strip() == said, done.stderr.decode()
