"""The operations that training needs from an array library beyond the array API: JAX or MLX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["LIBRARIES", "Library", "library"]

Array = Any
Function = Callable[..., Any]


@dataclass(frozen=True)
class Library:
    """An array library.

    Attributes
    ----------
    xp
        Its namespace.
    loop
        ``carry, kept = body(carry, entry)`` for every entry of stacked arrays; returns the last
        carry and all that was kept, stacked.
    with_gradients
        Takes a function of a dict of arrays and more; returns its value and the dict's gradients.
    prepared
        Takes a function and arguments of the right shapes; returns a function that computes it,
        and the bytes that this needs where they are known before it runs.
    wait
        Finishes the computation of arrays.
    peak
        The most memory in bytes since ``forget``, or None where the library does not count.
    """

    xp: Any
    loop: Function
    with_gradients: Callable[[Function], Function]
    prepared: Callable[..., tuple[Function, int | None]]
    wait: Function
    forget: Callable[[], None]
    peak: Callable[[], int | None]


def library(name: str) -> Library:
    """Return the library of that name, ``"jax"`` or ``"mlx"``."""
    return LIBRARIES[name]()


def _jax() -> Library:
    jax: Any = import_module("jax")

    def prepared(function: Function, *arguments: Any) -> tuple[Function, int | None]:
        compiled = jax.jit(function).lower(*arguments).compile()
        memory = compiled.memory_analysis()
        if memory is None:
            return compiled, None
        sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        return compiled, sum(int(getattr(memory, size)) for size in sizes)

    return Library(
        xp=jax.numpy,
        loop=jax.lax.scan,
        with_gradients=jax.value_and_grad,
        prepared=prepared,
        wait=jax.block_until_ready,
        forget=lambda: None,
        peak=lambda: None,
    )


def _mlx() -> Library:
    mx: Any = import_module("mlx.core")
    on_gpu = mx.default_device().type == mx.DeviceType.gpu

    def loop(body: Function, carry: Any, stacked: Mapping[str, Array]) -> tuple[Any, Any]:
        entries = {name: mx.unstack(array, axis=0) for name, array in stacked.items()}
        count = len(next(iter(entries.values())))
        kept: list[Any] = []
        for k in range(count):
            carry, keep = body(carry, {name: parts[k] for name, parts in entries.items()})
            kept.append(keep)
        if kept[0] is None:
            return carry, None
        return carry, [mx.stack(parts) for parts in zip(*kept, strict=True)]

    def prepared(function: Function, *_: Any) -> tuple[Function, int | None]:
        # on a CPU it would save a sixth of a step, and call g++ for seconds first
        return (mx.compile(function) if on_gpu else function), None

    return Library(
        xp=mx,
        loop=loop,
        with_gradients=mx.value_and_grad,
        prepared=prepared,
        wait=mx.eval,
        forget=mx.reset_peak_memory,
        peak=mx.get_peak_memory,
    )


LIBRARIES: Mapping[str, Callable[[], Library]] = {"jax": _jax, "mlx": _mlx}
"""The libraries that can train, by name."""
