"""The collectives of programs that JAX compiles for several devices, and their bytes.

Programs for eight devices are compiled and run in one process of their own, since JAX must be told
of the devices before it starts. Here it is two sublayers in every layout. As a command, this file
prints a line for each op too: ``python tests/test_sharded.py``; docs/records has what it printed.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import needs_gcc

from mhc_core import DEEPSEEK_V4
from mhc_core.planning import Model, plan

DEVICES, B, S, n, C = 8, 8, 16, 4, 64
MODEL = Model(layers=1, channels=C, n=n, variant=DEEPSEEK_V4)
M = MODEL.columns
SETTINGS = (
    "auto, sequence",
    "explicit, data",
    "shard_map, data",
    "auto, channels",
    "explicit, channels",
    "shard_map, channels",
)
GATED = ("auto, gated", "explicit, gated", "shard_map, gated")  # channels
GATED_KERNELS = ("auto, gated, jax-cuda",)  # whose formulas keep what its kernels would
R = 6  # the rank of the gates
KERNELS = ("auto, all", "explicit, all", "shard_map, all")  # two axes of tokens and one of channels
TOKENS = tuple(name for name in SETTINGS if "channels" not in name)
CHANNELS = tuple(name for name in SETTINGS if "channels" in name)
FLAGS = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """Return the collectives of two sublayers, forward and with gradients, by setting."""
    pytest.importorskip("jax", reason="JAX is not installed")
    both = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    done = subprocess.run(
        [sys.executable, __file__, "--json"],
        env={**os.environ, "XLA_FLAGS": both, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "setting",
    [
        *SETTINGS,
        *GATED,
        *[pytest.param(name, marks=needs_gcc) for name in (*KERNELS, *GATED_KERNELS)],
    ],
)
def test_results_are_those_of_one_device(setting: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[setting]["error"] < 2e-5


@pytest.mark.parametrize("setting", TOKENS)
def test_sharded_tokens_exchange_only_gradients_of_parameters(
    setting: str, found: dict[str, dict[str, Any]]
) -> None:
    assert found[setting]["forward"] == []
    collectives = found[setting]["gradient"]
    assert {kind for kind, _ in collectives} == {"all-reduce"}
    (planned,) = plan(MODEL, tokens=B * S, devices=DEVICES, layout="data").communication
    # under jit, XLA sums m products for scale's gradient over the devices before it adds them to 3
    columns = 0 if setting.startswith("shard_map") else 4 * (M - 3)
    total = sum(size for _, size in collectives)
    assert total == planned.count * (planned.size + columns)


@pytest.mark.parametrize("setting", CHANNELS)
def test_sharded_channels_take_one_all_reduce_a_sublayer_and_direction(
    setting: str, found: dict[str, dict[str, Any]]
) -> None:
    planned = plan(MODEL, tokens=B * S, devices=DEVICES, layout="channels").communication
    forward, backward = planned
    assert found[setting]["forward"] == [["all-reduce", forward.size]] * forward.count
    collectives = found[setting]["gradient"]
    sums = sorted(size for kind, size in collectives if kind == "all-reduce")
    assert sums == sorted([forward.size] * forward.count + [backward.size] * backward.count)
    gathered = [collective for collective in collectives if collective[0] != "all-reduce"]
    # phi on all devices needs its whole gradient on each; phi sharded with the streams does not
    whole = [] if setting.startswith("shard_map") else [["all-gather", 4 * M * n * C]] * 2
    assert gathered == whole


@pytest.mark.parametrize(
    "setting", [*GATED, *[pytest.param(name, marks=needs_gcc) for name in GATED_KERNELS]]
)
def test_sharded_gates_sum_mean_squares_and_the_low_rank_products(
    setting: str, found: dict[str, dict[str, Any]]
) -> None:
    T = 4 * B * S
    head = [T * n, T * R]
    sums = [T * n, T * (R + n), *head]  # of the connection, then of the head
    assert found[setting]["forward"] == [["all-reduce", size] for size in sums]
    collectives = found[setting]["gradient"]
    pulled = sorted([*sums, T * R, T * n, T * (R + n), T * n])
    gathered = [size for kind, size in collectives if kind == "all-gather"]
    if setting.startswith("shard_map"):  # H_post's gradient beside the connection's
        assert sorted(size for _, size in collectives) == pulled
        assert gathered == []
    else:  # the gradients of whole weights, each of which all devices need
        weights = [4 * n * C * k for k in (1, R, R, n)]
        assert sorted(gathered) == sorted([*weights, *weights[:3]])
        assert {kind for kind, _ in collectives} == {"all-reduce", "all-gather"}


@needs_gcc
@pytest.mark.parametrize("setting", KERNELS)
def test_kernels_exchange_no_more_than_formulas(
    setting: str, found: dict[str, dict[str, Any]]
) -> None:
    """A sublayer of ``jax-cuda``, of which each device has a part of the tokens and channels."""
    assert found[setting]["launched"] > 0
    T, m = B * S // 4, M  # the tokens of a device
    assert found[setting]["forward"] == [["all-reduce", 4 * T * (m + 1)]]
    collectives = found[setting]["gradient"]
    sums = sorted(size for kind, size in collectives if kind == "all-reduce")
    of_parameters = 4 * (m * n * C // 2 + m + 3)
    assert sums == sorted([4 * T * (m + 1), 4 * T * (2 * n + n * n), of_parameters])
    gathered = [collective for collective in collectives if collective[0] != "all-reduce"]
    # phi on all devices needs its whole gradient on each; phi sharded with the streams does not
    whole = [] if setting.startswith("shard_map") else [["all-gather", 4 * m * n * C]]
    assert gathered == whole


def test_a_link_is_measured_by_an_all_reduce(found: dict[str, dict[str, Any]]) -> None:
    """A ring sends 2 (D - 1) / D of what it sums, here 4 KiB in 1/4 s."""
    link: Any = found["link"]
    assert link[0] is None
    assert link[1] == pytest.approx(2 * (DEVICES - 1) / DEVICES * 4096 / 0.25 / 1e9)


def test_what_does_not_fit_sharded_channels_is_refused(found: dict[str, dict[str, Any]]) -> None:
    refused: Any = found["refused"]
    assert refused["phi"].startswith(
        "pre: phi is the same on all devices of axis 'd'; needs a part"
    )
    assert refused["h_pre"] == (
        "aggregate: h_pre varies over axis 'd'; needs to be the same on all its devices"
    )
    assert refused["op"].startswith(
        "pre_scale: it takes no sharded channels; of the ops, aggregate"
    )


# ---- inside the process with several devices -----------------------------------------------------

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
ARRAY = re.compile(r"(f32|bf16|f16|f64|s32|u32|pred)\[([\d,]*)\]")
SIZES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}


def collectives(hlo: str) -> list[tuple[str, int]]:
    """Return the kind and the bytes of the result of each collective in compiled HLO."""
    calls: list[tuple[str, int]] = []
    for result, kind in COLLECTIVE.findall(hlo):
        arrays = ARRAY.findall(result)
        size = sum(
            SIZES[dtype] * int(np.prod([int(k) for k in shape.split(",") if k], dtype=np.int64))
            for dtype, shape in arrays
        )
        calls.append((kind, size))
    return calls


def two_sublayers(x: Any, *parameters: Any) -> Any:
    """Run pre, combine_pre and combine, around layers without arrays."""
    import jax.numpy

    import mhc_core

    mhc: Any = mhc_core
    jnp: Any = jax.numpy
    first, second = parameters[:3], parameters[3:]
    h, h_post, h_res = mhc.pre(x, *first, DEEPSEEK_V4)
    x, h, _, h_post, h_res = mhc.combine_pre(x, jnp.tanh(h), h_post, h_res, *second, DEEPSEEK_V4)
    return mhc.combine(x, jnp.tanh(h), h_post, h_res)


def one_sublayer(x: Any, *parameters: Any) -> Any:
    """Run pre and combine, around a layer without arrays."""
    import jax.numpy

    import mhc_core

    mhc: Any = mhc_core
    h, h_post, h_res = mhc.pre(x, *parameters, DEEPSEEK_V4)
    return mhc.combine(x, jax.numpy.tanh(h), h_post, h_res)


def summed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a sum of a function's results whose gradient depends on every number."""
    import jax
    import jax.numpy as jnp

    def loss(*arrays: Any) -> Any:
        return sum(jnp.sum(jnp.sin(out) * out) for out in jax.tree.leaves(function(*arrays)))

    return loss


