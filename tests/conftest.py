"""Fixtures for all tests: a clean environment, and plugins that exist for one test."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest

import mhc_backends
from mhc_core import discovery, math, selection
from mhc_core.backend import BackendSpec
from mhc_core.hookspecs import hookimpl

VARIABLES = ("MHC_BACKEND", "MHC_DISABLE_PLUGINS", "MHC_MLX_DISABLE_METAL")
LIBRARY = "fake_library"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the shell's environment variables from the tests."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


class FakeArray:
    """An array of a library that does not exist: a shape and a dtype."""

    def __init__(self, *shape: int, dtype: str = "float32") -> None:
        self.shape = shape
        self.dtype = dtype


class Plugins:
    """Entry points beside the installed ones, for one test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        installed = importlib.metadata.entry_points
        self._points = list(installed(group=discovery.ENTRY_POINTS))

        def entry_points(**asked: str) -> Any:  # others ask too: PyTorch, as it is imported
            ours = asked == {"group": discovery.ENTRY_POINTS}
            return self._points if ours else installed(**asked)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        monkeypatch.setattr(mhc_backends, "BUILTINS", mhc_backends.BUILTINS)
        self.module(LIBRARY, Array=FakeArray)
        self.forget()

    def forget(self) -> None:
        """Clear all caches: the next call discovers and chooses anew, as a new process would."""
        self._monkeypatch.setattr(discovery, "_discovered", None)
        self._monkeypatch.setattr(selection, "_SELECTED", {})
        self._monkeypatch.setattr(selection, "_RECALLED", {})

    def only(self, *names: str) -> None:
        """Keep only these of the installed plugins."""
        self._points = [point for point in self._points if point.name in names]
        kept = [m for m in mhc_backends.BUILTINS if m.split(".")[1].replace("_", "-") in names]
        self._monkeypatch.setattr(mhc_backends, "BUILTINS", tuple(kept))

    def module(self, name: str, **content: Any) -> None:
        """Make a module that can be imported."""
        made = ModuleType(name)
        vars(made).update(content)
        self._monkeypatch.setitem(sys.modules, name, made)

    def point(self, name: str, value: str) -> None:
        """Add an entry point to any module, existing or not."""
        self._points.append(EntryPoint(name, value, discovery.ENTRY_POINTS))
        self.forget()

    def plugin(
        self,
        name: str,
        specs: Callable[[], Any] | Sequence[Any] | None = None,
        select: Callable[[str, Sequence[BackendSpec]], Any] | None = None,
    ) -> None:
        """Add a plugin with these hooks."""
        hooks: dict[str, Any] = {}
        if specs is not None:

            @hookimpl
            def mhc_backend_specs() -> Any:
                return specs() if callable(specs) else specs

            hooks["mhc_backend_specs"] = mhc_backend_specs
        if select is not None:

            @hookimpl
            def mhc_select(op: str, candidates: Sequence[BackendSpec]) -> Any:
                return select(op, candidates)

            hooks["mhc_select"] = mhc_select
        module = f"plugin_{name.replace('-', '_')}_{len(self._points)}"
        self.module(module, **hooks)
        self.point(name, module)

    def mixers(self, name: str, mixers: Callable[[], Any]) -> None:
        """Add a plugin that brings mixers."""

        @hookimpl
        def mhc_mixers() -> Any:
            return mixers()

        module = f"plugin_{name.replace('-', '_')}_{len(self._points)}"
        self.module(module, mhc_mixers=mhc_mixers)
        self.point(name, module)

    def spec(
        self, name: str, functions: dict[str, Any] | None = None, **fields: Any
    ) -> BackendSpec:
        """Make a spec whose ops answer with the backend's name, or are the functions given."""
        module = f"ops_of_{name.replace('-', '_')}"
        answers = {op: lambda *_, **__: name for op in (*math.OPS, "vjp")}
        self.module(module, **(answers if functions is None else functions))
        fields = {"array_types": (f"{LIBRARY}.Array",), "ops": math.OPS, **fields}
        return BackendSpec(name=name, module=module, **fields)

    def backend(
        self, name: str, functions: dict[str, Any] | None = None, **fields: Any
    ) -> BackendSpec:
        """Add a plugin that brings one backend, for FakeArray unless said otherwise."""
        spec = self.spec(name, functions, **fields)
        self.plugin(name, [spec])
        return spec


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Plugins:
    """Return plugins that are gone after the test."""
    return Plugins(monkeypatch)


@pytest.fixture
def fake() -> type[FakeArray]:
    """Return the array type of the fake library."""
    return FakeArray
