"""The sides of a comparison: our backends and other people's code, each in every way it can run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mhc_core.cli._baselines import Baseline
from mhc_core.cli.bench._arrays import Sizes
from mhc_core.cli.bench._library import Library, library
from mhc_core.cli.bench._rows import Row

__all__ = ["Entry", "Side", "baseline_side", "entries", "our_side", "runnable"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Side:
    """One of our backends, or a baseline.

    Attributes
    ----------
    name, ours
        The name to write after ``--backend`` or ``--vs``, and whether it is a backend of ours.
    library
        The array library that it runs on.
    functions
        Its ops, with their static arguments bound.
    refuses
        Returns why it does not accept a row at some sizes, or None.
    from_host, to_host
        Convert from and to NumPy arrays.
    uncompilable
        Why it cannot be compiled as a whole, or None.
    remote
        The process of its own that runs and times it, or None.
    """

    name: str
    ours: bool
    library: Library
    functions: Any
    refuses: Callable[[Row, Sizes], str | None]
    from_host: Function
    to_host: Function
    uncompilable: str | None = None
    remote: Any = None

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def on_gpu(self) -> bool:
        """Return whether its arrays, PyTorch's, are on a GPU: a library may have arrays on both."""
        import numpy

        return bool(getattr(self.from_host(numpy.zeros(1, numpy.float32)), "is_cuda", False))

    def chosen(self) -> contextlib.AbstractContextManager[None]:
        """Select this side for the public ops."""
        from mhc_core import use_backend

        return use_backend(self.name) if self.ours else contextlib.nullcontext()


@dataclass(frozen=True)
class Entry:
    """A row by one side in one way: a function of the row's inputs and cotangents.

    ``replayed`` says that it replays a graph, whose memory is not that of a call.
    """

    side: Side
    way: str
    function: Function
    replayed: bool = False

    @property
    def label(self) -> str:
        """Return its name in the JSON: a backend and a baseline may have the same name."""
        return f"{'' if self.side.ours else 'vs '}{self.side.name} {self.way}"


# ---- ours ---------------------------------------------------------------------------------------


def runnable(chosen: Sequence[str] | None) -> list[str]:
    """Return the chosen backends, each of which must be able to run here, or all that can."""
    from mhc_core import backends, use_backend

    for name in chosen or ():
        with use_backend(name):  # raises with the reason
            pass
    known = backends().items()
    found = [n for n, b in known if b.available and b.spec is not None and b.spec.automatic]
    return list(dict.fromkeys(chosen or found))


def our_side(name: str) -> Side:
    """Return a backend that can run here as a side."""
    from mhc_core.discovery import backend_module, backends

    spec = backends()[name].spec
    assert spec is not None, name  # a broken plugin is no backend that can run
    own = backend_module(spec)

    def refuses(row: Row, sizes: Sizes) -> str | None:
        reasons = (spec.refuses(op, (sizes.dtype,), sizes.n) for op in row.ops)
        return next(filter(None, reasons), None)

    return Side(
        name,
        True,
        library(spec.array_types[0].partition(".")[0]),
        _our_functions(),
        refuses,
        own.from_host,
        own.to_host,
    )


@cache
def _our_functions() -> Any:
    """Return the public ops, with DeepSeek-V4's constants where there are any."""
    import mhc_core as mhc
    from mhc_core import math

    given: dict[str, Any] = {"gated_layer": _gated_layer}
    for op in math.OPS:
        has_variant = "variant" in math.load(op).OP.static
        static = {"variant": mhc.DEEPSEEK_V4} if has_variant else {}
        given[op] = partial(getattr(mhc, op), **static) if static else getattr(mhc, op)
        given[f"vjp {op}"] = _our_vjp(op, static)
    return SimpleNamespace(**given)


def _gated_layer(x: Any, h_pre_raw: Any, h_post_raw: Any, h_res_raw: Any) -> Any:
    """Run mlx-mhc's two stages, around an F that is the identity."""
    import mhc_core as mhc

    mappings = mhc.static_mappings(h_pre_raw, h_post_raw, h_res_raw)
    return mhc.gated_combine(x, mhc.pre_scale(x, mappings[0]), *mappings)