class Program:
    """A function and its gradients, compiled for devices that share its arrays."""

    def __init__(self, mesh: Any, function: Any, loss: Any, arrays: Any, specs: Any) -> None:
        import jax
        from jax.sharding import NamedSharding

        self.given = [
            jax.device_put(array, NamedSharding(mesh, spec))
            for array, spec in zip(arrays, specs, strict=True)
        ]
        graded: Any = jax.grad(loss, argnums=tuple(range(len(arrays))))
        self.forward: Any = jax.jit(function).lower(*self.given).compile()
        self.gradient: Any = jax.jit(graded).lower(*self.given).compile()

    def collectives(self) -> dict[str, list[tuple[str, int]]]:
        """Return those of the forward, and of the gradients with what they need of it."""
        return {
            "forward": collectives(self.forward.as_text()),
            "gradient": collectives(self.gradient.as_text()),
        }


def _numbers() -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, S, n, C)).astype(np.float32)
    parameters: list[Any] = []
    for _ in range(2):
        phi = rng.normal(size=(M, n * C)).astype(np.float32) / 16
        parameters += [phi, np.ones(3, np.float32), np.zeros(M, np.float32)]
    return x, parameters


def _programs() -> Iterator[tuple[str, Program]]:
    """Compile two sublayers in every setting."""
    import jax
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    import mhc_core
    from mhc_core.jax import HyperConnection, channels_over

    mhc: Any = mhc_core
    connection = HyperConnection(C, n, DEEPSEEK_V4, axis_name="d")
    x, parameters = _numbers()
    everywhere = [P()] * len(parameters)
    specs = {"data": P("d"), "sequence": P(None, "d"), "channels": P(None, None, None, "d")}
    loss = summed(two_sublayers)
    for setting in SETTINGS:
        kind, layout = setting.split(", ")
        axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
        mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(axis_type,))
        own = specs[layout]
        if kind != "shard_map":
            arrays = (x, *parameters)
            yield setting, Program(mesh, two_sublayers, loss, arrays, (own, *everywhere))
            continue
        arrays, all_specs, run = [x, *parameters], [own, *everywhere], two_sublayers
        if layout == "channels":
            for k in (1, 4):
                arrays[k] = arrays[k].reshape(M, n, C)
                all_specs[k] = P(None, None, "d")

            def run(x: Any, *some: Any) -> Any:
                first, second = (
                    dict(zip(("fn", "scale", "base"), own, strict=True))
                    for own in (some[:3], some[3:])
                )
                h, h_post, h_res = connection.pre(first, x)
                x, h, _, h_post, h_res = connection.combine_pre(
                    second, x, jax.numpy.tanh(h), h_post, h_res
                )
                with channels_over("d"):
                    return mhc.combine(x, jax.numpy.tanh(h), h_post, h_res)

        def local(*some: Any, run: Any = run) -> Any:
            lax: Any = jax.lax
            return lax.psum(summed(run)(*some), "d")

        ins = tuple(all_specs)
        mapped = jax.shard_map(run, mesh=mesh, in_specs=ins, out_specs=own)
        total = jax.shard_map(local, mesh=mesh, in_specs=ins, out_specs=P())
        yield setting, Program(mesh, mapped, total, arrays, ins)


