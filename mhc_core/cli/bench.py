"""``mhc bench``: how fast the backends are, beside other people's code, in one process.

Both sides get the same fresh random inputs in every repeat and take turns, each after one untimed
run; a row shows the median of the ratios of the repeats. Before any is timed, the two are checked
to agree.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhc_core.cli._baselines import BASELINES, Baseline

if TYPE_CHECKING:
    import numpy

__all__ = ["bench"]

Array = Any
Function = Callable[..., Any]
Transform = Callable[[Function], Function]


class Mode(str, Enum):
    """What is measured."""

    latency = "latency"
    dispatch = "dispatch"


class Dtype(str, Enum):
    """The dtype of the streams."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@dataclass(frozen=True)
class Sizes:
    """T tokens, n streams, C channels, and the dtype of the streams."""

    T: int
    n: int
    C: int
    dtype: str


class DisagreementError(Exception):
    """Ours and the baseline compute different things, so there is nothing to compare."""


# --------------------------------------------------------------------------------------- the rows
# A row is a function of ours and its inputs; a baseline has a function of the same inputs.


@dataclass(frozen=True)
class Input:
    """How a random input is made: normal numbers times ``spread`` plus ``centre``."""

    shape: Callable[[Sizes], tuple[int, ...]]
    spread: float = 1.0
    centre: float = 0.0
    stream: bool = False  # whether it has the streams' dtype, or always float32

    def make(self, sizes: Sizes, rng: numpy.random.Generator) -> Any:
        """Give fresh numbers, none of them zero."""
        import ml_dtypes
        import numpy

        numbers = rng.standard_normal(self.shape(sizes), dtype=numpy.float32)
        numbers = numbers * numpy.float32(self.spread) + numpy.float32(self.centre)
        numbers[numbers == 0] = 1.0
        if not self.stream or sizes.dtype == "float32":
            return numbers
        return numbers.astype(
            ml_dtypes.bfloat16 if sizes.dtype == "bfloat16" else numpy.dtype(sizes.dtype)
        )


X = Input(lambda s: (1, s.T, s.n, s.C), stream=True)
FLAT_X = Input(lambda s: (1, s.T, s.n * s.C), stream=True)
Y = Input(lambda s: (1, s.T, s.C), stream=True)
H_POST = Input(lambda s: (1, s.T, s.n), 0.3, 1.0)
H_RES = Input(lambda s: (1, s.T, s.n, s.n), 0.1, 0.25)
PHI = Input(lambda s: (s.n * s.n + 2 * s.n, s.n * s.C), 0.01)
SCALE = Input(lambda _: (3,), 0.1, 1.0)
BIAS = Input(lambda s: (s.n * s.n + 2 * s.n,), 0.5)
PER_STREAM = Input(lambda s: (s.n,))
MIXING = Input(lambda s: (s.n, s.n))
WEIGHT = Input(lambda s: (s.C,), 0.1, 1.0)


@dataclass(frozen=True)
class Row:
    """One thing to measure; ``ours`` takes the public API, a backend's library and the arrays."""

    name: str
    ours: Function
    inputs: tuple[Input, ...]
    backward: bool  # whether gradients of all inputs are taken too


def _pre(mhc: Any, _: Any, *arrays: Array) -> Any:
    return mhc.pre(*arrays, mhc.DEEPSEEK_V4)


def _combine(mhc: Any, _: Any, *arrays: Array) -> Any:
    return mhc.combine(*arrays)


def _sublayer(mhc: Any, xp: Any, x: Array, phi: Array, scale: Array, bias: Array) -> Any:
    h, h_post, h_res = mhc.pre(x, phi, scale, bias, mhc.DEEPSEEK_V4)
    return mhc.combine(x, xp.tanh(h), h_post, h_res)


def _static_layer(mhc: Any, _: Any, *arrays: Array) -> Any:
    return mhc.static_layer(*arrays)


def _gated_combine(mhc: Any, xp: Any, x: Array, *raw: Array) -> Any:
    mappings = mhc.static_mappings(*raw)
    return mhc.gated_combine(x, xp.tanh(mhc.pre_scale(x, mappings[0])), *mappings)