def _our_vjp(op: str, static: Mapping[str, Any]) -> Function:
    import mhc_core as mhc

    def pulled(inputs: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        return mhc.vjp(op, tuple(inputs), tuple(cotangents), **static)

    return pulled


# ---- theirs -------------------------------------------------------------------------------------


def baseline_side(baseline: Baseline, checkouts: Mapping[str, Path]) -> Side:
    """Return a baseline as a side; its package must be installed."""
    if baseline.start is not None:
        return _remote_side(baseline, baseline.start(checkouts))
    functions = SimpleNamespace(**baseline.load())
    host: Any = _host_functions(baseline.library)

    def refuses(row: Row, _: Sizes) -> str | None:
        lacking = [op for op in row.needs or row.ops if not hasattr(functions, op)]
        return f"has no {', '.join(lacking)}" if lacking else None

    return Side(
        baseline.name,
        False,
        library(baseline.library),
        functions,
        refuses,
        host.from_host,
        host.to_host,
        baseline.uncompilable,
    )


def _remote_side(baseline: Baseline, remote: Any) -> Side:
    """Return a side whose arrays are numbers of arrays in its process, and its results NumPy's."""

    def refuses(row: Row, sizes: Sizes) -> str | None:
        if row.needs or row.layers > 1 or row.passes == "step" or len(row.parts) > 1:
            return "runs single ops in its process"
        return remote.refuses(row.ops[0], row.passes, sizes.dtype, sizes.n, sizes.C)

    def same(given: Any) -> Any:
        return given

    here = library("numpy")
    name = f"{baseline.name}'s process"
    own = replace(here, name=name, accelerator=remote.on_gpu, forward={remote.way: same})
    return Side(baseline.name, False, own, None, refuses, remote.put, same, remote=remote)


def _host_functions(name: str) -> Any:
    """Return the host functions of one of our backends for the library."""
    from mhc_core.discovery import backend_module, backends

    for backend in backends().values():
        if backend.available and backend.spec is not None:
            own = backend.spec.array_types[0].partition(".")[0] == name
            if own and backend.spec.automatic:
                return backend_module(backend.spec)
    raise LookupError(f"no backend here is built on {name}")


# ---- ways ---------------------------------------------------------------------------------------


def entries(row: Row, side: Side) -> Iterator[Entry]:
    """Yield the entries of a row for one side, one for every way to run it."""
    if side.remote is not None:
        yield from _remote_entries(row, side)
        return
    graph = side.library.graph if side.library.graph and side.on_gpu else None
    for entry in _calls(row, side):
        yield entry
        if graph is not None:
            yield _graph_entry(entry, graph(entry.function))


def _graph_entry(entry: Entry, replays: Function) -> Entry:
    return replace(entry, way=f"{entry.way}, CUDA graph", function=replays, replayed=True)


def _remote_entries(row: Row, side: Side) -> Iterator[Entry]:
    """Yield the entries of a side that records its graphs itself."""
    op, names = row.ops[0], [word.partition(".")[2] for word in row.inputs]
    entry = Entry(side, side.remote.way, side.remote.call(op, names))
    yield entry
    if side.remote.graphs:
        yield _graph_entry(entry, side.remote.call(op, names, graph=True))


def _calls(row: Row, side: Side) -> Iterator[Entry]:
    forward = partial(row.formula, side.functions, side.library.xp)
    count = len(row.inputs)
    if row.layers > 1:
        way, transform = side.library.whole
        yield _entry(side, way, transform, forward)
    elif row.passes == "forward":
        for way, transform in side.library.forward.items():
            yield Entry(side, way, transform(forward))
    elif row.passes == "vjp":
        yield from _vjp_entries(row, side, forward, count)
    elif side.library.pull is not None:
        step = _pulled(side.library.pull, forward, count)
        ways = list(side.library.step.items())
        for way, transform in ways[:1] if side.uncompilable else ways:
            yield Entry(side, way, transform(step))


def _entry(side: Side, way: str, transform: Function, function: Function) -> Entry:
    if side.uncompilable:
        return Entry(side, "call", function)
    return Entry(side, way, transform(function))


def _pulled(pull: Function, forward: Function, count: int, part: slice = slice(None)) -> Function:
    def pulled(*arrays: Any) -> Any:
        return pull(forward, arrays[:count], arrays[count:])[part]

    return pulled


def _vjp_entries(row: Row, side: Side, forward: Function, count: int) -> Iterator[Entry]:
    """Yield a vjp's entry: ours by mhc.vjp, uncompiled; theirs by autodiff, compiled if allowed."""
    if side.ours:
        ours = getattr(side.functions, row.parts[0])
        yield Entry(side, "mhc.vjp", lambda *arrays: ours(arrays[:count], arrays[count:]))
    elif side.library.pull is not None:
        gradients = _pulled(side.library.pull, forward, count, slice(1, None))
        yield _entry(side, *list(side.library.step.items())[-1], gradients)