def _mapped_sublayer(mesh: Any, x: Any, phi: Any, *others: Any) -> Program:
    """Compile a sublayer in shard_map, with phi sharded as the streams are."""
    import jax
    from jax.sharding import PartitionSpec as P

    from mhc_core.jax import channels_over

    def run(x: Any, phi: Any, *others: Any) -> Any:
        with channels_over("c"):
            return one_sublayer(x, phi.reshape(M, -1), *others)

    def local(*some: Any) -> Any:
        lax: Any = jax.lax
        return lax.psum(summed(run)(*some), ("a", "b", "c"))

    own = P("a", "b", None, "c")
    ins = (own, P(None, None, "c"), P(), P())
    mapped = jax.shard_map(run, mesh=mesh, in_specs=ins, out_specs=own)
    total = jax.shard_map(local, mesh=mesh, in_specs=ins, out_specs=P())
    return Program(mesh, mapped, total, (x, phi.reshape(M, n, C), *others), ins)


def gated_sublayer(x: Any, *weights: Any) -> Any:
    """Run gated_pre, combine and gated_head, around a layer without arrays."""
    import jax.numpy

    import mhc_core

    mhc: Any = mhc_core
    h, h_post = mhc.gated_pre(x, *weights, eps=1e-6)
    x = mhc.combine(x, jax.numpy.tanh(h), h_post, None)
    return mhc.gated_head(x, *weights[:3], eps=1e-6)


