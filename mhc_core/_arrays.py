"""The classes of arrays, by name: nothing is imported to find out which library one is from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from mhc_core.backend import BackendSpec
from mhc_core.discovery import backend_module
from mhc_core.signature import Signature, dtype_name

__all__ = ["HOST_TYPE", "class_named", "converting_host_arrays", "full_name", "is_a"]

HOST_TYPE = "numpy.ndarray"
"""The class of host arrays, which every backend converts where it was chosen by name."""


def is_a(array: Any, dotted: str) -> bool:
    """Return whether ``array`` is of the named class; False if its library is not imported.

    Uses isinstance, the only test that JAX's tracers pass.
    """
    return isinstance(array, class_named(dotted))


def class_named(dotted: str) -> Any:
    """Return the class of that name, or () where its library is not imported."""
    owner, _, name = dotted.rpartition(".")
    return getattr(sys.modules.get(owner), name, ())


def full_name(array: Any) -> str:
    """Return the dotted name of an object's class."""
    return f"{type(array).__module__}.{type(array).__qualname__}"


def converting_host_arrays(
    function: Callable[..., Any], spec: BackendSpec, call: Signature
) -> Callable[..., Any]:
    """Return ``function`` for NumPy arrays too, each converted unless that changes its dtype."""
    from_host = backend_module(spec).from_host

    def converted(value: Any, names: Iterator[str]) -> Any:
        if isinstance(value, str):  # the op's name, ahead of a vjp's arrays
            return value
        if isinstance(value, tuple):
            return tuple(converted(item, names) for item in value)  # pyright: ignore[reportUnknownVariableType]
        if value is None:  # an array that is absent
            return None
        name = next(names)
        if not is_a(value, HOST_TYPE):
            return value
        own = from_host(value)
        if dtype_name(own.dtype) != dtype_name(value.dtype):
            raise TypeError(
                f"{call.op.name}: {name} has dtype {value.dtype}; backend {spec.name!r} has none "
                f"here and would make it {dtype_name(own.dtype)}: convert it first (nothing is "
                "narrowed silently)"
            )
        return own

    def converting(*arrays: Any, **static: Any) -> Any:
        names = iter(call.names)
        return function(*[converted(array, names) for array in arrays], **static)

    return converting
