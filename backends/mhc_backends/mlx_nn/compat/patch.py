"""mhc-mlx's AutoPatcher: a static connection around every Linear that can have one."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, cast

from mlx import nn

from mhc_backends.mlx_nn.compat.rewire import MHCRewire
from mhc_core import checks

__all__ = ["OUTPUT_HEADS", "AutoPatcher", "PatchReport", "Patched"]

OUTPUT_HEADS = (
    "classifier",
    "embed_out",
    "head",
    "lm_head",
    "output",
    "output_head",
    "output_layer",
    "unembed",
)
"""Common names of the layer that returns the logits."""

IN_A_TUPLE = "in a tuple: MLX does not train or save modules in tuples"


@dataclass(frozen=True)
class Patched:
    """The outcome for one module.

    Attributes
    ----------
    name
        Its path in the model, such as ``"layers.0.q_proj"``.
    class_name
        The name of its class.
    dims
        Its size if it was wrapped, otherwise None.
    reason
        Why it was not wrapped. For a wrapped module a warning, or "".
    """

    name: str
    class_name: str
    dims: int | None
    reason: str = ""


@dataclass(frozen=True)
class PatchReport:
    """The outcome of :meth:`AutoPatcher.patch`.

    Attributes
    ----------
    wrapped
        The modules that it wrapped.
    left
        Every other module, with the reason. A module that contains modules is listed only if the
        patcher did not search inside it.
    """

    wrapped: list[Patched] = field(default_factory=list[Patched])
    left: list[Patched] = field(default_factory=list[Patched])

    def __str__(self) -> str:
        rows = [f"{one.name} ({one.class_name}): wrapped" for one in self.wrapped]
        rows += [f"{one.name} ({one.class_name}): {one.reason}" for one in self.left]
        return "\n".join(rows)


class AutoPatcher:
    """Wrap the Linears of a model with :class:`MHCRewire`, in place."""

    @staticmethod
    def patch(
        model: nn.Module,
        n_streams: int = 32,
        verbose: bool = True,
        *,
        init: str = "residual",
        skip: Collection[str] = OUTPUT_HEADS,
        **mhc_kwargs: Any,
    ) -> PatchReport:
        """Wrap every Linear and QuantizedLinear that keeps its size, wherever the model holds it.

        It finds Linears in attributes and in nested lists, tuples and dicts. A module that occurs
        twice in the model is wrapped once. A module that is already wrapped stays unchanged, with
        everything inside it.

        Parameters
        ----------
        model
            The model, changed in place.
        n_streams
            n; only Linears whose size is a multiple of n are wrapped.
        verbose
            Whether to print what is wrapped.
        init
            As for :class:`MHCRewire`.
        skip
            Names of modules to leave unchanged, with everything inside them: whole paths, or last
            components of paths. ``()`` skips none.
        **mhc_kwargs
            Passed to the :class:`MHCLayer` of each wrapper.

        Returns
        -------
        PatchReport
            What was wrapped, and why the rest was not.

        Raises
        ------
        TypeError, ValueError
            For arguments of the wrong type or size, before anything is wrapped.

        Notes
        -----
        ``AutoPatcher.patch`` of mhc-mlx 0.6.3, which returns nothing. A wrapper is trainable even
        if the wrapped module is frozen, and has that module's mode (training or evaluation).

        Examples
        --------
        >>> from mlx import nn
        >>> from mhc_core.mlx import AutoPatcher
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
        >>> print(AutoPatcher.patch(model, n_streams=4, verbose=False))
        layers.0 (Linear): wrapped
        layers.1 (Linear): it maps 64 dims to 10; a residual connection needs the same size
        """
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"AutoPatcher: model is a {type(model).__name__}; needs an nn.Module")
        checks.positive_int("AutoPatcher", "n_streams", n_streams)
        MHCRewire(nn.Identity(), n_streams, n_streams, init=init, **mhc_kwargs)  # raises if wrong
        patching = _Patching(n_streams, verbose, skip, {"init": init, **mhc_kwargs})
        return patching.run(model)


class _Patching:
    """One run of the patcher."""

    def __init__(
        self, n: int, verbose: bool, skip: Collection[str], options: dict[str, Any]
    ) -> None:
        self.n, self.verbose, self.skip, self.options = n, verbose, skip, options
        self.report = PatchReport()
        self.replacements: dict[int, nn.Module] = {}  # by the id of the original module

    def run(self, model: nn.Module) -> PatchReport:
        if _sizes(model) or isinstance(model, MHCRewire):
            self.leave(model, "", "it is the model itself, which cannot be replaced in place")
        else:
            self.replacements[id(model)] = model
            self.visit_items(model, "")
        self.say(f"Patched {len(self.report.wrapped)} layers.")
        return self.report

    def visit_items(self, container: Any, prefix: str, in_tuple: bool = False) -> None:
        """Replace the items of a module, a dict or a list."""
        indices = range(len(container))
        for key in indices if isinstance(container, list) else list(container):
            value = cast("Any", container)[key]
            new = self.visit(value, f"{prefix}{key}", in_tuple)
            if new is not value:
                container[key] = new

    def visit(self, value: Any, name: str, in_tuple: bool) -> Any:
        """Return the replacement of a value."""
        if isinstance(value, nn.Module):
            if id(value) not in self.replacements:
                self.replacements[id(value)] = value  # ends the recursion of a cycle
                self.replacements[id(value)] = self.replacement(value, name, in_tuple)
            return self.replacements[id(value)]
        if isinstance(value, (dict, list)):
            self.visit_items(cast("Any", value), f"{name}.", in_tuple)
        elif isinstance(value, tuple):
            return self.visit_tuple(cast("tuple[Any, ...]", value), name)
        return cast("Any", value)

    def visit_tuple(self, value: tuple[Any, ...], name: str) -> tuple[Any, ...]:
        new = [self.visit(item, f"{name}.{k}", True) for k, item in enumerate(value)]
        if all(map(operator.is_, new, value)):
            return value
        make: Any = getattr(type(value), "_make", type(value))  # of a named tuple
        return make(new)

    def replacement(self, module: nn.Module, name: str, in_tuple: bool) -> nn.Module:
        reason = self.obstacle(module, name)
        if reason is None:
            return self.wrap(module, name, in_tuple)
        if reason or not _holds_module(dict(module)):
            self.leave(module, name, reason or "only Linear and QuantizedLinear are wrapped")
        else:
            self.visit_items(module, f"{name}.", in_tuple)
        return module

    def obstacle(self, module: nn.Module, name: str) -> str | None:
        """Return why a module cannot be wrapped, or None; "" if it is not a Linear at all."""
        if isinstance(module, MHCRewire):
            return f"it is already wrapped, with n={module.n}"
        if name in self.skip or name.rpartition(".")[2] in self.skip:
            return "its name is in skip, which by default has the names of output heads"
        sizes = _sizes(module)
        if sizes is None:
            return ""
        dims_in, dims_out = sizes
        if dims_in != dims_out:
            return (
                f"it maps {dims_in} dims to {dims_out}; a residual connection needs the same size"
            )
        if dims_in % self.n:
            return f"its {dims_in} dims are not a multiple of n={self.n}"
        return None

    def wrap(self, module: nn.Module, name: str, in_tuple: bool) -> MHCRewire:
        class_name, dims = type(module).__name__, (_sizes(module) or (0, 0))[0]
        self.say(f"Rewiring {name} (dims={dims}, streams={self.n})")
        wrapper = MHCRewire(module, dims, self.n, **self.options)
        wrapper.train(module.training)
        warning = IN_A_TUPLE if in_tuple else ""
        self.report.wrapped.append(Patched(name, class_name, dims, warning))
        return wrapper

    def leave(self, module: nn.Module, name: str, reason: str) -> None:
        self.report.left.append(Patched(name, type(module).__name__, None, reason))

    def say(self, line: str) -> None:
        if self.verbose:
            print(f"[AutoPatcher] {line}")


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return a Linear's or QuantizedLinear's input and output sizes, or None for another module."""
    if isinstance(module, nn.QuantizedLinear):
        rows, words = module.weight.shape
        return words * 32 // module.bits, rows
    if isinstance(module, nn.Linear):
        rows, columns = module.weight.shape
        return columns, rows
    return None


def _holds_module(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return True
    if isinstance(value, dict):
        value = list(cast("dict[Any, Any]", value).values())
    return isinstance(value, (list, tuple)) and any(map(_holds_module, cast("list[Any]", value)))