def _gated(settings: Sequence[str] = GATED) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compile and run a gated residual and its head with sharded channels."""
    import jax
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    from mhc_core.jax import GatedConnection, GatedHead

    rng = np.random.default_rng(1)
    x, _ = _numbers()
    shapes = {"norm": (n, C), "down": (R, n, C), "up": (n, C, R), "inject": (n, n, C)}
    apart = [rng.normal(size=shape).astype(np.float32) / 4 for shape in shapes.values()]
    flat = [apart[0].ravel(), apart[1].reshape(R, -1), apart[2].reshape(-1, R)]
    arrays = (x, *flat, apart[3].reshape(n, -1))
    loss = summed(gated_sublayer)
    graded: Any = jax.grad(loss, argnums=tuple(range(5)))
    wanted: Any = jax.jit(graded)(*arrays)
    own = P(None, None, None, "d")
    connection, head = (one(C, n, R, axis_name="d") for one in (GatedConnection, GatedHead))

    def run(x: Any, *some: Any) -> Any:
        weights = dict(zip(shapes, some, strict=True))
        return head(weights, connection(weights, x, jax.numpy.tanh))

    def local(*some: Any) -> Any:
        lax: Any = jax.lax
        return lax.psum(summed(run)(*some), "d")

    for setting in settings:
        explicit = setting.startswith("explicit")
        axis_type = AxisType.Explicit if explicit else AxisType.Auto
        mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(axis_type,))
        if setting.startswith("shard_map"):
            ins = (own, P(None, "d"), P(None, None, "d"), P(None, "d"), P(None, None, "d"))
            mapped = jax.shard_map(run, mesh=mesh, in_specs=ins, out_specs=P(None, None, "d"))
            total = jax.shard_map(local, mesh=mesh, in_specs=ins, out_specs=P())
            program = Program(mesh, mapped, total, (x, *apart), ins)
        else:
            program = Program(mesh, gated_sublayer, loss, arrays, (own, *[P()] * 4))
        found: dict[str, Any] = program.collectives()
        yield setting, {**found, "error": _error(program, wanted)}


def _kernels() -> Iterator[tuple[str, dict[str, Any]]]:
    """Compile and run a sublayer of jax-cuda's kernels on a CPU, on eight devices."""
    import jax
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P
    from jax_on_cpu import DEVICE, NAME, SPEC

    from mhc_core import use_backend
    from mhc_core.selection import registered

    x, parameters = _numbers()
    arrays = (x, *parameters[:3])
    loss, every = summed(one_sublayer), tuple(range(4))
    graded: Any = jax.grad(loss, argnums=every)
    wanted: Any = jax.jit(graded)(*arrays)
    specs = (P("a", "b", None, "c"), P(), P(), P())
    with registered(SPEC), use_backend(NAME):
        (setting,) = GATED_KERNELS
        yield setting, next(_gated(GATED[:1]))[1]
        for setting in KERNELS:
            explicit = setting.startswith("explicit")
            axis_type = AxisType.Explicit if explicit else AxisType.Auto
            mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(axis_type,) * 3)
            before = DEVICE.launched
            if setting.startswith("shard_map"):
                program = _mapped_sublayer(mesh, x, *parameters[:3])
            else:
                program = Program(mesh, one_sublayer, loss, arrays, specs)
            found: dict[str, Any] = program.collectives()
            found["error"] = _error(program, wanted)
            yield setting, {**found, "launched": DEVICE.launched - before}


def _error(program: Program, wanted: Any) -> float:
    """Return the largest distance of the gradients from those of one device."""
    import jax

    worst = 0.0
    got: Any = jax.tree.leaves(program.gradient(*program.given))
    for a, b in zip(jax.tree.leaves(wanted), got, strict=True):
        a, b = np.asarray(a), np.asarray(b).reshape(a.shape)
        worst = max(worst, float(np.abs(a - b).max() / np.abs(a).max()))
    return worst


