"""jax-cuda on a CPU: its plans and its handler, with CUDA texts that g++ compiles."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="JAX is not installed")
import jax
import jax.numpy as jnp
from jax import export
from jax_on_cpu import DEVICE, NAME, SPEC, TARGET, needs_gcc

import mhc_core as mhc
from mhc_backends import jax_cuda
from mhc_backends.jax_cuda import library
from mhc_backends.kernels import nvrtc
from mhc_conformance.cases import Case, Sizes, data
from mhc_conformance.telling import SECOND
from mhc_core import math
from mhc_core.selection import registered

pytestmark = [
    needs_gcc,
    pytest.mark.skipif(jax.version.__version_info__[:2] < jax_cuda.NEEDED, reason="JAX is older"),
]
ERRORS = (ValueError, jax.errors.JaxRuntimeError)  # a handler's, called at once or by a thread
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
PLUGIN = Path(__file__).parents[1] / "plugins" / "mhc-jax-cuda"
SIZES = Sizes((2,), 3, 5, "small, with tails of every kind")


def _small(case: Case, **changes: Any) -> Case:
    static = {**case.options, **({"n": 3} if "n" in case.options else {})}
    if "variant" in static:
        static["variant"] = replace(static["variant"], sinkhorn_iterations=3)
    return replace(case, sizes=SIZES, shared=False, static=tuple(static.items()), **changes)


# Each has a kind of step, buffer or result that the others lack. PyTorch's tests run the texts of
# all ops on a CPU, and each more costs g++ half a second.
OPS = (
    *("combine", "combine_pre", "contract", "head", "pre", "residual_add_aggregate", "sinkhorn"),
    "static_layer",  # whose launches read parts of buffers
    "pre_residual",  # of which an input is a result
    "gated_head",  # whose vjp reads three saved arrays
)
BY_OP = {case.op: _small(case) for case in SECOND if case.op in OPS}
CASES = {
    **BY_OP,
    "combine, one mapping for all": replace(BY_OP["combine"], shared=True),
    "combine, unmixed": replace(BY_OP["combine"], unmixed=True),
    "combine_pre, h_pre given": replace(BY_OP["combine_pre"], optional=True),
    "pre, narrow": replace(BY_OP["pre"], narrow=True),
}
DTYPES = {"pre, narrow": "bfloat16"}
every_case = pytest.mark.parametrize("name", list(CASES))


def _arrays(name: str) -> tuple[Any, ...]:
    return tuple(data(CASES[name], DTYPES.get(name, "float32"), 0).primals)


@pytest.fixture(autouse=True, scope="module")
def _backend() -> Iterator[None]:
    """Register the backend, with the functions of all calls in one program."""
    calls: list[tuple[str, Any, Any, Sequence[int]]] = []
    for name, case in CASES.items():
        placed = case.placed(_arrays(name))
        there = [(one.shape, str(one.dtype)) for one in placed if one is not None]
        absent = [place for place, one in enumerate(placed) if one is None]
        calls.append((case.op, there, case.options, absent))
    DEVICE.prepare_calls(calls)
    with registered(SPEC):
        yield


def _function(name: str, backend: str = NAME) -> Callable[..., Any]:
    case = CASES[name]

    def function(*arrays: Any) -> Any:
        op = math.load(case.op).OP
        named = dict.fromkeys(op.optional) | dict(zip(op.arrays, case.placed(arrays), strict=False))
        return getattr(mhc, case.op)(**named, **case.options, backend=backend)

    return function


def _several(outputs: Any) -> list[Any]:
    every = outputs if isinstance(outputs, tuple) else (outputs,)
    return [one for one in every if one is not None]


def _assert_close(got: Any, want: Any, **tolerances: float) -> None:
    for a, b in zip(_several(got), _several(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), **(tolerances or CLOSE)
        )


def _loss(function: Callable[..., Any], power: int = 2) -> Callable[..., Any]:
    return lambda *arrays: sum((one**power).sum() for one in _several(function(*arrays)))


# ---- right ---------------------------------------------------------------------------------------


@every_case
def test_outputs_and_gradients(name: str) -> None:
    """Compare with NumPy; gradients by JAX and by mhc.vjp."""
    case, arrays, before = CASES[name], _arrays(name), DEVICE.launched
    device = [jnp.asarray(one) for one in arrays]
    loose = {"rtol": 2e-2, "atol": 2e-2} if name in DTYPES else CLOSE
    want = _function(name, "numpy")(*arrays)
    got, pull = jax.vjp(lambda *given: tuple(_several(_function(name)(*given))), *device)
    _assert_close(got, tuple(_several(want)), **loose)
    with mhc.no_grad():
        _assert_close(_function(name)(*device), got, rtol=0, atol=0)
    assert DEVICE.launched > before
    cotangents = tuple(
        np.random.default_rng(1).normal(size=one.shape).astype(one.dtype) for one in got
    )
    given = iter(cotangents)
    every = want if isinstance(want, tuple) else (want,)
    placed = tuple(None if one is None else next(given) for one in every)
    asked = case.op, case.placed(arrays), placed
    pulled = mhc.vjp(*asked, **case.options, backend="numpy")
    _assert_close(pull(tuple(map(jnp.asarray, cotangents))), tuple(_several(pulled)), **loose)
    moved = [
        tuple(None if one is None else jnp.asarray(one) for one in group) for group in asked[1:]
    ]
    _assert_close(mhc.vjp(case.op, *moved, **case.options, backend=NAME), pulled, **loose)


@pytest.mark.parametrize(("op", "orders"), [("combine", (2, 3)), ("head", (2,))])
def test_second_and_third_derivatives(op: str, orders: tuple[int, ...]) -> None:
    x, *others = (jnp.asarray(one) for one in _arrays(op))

    def higher(backend: str, order: int) -> Any:
        gradient = jax.grad(lambda x: _loss(_function(op, backend), 3)(x, *others))
        for _ in range(order - 1):
            gradient = jax.grad(lambda x, g=gradient: (g(x) ** 2).sum())
        return jax.jit(gradient)(x)

    for order in orders:
        got, want = higher(NAME, order), higher("jax", order)
        scale = float(jnp.abs(want).max())
        _assert_close(got / scale, want / scale, rtol=1e-4, atol=1e-4)


def test_transforms() -> None:
    """jit, scan, checkpoint, vmap of forwards and of gradients, with a parameter for each too."""
    x, y, h_post, h_res = (jnp.asarray(one) for one in _arrays("combine"))
    function = _function("combine")

    def chain(x: Any) -> Any:
        return jax.lax.scan(lambda x, _: (function(x, y, h_post, h_res), None), x, None, length=3)[
            0
        ]

    want = x
    for _ in range(3):
        want = function(want, y, h_post, h_res)
    _assert_close(jax.jit(chain)(x), want)
    gradient = jax.grad(lambda x: (chain(x) ** 2).sum())(x)
    checkpointed = jax.grad(lambda x: (jax.checkpoint(chain)(x) ** 2).sum())(x)
    _assert_close(jax.jit(jax.grad(lambda x: (chain(x) ** 2).sum()))(x), gradient)
    _assert_close(checkpointed, gradient)
    many, axes = (
        (jnp.stack([x, -x, x * 2]), jnp.stack([h_res, h_res * 2, h_res], -1)),
        (0, None, None, -1),
    )
    each = [
        (function(a, y, h_post, b), jax.grad(_loss(function), 3)(a, y, h_post, b))
        for a, b in zip(many[0], jnp.moveaxis(many[1], -1, 0), strict=True)
    ]
    got = jax.vmap(function, axes)(many[0], y, h_post, many[1])
    _assert_close(got, jnp.stack([one for one, _ in each]))
    got = jax.vmap(jax.grad(_loss(function), 3), axes)(many[0], y, h_post, many[1])
    _assert_close(got, jnp.stack([one for _, one in each]))


@pytest.mark.parametrize(
    ("name", "of", "axes", "loops"),
    [
        ("pre", None, (0, None, None, None), False),
        ("pre", None, (0, 0, None, None), True),  # a phi for each
        ("pre", 0, (0, None, None, None), True),  # whose kernels sum phi's gradient too
        ("combine", 3, (0, None, None, 1), False),
        ("gated_head", 0, (0, None, None, None), True),
        ("combine, one mapping for all", None, (0, None, None, 0), False),
        ("combine, one mapping for all", 3, (0, None, None, None), True),
    ],
)
def test_vmap_is_one_launch_where_parameters_are_shared(
    name: str, of: int | None, axes: tuple[Any, ...], loops: bool
) -> None:
    """Compare with a Python loop, and look for a loop in the program."""
    arrays = [jnp.asarray(one) for one in _arrays(name)]
    function = _function(name)
    if of is not None:
        function = jax.grad(_loss(function), of)
    many = [
        one if axis is None else jnp.stack([one, one / 2, -one], axis)
        for one, axis in zip(arrays, axes, strict=True)
    ]
    each = [
        function(*[one if axis is None else jnp.take(one, k, axis) for one, axis in pairs])
        for pairs in [list(zip(many, axes, strict=True))]
        for k in range(3)
    ]
    got = jax.vmap(function, axes)(*many)
    _assert_close(got, jax.tree.map(lambda *some: jnp.stack(some), *each))
    assert ("while" in _text(jax.vmap(function, axes), *many)) == loops


def test_shard_map_gives_gradients_of_what_is_shared() -> None:
    name = "combine, one mapping for all"
    arrays = [jnp.asarray(one) for one in _arrays(name)]
    gradient = jax.grad(_loss(_function(name)), (0, 3))
    mesh, spec = _mesh(), jax.sharding.PartitionSpec
    given = (spec("data"), spec("data"), spec(), spec())
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=given, out_specs=(spec("data"), spec()))
    _assert_close(jax.jit(sharded)(*arrays), gradient(*arrays))


def _mesh() -> Any:
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def test_no_tokens() -> None:
    x, *parameters = (jnp.asarray(one) for one in _arrays("pre"))
    h, h_post, h_res = _function("pre")(x[:0], *parameters)
    assert (h.shape, h_post.shape, h_res.shape) == ((0, 5), (0, 3), (0, 3, 3))
    assert not jax.grad(_loss(_function("pre")), 1)(x[:0], *parameters).any()


def test_forward_mode_is_refused_with_the_remedy() -> None:
    x, *others = (jnp.asarray(one) for one in _arrays("combine"))
    with pytest.raises(TypeError, match=r"no forward mode.*backend='jax'"):
        jax.jvp(lambda x: _function("combine")(x, *others), (x,), (x,))
    with mhc.no_grad(), pytest.raises(TypeError, match=r"no forward mode.*backend='jax'"):
        jax.jvp(lambda x: _function("combine")(x, *others), (x,), (x,))


# ---- programs of XLA -----------------------------------------------------------------------------


def _text(function: Callable[..., Any], *arrays: Any) -> str:
    return jax.jit(function).lower(*arrays).as_text()


def test_launches_that_need_nothing_of_jax_are_one_call() -> None:
    calls = {}
    for name in ("pre", "pre, narrow", "combine_pre"):
        device = [jnp.asarray(one) for one in _arrays(name)]
        with mhc.no_grad():
            forward = _text(_function(name), *device)
        both = _text(jax.grad(_loss(_function(name)), tuple(range(len(device)))), *device)
        calls[name] = [text.count(f"custom_call @{TARGET}") for text in (forward, both)]
    # combine_pre's vjp adds two gradients, between the kernels of its two halves
    assert calls == {"pre": [1, 2], "pre, narrow": [1, 2], "combine_pre": [1, 3]}


def test_a_program_names_functions_by_their_texts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    device = [jnp.asarray(one) for one in _arrays("pre")]
    first = _text(_function("pre"), *device)
    jax.clear_caches()
    assert _text(_function("pre"), *device) == first
    wanted = library.Wanted("a text", 4096)
    assert wanted.digest == hashlib.sha256(f"4096\n{nvrtc.PRELUDE}a text".encode()).hexdigest()
    assert wanted.digest != library.Wanted("a text", 8192).digest
    digests = re.findall(r'functions = "(\w+)"', first)
    assert digests
    assert all(len(one) % 64 == 0 for one in digests)


def test_an_exported_program_runs_and_says_what_it_lacks() -> None:
    device = [jnp.asarray(one) for one in _arrays("combine")]
    allowed = [export.DisabledSafetyCheck.custom_call(TARGET)]
    function = jax.jit(jax.grad(_loss(_function("combine"))))
    program = export.export(function, disabled_checks=allowed)(*device)
    _assert_close(program.call(*device), function(*device))
    DEVICE.forget()
    try:
        with pytest.raises(ERRORS, match=r"function \w{64} is not known"):
            jax.block_until_ready(program.call(*device))
    finally:
        DEVICE.restore()


@pytest.mark.parametrize(
    "launches",
    [
        [0, 1, 1, 32, 0],  # no number of arguments
        [1, 1, 1, 32, 0, 0],  # a function that is not there
        [0, 1, 1, 32, 0, 1, 2, 0],  # a buffer that is not there
        [0, 1, 1, 32, 0, 2, 0, 0],  # an argument that is not there
        [0, 1, 1, 32, 0, -1],
    ],
)
def test_a_broken_program_is_an_error(launches: list[int]) -> None:
    out = jax.ShapeDtypeStruct((4,), jnp.float32)
    call = jax.ffi.ffi_call(TARGET, out)
    with pytest.raises(ERRORS, match="attributes of a call"):
        jax.block_until_ready(
            call(jnp.ones(4), functions="0" * 64, launches=np.array(launches, np.int64))
        )


# ---- the library for GPUs ------------------------------------------------------------------------


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[library.Gpu]:
    """Build the library for GPUs as at first use, with a compiler of kernels that compiles none."""
    monkeypatch.setattr(library, "prebuilt", lambda: None)
    monkeypatch.setenv("MHC_CACHE", str(tmp_path))
    monkeypatch.setattr(
        nvrtc, "compiled", lambda text, architecture: f"{architecture} {text}".encode()
    )
    monkeypatch.setattr(library, "TARGET", f"mhc_test_{tmp_path.name}")
    made = library.Gpu()
    monkeypatch.setattr(library.Gpu, "architectures", ("sm_80", "sm_90"))
    yield made
    made._library.mhc_on_missing(None)


def test_the_library_is_built_once_and_knows_texts_of_other_processes(
    gpu: library.Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = (tmp_path / "jax-cuda").iterdir()
    monkeypatch.setattr(library, "build", lambda *_: pytest.fail("built again"))
    assert library.built(library.FOLDER / library.SOURCE) == file
    assert gpu.memory == 163 * 1024  # the least of all
    wanted = library.Wanted("the text", 0)
    gpu.prepare([wanted, wanted])
    monkeypatch.setattr(nvrtc, "write", lambda *_: pytest.fail("written again"))
    gpu.prepare([wanted])
    assert nvrtc.read(tmp_path / "text" / f"{wanted.digest}.cu") == b"the text"
    assert gpu._found(wanted.digest.encode(), b"sm_100") == 1
    assert gpu._found(b"0" * 64, b"sm_100") == 0


@pytest.mark.usefixtures("gpu")
def test_what_was_traced_for_a_gpu_is_refused_on_a_cpu() -> None:
    call = jax.ffi.ffi_call(library.TARGET, jax.ShapeDtypeStruct((4,), jnp.float32))
    with pytest.raises(ERRORS, match=r"traced for a GPU .* backend='jax'"):
        jax.block_until_ready(call(jnp.ones(4), functions="", launches=np.zeros(0, np.int64)))


def test_the_wheel_has_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hatchling", reason="hatchling, which builds it, is not installed")
    if not PLUGIN.is_dir():
        pytest.skip("a source archive has no plugins")
    command = [sys.executable, "-m", "build", "-nx", "--outdir", str(tmp_path), str(PLUGIN)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    archive, wheel = sorted(tmp_path.iterdir(), key=lambda path: path.suffix)
    with tarfile.open(archive) as files:
        sources = {Path(name).name for name in files.getnames() if "/native/" in name}
    assert sources == {library.SOURCE, "plan_handler.h"}
    assert re.search(r"-py3-none-manylinux_2_\d+_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(library, "built", lambda *_: pytest.fail("built at first use"))
    loaded = library._load()
    assert Path(loaded._name) == library.prebuilt() == tmp_path / "site/mhc_jax_cuda/cuda.so"
    monkeypatch.setattr(library, "VERSION", 0)  # a wheel of another version of mhc-core
    with pytest.raises(pytest.fail.Exception, match="built at first use"):
        library._load()


def test_what_is_needed_to_build_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library.compiler() is None
    with pytest.raises(mhc.BackendUnavailableError, match=r"mhc-jax-cuda, or a C\+\+ compiler"):
        library.build(library.FOLDER / library.SOURCE, tmp_path, tmp_path / "new.so")
    monkeypatch.undo()
    with pytest.raises(mhc.BackendUnavailableError, match=r"failed: [\s\S]*c_api.h"):
        library.build(library.FOLDER / library.SOURCE, tmp_path, tmp_path / "new.so")
    assert list(tmp_path.iterdir()) == []


# ---- what it takes -------------------------------------------------------------------------------


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = mhc.backends()["jax-cuda"].reason
    if reason is None:
        pytest.skip("this machine has one")
    assert any(word in reason for word in ("plugin for CUDA", "driver", "no GPU"))
    monkeypatch.setattr(jax_cuda, "_version", lambda: (0, 9))
    assert jax_cuda.missing() == "needs JAX 0.10 or later"
    monkeypatch.undo()
    monkeypatch.setattr(jax_cuda, "PLUGINS", ("no_such_plugin",))
    assert "pip install 'jax[cuda13]'" in str(jax_cuda.missing())
    monkeypatch.setattr(jax_cuda, "PLUGINS", ("jax",))
    monkeypatch.setattr(jax_cuda, "devices", lambda: 0)
    assert jax_cuda.missing() == "NVIDIA's driver finds no GPU"
    monkeypatch.setattr(jax_cuda, "devices", lambda: 1)
    monkeypatch.setattr(nvrtc, "missing", lambda: None)
    assert jax_cuda.missing() is None
    monkeypatch.setattr(nvrtc, "missing", lambda: "no NVRTC")
    assert jax_cuda.missing() == "no NVRTC"
    monkeypatch.setattr(library, "prebuilt", lambda: None)
    monkeypatch.setattr(library, "compiler", lambda: None)
    assert "plugins/mhc-jax-cuda" in str(jax_cuda.missing())


def _gpu(capability: str) -> Any:
    return SimpleNamespace(platform="gpu", compute_capability=capability, device_kind="GPU X")


def test_it_takes_arrays_on_one_gpu_with_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_cuda, "_REFUSED", {})
    x = jnp.ones(3)
    assert jax_cuda.takes([np.ones(3), x]) == "takes arrays on NVIDIA GPUs, not those on cpu"
    assert jax_cuda._refusal([_gpu("9.0")]) is None
    assert "8.0 or later, and GPU X has 7.5" in str(jax_cuda._refusal([_gpu("7.5")]))
    assert "not those on gpu" in str(jax_cuda._refusal([_gpu("gfx90a")]))
    assert jax_cuda._refusal([_gpu("9.0")] * 2) is None
    assert "GPU X has 7.5" in str(jax_cuda._refusal([_gpu("9.0"), _gpu("7.5")]))
    monkeypatch.setattr(jax_cuda, "_gpus", lambda: False)
    assert "finds none here" in str(jax_cuda.takes([np.ones(3)]))


def test_it_takes_tracers_for_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str | None] = []

    def traced(x: Any) -> Any:
        found.append(jax_cuda.takes([x]))
        return x

    monkeypatch.setattr(jax_cuda, "_REFUSED", {})
    jax.jit(traced).lower(jnp.ones(3))
    assert "not those on cpu" in str(found.pop())
    monkeypatch.setattr(jax_cuda, "_REFUSED", {})
    monkeypatch.setattr(jax_cuda, "_first", lambda: _gpu("9.0"))
    jax.jit(lambda x: traced(x)).lower(jnp.ones(3))
    assert found.pop() is None
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    jax.jit(lambda x: traced(x) * 1).lower(jnp.ones(3))
    assert found.pop() is None
    auto, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
    spec = jax.sharding.PartitionSpec("data")
    for types, manual, reason in (
        ((auto, auto), ("data", "model"), None),
        ((auto, auto), ("data",), "data Manual, model Auto; backend='jax' takes any"),
        ((auto, explicit), ("data",), "data Manual, model Explicit"),
    ):
        mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=types)
        mapped = jax.shard_map(
            traced, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={*manual}
        )
        jax.jit(mapped).lower(jnp.ones(3))
        last = found.pop()
        assert last is None if reason is None else reason in str(last)
    with jax.default_device(jax.devices("cpu")[0]):
        jax.jit(lambda x: traced(x) * 2).lower(jnp.ones(3))
    assert "not those on cpu" in str(found.pop())
