"""The base of modules with static mappings, which evaluation mode computes once and caches."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar, cast

import mlx.core as mx
from mlx import nn

__all__ = ["StaticModule", "residual_start"]

NEAR_ONE = 9.0  # the logit: 1 - sigmoid(9) = 1.2e-4; nearer to 1, it would train more slowly


class StaticModule(nn.Module):
    """A module whose mappings do not depend on its input.

    In evaluation mode a mapping is cached with the arrays that it was computed from, and is valid
    only while the module holds those same array objects. So ``update``, ``load_weights``,
    ``set_dtype``, an optimizer, an assignment, and the tracers of ``mx.grad`` and ``mx.compile``
    all invalidate it, and no values are compared.

    Attributes
    ----------
    raw
        The names of the parameters that the mappings depend on.
    """

    # Writing into an array (``module.weight[0] = 1``) does not change the object. Code that writes
    # into a parameter gets it from the module or assigns it first, so both clear the cache. A write
    # into an array that the caller got before the last evaluation is not noticed.
    raw: ClassVar[tuple[str, ...]] = ()

    def _clear(self, *names: str) -> None:
        """Clear the cache if one of these parameters matters to it; without names, always."""
        if not names or any(name in self.raw for name in names):
            vars(self).pop("_cache", None)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set a parameter."""
        self._clear(name)
        super().__setitem__(name, value)

    def __getitem__(self, name: str) -> Any:
        """Return a parameter."""
        self._clear(name)
        return cast("Any", super()).__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a parameter, also for ``module.name``."""
        self._clear(name)
        return cast("Any", super()).get(name, default)

    def items(self) -> Any:
        """Return all items, also for ``parameters()`` of any module that contains this one."""
        self._clear()
        return cast("Any", super()).items()

    def values(self) -> Any:
        """Return all values."""
        self._clear()
        return cast("Any", super()).values()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the cache, whose arrays may belong to a trace that has ended."""
        return {key: value for key, value in vars(self).items() if key != "_cache"}

    def cached(self, name: str) -> Any:
        """Return a cached mapping, or None if it is not cached or the module is in training."""
        cache: dict[str, tuple[tuple[Any, ...], Any]] = vars(self).get("_cache", {})
        return cache[name][1] if name in cache and not self.training else None

    def _parameters(self, *names: str) -> tuple[Any, ...]:
        """Return parameters without clearing the cache, for code that does not write into them."""
        module = cast("Any", super())
        return tuple(module.__getitem__(name) for name in names)

    def _memoized(self, name: str, compute: Callable[..., Any], *sources: Any) -> Any:
        """Return ``compute(*sources)``; in evaluation mode from the cache while it is valid."""
        if self.training:
            return compute(*sources)
        # In __dict__: as a module's attribute, MLX would count a dict among its parameters.
        cache: dict[str, tuple[tuple[Any, ...], Any]] = vars(self).setdefault("_cache", {})
        before, value = cache.get(name, ((), None))
        if len(before) != len(sources) or any(map(operator.is_not, before, sources)):
            value = compute(*sources)
            cache[name] = (sources, value)
        return value


def residual_start(n: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return raw parameters whose H_pre, H_post and H_res are 1, 1 and the identity, to 1.3e-4.

    The diagonal of H_res is 1 - 1.2e-4 for any n.
    """
    gap = NEAR_ONE + math.log(max(n - 1, 1))  # between a row's diagonal logit and its others
    return mx.full((n,), NEAR_ONE), mx.zeros((n,)), gap * (mx.eye(n) - 1)