ROWS = (
    Row("pre", _pre, (X, PHI, SCALE, BIAS), False),
    Row("combine", _combine, (X, Y, H_POST, H_RES), False),
    Row("sublayer", _sublayer, (X, PHI, SCALE, BIAS), True),
    Row("static_layer", _static_layer, (X, PER_STREAM, PER_STREAM, MIXING, WEIGHT), True),
    Row("gated_combine", _gated_combine, (FLAT_X, PER_STREAM, PER_STREAM, MIXING), True),
)


# ---------------------------------------------------------------------------------- the libraries


@dataclass(frozen=True)
class Library:
    """What the measurement needs of an array library."""

    xp: Any
    wait: Function  # finishes the computation of arrays
    pull: Function  # of a forward, its inputs and a cotangent: the outputs and all gradients
    forward: Mapping[str, Transform]  # the ways in which one runs a forward, by name
    step: Mapping[str, Transform]  # and a forward with its backward


def _library(name: str) -> Library:
    return {"jax": _jax, "mlx": _mlx}[name]()


def _jax() -> Library:
    jax: Any = import_module("jax")

    def pull(forward: Function, inputs: Sequence[Array], cotangent: Array) -> Any:
        output, back = jax.vjp(forward, *inputs)
        return output, back(cotangent)

    ways: dict[str, Transform] = {"jax.jit": jax.jit}
    return Library(jax.numpy, jax.block_until_ready, pull, ways, ways)


def _mlx() -> Library:
    mx: Any = import_module("mlx.core")

    def pull(forward: Function, inputs: Sequence[Array], cotangent: Array) -> Any:
        return mx.vjp(forward, list(inputs), [cotangent])

    # A step that is compiled as a whole is fused; what is compiled inside mx.grad is not.
    steps: dict[str, Transform] = {"mx.grad": _unchanged, "mx.compile": mx.compile}
    return Library(mx, mx.eval, pull, {"call": _unchanged}, steps)


def _unchanged(function: Function) -> Function:
    return function


@dataclass(frozen=True)
class Way:
    """How both sides of a row are run."""

    name: str
    ours: Transform
    theirs: Transform


def _ways(row: Row, baseline: Baseline) -> Iterator[Way]:
    """Give the ways in which a row is run beside a baseline."""
    library = _library(baseline.library)

    def step(forward: Function) -> Function:
        def pulled(*arrays: Array) -> Any:
            *inputs, cotangent = arrays
            return library.pull(forward, inputs, cotangent)

        return pulled if row.backward else forward

    def after_step(transform: Transform) -> Transform:
        return lambda forward: transform(step(forward))

    for name, transform in (library.step if row.backward else library.forward).items():
        if name == "mx.compile" and baseline.uncompilable:
            yield Way("mx.compile, theirs mx.grad", after_step(transform), step)
        else:
            yield Way(name, after_step(transform), after_step(transform))


# -------------------------------------------------------------------------------- the measurement


@dataclass(frozen=True)
class Measured:
    """One line of the table."""

    row: str
    backend: str
    vs: str
    way: str
    ratio: float  # baseline / ours: above 1, ours is faster
    ours_ms: float
    baseline_ms: float
    apart: float  # the largest difference, relative to the largest number of its array


def _bind(row: Row, backend: str, xp: Any) -> Function:
    """Give our side of a row as a function of its inputs, on one backend."""
    import mhc_core

    def ours(*arrays: Array) -> Any:
        with mhc_core.use_backend(backend):
            return row.ours(mhc_core, xp, *arrays)

    return ours


def _inputs(row: Row, sizes: Sizes, module: Any, rng: numpy.random.Generator) -> list[Array]:
    made = [spec.make(sizes, rng) for spec in row.inputs]
    if row.backward:
        made.append(row.inputs[0].make(sizes, rng))  # the cotangent, shaped as the streams
    return [module.from_host(array) for array in made]


def _leaves(tree: Any) -> list[Array]:
    if isinstance(tree, (tuple, list)):
        return [leaf for part in tree for leaf in _leaves(part)]  # pyright: ignore
    return [tree]


