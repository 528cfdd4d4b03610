"""The rows of the benchmark: each one's formula in terms of ops, its inputs, and its ideal traffic.

A row is written once and runs on our ops or on a baseline's functions of the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from mhc_core import no_grad
from mhc_core.cli.bench._arrays import Sizes, draw, dtype_of, nbytes, shape_of

if TYPE_CHECKING:
    import numpy

__all__ = ["TRAIN", "Row", "decode_rows", "rows", "rows_of_ops"]

Array = Any
Ops = Any  # has the ops as attributes, their static arguments already given


@dataclass(frozen=True)
class Row:
    """One row of the benchmark.

    Attributes
    ----------
    name
        The name to write after ``--row``, and shown in the table.
    passes
        ``"forward"``; ``"step"``, a forward with the gradients of all inputs; or ``"vjp"``, the
        gradients of an op from its primals and the cotangents of its outputs.
    formula
        A function from ops, an array namespace and the inputs to the outputs.
    inputs
        Each as ``op.argument``, whose shape the op declares.
    outputs
        Each as ``op.output``, for steps: the cotangents passed beside the inputs.
    parts
        The ops that it consists of, ``"vjp op"`` for a vjp. Its ideal traffic is theirs: each of an
        op's inputs read once, each output written once. The work of F in between is not counted.
    reread
        Inputs that are read a second time: a sum of two gradients reads one of them.
    besides
        Further ops, which run on parameters alone: their traffic is negligible.
    needs
        The functions that the formula calls, where they are not the ops themselves.
    shared
        Whether all tokens share one H_pre, H_post and H_res.
    layers
        How many sublayers one call has; times are per sublayer.
    """

    name: str
    passes: Literal["forward", "step", "vjp"]
    formula: Callable[..., Any]
    inputs: tuple[str, ...]
    parts: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    reread: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    shared: bool = False
    layers: int = 1

    @property
    def ops(self) -> tuple[str, ...]:
        """Return the names of all ops that it calls."""
        parts = (part.removeprefix("vjp ") for part in self.parts)
        return tuple(dict.fromkeys((*parts, *self.besides)))

    def make(self, sizes: Sizes, rng: numpy.random.Generator) -> list[Any]:
        """Draw the inputs and, after them, the cotangents."""
        given = [(word.partition(".")[2], *_input(word, sizes)) for word in self.inputs]
        given += [("cotangent", *_output(word, sizes)) for word in self.outputs]
        return [draw(name, shape, dtype, rng) for name, shape, dtype in given]

    def held(self, sizes: Sizes) -> int:
        """Return the bytes of the inputs and cotangents themselves."""
        given = [_input(word, sizes) for word in self.inputs]
        given += [_output(word, sizes) for word in self.outputs]
        return sum(nbytes(*one) for one in given)

    def traffic(self, sizes: Sizes) -> int:
        """Return the bytes that must be moved: every GB/s is computed from this."""
        moved = sum(_op_bytes(part, sizes, self.shared) for part in self.parts)
        return moved * self.layers + sum(nbytes(*_input(word, sizes)) for word in self.reread)


# ---- declared shapes and bytes ------------------------------------------------------------------


def _op(name: str) -> Any:
    from mhc_core import math

    return math.load(name).OP


def arrays_of(op: str) -> tuple[str, ...]:
    """Return an op's arrays as ``op.argument``, except h_pre where it is optional."""
    declared = _op(op)
    left_out = {"h_pre"} & {*declared.optional}
    return tuple(f"{op}.{name}" for name in declared.arrays if name not in left_out)


def outputs_of(op: str) -> tuple[str, ...]:
    """Return an op's outputs as ``op.output``."""
    return tuple(f"{op}.{name}" for name in _op(op).outputs)


def _input(word: str, sizes: Sizes, shared: bool = False) -> tuple[tuple[int, ...], str]:
    op, _, name = word.partition(".")
    pattern = _op(op).arrays[name]
    return shape_of(pattern, sizes, shared), dtype_of(pattern, sizes)


def _output(word: str, sizes: Sizes) -> tuple[tuple[int, ...], str]:
    op, _, name = word.partition(".")
    out = _op(op).outputs[name]
    return shape_of(out.shape, sizes), sizes.dtype if out.dtype == "stream" else "float32"


