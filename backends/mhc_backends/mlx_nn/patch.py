"""mhc-mlx's AutoPatcher: a static connection around every Linear that can have one."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, cast

from mlx import nn

from mhc_backends.mlx_nn.rewire import MHCRewire
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
"""The names that models give to the layer in front of their logits."""

IN_A_TUPLE = "in a tuple: MLX neither trains nor saves what is in one"


@dataclass(frozen=True)
class Patched:
    """The outcome for one module.

    Attributes
    ----------
    name
        Its path in the model, such as ``"layers.0.q_proj"``.
    kind
        Its class.
    dims
        Its size if it was wrapped, otherwise None.
    reason
        Why it was not wrapped; for a wrapped one, a remark on it, or nothing.
    """

    name: str
    kind: str
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
        Every other one, with the reason; of modules that hold modules, only those whose contents
        were not searched.
    """

    wrapped: list[Patched] = field(default_factory=list[Patched])
    left: list[Patched] = field(default_factory=list[Patched])

    def __str__(self) -> str:
        rows = [f"{one.name} ({one.kind}): wrapped" for one in self.wrapped]
        rows += [f"{one.name} ({one.kind}): {one.reason}" for one in self.left]
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

        A Linear may be held as an attribute, or in lists, tuples and dicts, nested in any way. A
        module that a model holds twice is wrapped once; one that is wrapped already is left
        unchanged with everything inside it.

        Parameters
        ----------
        model
            The model, which is changed.
        n_streams
            n, which must divide a layer's size.
        verbose
            Whether to print what is wrapped.
        init
            As for :class:`MHCRewire`.
        skip
            Names of modules that are left unchanged with all that they hold: whole paths, or last
            parts of paths. By default :data:`OUTPUT_HEADS`; ``()`` for none.
        **mhc_kwargs
            For the :class:`MHCLayer` of each.

        Returns
        -------
        PatchReport
            What was wrapped, and why the rest was not.

        Raises
        ------
        TypeError, ValueError
            For arguments of the wrong kind or size, before anything is wrapped.

        Notes
        -----
        ``AutoPatcher.patch`` of mhc-mlx 0.6.3, which returns nothing. A wrapper is trainable even
        if the wrapped module is frozen, and takes over that module's mode (training or evaluation).

        Examples
        --------
        >>> from mlx import nn
        >>> from mhc_core.mlx import AutoPatcher
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
        >>> print(AutoPatcher.patch(model, n_streams=4, verbose=False))
        layers.0 (Linear): wrapped
        layers.1 (Linear): it takes 64 dims and gives 10; a residual needs as many
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
        self.now: dict[int, nn.Module] = {}  # by the id of a module, what stands for it now

    def run(self, model: nn.Module) -> PatchReport:
        if _sizes(model) or isinstance(model, MHCRewire):
            self.leave(model, "", "it is the model itself, which cannot be replaced in place")
        else:
            self.now[id(model)] = model
            self.enter(model, "")
        self.say(f"Patched {len(self.report.wrapped)} layers.")
        return self.report

    def enter(self, holder: Any, prefix: str, in_tuple: bool = False) -> None:
        """Replace what a module, a dict or a list holds."""
        indices = range(len(holder))
        for key in indices if isinstance(holder, list) else list(holder):
            value = cast("Any", holder)[key]
            new = self.visit(value, f"{prefix}{key}", in_tuple)
            if new is not value:
                holder[key] = new

    def visit(self, value: Any, name: str, in_tuple: bool) -> Any:
        """Return the replacement of a value."""
        if isinstance(value, nn.Module):
            if id(value) not in self.now:
                self.now[id(value)] = value  # a module may hold one that holds it
                self.now[id(value)] = self.replacement(value, name, in_tuple)
            return self.now[id(value)]
        if isinstance(value, (dict, list)):
            self.enter(cast("Any", value), f"{name}.", in_tuple)
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
        reason = self.against(module, name)
        if reason is None:
            return self.wrap(module, name, in_tuple)
        if reason or not _holds_module(dict(module)):
            self.leave(module, name, reason or "only Linear and QuantizedLinear are wrapped")
        else:
            self.enter(module, f"{name}.", in_tuple)
        return module

    def against(self, module: nn.Module, name: str) -> str | None:
        """Return why a module is left unchanged, "" if only for its kind, None if it is wrapped."""
        if isinstance(module, MHCRewire):
            return f"it is wrapped already, with n={module.n}"
        if name in self.skip or name.rpartition(".")[2] in self.skip:
            return "its name is in skip, by default those of output heads"
        sizes = _sizes(module)
        if sizes is None:
            return ""
        given, returned = sizes
        if given != returned:
            return f"it takes {given} dims and gives {returned}; a residual needs as many"
        if given % self.n:
            return f"its {given} dims are no multiple of n={self.n}"
        return None

    def wrap(self, module: nn.Module, name: str, in_tuple: bool) -> MHCRewire:
        kind, dims = type(module).__name__, (_sizes(module) or (0, 0))[0]
        self.say(f"Rewiring {name} (dims={dims}, streams={self.n})")
        wrapper = MHCRewire(module, dims, self.n, **self.options)
        wrapper.train(module.training)
        self.report.wrapped.append(Patched(name, kind, dims, IN_A_TUPLE if in_tuple else ""))
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