def _apart(ours: Any, theirs: Any, module: Any) -> float:
    """Compare results array by array, each on the scale of its largest number."""
    import numpy

    worst = 0.0
    hosts = [
        [module.to_host(leaf).astype(numpy.float64) for leaf in _leaves(t)] for t in (ours, theirs)
    ]
    for a, b in zip(*hosts, strict=True):
        if a.shape != b.shape or not (numpy.isfinite(a).all() and numpy.isfinite(b).all()):
            return float("inf")
        worst = max(worst, float(numpy.abs(a - b).max() / max(numpy.abs(b).max(), 1e-30)))
    return worst


def _allowed(dtype: str) -> float:
    """Half of the dtype's digits: far above rounding, far below any mistake in a formula."""
    finfo: Any = import_module("ml_dtypes").finfo
    return float(finfo(dtype).eps) ** 0.5


def _seconds(function: Function, arrays: Sequence[Array], wait: Function) -> float:
    wait(function(*arrays))  # untimed: what came before must not be counted, such as its caches
    gc.collect()
    start = time.perf_counter()
    wait(function(*arrays))
    return time.perf_counter() - start


def measure(
    row: Row, way: Way, backend: str, baseline: Baseline, sizes: Sizes, repeats: int
) -> Measured:
    """Check that both sides agree, then time them in turn."""
    import numpy

    library, module = _library(baseline.library), _module(backend)
    ours = way.ours(_bind(row, backend, library.xp))
    theirs = way.theirs(baseline.load()[row.name])
    rng = numpy.random.default_rng()
    arrays = _inputs(row, sizes, module, rng)
    apart = _apart(ours(*arrays), theirs(*arrays), module)
    if not apart <= _allowed(sizes.dtype):
        raise DisagreementError(
            f"{row.name} ({way.name}): {backend} and {baseline.name} are {apart:.1e} apart; "
            f"allowed is {_allowed(sizes.dtype):.1e}. One of the two is wrong."
        )
    times: list[tuple[float, float]] = []
    for _ in range(repeats):
        arrays = _inputs(row, sizes, module, rng)
        library.wait(arrays)
        our = _seconds(ours, arrays, library.wait)
        times.append((our, _seconds(theirs, arrays, library.wait)))
    return Measured(
        row.name,
        backend,
        baseline.name,
        way.name,
        ratio=statistics.median(their / our for our, their in times),
        ours_ms=1e3 * statistics.median(our for our, _ in times),
        baseline_ms=1e3 * statistics.median(their for _, their in times),
        apart=apart,
    )


def _module(backend: str) -> Any:
    from mhc_core._registry import backends, module

    spec = backends()[backend].spec
    return module(spec) if spec else None


def _array_library(backend: str) -> str:
    """Name the array library of a backend, such as mlx."""
    from mhc_core._registry import backends

    spec = backends()[backend].spec
    return spec.array_types[0].partition(".")[0] if spec else ""


def plan(
    backends: Sequence[str], baselines: Sequence[Baseline]
) -> Iterator[tuple[Row, Way, str, Baseline]]:
    """Give every measurement that the chosen backends and baselines allow."""
    for backend in backends:
        for baseline in baselines:
            if baseline.library != _array_library(backend):
                continue
            has = baseline.load()
            for row in (row for row in ROWS if row.name in has):
                for way in _ways(row, baseline):
                    yield row, way, backend, baseline


# ------------------------------------------------------------------------------------- dispatch


@dataclass(frozen=True)
class Dispatched:
    """What one small call costs before its backend's function begins, in nanoseconds."""

    backend: str
    op: str
    arrays: int
    selection_ns: float
    validation_ns: float
    call_ns: float  # the public call as a whole, with a backend's function that does nothing


