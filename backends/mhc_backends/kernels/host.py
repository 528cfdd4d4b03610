"""Launches of kernels by name on any host: the array library whose arrays the kernels read.

The ops in ``mhc_backends.kernels.ops`` are written against :class:`Kernels` and need no library.
Their arrays are the host's own (:class:`Array`), or descriptions of arrays whose launches are
recorded for later (``plan.py``).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from mhc_backends.kernels.launch import shares
from mhc_backends.kernels.program import Program, Sizes, Stage, program

__all__ = [
    "FLOAT32",
    "MEMORY",
    "Array",
    "Channels",
    "Host",
    "Kernels",
    "Out",
    "Sizes",
    "Stage",
    "dtype_name",
    "tokens",
]

FLOAT32 = "float32"
MEMORY = 16384
"""Bytes of threadgroup memory for the factors of a product, half of what Metal has at least."""

Array = Any
"""An array of the host: ``shape``, ``dtype``, ``ndim``, ``size``, ``reshape``, indexing by slices
and None, and for a few ops ``+``, ``*``, ``/`` and ``sum``.
"""


class Out(NamedTuple):
    """The shape and dtype of an output; the dtype is the host's own or a name.

    ``whole`` says that it is the same on all devices that share channels, also where an input of
    its kernel is one device's part.
    """

    shape: Sequence[int]
    dtype: Any
    whole: bool = False

    @classmethod
    def like(cls, array: Array) -> Out:
        """Ask for an output like an array."""
        return cls(array.shape, array.dtype)


class Host(Protocol):
    """The functions of an array library that the ops need. Dtypes are its own or names."""

    def zeros(self, shape: Sequence[int], dtype: Any) -> Array:
        """Return an array of zeros."""
        ...

    def constant(self, values: Sequence[Any]) -> Array:
        """Return a float32 array of numbers, or of rows of them, the same at every call."""
        ...

    def cast(self, array: Array, dtype: Any) -> Array:
        """Return the array in a dtype."""
        ...

    def repeat(self, array: Array, n: int) -> Array:
        """Return n copies along a new last axis but one, written once: no broadcast view."""
        ...

    def launch(
        self, name: str, runs: Program, inputs: Mapping[str, Array], outputs: Mapping[str, Out]
    ) -> list[Array]:
        """Launch a program on arrays, read in row-major order, and return its outputs."""
        ...


class Channels(NamedTuple):
    """Devices that share channels: how many, and their all-reduce of some arrays."""

    devices: int
    total: Callable[[Sequence[Array]], Sequence[Array]]


def tokens(array: Array, last: int) -> Array:
    """Flatten all but the last ``last`` axes into one; a shared array gets one row."""
    split = array.ndim - last
    return array.reshape(math.prod(array.shape[:split]), *array.shape[split:])


@functools.cache
def dtype_name(dtype: Any) -> str:
    """Return a dtype's name without its module."""
    return str(dtype).rpartition(".")[2]


class Kernels:
    """The kernels in one dialect, launched by one host.

    Parameters
    ----------
    host
        The array library.
    dialect
        ``"metal"`` or ``"cuda"``.
    memory
        Bytes of threadgroup memory available to the factors of a product.
    channels
        The devices that share channels, where the arrays are one device's part.
    """

    def __init__(
        self, host: Host, dialect: str, memory: int = MEMORY, channels: Channels | None = None
    ) -> None:
        self.host = host
        self.dialect = dialect
        self.memory = memory
        self._channels = channels

    @property
    def devices(self) -> int:
        """The number of devices that share channels."""
        return 1 if self._channels is None else self._channels.devices

    def on_parts(self, channels: Channels) -> Kernels:
        """Return the same kernels for arrays that are one device's part of the channels."""
        same = copy.copy(self)
        same._channels = channels
        return same

    def over_channels(self, *sums: Array) -> Sequence[Array]:
        """Sum one device's float32 sums over C across all devices that have channels."""
        return sums if self._channels is None else self._channels.total(sums)

    def __call__(
        self,
        name: str,
        inputs: Mapping[str, Array | None],
        outputs: Mapping[str, Out | None],
        sizes: Sizes,
        numbers: Mapping[str, float] | None = None,
        stage: Stage | None = None,
        /,
        **constants: int,
    ) -> list[Array]:
        """Launch a kernel and return its outputs; without tokens, nothing is launched.

        Inputs are read in row-major order: the host copies strided ones. An input or output that is
        None is absent: the kernel's constants disable the code that mentions it. ``numbers`` are
        written into the kernel's text, ``stage`` is the threadgroup memory whose size the launch
        determines, and ``constants`` are template arguments in addition to those of the sizes and
        the launch. Each new value of these compiles the kernel again, so pass values that vary as
        inputs; in MLX's CUDA build an input costs a launch 1 us, and an output 2.
        """
        given = {name: array for name, array in inputs.items() if array is not None}
        made = {name: out for name, out in outputs.items() if out is not None}
        if sizes.T == 0:
            return [self.host.zeros(tuple(out.shape), out.dtype) for out in made.values()]
        runs = program(
            name,
            self.dialect,
            dtype_name(next(iter(given.values())).dtype),
            sizes,
            absent=frozenset({*inputs, *outputs} - {*given, *made}),
            numbers=numbers,
            stage=stage,
            constants=constants,
        )
        return self.host.launch(name, runs, given, made)

    def sum_to(self, gradient: Array, like: Array, last: int) -> Array:
        """Sum a gradient per token as its primal needs.

        Parameters
        ----------
        gradient
            float32, one row per token.
        like
            The primal. If all tokens share it, their gradients are summed.
        last
            The number of the primal's axes, without leading ones.
        """
        if like.ndim == last:
            gradient = self.sum_rows(gradient.reshape(gradient.shape[0], like.size))
        return self.host.cast(gradient.reshape(like.shape), like.dtype)

    def sum_rows(self, a: Array) -> Array:
        """Sum [R, K] to [1, K], some rows at a time, in a fixed order."""
        while a.shape[0] != 1:
            rows, columns = a.shape
            sizes = Sizes(rows, 1, columns)
            count = 1 if rows == 0 else shares("sum_rows", *sizes, self.dialect)
            (a,) = self("sum_rows", {"a": a}, {"out": Out((count, columns), FLOAT32)}, sizes)
        return a
