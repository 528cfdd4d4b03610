"""The acceleration of transformers' models: their hyper-connections run on the uniform ops.

A model keeps its modules, its parameters and their names. Only the class of some of its modules
changes, to a subclass that is defined here. The library's classes and other models stay as they
are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, cast

from mhc_backends.acceleration import (
    AccelerationReport,
    Note,
    Planned,
    Swap,
    natural,
    swap_classes,
)
from mhc_backends.checkpoints.families import OTHERS
from mhc_core import checks
from mhc_torch.models.family import EVERYWHERE, Family

__all__ = ["AccelerationReport", "Note", "accelerate", "restore"]

# A family's file here, by the module that defines the classes which it replaces.
_FAMILIES = {
    f"transformers.models.{name}.modeling_{name}": name
    for name in ("deepseek_v4", "glm5_next", "hy_v4", "hy_v4_vl", "qwen4_exp")
}


def accelerate(model: Any, *, everywhere: bool = False) -> AccelerationReport:
    """Run a model's hyper-connections on mhc-core, in place, for training and for inference.

    For models of transformers with the layers of ``deepseek_v4``, ``glm5_next``, ``hy_v4``,
    ``hy_v4_vl`` and ``qwen4_exp``, wrapped or not. In each layer one pass,
    :func:`mhc_core.combine_pre`, writes the streams after attention and reads them for the experts,
    and where kernels run it also applies the layer's RMS norm; ``qwen4_exp`` has
    :func:`mhc_core.combine` and :func:`mhc_core.gated_pre`. transformers 5.24 has no Xing4.0.

    Parameters, their names, the state_dict, caches, ``generate``, gradient checkpointing,
    ``save_pretrained`` and hooks work as before. Outputs and gradients equal the model's up to
    rounding: mappings and sums are float32, also under autocast.

    Parameters
    ----------
    model
        The model, as transformers made or loaded it.
    everywhere
        False runs the ops where mhc-core has kernels, on CUDA tensors; elsewhere each module runs
        the model's own code, which is faster there than the formulas of the backend ``torch``. True
        runs the ops on every device.

    Returns
    -------
    AccelerationReport
        The modules that were replaced, each with a sentence, and those that were left unchanged,
        with the reason. A second call replaces nothing more.

    Raises
    ------
    TypeError
        For a model without hyper-connections, or of a family that is not known yet. Kimi K3's
        attention residuals are not hyper-connections.
    RuntimeError
        If the installed transformers lacks something that is needed, or computes something else.
        After any of these errors the model is unchanged.

    Examples
    --------
    >>> import mhc_torch
    >>> model = AutoModelForCausalLM.from_pretrained(...)  # doctest: +SKIP
    >>> print(mhc_torch.accelerate(model))  # doctest: +SKIP
    """
    checks.boolean("accelerate", "everywhere", everywhere)
    modules = _modules(model)
    family = _family(model, modules)
    plan: list[Planned] = []
    left: list[Note] = []
    reasons: dict[type[Any], str | None] = {}
    ours = {swap.cls for swap in family.swaps.values()}
    for path, module in modules:
        cls = _class(module)
        if cls not in family.swaps:
            continue
        swap = family.swaps[cls]
        if cls not in reasons:  # the first of its class
            if swap.check:
                swap.check(path, module)
            reasons[cls] = family.leaves(cls, module)
        reason = reasons[cls]
        if reason is None:
            plan.append(Planned(path, module, cls, swap))
        else:
            left.append(Note(path, cls.__name__, reason))
    swap_classes(plan)
    for _, module in modules:
        if _class(module) in ours:
            vars(module)[EVERYWHERE] = everywhere
    return AccelerationReport(tuple(planned.note for planned in plan), tuple(left))


def restore(model: Any) -> AccelerationReport:
    """Undo :func:`accelerate` in place: every module gets its original class back.

    Parameters keep their present values. A model that was not accelerated does not change.

    Raises
    ------
    TypeError, RuntimeError
        As :func:`accelerate` raises them.
    """
    modules = _modules(model)
    family = _family(model, modules)
    originals = {swap.cls: original for original, swap in family.swaps.items()}
    plan = [
        Planned(path, module, _class(module), Swap(original, f"restored to {original.__name__}"))
        for path, module in modules
        if (original := originals.get(_class(module)))
    ]
    swap_classes(plan)
    for planned in plan:
        vars(planned.module).pop(EVERYWHERE, None)
    return AccelerationReport(tuple(planned.note for planned in plan), ())


def _modules(model: Any) -> list[tuple[str, Any]]:
    if not hasattr(model, "named_modules"):
        name = type(model).__name__
        raise TypeError(f"accelerate: model is a {name}; needs a torch.nn.Module of transformers")
    return sorted(model.named_modules(), key=lambda item: natural(item[0]))


def _class(module: Any) -> type[Any]:
    return cast("type[Any]", type(module))


def _homes(modules: Sequence[tuple[str, Any]]) -> Iterator[str]:
    """Yield the Python modules that define the model's classes, and their base classes."""
    for _, module in modules:
        for cls in _class(module).__mro__:
            yield cls.__module__


def _family(model: Any, modules: Sequence[tuple[str, Any]]) -> Family:
    """Return the family of a model's layers; raise if it is not known."""
    homes = dict.fromkeys(_homes(modules))
    for home in homes:
        if home in _FAMILIES:
            return import_module(f"{__name__}.{_FAMILIES[home]}").FAMILY
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    if kind in OTHERS:
        raise TypeError(f"accelerate: model is a {type(model).__name__}, whose {OTHERS[kind]}")
    known = ", ".join(_FAMILIES.values())
    for home in homes:
        if home.startswith("transformers.models.") and _has_connections(home):
            raise TypeError(
                f"accelerate: model has the hyper-connections of {home.split('.')[2]}, which are "
                f"not known yet; known are those of {known}"
            )
    raise TypeError(
        f"accelerate: model is a {type(model).__name__}, without hyper-connections of a known "
        f"family; known are those of {known}"
    )


def _has_connections(home: str) -> bool:
    names = vars(sys.modules[home]) if home in sys.modules else {}
    return any("HyperConnection" in name for name in names)