def _op_bytes(part: str, sizes: Sizes, shared: bool) -> int:
    op = part.removeprefix("vjp ")
    read = sum(nbytes(*_input(word, sizes, shared)) for word in arrays_of(op))
    written = sum(nbytes(*_output(word, sizes)) for word in outputs_of(op))
    return 2 * read + written if part.startswith("vjp ") else read + written


# ---- formulas -----------------------------------------------------------------------------------


def _call(op: str) -> Callable[..., Any]:
    def formula(ops: Ops, _: Any, *arrays: Array) -> Any:
        return getattr(ops, op)(*arrays)

    return formula


def _sublayer(ops: Ops, xp: Any, x: Array, phi: Array, scale: Array, bias: Array) -> Any:
    h, h_post, h_res = ops.pre(x, phi, scale, bias)
    return ops.combine(x, xp.tanh(h), h_post, h_res)


def _decode(ops: Ops, _: Any, x: Array, *rest: Array) -> Any:
    """Run sublayers with F left out, each with a projection of its own."""
    y, h_post, h_res, scale, bias, *phis = rest
    with no_grad():
        for phi in phis:
            x, y, _, h_post, h_res = ops.combine_pre(x, y, h_post, h_res, phi, scale, bias)
    return x, y


def _static_decode(ops: Ops, _: Any, x: Array, *parameters: Array) -> Any:
    with no_grad():
        for k in range(0, len(parameters), 4):
            x = ops.static_layer(x, *parameters[k : k + 4])
    return x


def _forward(op: str) -> Row:
    return Row(op, "forward", _call(op), arrays_of(op), (op,))


def _vjp(op: str) -> Row:
    return Row(f"{op} vjp", "vjp", _call(op), arrays_of(op), (f"vjp {op}",), outputs_of(op))


def _step(row: Row, output: str, *reread: str) -> Row:
    parts = (*row.parts, *(f"vjp {part}" for part in reversed(row.parts)))
    name = f"{row.name} fwd+bwd"
    return replace(row, name=name, passes="step", parts=parts, outputs=(output,), reread=reread)


@cache
def rows() -> Mapping[str, Row]:
    """Return every row of the modes latency and throughput, by name."""
    sublayer = Row("sublayer", "forward", _sublayer, arrays_of("pre"), ("pre", "combine"))
    static = _forward("static_layer")
    gated = Row(
        "gated_layer",
        "forward",
        _call("gated_layer"),
        ("gated_combine.x", *(f"static_layer.h_{name}_raw" for name in ("pre", "post", "res"))),
        ("pre_scale", "gated_combine"),
        besides=("static_mappings",),
        needs=("gated_layer",),
        shared=True,
    )
    every = [
        *map(_forward, ("pre", "combine", "combine_pre", "aggregate")),
        sublayer,
        _step(sublayer, "combine.x", "pre.x"),
        static,
        _step(static, "static_layer.x"),
        gated,
        _step(gated, "gated_combine.x", "gated_combine.x"),
        *map(_vjp, ("pre", "combine", "combine_pre", "aggregate", "static_layer")),
    ]
    return {row.name: row for row in every}


@cache
def rows_of_ops() -> Mapping[str, Row]:
    """Return a row for the forward and one for the vjp of every op that needs only arrays."""
    import inspect

    import mhc_core
    from mhc_core import math

    made: dict[str, Row] = {}
    for op in math.OPS:
        parameters = inspect.signature(getattr(mhc_core, op)).parameters
        given = (parameters[name].default for name in _op(op).static if name != "variant")
        if inspect.Parameter.empty not in given:
            made |= {row.name: row for row in (_forward(op), _vjp(op))}
    return made


TRAIN = ("sublayer fwd+bwd", "static_layer fwd+bwd", "gated_layer fwd+bwd")


def decode_rows(layers: int) -> Mapping[str, Row]:
    """Return the chains of the mode decode, by name."""
    streams, projections = arrays_of("combine_pre"), "combine_pre.phi"
    dynamic = Row(
        "combine_pre chain",
        "forward",
        _decode,
        (*(word for word in streams if word != projections), *[projections] * layers),
        ("combine_pre",),
        layers=layers,
    )
    x, *parameters = arrays_of("static_layer")
    inputs = (x, *parameters * layers)
    static = replace(_forward("static_layer"), name="static_layer chain", formula=_static_decode)
    return {row.name: row for row in (dynamic, replace(static, inputs=inputs, layers=layers))}
