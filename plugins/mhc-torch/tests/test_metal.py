"""torch-metal through the public API on a CPU: texts, arguments and launches, without a Mac."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mps_on_cpu
import numpy
import pytest
import torch
from calls import CALLS, C, Call, N, T, assert_close, gradients
from mps_on_cpu import NAME, SPEC, compile_shader, simulator
from torch import Tensor

import mhc_core as mhc
import mhc_torch
from mhc_backends.overview import overview, sections
from mhc_backends.proof import KernelProof
from mhc_backends.proof.child import FaultError
from mhc_backends.proof.launches import calls, launches, planned
from mhc_conformance import Subject
from mhc_conformance.checks import check
from mhc_core import machine, math
from mhc_core.errors import BackendUnavailableError, UnsupportedError
from mhc_core.selection import registered
from mhc_torch import metal
from mhc_torch.metal import proof
from mhc_torch.metal.host import Metal
from mhc_torch.plans.functions import functions
from mhc_torch.plans.kernels import Kernels

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
SHARED = Call("combine", ((3, 2, N, C), (3, 2, C), (N,), (N, N)))  # one mapping for all tokens
WITHOUT = Call("combine", ((T, N, C), (T, C), (T, N)), absent=(3,))
BY_OP = {call.op: call for call in CALLS}
OPS = ("combine_pre", "expand", "sinkhorn_knopp", "static_layer")


@pytest.fixture(autouse=True, scope="module")
def _backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Register the backend, with compiled kernels in a folder of the tests' own."""
    folder = tmp_path_factory.mktemp("simulator")
    folder.chmod(0o700)
    with registered(SPEC), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHC_SIMULATOR_CACHE", str(folder))
        yield


def _kernels(call: Call, backend: str = NAME) -> Callable[..., Any]:
    names = list(math.load(call.op).OP.arrays)

    def function(*arrays: Tensor) -> Any:
        named = dict(zip(names, call.placed(arrays), strict=False))
        return getattr(mhc, call.op)(**named, **call.static, backend=backend)

    return function


def _torch(call: Call) -> Callable[..., Any]:
    return _kernels(call, "torch")


# ---- the ops -------------------------------------------------------------------------------------

KINDS = [  # ops of different launches, in the narrow dtypes, of which the kit has fewer cases
    ("combine", "float16"),
    ("gated_combine", "float16"),
    ("pre", "float16"),
    ("rms_norm", "bfloat16"),
    ("sinkhorn", "bfloat16"),
]


@pytest.mark.parametrize(("op", "dtype"), KINDS)
@pytest.mark.parametrize("kind", ["forward", "gradient"])
def test_the_kit(op: str, dtype: str, kind: str) -> None:
    before = mps_on_cpu.launched()
    record = check(Subject(NAME), op, dtype, kind, 0)
    assert record.passed, record.detail
    assert mps_on_cpu.launched() > before


@pytest.mark.parametrize(
    "call",
    [*(BY_OP[op] for op in OPS), SHARED, WITHOUT],
    ids=lambda call: f"{call.op}-{len(call.shapes)}",
)
def test_outputs_and_gradients(call: Call) -> None:
    arrays = call.arrays(torch.float32)
    assert_close(_kernels(call)(*arrays), _torch(call)(*arrays), **CLOSE)
    assert_close(gradients(_kernels(call), arrays), gradients(_torch(call), arrays), **CLOSE)


def test_tensors_that_begin_anywhere_and_strided_ones() -> None:
    call = BY_OP["combine"]
    plain = [a.detach() for a in call.arrays(torch.float16)]
    ahead = [torch.cat([a.new_zeros(1), a.flatten()])[1:].view(a.shape) for a in plain]
    gaps = [a.repeat_interleave(2, -1)[..., ::2] for a in plain]
    want = _kernels(call)(*plain)
    for arrays in (ahead, gaps):
        assert_close(_kernels(call)(*arrays), want, rtol=0, atol=0)


def test_no_tokens() -> None:
    before, x = mps_on_cpu.launched(), torch.zeros(0, N, C)
    assert mhc.aggregate(x, torch.zeros(0, N), backend=NAME).shape == (0, C)
    assert mps_on_cpu.launched() == before


def test_a_compiler_sees_one_graph() -> None:
    call = BY_OP["combine"]
    compiled = torch.compile(_kernels(call), fullgraph=True)
    arrays = call.arrays(torch.float32)
    assert_close(compiled(*arrays), _kernels(call)(*arrays), rtol=0, atol=0)
    got, want = gradients(compiled, arrays), gradients(_kernels(call), arrays)
    assert_close(got, want, rtol=0, atol=0)


