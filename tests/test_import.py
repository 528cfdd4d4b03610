"""The cost and the effects of ``import mhc_core``, and the docstrings of the public names."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest

import mhc_core
from mhc_conformance import oracle
from mhc_core import _api, discovery, math, selection, variants

HEAVY = ("numpy", "jax", "mlx", "array_api_compat", "torch", "ml_dtypes", "pluggy", "typer", "rich")
BESIDE = "asyncio, http.client, unittest.mock"  # 1.6 times what our import costs
OPS = [name for name in _api.__all__ if name != "vjp"]

IMPORT = """
import sys, time
start = time.process_time()
import {modules}
print(time.process_time() - start, *sorted(sys.modules))
"""


def _in_a_new_process(code: str, *options: str) -> str:
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_import_brings_no_array_library() -> None:
    _, *modules = _in_a_new_process(IMPORT.format(modules="mhc_core")).split()
    assert not set(HEAVY) & set(modules)
    assert not [name for name in modules if name.startswith(("mhc_backends", "mhc_core.math"))]


def test_import_is_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # with bytecode, which installers write; the first run makes it
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))

    def seconds(modules: str) -> float:
        return float(_in_a_new_process(IMPORT.format(modules=modules)).split()[0])

    for modules in ("mhc_core", BESIDE):
        seconds(modules)
    # side by side: what a second of a machine is worth changes with what else it does
    ratios = [seconds("mhc_core") / seconds(BESIDE) for _ in range(5)]
    assert min(ratios) < 0.8, f"import mhc_core takes {ratios} times what {BESIDE} take"


def test_discovery_imports_no_array_library() -> None:
    code = "import sys, mhc_core.discovery as d; d.discover(); print(*sorted(sys.modules))"
    assert not {"numpy", "jax", "mlx", "torch"} & set(_in_a_new_process(code).split())


def test_submodules_come_when_they_are_used() -> None:
    code = (
        "import sys, mhc_core; assert 'mhc_core.mlx' not in sys.modules;"
        "print(mhc_core.mlx.HyperConnection.__name__, mhc_core.diagnostics.__name__)"
    )
    assert _in_a_new_process(code).split() == ["HyperConnection", "mhc_core.diagnostics"]
    with pytest.raises(AttributeError, match="has no attribute 'mxl'"):
        _ = mhc_core.mxl  # type: ignore[attr-defined]


def test_a_numpy_call_imports_neither_jax_nor_mlx() -> None:
    code = (
        "import sys, numpy, mhc_core as mhc; mhc.sinkhorn(numpy.zeros((2, 2)));"
        "print(*sorted(sys.modules))"
    )
    assert not {"jax", "mlx", "torch"} & set(_in_a_new_process(code).split())


@pytest.mark.parametrize("name", ["mhc_core", "mhc_core.mlx", "mhc_backends", "mhc_conformance"])
def test_no_name_is_there_by_accident(name: str) -> None:
    assert "annotations" not in dir(importlib.import_module(name))


CONSTANTS = ["DEEPSEEK_V4", "DEEPSEEK_V41", "GLM53_FLASH", "HY_V4", "LIGER", "PAPER", "XING40"]
CLASSES = [
    *("Backend", "BackendError", "BackendUnavailableError"),
    *("UnknownBackendError", "UnsupportedError", "Variant"),
]


def test_the_public_names_are_the_ops_and_these() -> None:
    functions = sorted([*math.OPS, "vjp", "backends", "mixers", "no_grad", "use_backend"])
    assert mhc_core.__all__ == [*CONSTANTS, *CLASSES, *functions]
    assert _api.__all__ == sorted([*math.OPS, "vjp"])


def test_the_ops_are_the_same_everywhere() -> None:
    assert tuple(OPS) == math.OPS
    assert set(oracle.OPS) == set(math.OPS)
    assert all(math.load(op).OP.name == op for op in math.OPS)
    # the list that editors read, which cannot be computed
    listed = re.search(r"__all__ = (\[\s[^]]*\])", inspect.getsource(_api))
    assert listed is not None
    assert ast.literal_eval(listed[1]) == _api.__all__


@pytest.mark.parametrize("name", mhc_core.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(mhc_core, name)
    if isinstance(value, mhc_core.Variant):  # documented by the string below its assignment
        source = inspect.getsource(variants)
        assert re.search(rf'^{name} = .*\n"""\S', source, re.MULTILINE)
    else:
        assert inspect.getdoc(value)


UNSHAPED = ("combine_pre", "combine_pre_norm", "static_mappings")


@pytest.mark.parametrize("op", OPS)
def test_every_op_tells_its_formula_shapes_result_and_errors(op: str) -> None:
    text = inspect.getdoc(getattr(_api, op)) or ""
    heads = ("Parameters\n---", "Returns\n---", "Notes\n---", "Errors: see :mod:`mhc_core._api`")
    for head in heads:
        assert head in text, f"{op}: no {head!r}"
    parameters, returns = text.split("Parameters\n", 1)[1].split("Returns\n", 1)
    assert re.search(r"\w\S* /?= \S", text.split("Parameters\n")[0]), f"{op}: no formula"
    assert "``[" in parameters or "As for" in parameters, f"{op}: no shapes"
    assert "[..." in returns or op in UNSHAPED, f"{op}: no result's shape"
    for name in inspect.signature(getattr(_api, op)).parameters:
        assert re.search(rf"^(.*, )?{name}(,.*)?$", parameters, re.MULTILINE), f"{op}: no {name}"


def test_errors_are_documented_where_the_ops_point() -> None:
    text = inspect.getdoc(_api) or ""
    for word in ("Errors:", "TypeError", "ValueError", "BackendError", "Dtypes:", "Shapes:"):
        assert word in text


def test_every_op_has_its_declared_arguments() -> None:
    for op in OPS:
        declared = math.load(op).OP
        names = list(inspect.signature(getattr(_api, op)).parameters)
        own = {*declared.arrays, *declared.static}
        # with its norm, an op is another one, which the same function calls
        normed = math.load(f"{op}_norm").OP if f"{op}_norm" in OPS else declared
        more = {*normed.arrays, *normed.static} - own
        assert set(names) == {*own, *more, "backend"}
        arrays = [name for name in names if name in declared.arrays]
        assert arrays == list(declared.arrays), "vjp's primals would come in another order"


@pytest.mark.parametrize("module", [_api, discovery, selection, variants], ids=lambda m: m.__name__)
def test_examples_run(module: ModuleType) -> None:
    assert numpy.float32(1).shape == ()  # the examples write NumPy's numbers as plain lists
    result = doctest.testmod(module, raise_on_error=False)
    assert result.attempted
    assert not result.failed
