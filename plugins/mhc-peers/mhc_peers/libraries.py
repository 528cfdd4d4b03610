"""The array libraries of peers: arrays in, arrays out, and gradients by the library's autodiff."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, cast

import numpy as np

__all__ = ["LIBRARIES", "Compiled", "has_gpu"]

Function = Callable[..., Any]


def has_gpu() -> bool:
    """Return whether PyTorch has a GPU here."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def _several(outputs: Any) -> list[Any]:
    if isinstance(outputs, (tuple, list)):
        return list(cast("Sequence[Any]", outputs))
    return [outputs]


class Compiled:
    """The calls of a peer that are timed, each compiled once."""

    way = "call"

    def __init__(self) -> None:
        self._calls: dict[Any, Function] = {}

    def forward(self, function: Function, primals: Sequence[Any]) -> list[Any]:
        raise NotImplementedError

    def gradients(
        self, function: Function, primals: Sequence[Any], cotangents: Sequence[Any]
    ) -> list[Any]:
        raise NotImplementedError

    def compiled(
        self, key: Any, function: Function, names: Sequence[str], static: Mapping[str, Any]
    ) -> Function:
        """Return a function of primals to outputs; of cotangents after them, to gradients."""
        if key not in self._calls:
            count = len(names)

            def call(*arrays: Any) -> Any:
                return function(**dict(zip(names, arrays, strict=True)), **static)

            def run(*arrays: Any) -> Any:
                if len(arrays) == count:
                    return self.forward(call, arrays)
                return self.gradients(call, arrays[:count], arrays[count:])

            self._calls[key] = self.whole(run)
        return self._calls[key]

    def whole(self, function: Function) -> Function:
        """Compile a function as users of the library do."""
        return function


class Torch(Compiled):
    """PyTorch, on a GPU where there is one and the peer needs it."""

    def __init__(self, device: str) -> None:
        import torch

        super().__init__()
        torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = False
        self.torch, self.device = torch, device

    def take(self, array: Any) -> Any:
        narrow = str(array.dtype) == "bfloat16"
        tensor = self.torch.from_numpy(array.astype(np.float32) if narrow else array)
        return (tensor.bfloat16() if narrow else tensor).to(self.device)

    def give(self, tensor: Any) -> Any:
        tensor = tensor.detach().cpu()
        if tensor.dtype != self.torch.bfloat16:
            return tensor.numpy()
        import ml_dtypes

        return tensor.float().numpy().astype(ml_dtypes.bfloat16)

    def forward(self, function: Function, primals: Sequence[Any]) -> list[Any]:
        with self.torch.no_grad():
            return _several(function(*primals))

    def gradients(
        self, function: Function, primals: Sequence[Any], cotangents: Sequence[Any]
    ) -> list[Any]:
        leaves = [primal.detach().clone().requires_grad_() for primal in primals]
        outputs = _several(function(*leaves))
        pairs = list(zip(outputs, cotangents, strict=True))
        found = self.torch.autograd.grad(
            [output for output, _ in pairs],
            leaves,
            [cotangent.to(output.dtype) for output, cotangent in pairs],
            allow_unused=True,
        )
        return [
            self.torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves, found, strict=True)
        ]

    def wait(self, outputs: Sequence[Any]) -> None:
        if self.device != "cpu":
            self.torch.cuda.synchronize()


class Mlx(Compiled):
    """MLX, on its default device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.mx: Any = import_module("mlx.core")

    def take(self, array: Any) -> Any:
        if str(array.dtype) == "bfloat16":
            return self.mx.array(array.astype(np.float32)).astype(self.mx.bfloat16)
        return self.mx.array(array)

    def give(self, array: Any) -> Any:
        if array.dtype != self.mx.bfloat16:
            return np.array(array)
        import ml_dtypes

        return np.array(array.astype(self.mx.float32)).astype(ml_dtypes.bfloat16)

    def forward(self, function: Function, primals: Sequence[Any]) -> list[Any]:
        return _several(function(*primals))

    def gradients(
        self, function: Function, primals: Sequence[Any], cotangents: Sequence[Any]
    ) -> list[Any]:
        def listed(*arrays: Any) -> list[Any]:
            return _several(function(*arrays))

        dtypes = [output.dtype for output in listed(*primals)]
        given = [c.astype(dtype) for c, dtype in zip(cotangents, dtypes, strict=True)]
        return list(self.mx.vjp(listed, list(primals), given)[1])

    def wait(self, outputs: Sequence[Any]) -> None:
        self.mx.eval(list(outputs))


class Jax(Compiled):
    """JAX, on its default device."""

    def __init__(self, device: str) -> None:
        import jax
        import jax.numpy as jnp

        super().__init__()
        self.jax, self.jnp = jax, jnp

    way = "jax.jit"

    def whole(self, function: Function) -> Function:
        """Compile a function."""
        return self.jax.jit(function)

    def take(self, array: Any) -> Any:
        return self.jnp.asarray(array)

    def give(self, array: Any) -> Any:
        return np.asarray(array)

    def forward(self, function: Function, primals: Sequence[Any]) -> list[Any]:
        return _several(function(*primals))

    def gradients(
        self, function: Function, primals: Sequence[Any], cotangents: Sequence[Any]
    ) -> list[Any]:
        def listed(*arrays: Any) -> list[Any]:
            return _several(function(*arrays))

        outputs, pull = self.jax.vjp(listed, *primals)
        pairs = zip(outputs, cotangents, strict=True)
        return list(pull([cotangent.astype(output.dtype) for output, cotangent in pairs]))

    def wait(self, outputs: Sequence[Any]) -> None:
        self.jax.block_until_ready(list(outputs))


LIBRARIES: dict[str, Callable[[str], Any]] = {"torch": Torch, "mlx": Mlx, "jax": Jax}
"""The array libraries by name."""
