"""The acceleration of other libraries' models: their hyper-connections run on the uniform ops.

A model keeps its modules, its parameters and their names. Only the class of some of its modules
changes, to a subclass that is defined in this package and calls the uniform ops. The library's
classes, functions and modules stay as they are, and so do other models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, cast

from mhc_backends.acceleration import (
    AccelerationReport,
    Note,
    Planned,
    Swap,
    natural,
    swap_classes,
)
from mhc_backends.mlx_nn.models.family import Family

__all__ = ["AccelerationReport", "Note", "accelerate", "restore"]


class _Library(NamedTuple):
    """The family of a model class, and the releases of its library that were tested."""

    family: str
    distribution: str
    tested: tuple[str, ...]


_DRAFTERS = "mlx_vlm.speculative.drafters"
_MODELS = {
    "mlx_lm.models.deepseek_v41.Model": _Library("mlx_lm_deepseek_v41", "mlx-lm", ("0.32.2",)),
    "mlx_vlm.models.deepseek_v4.deepseek_v4.Model": _Library(
        "mlx_vlm_deepseek_v4", "mlx-vlm", ("0.7.10",)
    ),
    "mlx_vlm.models.deepseek_v41.deepseek_v41.Model": _Library(
        "mlx_vlm_deepseek_v41", "mlx-vlm", ("0.7.10",)
    ),
    "mlx_vlm.models.glm5_next.glm5_next.Model": _Library(
        "mlx_vlm_glm5_next", "mlx-vlm", ("0.7.10",)
    ),
    "mlx_vlm.models.hy_v4.hy_v4.Model": _Library("mlx_vlm_hy_v4", "mlx-vlm", ("0.7.10",)),
    "mlx_vlm.models.qwen4_exp.qwen4_exp.Model": _Library(
        "mlx_vlm_qwen4_exp", "mlx-vlm", ("0.7.10",)
    ),
    "mlx_vlm.models.xing4_0.xing4_0.Model": _Library("mlx_vlm_xing4_0", "mlx-vlm", ("0.7.10",)),
    f"{_DRAFTERS}.deepseek_v4_mtp.deepseek_v4_mtp.DeepseekV4MTPDraftModel": _Library(
        "mlx_vlm_deepseek_v4_mtp", "mlx-vlm", ("0.7.10",)
    ),
    f"{_DRAFTERS}.deepseek_v4_dspark.deepseek_v4_dspark.DeepseekV4DsparkDraftModel": _Library(
        "mlx_vlm_deepseek_v4_dspark", "mlx-vlm", ("0.7.10",)
    ),
    f"{_DRAFTERS}.qwen4_exp_mtp.qwen4_exp_mtp.Qwen4ExpMTPDraftModel": _Library(
        "mlx_vlm_qwen4_exp", "mlx-vlm", ("0.7.10",)
    ),
}

_NO_STREAMS = "drafting layers have no hyper-connections"
_OTHERS = {  # models that have no hyper-connections, though one may expect them
    "mlx_vlm.models.kimi_k3.kimi_k3.Model": "attention residuals are not hyper-connections",
    f"{_DRAFTERS}.dspark.dspark.DSparkDraftModel": _NO_STREAMS,
    f"{_DRAFTERS}.glm5_next_mtp.glm5_next_mtp.Glm5NextMTPDraftModel": _NO_STREAMS,
    f"{_DRAFTERS}.hy_v4_mtp.hy_v4_mtp.HyV4MTPDraftModel": _NO_STREAMS,
}

_FROZEN = "_frozen_by_mhc_core"  # an attribute of modules: the parameters that accelerate froze

_UNTRAINED = (
    "not always differentiable in this version of the library; accelerate(model, trainable=True) "
    "makes it so"
)


def accelerate(model: Any, *, trainable: bool = False) -> AccelerationReport:
    """Run a model's hyper-connections on mhc-core, in place; optionally make it differentiable.

    For the DeepSeek-V4.1 model of mlx-lm (``mlx_lm.models.deepseek_v41``) and the DeepSeek-V4 and
    V4.1 models of mlx-vlm (``mlx_vlm.models.deepseek_v4``, ``mlx_vlm.models.deepseek_v41``), and
    its GLM-5.3-Flash, HY-V4, Qwen4-Exp and Xing4.0 (``glm5_next``, ``hy_v4``, ``qwen4_exp``,
    ``xing4_0``). A drafter for speculative decoding is a model of its own: mlx-vlm's
    ``deepseek_v4_mtp``, ``deepseek_v4_dspark`` and ``qwen4_exp_mtp`` are accelerated too; its
    other drafters have no hyper-connections. One pass, :func:`mhc_core.combine_pre`, writes the
    streams after a sublayer and reads them for the next one, also across layers. Where kernels run,
    it also applies the layer's ``nn.RMSNorm``.

    Where no kernels run, as on a CPU, few tokens stay on the library's own code outside training,
    with its bits, because it is faster for them: the report says up to which size.

    Some of the model's modules become instances of subclasses of their own classes. The library's
    own classes, functions and modules stay as they are, and so do other models. Parameters, their
    names, caches, ``load_weights``, ``quantize``, LoRA, ``train``, ``eval`` and ``shard`` work as
    before, whether they are used before or after this. A layer leaves its streams for the next
    layer to write, so call this again after layers are removed, replaced or pipelined.

    The ops run on the backend that is selected when the model is called. Logits equal the model's
    up to rounding; in a model that rounds to fp8 or fp4, a difference in the last bit may change
    that rounding. On ``mlx-metal`` a token's hyper-connections have the same bits alone and in any
    block or batch, so mlx-vlm's speculative decoding is exact without its loop over tokens.
    ``mlx-compiled`` does not promise that, but on CPUs it held for every block size that was tried.
    Unless gradients are needed, generate text inside ``with mhc_core.no_grad():``.

    Parameters
    ----------
    model
        The model as the library made or loaded it.
    trainable
        True also replaces the operations that have no gradient in these versions; the forward keeps
        its bits. Choices of indices become constants of the gradient, and rounding to fp8 and fp4
        gets a straight-through gradient. Call ``model.train()`` before training, as always: in
        ``eval`` mlx-vlm runs short blocks on kernels without gradients. mlx-lm's
        ``grad_checkpoint`` does not work with these layers, accelerated or not: they write to
        caches, and it would run those writes twice.

    Returns
    -------
    AccelerationReport
        The modules that were replaced, with what is different; and those that were left unchanged
        or have no gradient, with the reason. A second call replaces nothing more.

    Raises
    ------
    TypeError
        For a model of another class.
    RuntimeError
        For a version of its library that was not tested.
    ValueError
        For hyper-connections whose parameters have wrong shapes. After any of these errors the
        model is unchanged.

    Notes
    -----
    arXiv:2512.24880 for the connections, arXiv:1308.3432 for straight-through gradients.
    """
    family = _family(model)
    modules = sorted(model.named_modules(), key=lambda item: natural(item[0]))
    plan = list(_plan(family, model, modules, trainable))
    left = tuple(_left(family, modules, trainable))
    _swap(plan)
    return AccelerationReport(tuple(planned.note for planned in plan), left)


def restore(model: Any) -> AccelerationReport:
    """Undo :func:`accelerate` in place: every module gets its original class back.

    Parameters keep their present values. Those that :func:`accelerate` froze are unfrozen. A model
    that was not accelerated does not change.

    Parameters
    ----------
    model
        A model that :func:`accelerate` accepts.

    Returns
    -------
    AccelerationReport
        The modules that were restored, each with its class; the list of modules left is empty.

    Raises
    ------
    TypeError, RuntimeError
        As :func:`accelerate` raises them.
    """
    family = _family(model)
    modules = sorted(model.named_modules(), key=lambda item: natural(item[0]))
    plan = list(_restorations(family, modules))
    _swap(plan)
    for planned in plan:
        for name in cast("Sequence[str]", vars(planned.module).pop(_FROZEN, ())):
            planned.module.unfreeze(recurse=False, keys=name)
    return AccelerationReport(tuple(planned.note for planned in plan), ())


def _restorations(family: Family, modules: Sequence[tuple[str, Any]]) -> Iterator[Planned]:
    """Yield the modules that get the library's class back."""
    layers = family.layers
    swaps = {**family.trainable, **family.connections}
    originals = {swap.cls: original for original, swap in swaps.items()}
    originals |= {layers.passing: layers.original, layers.writing: layers.original}
    for path, module in modules:
        cls = cast("type[Any]", type(module))
        if cls in originals:
            original = originals[cls]
            yield Planned(path, module, cls, Swap(original, f"restored to {original.__name__}"))


