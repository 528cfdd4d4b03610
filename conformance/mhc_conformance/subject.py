"""The backend under test, reached only through the public API and its declared functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

import mhc_core
from mhc_conformance.cases import Case, declaration
from mhc_core.backend import BackendSpec
from mhc_core.discovery import backend_module

__all__ = ["Subject", "several"]

Array = NDArray[Any]


def several(arrays: Any) -> tuple[Any, ...]:
    """Return the outputs of an op, one or many, as a tuple."""
    return tuple(cast("Sequence[Any]", arrays)) if isinstance(arrays, (tuple, list)) else (arrays,)


def _there(arrays: Any) -> tuple[Any, ...]:
    return tuple(array for array in arrays if array is not None)


class Subject:
    """One backend: its declaration, and its ops on its own arrays."""

    def __init__(self, name: str, full: bool = False, quick: bool = False) -> None:
        known = mhc_core.backends()
        if name not in known:
            with mhc_core.use_backend(name):  # raises, with the nearest name
                raise AssertionError(name)
        backend = known[name]
        if backend.spec is None or backend.reason is not None:
            raise mhc_core.BackendUnavailableError(f"backend {name!r} cannot run: {backend.reason}")
        self.name = name
        self.full = full
        self.quick = quick
        self.wants: Callable[[Any], bool] = lambda _: True  # whether to run a case
        self.trying = ""  # the case that is running, for the record of an exception
        self.spec: BackendSpec = backend.spec
        # whether it runs its share of the cases alone: see cases.dealt
        self.deals = self.spec.neutral and self.lacks("compile") is None and not (full or quick)
        self.module: Any = backend_module(backend.spec)
        # whether one program has a case's outputs and gradients, kept for both checks
        self.together = self.deals and hasattr(self.module, "composed")
        self.kept: dict[Any, tuple[Any, Any]] = {}
        self._programs: dict[Any, Callable[..., Any]] = {}

    def dtype_context(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        """Enter the context that the library needs for arrays of that dtype (JAX's x64 mode)."""
        enter = getattr(self.module, "dtype_context", None)
        return enter(dtype) if enter else contextlib.nullcontext()

    def hurried(self) -> contextlib.AbstractContextManager[None]:
        """Enter the context in which the backend compiles faster, if its module has one."""
        enter = getattr(self.module, "hurried", None)
        return enter() if enter else contextlib.nullcontext()

    def take(self, arrays: Sequence[Array]) -> tuple[Any, ...]:
        """Convert NumPy arrays to the backend's own."""
        return tuple(self.module.from_host(np.ascontiguousarray(array)) for array in arrays)

    def give(self, arrays: Any) -> tuple[Array, ...]:
        """Convert one array or several to NumPy's."""
        return tuple(self.module.to_host(array) for array in several(arrays))

    def function(self, case: Case) -> Callable[..., Any]:
        """Return a case's op as a function of the arrays that are there, to the outputs that are.

        Nothing else knows of arrays that are None: those of the case, and H_res of streams that are
        not mixed.
        """
        # read here, since a compiler that traces the call cannot follow an import
        public, names, options = getattr(mhc_core, case.op), case.names, case.options
        optional = declaration(case.op).optional

        def call(*arrays: Any) -> Any:
            named = {**dict.fromkeys(optional), **dict(zip(names, arrays, strict=True))}
            outputs = public(**named, **options, backend=self.name)
            return _there(outputs) if isinstance(outputs, tuple) else outputs

        return call

    def vjp(self, case: Case, primals: Any, cotangents: Any) -> Any:
        """Call the public vjp of a case's op, with the arrays that are there."""
        kept, given = declaration(case.op).kept(case.options), iter(cotangents)
        pulled = mhc_core.vjp(
            case.op,
            case.placed(primals),
            tuple(next(given) if there else None for there in kept),
            **case.options,
            backend=self.name,
        )
        return _there(pulled)

    def accepts(self, case: Case) -> bool:
        """Return whether the backend declares the case's number of streams and its mixers."""
        return self.spec.refuses(self.spec.ops[0], (), case.sizes.n, case.mixers) is None

    def lacks(self, transform: str) -> str | None:
        """Return why the backend lacks a transform, or None where it declares to have it."""
        return self.spec.without.get(transform)

    def transform(self, name: str) -> Callable[..., Any]:
        """Return a declared transform; raise if the backend declares it and does not have it."""
        function = getattr(self.module, name, None)
        if function is None:
            raise AssertionError(
                f"backend {self.name!r} declares {name!r} (it is not in BackendSpec.without), but "
                f"{self.spec.module} has no function {name!r}"
            )
        return function

    def composed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function made of many calls as the backend's module has it run.

        A library that compiles each call by itself may compile them together in less time.
        """
        made = getattr(self.module, "composed", None)
        return made(function) if made else function

    def forward(self, case: Case) -> Callable[..., Any]:
        """Return :meth:`function`, composed; the same program at every call."""
        return self._program("forward", case, lambda: self.function(case))

    def both(self, case: Case) -> Callable[..., Any]:
        """Return a function of primals and cotangents to outputs and gradients, as `forward`."""

        def make() -> Callable[..., Any]:
            function = self.function(case)

            def call(primals: Any, cotangents: Any) -> Any:
                return several(function(*primals)), self.vjp(case, primals, cotangents)

            return call

        return self._program("both", case, make)

    def _program(
        self, what: str, case: Case, make: Callable[[], Callable[..., Any]]
    ) -> Callable[..., Any]:
        key = what, case
        if key not in self._programs:
            self._programs[key] = self.composed(make())
        return self._programs[key]