# ---- a wrong launch is noticed -------------------------------------------------------------------


def _swapped(made: Any) -> Any:
    first, second, *rest = made.reads
    return made._replace(reads=[second, first, *rest])


def _swapped_last(made: Any) -> Any:
    *rest, before, last = made.reads
    return made._replace(reads=[*rest, last, before])


def _lengths(made: Any) -> Any:
    first, *rest = made.lengths[0]
    return made._replace(lengths=([*rest, first],))


def _lengths_first(made: Any) -> Any:
    return made._replace(reads=[lambda _: made.lengths[0], *made.reads], lengths=())


def _groups(made: Any) -> Any:
    """Count threadgroups in the grid, as CUDA does, where PyTorch counts threads."""
    x, y, z = made.threads
    return made._replace(threads=(x // made.group_size[0], y, z))


def _missing(made: Any) -> Any:
    return made._replace(reads=made.reads[:-1])


WRONG = [_swapped, _swapped_last, _lengths, _lengths_first, _groups, _missing]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__.strip("_"))
def test_a_wrong_launch_fails(wrong: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = Metal._launched

    def launched(*given: Any) -> Any:
        return wrong(right(*given))

    x, h_pre = torch.randn(3, 4, 40), torch.randn(3, 4)
    want = mhc.aggregate(x, h_pre, backend="torch")
    own, _ = functions(Kernels("torch-metal-right", Metal(compile_shader, "cpu")))
    assert_close(own("aggregate")(x, h_pre), want, **CLOSE)
    monkeypatch.setattr(Metal, "_launched", launched)
    op, _ = functions(Kernels("torch-metal-wrong", Metal(compile_shader, "cpu")))
    with pytest.raises((simulator.SimulatorError, AssertionError, RuntimeError)):
        assert_close(op("aggregate")(x, h_pre), want, **CLOSE)


def test_an_array_of_another_dtype_is_read_as_it_lies() -> None:
    """Check that the stand-in looks at no dtype, as PyTorch does not."""
    text = """#include <metal_stdlib>
using namespace metal;
[[kernel]] void twice(
  const device float* x [[buffer(0)]],
  device float* out [[buffer(1)]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
out[thread_position_in_grid.x] = 2 * x[thread_position_in_grid.x];
}
"""
    kernel, x, out = compile_shader(text).twice, torch.arange(1.0, 5), torch.empty(4)
    kernel(x, out, threads=(4, 1, 1), group_size=(4, 1, 1))
    assert torch.equal(out, 2 * x)
    kernel(x.view(torch.int32), out, threads=(4, 1, 1), group_size=(4, 1, 1))
    assert torch.equal(out, 2 * x)
    with pytest.raises(simulator.KernelFaultError):
        kernel(x.half(), out, threads=(4, 1, 1), group_size=(4, 1, 1))
    with pytest.raises(AssertionError, match="bound twice"):
        kernel(out, out, threads=(4, 1, 1), group_size=(4, 1, 1))
    with pytest.raises(RuntimeError, match="function state object for: half"):
        _ = compile_shader(text).half
    with pytest.raises(RuntimeError, match="ASCII"):
        compile_shader(text + "// \u00e9")


# ---- the proof on a machine ----------------------------------------------------------------------


def _proof(host: str) -> KernelProof:
    own = mhc_torch.METAL.proof
    assert isinstance(own, KernelProof)
    made = copy.copy(own)
    vars(made).update(_name="torch-metal-tried", _launcher=f"mps_on_cpu:{host}", _verdicts={})
    return made


def test_it_proves_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_CACHE", str(tmp_path))
    kind = ("sinkhorn", ("float32", "float32"), 2)
    assert _proof("host").verdict(*kind) is None
    (file,) = tmp_path.rglob("*.json")
    kept = json.loads(file.read_text())
    assert kept["classes"] == {"sinkhorn": "held", "sinkhorn_vjp": "held"}
    assert {"torch", "chip", "mhc-core"} <= set(kept["identity"])
    assert _proof("nowhere").verdict(*kind) is None  # from the cache


def test_a_wrong_number_is_no_proof() -> None:
    """Check without the process, which takes PyTorch's import."""
    call = calls("sinkhorn", ("float32", "float32"), 2, planned)[0]
    op, vjp = functions(Kernels("torch-metal-wrong-proof", mps_on_cpu.wrong_host()))
    told: dict[str, Any] = {}
    with pytest.raises(FaultError, match=r"h_res is off by 0.001, .*; forward; kernels sinkhorn"):
        proof._prove(call, op("sinkhorn"), vjp, "cpu", lambda **said: told.update(said))
    assert told["failed"] == ["sinkhorn", "sinkhorn_vjp"]


def test_the_proof_tries_what_mlx_tries() -> None:
    for kind in (("combine", ("float32",) * 5, 4), ("pre", ("bfloat16", *["float32"] * 6), 4)):
        tried: list[set[str]] = []
        for of in (launches, planned):
            chosen = calls(*kind, of)
            tried.append({one.class_ for call in chosen for one in of(call)})
        assert tried[0] == tried[1]


# ---- what it takes, and errors -------------------------------------------------------------------


def _on(kind: str) -> Any:
    return SimpleNamespace(is_mps=kind == "mps", is_cuda=kind == "cuda", device=kind)


def test_it_takes_mps_tensors() -> None:
    host = object()  # NumPy's arrays have no is_mps
    for arrays in ([_on("mps")], [host, host], [host, _on("mps")]):
        assert metal.takes(arrays) is None
    for arrays in ([_on("cpu")], [host, _on("cpu")]):
        assert metal.takes(arrays) == "takes MPS tensors, not those on cpu"
    torch.vmap(_under_vmap)(torch.zeros(2))


def _under_vmap(x: Tensor) -> Tensor:
    assert metal.takes([_on("mps")]) == metal.NO_VMAP
    return x


def test_it_is_chosen_for_the_tensors_that_it_takes() -> None:
    """Check with CPU tensors in place of MPS tensors, and float64 for what kernels do not have."""

    def takes(arrays: Any) -> str | None:
        return None if arrays[0].is_contiguous() else "takes contiguous tensors"

    x, h_pre = torch.randn(3, N, C), torch.randn(3, N)
    op = mps_on_cpu.launched
    with registered(replace(SPEC, name="torch-metal-first", automatic=True, takes=takes)):
        for arrays, expected in (
            ((x, h_pre), 1),
            ((x.mT.contiguous().mT, h_pre), 0),
            ((x.double(), h_pre.double()), 0),
        ):
            before = op()
            mhc.aggregate(*arrays)
            assert op() - before == expected
        with pytest.raises(UnsupportedError, match="takes contiguous tensors"):
            mhc.aggregate(x.mT.contiguous().mT, h_pre, backend="torch-metal-first")
        with pytest.raises(UnsupportedError, match="has no float64"):
            mhc.aggregate(x.double(), h_pre.double(), backend="torch-metal-first")


def test_a_machine_without_metal_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal.sys, "platform", "linux")
    assert "need macOS on Apple silicon, and this is linux" in str(metal.missing())
    monkeypatch.setattr(metal.sys, "platform", "darwin")
    monkeypatch.setattr(metal.platform, "machine", lambda: "x86_64")
    assert "and this is darwin on x86_64" in str(metal.missing())
    monkeypatch.setattr(metal.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert metal.missing() == metal.NO_MPS
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert metal.missing() is None
    for value, refused in (("1", True), ("", True), ("0", False)):  # as PyTorch reads it
        monkeypatch.setenv(metal.FAST_MATH, value)
        assert (f"{metal.FAST_MATH} is {value!r}" in str(metal.missing())) == refused


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has an MPS device")
def test_without_mps_every_way_in_is_an_error() -> None:
    import mhc_torch.metal.ops as ops

    x, h_pre = torch.zeros(3, N, C), torch.zeros(3, N)
    if sys.platform != "darwin":
        with pytest.raises(BackendUnavailableError, match="'torch-metal' cannot run here"):
            mhc.aggregate(x, h_pre, backend="torch-metal")
    with pytest.raises(BackendUnavailableError, match="finds no MPS device"):
        ops.from_host(numpy.zeros(3, numpy.float32))
    with pytest.raises(BackendUnavailableError, match=r"kernel aggregate .* finds no MPS device"):
        ops.aggregate(x, h_pre)


def test_a_text_that_is_refused_is_an_error_that_names_the_kernel() -> None:
    def refuses(text: str) -> Any:
        raise SyntaxError("program_source:1: error: no")  # as c10::SyntaxError comes to Python

    op, _ = functions(Kernels("torch-metal-refused", Metal(refuses, "cpu")))
    with pytest.raises(BackendUnavailableError, match=r"kernel aggregate .*program_source:1"):
        op("aggregate")(torch.zeros(3, N, C), torch.zeros(3, N))


def test_mhc_info_says_that_it_has_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "devices", dict)  # which would import every library
    lines = [line for many in sections(overview()).values() for line in many]
    (at,) = (k for k, line in enumerate(lines) if line.startswith("torch-metal: "))
    assert "never run on a Mac" in lines[at + 2]
    with pytest.raises(TypeError, match="note is 3; needs words, or None"):
        replace(mhc_torch.METAL, note=cast("Any", 3))
