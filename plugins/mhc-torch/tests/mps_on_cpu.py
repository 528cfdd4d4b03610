"""The backend torch-metal without a Mac: its plans, and Metal texts that the simulator runs.

:func:`compile_shader` stands in for ``torch.mps.compile_shader`` on CPU tensors. It binds arguments
as PyTorch does: ``torch/csrc/mps/Module.cpp`` (commit f3b72801) for the call, ``mtl_setBuffer`` and
``mtl_setBytes`` in ``ATen/native/mps/OperationUtils.h``, of the installed PyTorch, for the memory.
So nothing looks at a tensor's shape, strides or dtype. What is stricter here: a buffer ends with
the tensor, no memory is bound twice if one of the two is written, every buffer is given, and a grid
is whole threadgroups.

The module is that of a backend, as ``mhc_torch.metal.ops`` is.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch.utils._cpp_embed_headers import _embed_headers

import mhc_torch
from mhc_torch.metal.host import Metal
from mhc_torch.ops import checkpoint, compile, from_host, grad, to_host
from mhc_torch.plans.functions import functions
from mhc_torch.plans.kernels import Kernels

simulator = pytest.importorskip("mhc_metal_simulator", reason="needs the simulator of Metal")
launch = pytest.importorskip("mhc_metal_simulator.launch")

__all__ = [
    "NAME", "SPEC", "checkpoint", "compile", "compile_shader", "from_host", "grad", "launched",
    "to_host", "vjp",
]  # fmt: skip

NAME = "torch-metal-on-cpu"
SPEC = replace(
    mhc_torch.METAL,
    name=NAME,
    module=__name__,
    missing=lambda: None,
    takes=None,
    automatic=False,
    proof=None,
)
MOST_BYTES = 4096  # "Maximum length of a data block for a function": Apple's Metal limits, setBytes
ALIGNMENT = 16  # bytes: a buffer begins at a multiple
TEXTS: set[str] = set()
"""All texts that were compiled."""

_BUFFER = re.compile(
    r"(?P<const>const )?(?P<space>device|constant) (?P<type>\w+)\* (?P<name>\w+)"
    r" \[\[buffer\((?P<index>\d+)\)\]\]"
)
_UNSIGNED = {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32, 8: numpy.uint64}
_BYTES = {"float": 4, "half": 2, "bfloat": 2, "int64_t": 8}
_count = [0]


def launched() -> int:
    """Return the number of launches so far."""
    return _count[0]


def compile_shader(source: str) -> _Library:
    """Return the kernels of a text."""
    if not source.isascii():  # NSASCIIStringEncoding, in compileLibrary
        raise RuntimeError("PyTorch hands texts over as ASCII")
    # what torch.mps.compile_shader does first, with its own function
    folder = Path(torch.__file__).parent / "include"
    lines = [f"{line}\n" for line in source.split("\n")]
    return _Library(_embed_headers(lines, [folder], set()))


class _Library:
    """The functions of a text by their names, as attributes."""

    def __init__(self, text: str) -> None:
        TEXTS.add(text)
        self._text = text
        named = re.findall(r'\[\[host_name\("(\w+)"\)\]\]', text)
        self._names = named or re.findall(r"\[\[kernel\]\] void (\w+)\(", text)

    def __getattr__(self, name: str) -> _Kernel:
        if name not in self._names:
            raise RuntimeError(f"Failed to create function state object for: {name}")
        return _Kernel(name, self._text)


class _Kernel:
    """A function of a text; a call binds its arguments and runs it."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        (inside,) = re.findall(r"\[\[kernel\]\] void \w+\((.*?)\) \{", text, re.DOTALL)
        self._parameters = [found.groupdict() for found in _BUFFER.finditer(inside)]
        assert [int(one["index"]) for one in self._parameters] == [*range(len(self._parameters))]

    def __call__(
        self, *args: Any, threads: Any = None, group_size: Any = None, arg_casts: Any = None
    ) -> None:
        assert arg_casts is None, "no launch here asks for casts"
        _count[0] += 1
        if len(args) != len(self._parameters):
            raise RuntimeError(f"{len(self._parameters)} buffers, and {len(args)} arguments")
        grid, group = _extent(threads), _extent(group_size)
        assert all(x % y == 0 for x, y in zip(grid, group, strict=True)), "a part of a threadgroup"
        memory = [_Memory(one) for one in args]
        inputs, outputs, offsets = {}, [], {}
        written: list[tuple[str, _Memory]] = []
        for parameter, bound in zip(self._parameters, memory, strict=True):
            name, size = str(parameter["name"]), _BYTES[str(parameter["type"])]
            kind = numpy.dtype(_UNSIGNED[size])
            if parameter["const"]:
                whole = bound.content[: len(bound.content) // size * size]
                inputs[name] = numpy.frombuffer(whole, kind)
                offsets[name] = bound.offset
                continue
            assert bound.address is not None, f"{name} is written, and is no tensor"
            assert bound.offset % ALIGNMENT == 0, f"{name} begins anywhere"
            outputs.append(launch.Output(name, (len(bound.content) // size,), kind))
            written.append((name, bound))
        _require_apart([bound for _, bound in written], memory)
        made = simulator.simulate(self._name, self._text, inputs, outputs, grid, group, offsets)
        for (_, bound), result in zip(written, made, strict=True):
            ctypes.memmove(bound.address, result.tobytes(), len(bound.content))


class _Memory:
    """The memory that PyTorch binds for an argument."""

    address: int | None = None
    offset = 0

    def __init__(self, argument: Any) -> None:
        if isinstance(argument, torch.Tensor):
            self.address = argument.data_ptr()
            self.offset = argument.storage_offset() * argument.element_size()
            self.content = ctypes.string_at(
                self.address, argument.numel() * argument.element_size()
            )
            return
        whole = isinstance(argument, (list, tuple))
        numbers = list(argument) if whole else [argument]
        if not numbers:
            raise RuntimeError("Empty list/tuple can not be an argument to metal kernel")
        if type(numbers[0]) is int:
            self.content = numpy.array(numbers, numpy.int64).tobytes()
        elif type(numbers[0]) is float:
            self.content = numpy.array(numbers, numpy.float32).tobytes()
        else:
            raise RuntimeError("Unsupported argument type")
        assert len(self.content) <= MOST_BYTES


def _extent(given: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = given
    return x, y, z


def _require_apart(written: Sequence[_Memory], every: Sequence[_Memory]) -> None:
    for one in written:
        for other in every:
            if other is one or other.address is None or one.address is None:
                continue
            first, second = sorted((one, other), key=lambda memory: memory.address or 0)
            assert (first.address or 0) + len(first.content) <= (second.address or 0), (
                "memory is written that is bound twice"
            )


class _Device(Metal):
    """Make memory that no kernel has written NaN, or 0xFF."""

    def empty(self, shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
        return super().empty(shape, strides, dtype).fill_(math.nan)


def host() -> Metal:
    """Return a host of plans."""
    return _Device(compile_shader, "cpu")


def wrong_host() -> Metal:
    """Return a host on which the last array of every launch is a little too large."""

    def compiled(source: str) -> Any:
        right = compile_shader(source).mhc_kernel

        def wrong(*args: Any, **extent: Any) -> None:
            right(*args, **extent)
            [one for one in args if isinstance(one, torch.Tensor)][-1].mul_(1.001)

        return SimpleNamespace(mhc_kernel=wrong)

    return _Device(compiled, "cpu")


_op, vjp = functions(Kernels(NAME, host()))


def __getattr__(name: str) -> Any:
    return _op(name)
