"""Launches of kernels by name, through any launcher: ``mx.fast.metal_kernel``,
``mx.fast.cuda_kernel``, or one that simulates them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mhc_backends.kernels.launch import shares
from mhc_backends.kernels.program import Program, Sizes, Stage, program

__all__ = ["Kernels", "Out", "Sizes", "Stage", "dtype_name", "tokens"]

Launcher = Callable[..., Any]  # MLX's stubs say object


class Out(NamedTuple):
    """The shape and dtype of an output."""

    shape: Sequence[int]
    dtype: mx.Dtype

    @classmethod
    def like(cls, array: mx.array) -> Out:
        """Ask for an output like an array."""
        return cls(array.shape, array.dtype)


def tokens(array: mx.array, last: int) -> mx.array:
    """Flatten all but the last ``last`` axes into one; a shared array gets one row."""
    split = array.ndim - last
    return array.reshape(math.prod(array.shape[:split]), *array.shape[split:])


# ---- launching -----------------------------------------------------------------------------------


class Kernels:
    """The kernels in one dialect, launched by one launcher.

    Parameters
    ----------
    launcher
        ``mx.fast.metal_kernel`` or a function with its signature.
    dialect
        ``"metal"`` or ``"cuda"``.
    memory
        Bytes of threadgroup memory available to the factors of a product.
    """

    def __init__(self, launcher: Launcher, dialect: str, memory: int = 16384) -> None:
        self.launcher = launcher
        self.dialect = dialect
        self.memory = memory
        self._made: dict[Any, Callable[..., Sequence[mx.array]]] = {}

    def __call__(
        self,
        name: str,
        inputs: Mapping[str, mx.array | None],
        outputs: Mapping[str, Out | None],
        sizes: Sizes,
        numbers: Mapping[str, float] | None = None,
        stage: Stage | None = None,
        /,
        **constants: int,
    ) -> list[mx.array]:
        """Launch a kernel and return its outputs; without tokens, nothing is launched.

        Inputs are read in row-major order: MLX copies strided ones. An input or output that is None
        is absent: the kernel's constants disable the code that mentions it. ``numbers`` are written
        into the kernel's text, ``stage`` is the threadgroup memory whose size the launch
        determines, and ``constants`` are template arguments in addition to those of the sizes and
        the launch. Each new value of these compiles the kernel again, so pass values that vary as
        inputs; in MLX's CUDA build an input costs a launch 1 us, and an output 2.
        """
        given = {name: array for name, array in inputs.items() if array is not None}
        made = {name: out for name, out in outputs.items() if out is not None}
        shapes = [tuple(out.shape) for out in made.values()]
        dtypes = [out.dtype for out in made.values()]
        if sizes.T == 0:
            return [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        arrays = list(given.values())
        runs = program(
            name,
            self.dialect,
            dtype_name(arrays[0].dtype),
            sizes,
            absent=frozenset({*inputs, *outputs} - {*given, *made}),
            numbers=numbers,
            stage=stage,
            constants=constants,
        )
        kernel = self._kernel(name, runs, tuple(given), tuple(made), arrays, dtypes)
        return list(
            kernel(
                inputs=arrays,
                template=list(runs.template),
                grid=runs.launch.grid,
                threadgroup=runs.launch.threadgroup,
                output_shapes=shapes,
                output_dtypes=dtypes,
            )
        )

    def _kernel(
        self,
        name: str,
        runs: Program,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        arrays: Sequence[mx.array],
        dtypes: Sequence[mx.Dtype],
    ) -> Callable[..., Sequence[mx.array]]:
        """Return MLX's object for a kernel, under a separate name for each generated text.

        The text depends on the dtypes, and in Metal on which inputs are in constant memory. Some
        MLX releases look up a compiled kernel by its name alone, and must not find another one.
        """
        words = [f"{dtype_name(a.dtype)}{'c' if a.size < 8 else ''}" for a in arrays]
        parts = ["mhc", name, runs.digest, *words, *map(dtype_name, dtypes)]
        full = "_".join(filter(None, parts))
        texts = full, runs.header, runs.source, runs.memory
        made = self._made.get(texts)
        if made is None:
            dynamic = {"shared_memory": runs.memory} if runs.memory else {}
            made = self._made[texts] = self.launcher(
                name=full,
                input_names=list(inputs),
                output_names=list(outputs),
                source=runs.source,
                header=runs.header,
                **dynamic,
            )
        return made

    def sum_to(self, gradient: mx.array, like: mx.array, last: int) -> mx.array:
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
        return gradient.reshape(like.shape).astype(like.dtype)

    def sum_rows(self, a: mx.array) -> mx.array:
        """Sum [R, K] to [1, K], some rows at a time, in a fixed order."""
        while a.shape[0] != 1:
            rows, columns = a.shape
            sizes = Sizes(rows, 1, columns)
            count = 1 if rows == 0 else shares("sum_rows", *sizes, self.dialect)
            (a,) = self("sum_rows", {"a": a}, {"out": Out((count, columns), mx.float32)}, sizes)
        return a


def dtype_name(dtype: mx.Dtype) -> str:
    """Return a dtype's name without its module."""
    return str(dtype).removeprefix("mlx.core.")
