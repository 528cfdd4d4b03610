"""Launches of kernels on MLX arrays, through any launcher: ``mx.fast.metal_kernel``,
``mx.fast.cuda_kernel``, or one that simulates them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from mhc_backends.kernels import host
from mhc_backends.kernels.host import MEMORY, Out, Sizes, Stage, dtype_name, tokens
from mhc_backends.kernels.program import Program

__all__ = ["Kernels", "Out", "Sizes", "Stage", "dtype_name", "tokens"]

Launcher = Callable[..., Any]  # MLX's stubs say object


class Kernels(host.Kernels):
    """The kernels in one dialect, launched by one launcher on MLX arrays.

    Parameters
    ----------
    launcher
        ``mx.fast.metal_kernel`` or a function with its signature.
    dialect
        ``"metal"`` or ``"cuda"``.
    memory
        Bytes of threadgroup memory available to the factors of a product.
    built
        Called after the launches of an op have been built, before MLX runs any.
    """

    def __init__(
        self,
        launcher: Launcher,
        dialect: str,
        memory: int = MEMORY,
        built: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(_Mlx(launcher), dialect, memory)
        self.built = built


class _Mlx:
    """MLX as the host of kernels."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._made: dict[Any, Callable[..., Sequence[mx.array]]] = {}

    def zeros(self, shape: Sequence[int], dtype: Any) -> mx.array:
        return mx.zeros(tuple(shape), _dtype(dtype))

    def constant(self, values: Sequence[Any]) -> mx.array:
        return mx.array(list(values), mx.float32)

    def cast(self, array: mx.array, dtype: Any) -> mx.array:
        return array.astype(_dtype(dtype))

    def repeat(self, array: mx.array, n: int) -> mx.array:
        streams = mx.broadcast_to(array[..., None, :], (*array.shape[:-1], n, array.shape[-1]))
        return mx.contiguous(streams)

    def launch(
        self, name: str, runs: Program, inputs: Mapping[str, mx.array], outputs: Mapping[str, Out]
    ) -> list[mx.array]:
        arrays = list(inputs.values())
        dtypes = [_dtype(out.dtype) for out in outputs.values()]
        kernel = self._kernel(name, runs, tuple(inputs), tuple(outputs), arrays, dtypes)
        return list(
            kernel(
                inputs=arrays,
                template=list(runs.template),
                grid=runs.launch.grid,
                threadgroup=runs.launch.threadgroup,
                output_shapes=[tuple(out.shape) for out in outputs.values()],
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

        The text depends on the dtypes, in Metal on which inputs are in constant memory, and in CUDA
        on the launch bounds. Some MLX releases look up a compiled kernel by its name alone, and
        must not find another one.
        """
        words = [f"{dtype_name(a.dtype)}{'c' if a.size < 8 else ''}" for a in arrays]
        bounds = map(str, runs.bounds or ())
        parts = ["mhc", name, runs.digest, *words, *map(dtype_name, dtypes), *bounds]
        full = "_".join(filter(None, parts))
        texts = full, runs.header, runs.source, runs.memory
        made = self._made.get(texts)
        if made is None:
            dynamic = {"shared_memory": runs.memory} if runs.memory else {}
            made = self._made[texts] = self._launcher(
                name=full,
                input_names=list(inputs),
                output_names=list(outputs),
                source=runs.source,
                header=runs.header + launch_bounds(runs),
                **dynamic,
            )
        return made


def launch_bounds(runs: Program) -> str:
    """Return the end of a CUDA header that gives launch bounds to the function that MLX writes.

    They go into the definition of ``__global__``, because nothing else of that function's own text
    is ours. MLX 0.32 writes ``__global__ void custom_kernel_NAME(`` with all parameters
    (build_kernel in mlx/backend/cuda/custom_kernel.cpp) and gives NVRTC no options but the
    architecture and folders of headers (mlx/backend/cuda/jit_module.cpp), so no
    ``--maxrregcount``. As tried with NVRTC 13.0: a ``#pragma clang attribute`` is ignored, inline
    PTX cannot have ``.maxntid``, and an attribute before the namespace that MLX opens is an error.
    Bounds on a declaration ahead of MLX's function do reach it, but that declaration would have to
    repeat its name, hash and parameters exactly: else it is an overload, and NVRTC refuses to look
    up the name.
    """
    if runs.bounds is None:
        return ""
    threads, groups = runs.bounds
    words = f"__attribute__((global)) __launch_bounds__({threads}, {groups})"
    return f"#undef __global__\n#define __global__ {words}\n"


def _dtype(dtype: Any) -> mx.Dtype:
    return getattr(mx, dtype) if isinstance(dtype, str) else dtype
