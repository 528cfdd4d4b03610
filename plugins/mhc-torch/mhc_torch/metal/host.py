"""Metal kernels on MPS tensors: compiled and launched by ``torch.mps.compile_shader``.

PyTorch binds a call's arguments in their order (``torch/csrc/mps/Module.cpp``, commit f3b72801): a
tensor is its buffer, from the tensor's first element on, whatever its shape and strides; a list of
integers is an array of int64_t. ``threads`` are those of the whole grid, as in MLX's launches, and
``group_size`` those of a threadgroup. Launches join the work of PyTorch's current stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mhc_backends.kernels.host import MEMORY
from mhc_backends.kernels.metal_function import NAME, function
from mhc_backends.kernels.plan import Launch
from mhc_core.errors import BackendUnavailableError
from mhc_torch.metal import NO_MPS
from mhc_torch.plans.host import Launcher, Places
from mhc_torch.plans.replay import viewed

__all__ = ["Metal"]

Read = Callable[[Sequence[Any]], Any]


class _Launched(NamedTuple):
    kernel: Callable[..., None]
    reads: Sequence[Read]
    lengths: tuple[list[int], ...]
    threads: tuple[int, int, int]
    group_size: tuple[int, int, int]


class Metal:
    """The MPS device of this machine.

    Parameters
    ----------
    compile_shader
        ``torch.mps.compile_shader`` or a function that stands in for it.
    device
        The device of the tensors.
    """

    dialect = "metal"
    shared_workspace = False  # each buffer is bound as a tensor

    def __init__(
        self,
        compile_shader: Callable[[str], Any] = torch.mps.compile_shader,
        device: str = "mps",
    ) -> None:
        self._compile_shader, self.device = compile_shader, device
        self._lock = threading.Lock()
        self._kernels: dict[str, Callable[..., None]] = {}
        self._constants: dict[tuple[float, ...], torch.Tensor] = {}

    def memory(self, index: int) -> int:
        """Return the bytes of threadgroup memory for factors of a product."""
        return MEMORY

    def guard(self, index: int) -> Any:
        """Return None: PyTorch has one MPS device."""
        return None

    def empty(self, shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor on the device."""
        return torch.empty_strided(shape, strides, dtype=dtype, device=self.device)

    def launchers(
        self, parts: Sequence[Sequence[Launch]], places: Places, index: int
    ) -> list[Launcher]:
        """Return a function that launches them for each part of a plan."""
        constants = {
            number: self._constant(numbers) for number, numbers in places.constants.items()
        }
        return [
            _launcher([self._launched(step, places, constants) for step in part]) for part in parts
        ]

    def _launched(
        self, step: Launch, places: Places, constants: Mapping[int, torch.Tensor]
    ) -> _Launched:
        made, arrays = function(step), {**step.inputs, **step.outputs}
        axes = [(arrays[one.array], one.axis) for one in made.arguments]
        lengths = [int(value.shape[axis]) for value, axis in axes if axis is not None]
        return _Launched(
            self._kernel(step.kernel, made.text),
            [_reader(value, places, constants) for value, axis in axes if axis is None],
            (lengths,) if lengths else (),
            step.program.launch.grid,
            step.program.launch.threadgroup,
        )

    def _kernel(self, kernel: str, text: str) -> Callable[..., None]:
        with self._lock:
            if text not in self._kernels:
                self._kernels[text] = self._compiled(kernel, text)
            return self._kernels[text]

    def _compiled(self, kernel: str, text: str) -> Callable[..., None]:
        try:
            return getattr(self._compile_shader(text), NAME)
        except (RuntimeError, SyntaxError) as error:
            why = str(error) if _has_mps() or self.device != "mps" else NO_MPS
            raise BackendUnavailableError(
                f"backend 'torch-metal': kernel {kernel} could not be compiled: {why}"
            ) from error

    def _constant(self, numbers: tuple[float, ...]) -> torch.Tensor:
        with self._lock:
            if numbers not in self._constants:
                made = torch.tensor(numbers, dtype=torch.float32, device=self.device)
                self._constants[numbers] = made
            return self._constants[numbers]


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _launcher(steps: Sequence[_Launched]) -> Launcher:
    def run(held: Sequence[Any]) -> None:
        for kernel, reads, lengths, threads, group_size in steps:
            arrays = [read(held) for read in reads]
            kernel(*arrays, *lengths, threads=threads, group_size=group_size)

    return run


def _reader(value: Any, places: Places, constants: Mapping[int, torch.Tensor]) -> Read:
    if value.buffer in constants:
        whole, count = constants[value.buffer], value.size
        part = whole[value.offset : value.offset + count]
        return lambda _: part
    place, view = places.view(value)
    if view is None:
        return lambda held: held[place]
    return lambda held: viewed(held[place], view)
