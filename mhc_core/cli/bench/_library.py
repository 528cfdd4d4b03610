"""The operations that the measurement needs from each array library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

from mhc_core.graphs import replayed

__all__ = ["Library", "leaves", "library"]

Array = Any
Function = Callable[..., Any]
Transform = Callable[[Function], Function]

MIB = 2**20
AT_ONCE = 4 * 2**30


@dataclass(frozen=True)
class Library:
    """An array library: how to wait for it, and the ways in which users run functions in it.

    Attributes
    ----------
    name, xp
        Its name, and its namespace of functions.
    wait
        Finishes the computation of arrays.
    issue
        Starts it without waiting.
    holds
        Whether results must be kept until the wait is over.
    at_once
        The bytes of results that may be in flight: no further calls are issued beyond that.
        Starting and ending a turn costs time, 0.3 ms with MLX on an NVIDIA H200, which is small
        only over many calls.
    pull
        Takes a forward, its inputs and cotangents; returns the outputs and the gradients of all
        inputs. None where the library has no autodiff.
    forward, step
        The ways in which users run a forward, and a forward with its backward, by name.
    whole
        The way to run a long chain as a whole.
    copy
        Reads and writes each byte of an array once.
    accelerator
        Whether it runs on a GPU here.
    peak
        Takes a function without arguments; returns its peak extra memory in bytes, results
        included. None where the library does not report it; the function returns None for
        arrays whose memory it does not count.
    graph
        Records what a function launches on a GPU, at its first call with some arrays, and replays
        it, without the work of the CPU. None where the library has no such graphs of its own, or
        uses them in its compiled ways.
    """

    name: str
    xp: Any
    wait: Function
    issue: Function
    pull: Callable[[Function, Sequence[Array], Sequence[Array]], Any] | None
    forward: Mapping[str, Transform]
    step: Mapping[str, Transform]
    whole: tuple[str, Transform]
    copy: Function
    accelerator: bool
    holds: bool = False
    at_once: int = AT_ONCE
    peak: Callable[[Callable[[], Any]], int | None] | None = None
    graph: Transform | None = None

    @property
    def copied_bytes(self) -> int:
        """Return the bytes of the array that is copied to measure memory speed: beyond caches."""
        return (1024 if self.accelerator else 128) * MIB


def leaves(tree: Any) -> list[Array]:
    """Return the arrays of nested tuples and lists in order."""
    if isinstance(tree, (tuple, list)):
        return [leaf for part in tree for leaf in leaves(part)]  # pyright: ignore
    return [tree]


@cache
def library(name: str) -> Library:
    """Return the library of that name; an unknown one is called like NumPy, synchronously."""
    return {"jax": _jax, "mlx": _mlx, "numpy": _numpy, "torch": _torch}.get(name, _numpy)()


def _unchanged(function: Function) -> Function:
    return function


def _nothing(_: Any) -> None:
    return None


CALL: Mapping[str, Transform] = {"call": _unchanged}


def _numpy() -> Library:
    numpy: Any = import_module("numpy")
    return Library(
        name="numpy",
        xp=numpy,
        wait=_nothing,
        issue=_nothing,
        pull=None,
        forward=CALL,
        step={},
        whole=("call", _unchanged),
        copy=_into_the_same(numpy),
        accelerator=False,
    )


def _into_the_same(numpy: Any) -> Function:
    """Copy into existing memory: NumPy would ask the system for new pages each time."""
    there: list[Any] = []

    def copy(array: Any) -> Any:
        if not there or there[0].nbytes != array.nbytes:
            there[:] = [numpy.empty_like(array)]
        return numpy.negative(array, out=there[0])

    return copy


def _jax() -> Library:
    jax: Any = import_module("jax")

    def pull(forward: Function, inputs: Sequence[Array], cotangents: Sequence[Array]) -> Any:
        output, back = jax.vjp(forward, *inputs)
        several = isinstance(output, (tuple, list))
        return output, back(tuple(cotangents) if several else cotangents[0])

    ways: dict[str, Transform] = {"jax.jit": jax.jit}
    return Library(
        name="jax",
        xp=jax.numpy,
        wait=jax.block_until_ready,
        issue=_nothing,
        pull=pull,
        forward=ways,
        step=ways,
        whole=("jax.jit", jax.jit),
        copy=jax.jit(jax.numpy.negative),
        accelerator=jax.default_backend() != "cpu",
        holds=True,
        at_once=_quarter(jax.local_devices()[0].memory_stats() or {}),  # none of a CPU
    )


def _mlx() -> Library:
    mx: Any = import_module("mlx.core")
    on_gpu = mx.default_device().type == mx.DeviceType.gpu

    def wait(tree: Any) -> None:
        mx.eval(tree)
        mx.synchronize()

    def pull(forward: Function, inputs: Sequence[Array], cotangents: Sequence[Array]) -> Any:
        return mx.vjp(forward, list(inputs), list(cotangents))

    def peak(function: Callable[[], Any]) -> int:
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        wait(function())
        return mx.get_peak_memory() - before

    # A step that is compiled as a whole is fused; what is compiled inside mx.grad is not.
    steps: dict[str, Transform] = {"mx.grad": _unchanged, "mx.compile": mx.compile}
    return Library(
        name="mlx",
        xp=mx,
        wait=wait,
        issue=mx.async_eval,
        pull=pull,
        forward=CALL,
        step=steps,
        # on a CPU, mx.compile calls g++ for every piece of the chain
        whole=("mx.compile", mx.compile) if on_gpu else ("call", _unchanged),
        copy=mx.negative,
        accelerator=on_gpu,
        at_once=_quarter(mx.device_info()) if on_gpu else AT_ONCE,
        peak=peak,
    )


def _quarter(device: Mapping[str, Any]) -> int:
    """Return a quarter of a GPU's memory, for which MLX has two names, and JAX one."""
    names = ("total_memory", "memory_size", "bytes_limit")
    return max(int(next(filter(None, map(device.get, names)), 0)) // 4, AT_ONCE)


def _torch() -> Library:
    torch: Any = import_module("torch")
    on_gpu = torch.cuda.is_available()  # torch-cuda's arrays are there, whatever the default device

    def wait(_: Any) -> None:
        if on_gpu:
            torch.cuda.synchronize()
        elif torch.backends.mps.is_available():  # torch-metal's
            torch.mps.synchronize()

    def pull(forward: Function, inputs: Sequence[Array], cotangents: Sequence[Array]) -> Any:
        own = [array.detach().requires_grad_() for array in inputs]
        output = forward(*own)
        return output, torch.autograd.grad(leaves(output), own, list(cotangents))

    def peak(function: Callable[[], Any]) -> int | None:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = leaves(function())
        wait(results)
        used = torch.cuda.max_memory_allocated() - before
        return used if all(one.is_cuda for one in results) else None

    memory = torch.cuda.get_device_properties().total_memory if on_gpu else 0
    return Library(
        name="torch",
        xp=torch,
        wait=wait,
        issue=_nothing,
        pull=pull,
        forward=CALL,
        step={"autograd": _unchanged},
        whole=("call", _unchanged),
        copy=torch.neg,
        accelerator=on_gpu,
        at_once=max(memory // 4, AT_ONCE),
        peak=peak if on_gpu else None,
        graph=partial(replayed, torch) if on_gpu else None,
    )
