"""The step between two sublayers of a DeepSeek model: one pass over the streams."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx import nn

import mhc_core as mhc
from mhc_backends.mlx_nn.inside import Call, norm_inside, runs_formulas
from mhc_core.selection import situation

__all__ = [
    "FEW",
    "Call",
    "Entered",
    "Pending",
    "Projection",
    "check",
    "check_rows",
    "constant",
    "deepseek",
    "enter",
    "enter_layer",
    "few_stay",
    "left",
    "written",
]

FEW = 1 << 17
"""Streams of fewer numbers than this are few: the library's own code is faster than the formulas.

Measured on a CPU, float32 and bfloat16: the times are equal at about 128 tokens of 4 streams with
256 channels, at 32 with 1024 and at 8 with 4096 (docs/performance.md).
"""


def few_stay(times: float = 1) -> str:
    """Return the sentence of a report about what :func:`left` leaves to the library."""
    bound = "" if times == float("inf") else f" of fewer than {FEW * times} numbers"
    return f"where no kernels run, streams{bound} stay on the library's own code outside training"


class Pending(NamedTuple):
    """Streams before the last sublayer's output is written to them: the arguments of combine.

    A layer passes this to the next instead of the streams, so that one pass writes and reads them.
    It is a tuple of arrays, which ``mx.compile`` and ``mx.checkpoint`` accept.
    """

    x: mx.array
    y: mx.array
    h_post: mx.array
    h_res: mx.array | None

    def written(self) -> mx.array:
        """Return the streams ``[..., n, C]``."""
        combine: Any = mhc.combine
        return combine(*self)

    def __getitem__(self, index: Any) -> Any:
        """Return an entry of this tuple, or of the streams by several indices.

        mlx-vlm makes the mask of a layer from a stream, of which it reads the shape alone.
        """
        fields: tuple[Any, ...] = tuple(self)
        return self.written()[index] if isinstance(index, tuple) else fields[index]

    def mean(self, axis: int) -> mx.array:
        """Return the streams' mean, which mlx-vlm's drafters compute after any layer."""
        return self.written().mean(axis=axis)

    def __getattr__(self, name: str) -> Any:
        """Raise RuntimeError: the caller expects streams, and hasattr would hide AttributeError."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            "an accelerated layer left its streams for the next layer to write, but the next layer "
            "is not accelerated. After layers are removed, replaced or pipelined, "
            "call accelerate(model) again"
        )


class Projection(NamedTuple):
    """The parameters of the projection that reads the streams, and the variant."""

    phi: mx.array
    scale: mx.array
    bias: mx.array
    variant: mhc.Variant

    def call(self, x: mx.array, op: str = "pre") -> Call:
        """Return the call of pre, or of head, with these parameters."""
        return Call(op, (x, self.phi, self.scale, self.bias), {"variant": self.variant})


_on_formulas: dict[Any, bool] = {}


def left(module: Any, streams: Any, call: Callable[[mx.array], Call], times: float = 1) -> bool:
    """Return whether a module leaves few streams to its library, whose code is faster for them.

    It does so where the formulas would run, not kernels, and outside training, so that no model
    gets slower. Fewer than ``times`` :data:`FEW` numbers are few. ``call`` returns the call whose
    backend decides; it is made once per class, dtype and choice of backend.
    """
    if module.training:
        return False
    x: mx.array = streams.x if isinstance(streams, Pending) else streams
    if not x.size < FEW * times:
        return False
    key = (cast("type[Any]", type(module)), x.dtype, *situation())
    if key not in _on_formulas:
        _on_formulas[key] = runs_formulas(call(x))
    return _on_formulas[key]


def constant(indices: mx.array | None) -> mx.array | None:
    """Return indices that no gradient is asked for, though ``mx.checkpoint`` asks for all."""
    return None if indices is None else mx.stop_gradient(indices)


def written(streams: Any) -> mx.array:
    """Return the streams, where they are pending too."""
    return streams.written() if isinstance(streams, Pending) else streams


class Entered(NamedTuple):
    """A sublayer's input h, and what its end and its successor need."""

    x: mx.array
    h: mx.array
    h_pre: Any  # an array, or None if the next sublayer does not use it
    h_post: mx.array
    h_res: Any  # an array, or None if the streams are not mixed

    def finish(self, y: mx.array) -> Pending:
        """Return the pending streams after the sublayer, whose output is y."""
        return Pending(self.x, y, self.h_post, self.h_res)


def enter(
    streams: Any, projection: Projection, h_pre: mx.array | None = None, /, **norm: Any
) -> Entered:
    """Begin a sublayer, from streams or from pending ones.

    ``h_pre`` is the previous sublayer's in the single-pass order of V4.1, and None in V4's.
    ``norm`` are the words of pre's norm.
    """
    if isinstance(streams, Pending):
        return Entered(*mhc.combine_pre(*streams, *projection, h_pre, **norm))
    if h_pre is None:
        h, h_post, h_res = mhc.pre(streams, *projection, **norm)
        return Entered(streams, h, None, h_post, h_res)
    mappings = mhc.mappings(streams, *projection)
    return Entered(streams, mhc.aggregate(streams, h_pre), *mappings)


def enter_layer(
    streams: Any, projection: Projection, norm: nn.Module, h_pre: mx.array | None = None
) -> Entered:
    """Begin a sublayer whose layer reads ``norm(h)``, which is the h that this returns."""
    pending = isinstance(streams, Pending)
    if pending or h_pre is None:
        op, given = ("combine_pre", streams) if pending else ("pre", (streams,))
        *arrays, variant = projection
        words = norm_inside(op, (*given, *arrays), norm, variant)
        if words:
            return enter(streams, projection, h_pre, **words)
    entered = enter(streams, projection, h_pre)
    return entered._replace(h=norm(entered.h))


@functools.cache
def deepseek(norm_eps: float, hc_eps: float, iterations: int = 20) -> mhc.Variant:
    """Return the variant of a DeepSeek model with these constants from its configuration."""
    return replace(
        mhc.DEEPSEEK_V4,
        norm_eps=norm_eps,
        pre_eps=hc_eps,
        sinkhorn_eps=hc_eps,
        sinkhorn_iterations=iterations,
    )


def check(path: str, module: Any, n: int, fn: str, scale: str, base: str) -> None:
    """Raise ValueError unless the parameters of these names have shapes for n streams."""
    check_rows(path, module, n, n * n + 2 * n, 3, (fn, scale, base))


def check_rows(
    path: str, module: Any, n: int, rows: int, parts: int, names: tuple[str, str, str]
) -> None:
    """Raise ValueError unless fn, scale and base, of these names, have shapes for n streams."""
    columns = module[names[0]].shape[-1]
    shapes = (rows, columns - columns % n), (parts,), (rows,)
    for name, shape in zip(names, shapes, strict=True):
        if module[name].shape != shape:
            raise ValueError(
                f"accelerate: {path}.{name} has shape {module[name].shape}; needs {shape} for "
                f"{n} streams"
            )
