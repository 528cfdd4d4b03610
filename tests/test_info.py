"""mhc info: its facts, its reasons for what does not run, and what it keeps to itself."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner, Result

import mhc_core
from mhc_backends.kernels import KERNELS
from mhc_backends.kernels.launch import launch
from mhc_backends.kernels.table import TABLE
from mhc_core.cli import app
from mhc_core.machine import devices
from mhc_core.text import safe

if TYPE_CHECKING:
    from conftest import Plugins

SIZES = ("--T", "64", "--n", "4", "--C", "100", "--dtype", "float16")


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["info", *arguments])
    assert result.exit_code == 0, result.output
    return result


def found(*arguments: str) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json").stdout)


def test_every_backend_is_there_with_its_reason() -> None:
    here = found()["backends"]
    assert [one["name"] for one in here] == list(mhc_core.backends())
    for one, backend in zip(here, mhc_core.backends().values(), strict=True):
        assert one["available"] is backend.available
        assert (one["reason"] is None) is backend.available
    text = run().stdout
    metal = mhc_core.backends()["mlx-metal"]
    assert metal.reason is None or f"mlx-metal: cannot run here: {metal.reason}" in text
    assert "numpy: runs here" in text


def test_versions_and_devices() -> None:
    told = found()
    assert told["versions"]["mhc-core"] == version("mhc-core")
    assert {"numpy", "mlx", "jax"} <= set(told["versions"])
    assert told["devices"]["mlx"].split(",")[0] in ("cpu", "gpu")
    assert told["devices"]["jax"].split(",")[0] in ("cpu", "gpu")
    assert told["machine"]["cores"] >= 1
    assert told["machine"]["processor"]


def test_a_device_is_told_by_the_library_s_best_backend(plugins: Plugins) -> None:
    def no_driver() -> str:
        raise RuntimeError("no driver\nin /home/jane")

    def not_there() -> str:
        raise ImportError("not installed")

    plugins.only("numpy")
    plugins.backend("slow", array_types=("one.Array",), device=lambda: "cpu")
    plugins.backend("fast", array_types=("one.Array",), device=lambda: "gpu", priority=1)
    plugins.backend("broken", array_types=("two.Array",), device=no_driver)
    plugins.backend("absent", array_types=("three.Array",), device=not_there)
    plugins.backend("silent", array_types=("four.Array",))
    plugins.backend("runs", array_types=("five.Array",), device=lambda: "cpu")
    absent = {"missing": lambda: "needs a GPU", "priority": 1}
    plugins.backend("needs-gpu", array_types=("five.Array",), device=no_driver, **absent)
    assert devices() == {"one": "gpu", "two": "RuntimeError: no driver", "five": "cpu"}
    assert devices(["one", "four"]) == {"one": "gpu"}


def test_every_kernel_has_one_row_and_it_is_the_launch() -> None:
    launches = found(*SIZES)["launches"]
    assert launches["refused"] is None
    assert list(launches["kernels"]) == list(KERNELS)
    combine = launches["kernels"]["combine"]
    want = launch("combine", 64, 4, 100, "float16")
    assert combine["takes"] == TABLE["combine"].groups
    assert combine["grid"] == list(want.grid)
    assert combine["elements"] == want.elements == 4
    text = run(*SIZES).stdout
    assert "kernel launches for T=64 n=4 C=100 float16" in text
    for kernel in KERNELS:
        assert sum(line.split()[:1] == [kernel] for line in text.splitlines()) == 1, kernel
    other = found("--C", "4096", "--dtype", "float16")["launches"]["kernels"]["combine"]
    assert other["elements"] > combine["elements"]


def test_it_says_why_more_streams_are_refused() -> None:
    told = found("--n", "33")
    assert told["launches"]["kernels"] == {}
    assert "from 1 to 32, not 33" in told["launches"]["refused"]
    by_name = {one["name"]: one["refuses"] for one in told["backends"]}
    assert "from 1 to 32, not 33" in by_name["mlx-metal"]
    assert by_name["mlx-compiled"] is None
    text = run("--n", "33").stdout
    assert text.count("takes n from 1 to 32, not 33") >= 2


def test_broken_and_disabled_plugins(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.point("nonsense", "a_module_that_nobody_has")
    monkeypatch.setenv("MHC_DISABLE_PLUGINS", "jax")
    told = found()
    problems = {one["name"]: one["problem"] for one in told["plugins"]}
    assert "ModuleNotFoundError" in problems["nonsense"]
    assert problems["jax"] == "left out by MHC_DISABLE_PLUGINS"
    assert problems["numpy"] is None
    backends = {one["name"]: one for one in told["backends"]}
    assert backends["nonsense"]["available"] is False
    assert "jax" not in backends
    text = run().stdout
    assert "nonsense: cannot run here: plugin 'nonsense' is broken" in text


def test_variables_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MHC_BACKEND" not in found()["environment"]
    monkeypatch.setenv("MHC_BACKEND", "numpy")
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    monkeypatch.setenv("MLX_SOMETHING_ELSE", "a private value")
    monkeypatch.setenv("ANOTHER_SETTING", "a private value")
    told = found()["environment"]
    assert told["MHC_BACKEND"] == "numpy"
    assert told["MLX_ENABLE_TF32"] == "0"
    assert told["MLX_SOMETHING_ELSE"] == "(set)"
    text = run().stdout
    assert "MHC_BACKEND=numpy" in text
    assert "private" not in text
    assert "ANOTHER" not in text


def test_a_tuning_file_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = tmp_path / "private" / "tuning.json"
    monkeypatch.setenv("MHC_KERNEL_TUNING", str(missing))
    for text in (run().stdout, run("--json").stdout):
        assert ".../tuning.json" in text
        assert "cannot be read" in text
        assert str(tmp_path) not in text


def test_nothing_tells_who_asks(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    home = "/home/jane.doe"
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("USER", "jane.doe")
    monkeypatch.setenv("MHC_KERNEL_TUNING", f"{home}/jane.doe.json")

    def broken() -> Any:
        raise OSError(f"cannot read {home}/models, /Users/jane.doe/x or C:\\Users\\jane.doe\\x")

    plugins.plugin("private", broken)
    for text in (run().stdout, run("--json").stdout):
        assert "cannot read ~/models" in text
        assert "jane" not in text


def test_paths_of_homes_are_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/data/people/j")
    monkeypatch.delenv("USER", raising=False)
    assert safe("at '/data/people/j/x.py'") == "at '~/x.py'"
    assert safe("at /home/k/x.py, /opt/home.txt") == "at ~/x.py, /opt/home.txt"
    assert safe(r"at C:\Users\k\x.py") == r"at ~\x.py"
