"""Functions on NVIDIA's GPUs: loaded once for each device, and launched on its current stream.

Launches go through cuda-bindings, which took 4.0 us on one machine, where a C extension took 3.7
and ctypes 5.6.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import repeat
from typing import Any, NamedTuple, Protocol

import torch

from mhc_backends.kernels.cuda_function import NAME
from mhc_backends.kernels.nvrtc import compiled
from mhc_core.errors import BackendUnavailableError

__all__ = ["Driver", "Nvidia", "Wanted"]

_C: Any = import_module("torch._C")

STATIC_MEMORY = 48 * 1024  # bytes of shared memory that no function has to ask for


class Wanted(NamedTuple):
    """A function that a launch needs: its text, and the bytes of dynamic shared memory."""

    text: str
    memory: int


class Driver(Protocol):
    """The functions of a device that launches need."""

    device_type: str
    """The kind of tensors that it takes."""

    def memory(self, index: int) -> int:
        """Return the bytes of shared memory that a threadgroup may have on a device."""
        ...

    def functions(self, index: int, wanted: Sequence[Wanted]) -> list[Any]:
        """Return functions that are ready to be launched on a device."""
        ...

    def constant(self, index: int, numbers: tuple[float, ...]) -> int:
        """Return the address of float32 numbers on a device, which stay there."""
        ...

    def guard(self, index: int) -> Any:
        """Return a context in which a device is the current one, or None if it is."""
        ...

    def stream(self, index: int) -> Any:
        """Return a device's current stream."""
        ...

    empty: Callable[..., torch.Tensor]
    """``empty(shape, strides, dtype)`` returns a tensor on the current device."""

    launch: Callable[..., Any]
    """``launch(function, x, y, threads, memory, stream, arguments)`` returns an error or nothing;
    ``arguments`` is the address of an array of the arguments' addresses.
    """


class Nvidia:
    """The devices of this machine."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._cuda: Any = import_module("cuda.bindings.driver")
        self._lock = threading.Lock()
        self._functions: dict[tuple[int, Wanted], Any] = {}
        self._constants: dict[tuple[int, tuple[float, ...]], int] = {}
        self._streams: dict[int, Any] = {}
        self._here = threading.local()
        self._raw: Callable[[int], int] = getattr(_C, "_cuda_getCurrentRawStream", _raw_stream)
        self._current: Callable[[], int] = getattr(_C, "_cuda_getDevice", torch.cuda.current_device)
        self.empty = getattr(_C._dynamo.guards, "_empty_strided_cuda", _empty)
        self.launch = self._launcher()

    def _launcher(self) -> Callable[..., Any]:
        launch = self._cuda.cuLaunchKernel

        def call(
            function: Any, x: int, y: int, threads: int, memory: int, stream: Any, arguments: int
        ) -> Any:
            return launch(function, x, y, 1, threads, 1, 1, memory, stream, arguments, 0)[0]

        return call

    @functools.cache  # noqa: B019 (one object a process)
    def memory(self, index: int) -> int:
        attribute = self._cuda.CUdevice_attribute
        wanted = attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        return self._call("cuDeviceGetAttribute", wanted, self._device(index))

    def guard(self, index: int) -> Any:
        if not hasattr(self._here, "ready"):
            self._enter(index)
        return None if self._current() == index else torch.cuda.device(index)

    def stream(self, index: int) -> Any:
        raw = self._raw(index)
        stream = self._streams.get(raw)
        if stream is None:
            stream = self._streams[raw] = self._cuda.CUstream(raw)
        return stream

    def functions(self, index: int, wanted: Sequence[Wanted]) -> list[Any]:
        new = [one for one in dict.fromkeys(wanted) if (index, one) not in self._functions]
        if new:
            architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
            with ThreadPoolExecutor(max_workers=8) as pool:
                codes = list(pool.map(compiled, [one.text for one in new], repeat(architecture)))
            with self._lock, self._anywhere():
                for one, code in zip(new, codes, strict=True):
                    if (index, one) not in self._functions:
                        self._functions[index, one] = self._load(index, one, code)
        return [self._functions[index, one] for one in wanted]

    def constant(self, index: int, numbers: tuple[float, ...]) -> int:
        with self._lock:
            if (index, numbers) not in self._constants:
                with self._anywhere():
                    self._constants[index, numbers] = self._upload(numbers)
            return self._constants[index, numbers]

    def _upload(self, numbers: tuple[float, ...]) -> int:
        data = struct.pack(f"{len(numbers)}f", *numbers)
        stream = self._call("cuStreamCreate", self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
        address = self._call("cuMemAlloc", len(data))
        self._call("cuMemcpyHtoDAsync", address, data, len(data), stream)
        self._call("cuStreamSynchronize", stream)
        self._call("cuStreamDestroy", stream)
        return int(address)

    def _load(self, index: int, wanted: Wanted, code: bytes) -> Any:
        function = self._call(
            "cuModuleGetFunction", self._call("cuModuleLoadData", code), NAME.encode()
        )
        if wanted.memory > STATIC_MEMORY:
            most = self.memory(index)
            if wanted.memory > most:
                raise BackendUnavailableError(
                    f"backend 'torch-cuda': a kernel needs {wanted.memory} bytes of shared memory, "
                    f"and {torch.cuda.get_device_name(index)} has {most} for a threadgroup"
                )
            attribute = self._cuda.CUfunction_attribute
            dynamic = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, dynamic, wanted.memory)
        return function

    @contextlib.contextmanager
    def _anywhere(self) -> Generator[None]:
        """Allow, while this thread's stream is being captured, what is no part of the capture."""
        relaxed = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        before = self._call("cuThreadExchangeStreamCaptureMode", relaxed)
        try:
            yield
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", before)

    def _enter(self, index: int) -> None:
        """Make a device's context that of this thread, which may never have called CUDA."""
        torch.cuda.init()
        if not int(self._call("cuCtxGetCurrent")):
            context = self._call("cuDevicePrimaryCtxRetain", self._device(index))
            self._call("cuCtxSetCurrent", context)
        self._here.ready = True

    def _device(self, index: int) -> Any:
        return self._call("cuDeviceGet", index)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._cuda, name)(*arguments)
        if error:
            raise BackendUnavailableError(f"backend 'torch-cuda': {name} failed: {error.name}")
        return results[0] if results else None


# What is used where PyTorch has no faster function under the name that its own compiler calls.


def _raw_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


def _empty(shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")