def _family(model: Any) -> Family:
    """Return the family of a model's class; raise if the class or the version is unknown."""
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__]
    name = next((name for name in names if name in _MODELS), None)
    if name is None:
        reason = next((_OTHERS[other] for other in names if other in _OTHERS), None)
        if reason:
            raise TypeError(f"accelerate: model is a {names[0]}, whose {reason}")
        raise TypeError(f"accelerate: model is a {names[0]}; needs {' or '.join(_MODELS)}")
    library = _MODELS[name]
    found = _version(library.distribution)
    if found not in library.tested:
        tested = " or ".join(library.tested)
        raise RuntimeError(
            f"accelerate: {library.distribution} {found} is installed; only {tested} is tested, "
            "other versions may compute something else. Run pip install "
            f"'{library.distribution}=={tested}', or look for a newer mhc-core"
        )
    return import_module(f"{__name__}.{library.family}").FAMILY


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def _plan(
    family: Family, model: Any, modules: Sequence[tuple[str, Any]], trainable: bool
) -> Iterator[Planned]:
    """Yield the modules whose class changes, with their new classes."""
    swaps = {**family.connections, **(family.trainable if trainable else {})}
    layers = family.layers
    order = family.order(model)
    following = dict(zip(map(id, order), [*order, None][1:], strict=True))
    for path, module in modules:
        cls = cast("type[Any]", type(module))
        if id(module) in following and cls in (layers.original, layers.passing, layers.writing):
            passes = _accepts_pending(family, following[id(module)])
            swap = Swap(layers.passing if passes else layers.writing, layers.why, layers.check)
        elif cls in swaps:
            swap = swaps[cls]
        else:
            continue
        if swap.cls is not cls:
            if swap.check:
                swap.check(path, module)
            yield Planned(path, module, cls, swap)


def _accepts_pending(family: Family, layer: Any) -> bool:
    layers = family.layers
    ours = type(layer) in (layers.original, layers.passing, layers.writing)
    return ours and (layers.accepts_pending is None or layers.accepts_pending(layer))


def _left(family: Family, modules: Sequence[tuple[str, Any]], trainable: bool) -> Iterator[Note]:
    """Yield a note for each module that is left unchanged or has no gradients."""
    ours = {swap.cls for swap in family.trainable.values()}
    trains = trainable or any(type(module) in ours for _, module in modules)
    untrained = family.untrained if trains else dict.fromkeys(family.trainable, _UNTRAINED)
    for path, module in modules:
        for cls, reason in (*family.left.items(), *untrained.items()):
            if isinstance(module, cls):
                yield Note(path, cls.__name__, reason)


def _swap(plan: list[Planned]) -> None:
    """Change all classes, or none if one fails; then freeze."""
    swap_classes(plan)
    for _, module, _, swap in plan:
        names = [name for name in swap.freeze if name in module.trainable_parameters()]
        for name in names:
            module.freeze(recurse=False, keys=name)
        if names:
            vars(module)[_FROZEN] = names
