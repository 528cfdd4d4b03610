"""The declaration of a family of models, and what its replacements share."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch
from torch import Tensor, nn

from mhc_backends.acceleration import Swap
from mhc_torch._norms import HOOKS, is_changed, kernels_run, parts_changed

__all__ = [
    "EVERYWHERE",
    "WHERE",
    "Family",
    "Norm",
    "agree",
    "classes_of",
    "compare",
    "drawn",
    "has_values",
    "hooked",
    "installed",
    "kernels_run",
    "pays",
    "probe_of",
    "replaces",
    "require",
    "streams_of",
    "stub_of",
    "why_left",
]

EVERYWHERE = "_mhc_everywhere"  # an attribute of modules: the argument of accelerate


WHERE = "for CUDA tensors; elsewhere its own code runs, unless everywhere=True"

_SAME = 1e-3  # of float32's rounding, and far below any other formula


def _nothing_left(_: type[Any], __: Any) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """The replacements of a library's classes, for the models of one of its modules.

    Attributes
    ----------
    swaps
        The subclass for each class; its check runs once, on the model's first instance.
    leaves
        Returns why the instances of a class stay unchanged, or None; it gets the first one.
    """

    swaps: Mapping[type[Any], Swap]
    leaves: Callable[[type[Any], Any], str | None] = _nothing_left


def installed() -> str:
    """Return the installed transformers in words."""
    try:
        return f"transformers {version('transformers')}"
    except PackageNotFoundError:
        return "transformers of unknown version"


def classes_of(home: str, names: Sequence[str]) -> list[Any]:
    """Return classes of a library's module; raise, naming those that it does not have."""
    module = import_module(home)
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise RuntimeError(
            f"accelerate: {home} of {installed()} has no {', '.join(missing)}; look for a newer "
            "mhc-torch"
        )
    return [getattr(module, name) for name in names]


def require(path: str, module: Any, names: Sequence[str]) -> None:
    """Raise unless a module has attributes of these dotted names."""
    for name in names:
        value: Any = module
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is None:
            raise RuntimeError(
                f"accelerate: {path}, a {type(module).__name__} of {installed()}, has no {name}; "
                "look for a newer mhc-torch"
            )


def has_values(module: nn.Module) -> bool:
    """Return whether a module's parameters are whole and on a real device."""
    return not any(p.is_meta or hasattr(p, "full_tensor") for p in module.parameters())


def hooked(module: nn.Module) -> bool:
    """Return whether a connection or a part of it must be called, as :func:`is_changed` says.

    A hook may bring the parameters, make them (pruning), or record what goes in (calibration).
    """
    return is_changed(module) or parts_changed(module)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The library's RMS norm at a layer's begin, which the kernels of pre and combine_pre take in.

    Attributes
    ----------
    cls
        Its class.
    keeps_dtype
        Whether its output has the dtype of its input, whatever the weight's.
    """

    cls: type[Any]
    keeps_dtype: bool = False

    def words(self, norm: nn.Module, x: Tensor) -> dict[str, Any]:
        """Return the arguments of pre for this norm; none if the module must be called."""
        if type(norm) is not self.cls or is_changed(norm):
            return {}
        module = cast("Any", norm)
        weight: Tensor = module.weight
        if not (self.keeps_dtype or weight.dtype == x.dtype):
            return {}
        return {"h_norm_weight": weight, "h_norm_eps": module.variance_epsilon}


# ---- what the installed library computes --------------------------------------------------------


def compare(path: str, module: Any, fn: Tensor, original: type[Any], ours: Any) -> None:
    """Raise unless the library's forward and ours agree on random parameters and streams.

    ``fn`` is the projection of the streams, ``[rows, n * C]``.
    """
    if not has_values(module):
        return
    probe = probe_of(module)
    x = drawn(torch.empty(1, 2, module.hc_mult, fn.shape[-1] // module.hc_mult, device=fn.device))
    with torch.no_grad():
        agree(path, original, ours(probe, x), original.forward(probe, x))


def agree(path: str, original: type[Any], got: Any, want: Any) -> None:
    """Raise unless what we compute for a module is what its class computes."""
    off = _difference(got, want)
    if not off <= _SAME:
        raise RuntimeError(
            f"accelerate: {path}, a {original.__name__} of {installed()}, computes something else "
            f"than mhc-core (they differ by {off:.1e}); look for a newer mhc-torch"
        )


def why_left(theirs: Callable[[], Any], ours: Callable[[], Any]) -> str | None:
    """Return why layers keep their forward, after comparing it with ours on one of stand-ins."""
    try:
        with torch.no_grad():
            off = _difference(ours(), theirs())
    except Exception as error:
        return f"its forward is not the one that is known: {type(error).__name__}: {error}"
    return None if off <= _SAME else f"its forward computes something else (off by {off:.1e})"


def probe_of(module: Any) -> Any:
    """Return a copy of a connection with random float32 parameters."""
    # without hooks, which would see the random numbers, and without the history of a pruned tensor
    own = [vars(one) for one in cast("nn.Module", module).modules()]
    kept: dict[int, Any] = {id(one[name]): OrderedDict[int, Any]() for one in own for name in HOOKS}
    tensors = [value for one in own for value in one.values() if isinstance(value, Tensor)]
    kept |= {id(tensor): tensor.detach().clone() for tensor in tensors}
    probe = copy.deepcopy(module, kept).float().requires_grad_(False)
    for parameter in probe.parameters():
        drawn(parameter)
        if parameter.ndim > 1:
            parameter /= parameter.shape[-1] ** 0.5
    return probe


def drawn(tensor: Tensor) -> Tensor:
    """Fill a tensor with random numbers, without the program's generator."""
    return tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(tensor.numel()))


def streams_of(connection: Any) -> Tensor:
    """Return random streams for a connection."""
    n, fn = connection.hc_mult, connection.fn
    return drawn(torch.empty(1, 2, n, fn.shape[-1] // n, device=fn.device))


def stub_of(cls: type[Any], layer: Any) -> Any:
    """Return a layer with random connections and norms; the caller adds the rest."""
    stub: Any = object.__new__(cls)  # transformers looks the forward up by the class
    nn.Module.__init__(stub)
    stub.attn_hc, stub.ffn_hc = probe_of(layer.attn_hc), probe_of(layer.ffn_hc)
    for name in ("input_layernorm", "post_attention_layernorm"):
        setattr(stub, name, probe_of(getattr(layer, name)))
    return stub


def _difference(got: Any, want: Any) -> float:
    """Return the largest difference of tensors or tuples of them, relative to the largest entry."""
    pairs = zip(_tuple(got), _tuple(want), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return cast("tuple[Tensor, ...]", value) if isinstance(value, tuple) else (value,)


def replaces(module: nn.Module, x: Tensor, fused: bool = True) -> bool:
    """Return whether the ops run a connection or a head that is called: they call no part of it."""
    return pays(module, x, fused) and not parts_changed(module)


def pays(module: nn.Module, x: Tensor, fused: bool = True) -> bool:
    """Return whether the ops are not slower than the model's own code for these streams.

    ``fused`` is whether kernels have the ops, and their vjps where gradients are wanted.
    """
    if vars(module).get(EVERYWHERE):
        return True
    return fused and kernels_run(x)