SMALL = Sizes(T=2, n=4, C=8, dtype="float32")
SMALL_OPS: Mapping[str, tuple[tuple[Input, ...], dict[str, Any]]] = {
    "aggregate": ((X, H_POST), {}),
    "residual_add_aggregate": ((X, X, H_POST), {}),
    "combine": ((X, Y, H_POST, H_RES), {}),
    "static_layer": ((X, PER_STREAM, PER_STREAM, MIXING, WEIGHT), {"eps": 1e-5, "iterations": 20}),
    "gated_combine": ((FLAT_X, FLAT_X, H_POST, H_POST, H_RES), {}),
    "combine_pre": ((X, Y, H_POST, H_RES, PHI, SCALE, BIAS), {}),
    "combine_pre with h_pre": ((X, Y, H_POST, H_RES, PHI, SCALE, BIAS, H_POST), {}),
}


def dispatch(backend: str, repeats: int) -> Iterator[Dispatched]:
    """Measure selection, validation and the whole overhead of each small call."""
    import numpy

    import mhc_core
    from mhc_core import _registry
    from mhc_core._signature import signature

    own, rng = _module(backend), numpy.random.default_rng()
    for label, (inputs, options) in SMALL_OPS.items():
        op = label.partition(" ")[0]
        arrays = tuple(own.from_host(spec.make(SMALL, rng)) for spec in inputs)
        has_variant = op == "combine_pre"
        static = {"variant": mhc_core.DEEPSEEK_V4} if has_variant else options
        positional = (*arrays[:7], mhc_core.DEEPSEEK_V4, *arrays[7:]) if has_variant else arrays
        measured = {
            "select": partial(
                _registry.select, op, signature(_registry.get_op, op, arrays, static), None, arrays
            ),
            "validate": partial(signature, _registry.get_op, op, arrays, static),
            "call": partial(getattr(mhc_core, op), *positional),
        }
        measured["call"]()  # discovers, selects, imports
        with _without_array_work(_registry):
            times = [_nanoseconds(function, repeats) for function in measured.values()]
        yield Dispatched(backend, label, len(arrays), *times)


@contextmanager
def _without_array_work(registry: Any) -> Generator[None]:
    """Put a function that does nothing in the place of every selected one."""
    selected = registry._SELECTED  # its lookup table, which has no public name

    def nothing(*_: Any, **__: Any) -> None:
        return None

    registry._SELECTED = dict.fromkeys(selected, nothing)
    try:
        yield
    finally:
        registry._SELECTED = selected


def _nanoseconds(function: Callable[[], Any], repeats: int, calls: int = 2000) -> float:
    """Median over the repeats of the mean of many calls, less the cost of the loop itself."""

    def mean(body: Callable[[], Any]) -> float:
        start = time.perf_counter_ns()
        for _ in range(calls):
            body()
        return (time.perf_counter_ns() - start) / calls

    empty = partial(int)  # called as the measured are, and as good as nothing

    mean(function)
    pairs = [(mean(function), mean(empty)) for _ in range(repeats)]
    return statistics.median(full - loop for full, loop in pairs)


# ------------------------------------------------------------------------------------ the command


