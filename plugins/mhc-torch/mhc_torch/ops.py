"""The ops on PyTorch tensors of any device, and PyTorch's transforms.

Forward-mode differentiation (torch.func.jvp) is not defined for functions with a hand-written vjp;
``mhc_core.math.<op>.forward`` under plain autograd has it.

``torch.compile`` cannot follow dispatch, which reads context variables and the environment: the
graph keeps calls of it unchanged, and the compiler's later stages, which run them on fake tensors,
see the tensor operations inside. So a backend is chosen when a function is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import ml_dtypes
import numpy
import torch
import torch.utils.checkpoint

from mhc_core import math
from mhc_core.dispatch import OPAQUE
from mhc_core.sharding import channel_axis, in_this_block
from mhc_torch import _dtensor, _function

for _function_of_core in OPAQUE:
    torch.compiler.allow_in_graph(_function_of_core)


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in math.OPS:
        raise AttributeError(name)
    names = tuple(math.load(name).OP.arrays)

    def op(*arrays: torch.Tensor | None, **static: Any) -> Any:
        if _dtensor.is_distributed(arrays):
            return _dtensor.apply(name, op, arrays, static)
        require_one_device(name, names, arrays)
        return _function.apply(name, arrays, static)

    return op


def vjp(
    op: str,
    primals: tuple[torch.Tensor | None, ...],
    cotangents: tuple[torch.Tensor | None, ...],
    **static: Any,
) -> tuple[torch.Tensor | None, ...]:
    """Pull cotangents back by the hand-written vjp."""
    if _dtensor.is_distributed(primals):
        return _dtensor.vjp(op, vjp, primals, cotangents, static)
    require_one_device_of_vjp(op, primals, cotangents)
    if channel_axis() is not None:
        return _function.pull_back_parts(op, primals, cotangents, static)
    return _function.pull_back(op, primals, cotangents, None, static)


def require_one_device_of_vjp(
    op: str,
    primals: Sequence[torch.Tensor | None],
    cotangents: Sequence[torch.Tensor | None],
) -> None:
    """Raise an error that names the first array of a vjp on another device than the first."""
    declared = math.load(op).OP
    names = list(declared.arrays)[: len(primals)]
    names += [f"the cotangent of {name}" for name in declared.outputs]
    require_one_device(f"vjp of {op}", names, (*primals, *cotangents))


def require_one_device(
    owner: str, names: Iterable[str], arrays: Sequence[torch.Tensor | None]
) -> None:
    """Raise an error that names the first array on another device than the first."""
    device = next(array for array in arrays if array is not None).device
    for name, array in zip(names, arrays, strict=False):
        if array is not None and array.device != device:
            raise ValueError(
                f"{owner}: {name} is on {array.device}; needs {device}, where the first array is: "
                f"move it with .to({str(device)!r})"
            )


# ------------------------------------------------------------------------------------ host arrays


def from_host(array: numpy.ndarray[Any, Any]) -> torch.Tensor:
    """Copy a NumPy array to PyTorch's default device."""
    own = numpy.array(array, order="C")  # a tensor cannot share memory that is read-only
    if own.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(own.view(numpy.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(own)
    return tensor.to(torch.get_default_device())


def to_host(array: torch.Tensor) -> numpy.ndarray[Any, Any]:
    """Return a NumPy array of the same dtype."""
    array = array.detach().cpu()
    if array.dtype == torch.bfloat16:
        return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return array.numpy()


# ------------------------------------------------------------------------------------- transforms


def grad(function: Callable[..., torch.Tensor], argnums: Sequence[int]) -> Callable[..., Any]:
    """Return a function's gradients by plain autograd, or inside torch.compile by torch.func.grad.

    The compiler's tracer follows torch.func.grad, which does not go through checkpoints. Inside
    another gradient, where arrays require one, the gradients can be differentiated again.
    """
    wanted = tuple(argnums)

    def gradients(*arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if torch.compiler.is_compiling():
            return torch.func.grad(function, argnums=wanted)(*arrays)
        again = torch.is_grad_enabled() and any(a.requires_grad for a in arrays)
        leaves = [
            a if again and a.requires_grad else a.detach().requires_grad_(i in wanted)
            for i, a in enumerate(arrays)
        ]
        with torch.enable_grad():
            result = function(*leaves)
        return torch.autograd.grad(
            result, [leaves[i] for i in wanted], create_graph=again, materialize_grads=True
        )

    return gradients


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile by torch.compile, without graph breaks, once for each kind of argument."""

    def call(*arrays: torch.Tensor) -> Any:
        return function(*arrays)

    # torch.compile counts recompilations for each code object, whichever closure it belongs to.
    call.__code__ = call.__code__.replace()
    return torch.compile(call, fullgraph=True, dynamic=False)


def vmap(function: Callable[..., Any], in_axes: Sequence[int | None]) -> Callable[..., Any]:
    """Map by torch.vmap."""
    return torch.vmap(function, in_dims=tuple(in_axes))


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checkpoint by torch.utils.checkpoint, which computes the function again in the backward."""

    def call(*arrays: Any) -> Any:
        # a tracing compiler cannot look at a context variable
        run = function if torch.compiler.is_compiling() else in_this_block(function)
        return _checkpoint(run, *arrays, use_reentrant=False)

    return call


_checkpoint = cast("Callable[..., Any]", torch.utils.checkpoint.checkpoint)
"""A global: the compiler's tracer does not follow it as a variable."""