def _refused() -> dict[str, str]:
    """Return the errors of calls that do not fit sharded channels."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    import mhc_core
    from mhc_core.jax import channels_over

    mhc: Any = mhc_core
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    parts = P(None, None, "d")

    def said(function: Any, *arrays: Any, specs: Sequence[Any]) -> str:
        def run(*some: Any) -> Any:
            with channels_over("d"):
                return function(*some)

        mapped = jax.shard_map(run, mesh=mesh, in_specs=tuple(specs), out_specs=P())
        try:  # only traced
            jax.eval_shape(mapped, *arrays)
        except ValueError as error:
            return str(error)
        return "not refused"

    def pre(*some: Any) -> Any:
        return mhc.pre(*some, DEEPSEEK_V4)

    x, own = jnp.ones((S, n, C)), jnp.ones((M, n * C // DEVICES))
    ones = jnp.ones(3), jnp.zeros(M)
    return {
        "phi": said(pre, x, own, *ones, specs=(parts, P(), P(), P())),
        "h_pre": said(mhc.aggregate, x, jnp.ones((S, n * DEVICES)), specs=(parts, P(None, "d"))),
        "op": said(mhc.pre_scale, jnp.ones((S, n * C)), jnp.ones((S, n)), specs=(P(), P())),
    }


def _link() -> tuple[str | None, float]:
    """Measure the link between the devices, under a clock that goes on by 1/4 s."""
    from types import SimpleNamespace

    from mhc_core.cli.plan import _link as link

    clock = itertools.count(step=0.25)
    link.NUMBERS = 1024
    link.time = SimpleNamespace(perf_counter=lambda: next(clock))
    return link.measure()


def _every_op() -> Iterator[str]:
    """Compile every op with sharded tokens, and those that take parts of C with sharded channels.

    Yield a line for each: the collectives of its forward, and those of its gradients.
    """
    import jax
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    import mhc_core as mhc
    from mhc_conformance.cases import SMALL, Case, data, declaration
    from mhc_conformance.telling import SECOND
    from mhc_core.math import OPS
    from mhc_core.sharding import CHANNEL_OPS

    statics = {case.op: case.options for case in SECOND}
    sizes = SMALL._replace(leading=(B, S), C=C)
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    tokens = {"batch": P("d"), "sequence": P(None, "d")}
    for op in OPS:
        case = Case(op, "sharded", sizes, tuple(statics[op].items()))
        arrays = list(data(case, "float32", 0).primals)
        patterns = [words[0] for words in declaration(op).patterns.values()][: len(arrays)]
        for layout in (*tokens, "channels"):
            if layout == "channels" and op not in CHANNEL_OPS:
                continue
            specs = [
                (P(*[None] * (array.ndim - 1), "d") if words[-1] == "C" else P())
                if layout == "channels"
                else (tokens[layout] if array.shape[:2] == (B, S) else P())
                for words, array in zip(patterns, arrays, strict=True)
            ]

            def run(*some: Any, op: str = op) -> Any:
                return getattr(mhc, op)(*some, **statics[op], backend="jax")

            found = Program(mesh, run, summed(run), arrays, specs).collectives()
            yield f"{op:24} {layout:9} {_listed(found)}"


def _listed(found: dict[str, list[tuple[str, int]]]) -> str:
    def words(some: list[tuple[str, int]]) -> str:
        return ", ".join(f"{kind} {size}" for kind, size in some) or "none"

    return f"forward: {words(found['forward'])}; with gradients: {words(found['gradient'])}"


def _main() -> None:
    import jax

    if "--json" not in sys.argv:
        print(f"jax {jax.__version__}, {DEVICES} CPU devices, [{B}, {S}, n, {C}] float32; bytes")
        for setting, program in _programs():
            print(f"{'two sublayers':16} {setting:18} {_listed(program.collectives())}", flush=True)
        for line in _every_op():
            print(line, flush=True)
        return
    x, parameters = _numbers()
    loss = summed(two_sublayers)
    every = tuple(range(7))
    graded: Any = jax.grad(loss, argnums=every)
    wanted: Any = jax.jit(graded)(x, *parameters)
    results: dict[str, Any] = {"refused": _refused(), "link": _link()}
    for setting, program in _programs():
        results[setting] = {**program.collectives(), "error": _error(program, wanted)}
    results |= _gated()
    if not needs_gcc.args[0]:
        results |= _kernels()
    print(json.dumps(results))


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", FLAGS)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    _main()