def bench(
    mode: Annotated[
        Mode,
        typer.Option(help="latency: ops beside other code; dispatch: a call without array work."),
    ] = Mode.latency,
    tokens: Annotated[int, typer.Option("--T", min=1, help="Tokens.")] = 1024,
    n: Annotated[int, typer.Option("--n", min=1, help="Streams.")] = 4,
    channels: Annotated[int, typer.Option("--C", min=1, help="Channels.")] = 1024,
    dtype: Annotated[Dtype, typer.Option(help="The streams' dtype.")] = Dtype.float32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each side.")] = 9,
    backend: Annotated[
        list[str] | None, typer.Option(help="Measure only this backend; may be repeated.")
    ] = None,
    vs: Annotated[
        list[str] | None,
        typer.Option(help=f"Compare only with this: {', '.join(BASELINES)}; may be repeated."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file.")
    ] = None,
) -> None:
    """Measure the backends beside other people's code, on fresh random inputs."""
    from mhc_core.errors import BackendError

    try:
        names = _runnable(backend)
        if mode is Mode.dispatch:
            report = _dispatch_report(names, repeats)
        else:
            sizes = Sizes(tokens, n, channels, dtype.value)
            report = _latency_report(names, _baselines(vs), sizes, repeats)
    except (BackendError, DisagreementError) as error:
        typer.echo(f"mhc bench: {error}", err=True)
        raise typer.Exit(1) from error
    if json_file:
        json_file.write_text(json.dumps(report, indent=2) + "\n")


def _runnable(chosen: Sequence[str] | None) -> list[str]:
    """Give the chosen backends, each of which must be able to run here, or all that can."""
    from mhc_core._registry import backends, use_backend

    for name in chosen or ():
        with use_backend(name):  # raises with the reason
            pass
    known = backends().items()
    found = [n for n, b in known if b.available and b.spec is not None and b.spec.automatic]
    return list(chosen or found)


def _baselines(chosen: Sequence[str] | None) -> list[Baseline]:
    for name in chosen or ():
        if name not in BASELINES:
            raise typer.BadParameter(f"--vs is {name!r}; needs one of {', '.join(BASELINES)}")
    return [BASELINES[name] for name in chosen or BASELINES]


def _latency_report(
    backends: Sequence[str], baselines: Sequence[Baseline], sizes: Sizes, repeats: int
) -> dict[str, Any]:
    absent = {b.name: reason for b in baselines if (reason := b.missing())}
    present = [baseline for baseline in baselines if baseline.name not in absent]
    steps = list(plan(backends, present))
    rows = [
        measure(row, way, name, baseline, sizes, repeats)
        for row, way, name, baseline in _progress(steps)
    ]
    notes = [f"{name}: not compared, {reason}" for name, reason in absent.items()]
    notes += [f"{b.name}: {b.what}" for b in present if any(row.vs == b.name for row in rows)]
    notes += [f"{b.name}: never compiled, {b.uncompilable}" for b in present if b.uncompilable]
    _print_latency(rows, sizes, repeats, notes)
    return _report("latency", rows, repeats, sizes=asdict(sizes), notes=notes)


def _dispatch_report(backends: Sequence[str], repeats: int) -> dict[str, Any]:
    rows = [row for name in _progress(backends) for row in dispatch(name, repeats)]
    _print_dispatch(rows)
    return _report("dispatch", rows, repeats)


def _report(mode: str, rows: Sequence[Any], repeats: int, **more: Any) -> dict[str, Any]:
    return {
        "mode": mode,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processors": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": _versions(),
        "repeats": repeats,
        **more,
        "rows": [asdict(row) for row in rows],
    }


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in ("mhc-core", "numpy", "jax", "mlx", "mhc-mlx", "mlx-mhc"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# ------------------------------------------------------------------------------------- the tables


def _progress(steps: Sequence[Any]) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import track

    yield from track(steps, "measuring", console=Console(stderr=True), transient=True)


def _print_table(
    title: str, left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console() if sys.stdout.isatty() else Console(width=110)
    console.print(table)


def _print_latency(
    rows: Sequence[Measured], sizes: Sizes, repeats: int, notes: Sequence[str]
) -> None:
    backward = {row.name for row in ROWS if row.backward}
    _print_table(
        f"T={sizes.T} n={sizes.n} C={sizes.C} {sizes.dtype}, medians of {repeats}",
        ("row", "backend", "vs", "how"),
        ("ratio", "ours ms", "theirs ms", "apart"),
        (
            (
                row.row + (" fwd+bwd" if row.row in backward else ""),
                row.backend,
                row.vs,
                row.way,
                f"{row.ratio:.2f}x",
                f"{row.ours_ms:.2f}",
                f"{row.baseline_ms:.2f}",
                f"{row.apart:.0e}",
            )
            for row in rows
        ),
    )
    typer.echo("ratio: theirs / ours, so that above 1 ours is faster")
    for note in notes:
        typer.echo(note)


def _print_dispatch(rows: Sequence[Dispatched]) -> None:
    _print_table(
        "nanoseconds of a small call, without array work",
        ("op", "backend"),
        ("arrays", "selection", "validation", "whole call"),
        (
            (
                row.op,
                row.backend,
                str(row.arrays),
                *(f"{t:.0f}" for t in (row.selection_ns, row.validation_ns, row.call_ns)),
            )
            for row in rows
        ),
    )
