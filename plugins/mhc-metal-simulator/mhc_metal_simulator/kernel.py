"""A stand-in for ``mx.fast.metal_kernel`` that simulates each launch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mhc_metal_simulator.capture import capture_source
from mhc_metal_simulator.engine import ALIGNMENT
from mhc_metal_simulator.errors import SimulatorError, TracedCallError
from mhc_metal_simulator.launch import HostArray, Output, simulate

__all__ = ["SimulatedKernel", "metal_kernel"]

# Kept now, because this module's function may replace it.
_mlx_metal_kernel: Any = mx.fast.metal_kernel

_NO_VALUES = (
    "[Primitive::vmap] Not implemented for CustomKernel. Kernel '{}' was called with arrays that "
    "have no values yet. Under mx.vmap a Metal kernel raises as well; mx.compile would trace it, "
    "but the simulator runs kernels as they are called: call it outside of mx.compile."
)


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
) -> SimulatedKernel:
    """Make a kernel as ``mx.fast.metal_kernel`` does, to be simulated when it is called."""
    return SimulatedKernel(
        name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs
    )


class SimulatedKernel:
    """A kernel to be called with the arguments that one of ``mx.fast.metal_kernel`` takes."""

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str,
        ensure_row_contiguous: bool,
        atomic_outputs: bool,
    ) -> None:
        self.name = name
        self.input_names = tuple(input_names)
        self.output_names = tuple(output_names)
        self._contiguous = ensure_row_contiguous
        self._texts: dict[Any, str] = {}
        self._lock = threading.Lock()
        # MLX's own object checks the arguments and generates the text.
        self._kernel: Any = _mlx_metal_kernel(
            name=name,
            input_names=input_names,
            output_names=output_names,
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            atomic_outputs=atomic_outputs,
        )

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[Any],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[Any]:
        """Run the kernel now and return its outputs as MLX arrays.

        Their gradient raises, like a real kernel's, unless an ``mx.custom_function`` around the
        call has a vjp. ``stream`` is ignored; it is part of MLX's signature.
        """
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        static = {
            "output_shapes": [tuple(shape) for shape in output_shapes],
            "output_dtypes": list(output_dtypes),
            "grid": tuple(grid),
            "threadgroup": tuple(threadgroup),
            "template": list(template) if template else None,
            "init_value": init_value,
        }

        def run(*values: Any) -> list[Any]:
            return self._run(list(values), static, verbose)

        return list(_without_gradient(run)(*arrays))

    def _run(self, arrays: list[Any], static: dict[str, Any], verbose: bool) -> list[Any]:
        hosts, offsets = zip(*map(self._to_host, arrays), strict=True) if arrays else ((), ())
        text = self._text(arrays, static)
        if verbose:
            print(f"Generated source code for `{self.name}`:\n```\n{text}\n```")
        outputs = [
            Output(name, shape, _host_dtype(dtype), static["init_value"])
            for name, shape, dtype in zip(
                self.output_names, static["output_shapes"], static["output_dtypes"], strict=True
            )
        ]
        named: dict[str, Any] = dict(zip(self.input_names, hosts, strict=True))
        placed = dict(zip(self.input_names, offsets, strict=True))
        made = simulate(
            self.name, text, named, outputs, static["grid"], static["threadgroup"], placed
        )
        return [
            _from_host(host, dtype)
            for host, dtype in zip(made, static["output_dtypes"], strict=True)
        ]

    def _to_host(self, array: Any) -> tuple[HostArray, int]:
        """Return an array on the host, and how many bytes after a multiple of 16 it begins.

        The bytes count from the start of the array's buffer, because MLX binds a view as its buffer
        with an offset. An array that MLX copies first begins at the start of a new buffer.
        """
        try:
            mx.eval(array)
        except ValueError as error:
            raise TracedCallError(_NO_VALUES.format(self.name)) from error
        shape: tuple[int, ...] = array.shape
        if array.size == 0:
            return np.zeros(shape, _host_dtype(array.dtype)), 0
        bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        host = np.asarray(memoryview(bits))
        if self._contiguous and not host.flags.c_contiguous:
            return np.asarray(host, order="C"), 0
        return host, (_address(host) - _first_address()) % ALIGNMENT

    def _text(self, arrays: list[Any], static: dict[str, Any]) -> str:
        """Return MLX's text, captured once for everything that it depends on."""
        # Inputs of fewer than 8 elements are in constant memory, scalars are references.
        shapes = tuple((str(x.dtype), x.ndim == 0, x.size < 8) for x in arrays)
        key = (shapes, repr(static["template"]), repr(static["output_dtypes"]))
        with self._lock:
            found = self._texts.get(key)
            if found is None:
                found = self._texts[key] = self._capture(arrays, static)
        return found

    def _capture(self, arrays: list[Any], static: dict[str, Any]) -> str:
        about = [(x.shape, x.dtype) for x in arrays]

        def call(*placeholders: Any) -> Any:
            return self._kernel(inputs=list(placeholders), verbose=True, **static)

        return capture_source(call, about)


def _address(host: HostArray) -> int:
    return host.__array_interface__["data"][0]


@functools.cache
def _first_address() -> int:
    """Return where an MLX buffer begins: on a CPU, 8 bytes after a multiple of 16."""
    array = mx.zeros(64)
    mx.eval(array)
    return _address(np.asarray(memoryview(cast("Any", array)))) % ALIGNMENT


def _host_dtype(dtype: Any) -> np.dtype[Any]:
    """Return NumPy's dtype of the same name; bfloat16 is ml_dtypes'."""
    name = str(dtype).removeprefix("mlx.core.")
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    if name == "complex64":
        raise SimulatorError("the simulator has no complex64; pass real and imaginary parts")
    return np.dtype({"bool": "bool_"}.get(name, name))


def _from_host(host: HostArray, dtype: Any) -> Any:
    if dtype == mx.bfloat16:
        return mx.array(host.view(np.uint16)).view(mx.bfloat16)
    return mx.array(host)


def _without_gradient(run: Any) -> Any:
    """Replace the derivatives of ``run`` by those of a custom kernel, which raise."""
    wrapped: Any = mx.custom_function(run)

    def vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")

    def jvp(primals: Any, tangents: Any) -> Any:
        raise ValueError("[Primitive::jvp] Not implemented for CustomKernel.")

    wrapped.vjp(vjp)
    wrapped.jvp(jvp)
    return wrapped
