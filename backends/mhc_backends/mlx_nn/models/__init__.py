"""The acceleration of other libraries' models: their hyper-connections run on the uniform ops.

A model keeps its modules, its parameters and their names. What changes is the class of some of
its modules: each becomes an instance of a subclass of its own class, which is defined in this
package and calls the uniform ops. No class, function or module of the library is touched, and no
other model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, cast

from mhc_backends.mlx_nn.models.family import Family, Swap

__all__ = ["AccelerationReport", "Note", "accelerate", "restore"]


class _Library(NamedTuple):
    """The family of a model class, and the releases of its library in which it was tested."""

    family: str
    distribution: str
    tested: tuple[str, ...]


_MODELS = {
    "mlx_lm.models.deepseek_v41.Model": _Library("mlx_lm_deepseek_v41", "mlx-lm", ("0.32.2",)),
    "mlx_vlm.models.deepseek_v4.deepseek_v4.Model": _Library(
        "mlx_vlm_deepseek_v4", "mlx-vlm", ("0.7.10",)
    ),
    "mlx_vlm.models.deepseek_v41.deepseek_v41.Model": _Library(
        "mlx_vlm_deepseek_v41", "mlx-vlm", ("0.7.10",)
    ),
}

_FROZEN = "_frozen_by_mhc_core"  # an attribute of modules: what accelerate froze

_UNTRAINED = (
    "gradients do not always pass in this version; accelerate(model, trainable=True) lets them"
)


class Note(NamedTuple):
    """A module's path and class, with a sentence on what was done with it, or why nothing was."""

    path: str
    kind: str
    text: str


class AccelerationReport(NamedTuple):
    """The modules that :func:`accelerate` replaced and those it left; printed, a line per kind."""

    replaced: tuple[Note, ...]
    left: tuple[Note, ...]

    def __str__(self) -> str:
        return "\n".join([*_lines("replaced", self.replaced), *_lines("left", self.left)])


def _lines(title: str, notes: tuple[Note, ...]) -> Iterator[str]:
    yield f"{title}: {len(notes)}"
    first = {note[1:]: note.path for note in reversed(notes)}
    for (kind, text), count in Counter(note[1:] for note in notes).items():
        yield f"  {count} {kind}, {first[kind, text]}{' ...' * (count > 1)}: {text}"


def accelerate(model: Any, *, trainable: bool = False) -> AccelerationReport:
    """Run a model's hyper-connections on mhc-core, in place; optionally make the model train.

    For the DeepSeek-V4.1 model of mlx-lm (``mlx_lm.models.deepseek_v41``) and the DeepSeek-V4 and
    V4.1 models of mlx-vlm (``mlx_vlm.models.deepseek_v4``, ``mlx_vlm.models.deepseek_v41``).
    Between two sublayers, also of different layers, the streams are written and read again in one
    pass, :func:`mhc_core.combine_pre`.

    Some of the model's modules become instances of subclasses of their own classes; no class,
    function or module of the library changes, and no other model. Parameters, their names, caches,
    ``load_weights``, ``quantize``, LoRA, ``train``, ``eval`` and ``shard`` work as before, earlier
    or later. A layer leaves its streams to the next, so call this again after layers were removed,
    replaced or pipelined.

    The ops run on the backend that is selected when the model is called. Logits are the model's up
    to rounding; where a model rounds to fp8 or fp4, a difference in the last bit may change that
    rounding. On ``mlx-metal`` a token's hyper-connections have the same bits alone and in any block
    or batch, so mlx-vlm's speculative decoding is exact without its loop over tokens.
    ``mlx-compiled`` does not promise that, though on CPUs it held for blocks of tokens in every
    size that was tried. Where no gradients are needed, generate inside
    ``with mhc_core.no_grad():``.

    Parameters
    ----------
    model
        The model as the library made or loaded it.
    trainable
        Also replace what has no gradient in these versions, with the same forward, bit by bit:
        choices of indices become constants of the gradient, rounding to fp8 and fp4 passes it
        straight through. Call ``model.train()`` before training, as always: in ``eval`` mlx-vlm
        runs short blocks by kernels without gradients. mlx-lm's ``grad_checkpoint`` does not suit
        these layers, with or without this: they write to caches, and it would run those writes
        twice.

    Returns
    -------
    AccelerationReport
        Each module that was replaced, with what replaces it; each that was left as it is, or that
        gets no gradient, with the reason. A second call replaces nothing more.

    Raises
    ------
    TypeError
        For a model of another class.
    RuntimeError
        For a version of its library in which this was not tested.
    ValueError
        For hyper-connections whose parameters have wrong shapes. After any of these errors, the
        model is unchanged.

    Notes
    -----
    arXiv:2512.24880 for the connections, arXiv:1308.3432 for straight-through gradients.
    """
    family = _family(model)
    modules = sorted(model.named_modules(), key=lambda item: _natural(item[0]))
    plan = list(_plan(family, model, modules, trainable))
    left = tuple(_left(family, modules, trainable))
    _swap(plan)
    return AccelerationReport(tuple(Note(p.path, p.kind.__name__, p.swap.why) for p in plan), left)


def restore(model: Any) -> AccelerationReport:
    """Undo :func:`accelerate` in place: every module gets its own class again.

    Parameters keep their present values, even if trained or loaded since; those that
    :func:`accelerate` froze can be trained again, as before. A model that was not accelerated is
    not changed.

    Parameters
    ----------
    model
        A model that :func:`accelerate` accepts.

    Returns
    -------
    AccelerationReport
        Each module that was restored, with the class that it has again; the list of modules left is
        empty.

    Raises
    ------
    TypeError, RuntimeError
        As :func:`accelerate` raises them.
    """
    family = _family(model)
    modules = sorted(model.named_modules(), key=lambda item: _natural(item[0]))
    plan = list(_given_back(family, modules))
    _swap(plan)
    for planned in plan:
        for name in cast("Sequence[str]", vars(planned.module).pop(_FROZEN, ())):
            planned.module.unfreeze(recurse=False, keys=name)
    return AccelerationReport(tuple(Note(p.path, p.kind.__name__, p.swap.why) for p in plan), ())


def _given_back(family: Family, modules: Sequence[tuple[str, Any]]) -> Iterator[_Planned]:
    """Yield the modules that get the library's class again."""
    layers = family.layers
    own = {swap.by: kind for kind, swap in (*family.trainable.items(), *family.connections.items())}
    own |= {layers.passing: layers.kind, layers.writing: layers.kind}
    for path, module in modules:
        kind = cast("type[Any]", type(module))
        if kind in own:
            yield _Planned(path, module, kind, Swap(own[kind], f"{own[kind].__name__} again"))


def _family(model: Any) -> Family:
    """Return the family of a model's class; raise if the class or the version is unknown."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__]
    name = next((name for name in names if name in _MODELS), None)
    if name is None:
        raise TypeError(f"accelerate: model is a {names[0]}; needs {' or '.join(_MODELS)}")
    library = _MODELS[name]
    found = _version(library.distribution)
    if found not in library.tested:
        tested = " or ".join(library.tested)
        raise RuntimeError(
            f"accelerate: {library.distribution} {found} is installed; known is {tested}, and "
            f"another may compute something else: pip install '{library.distribution}=={tested}', "
            "or look for a newer mhc-core"
        )
    return import_module(f"{__name__}.{library.family}").FAMILY


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of no known version"


def _natural(path: str) -> list[str]:
    return [part.zfill(6) for part in path.split(".")]


class _Planned(NamedTuple):
    path: str
    module: Any
    kind: type[Any]
    swap: Swap


def _plan(
    family: Family, model: Any, modules: Sequence[tuple[str, Any]], trainable: bool
) -> Iterator[_Planned]:
    """Yield the modules to change and their new classes, without those that have them already."""
    swaps = {**family.connections, **(family.trainable if trainable else {})}
    layers = family.layers
    order = model.layers  # in which they run
    following = dict(zip(map(id, order), [*order, None][1:], strict=True))
    for path, module in modules:
        kind = cast("type[Any]", type(module))
        if id(module) in following and kind in (layers.kind, layers.passing, layers.writing):
            passes = _takes_pending(family, following[id(module)])
            swap = Swap(layers.passing if passes else layers.writing, layers.why, layers.check)
        elif kind in swaps:
            swap = swaps[kind]
        else:
            continue
        if swap.by is not kind:
            if swap.check:
                swap.check(path, module)
            yield _Planned(path, module, kind, swap)


def _takes_pending(family: Family, layer: Any) -> bool:
    layers = family.layers
    ours = type(layer) in (layers.kind, layers.passing, layers.writing)
    return ours and (layers.takes_pending is None or layers.takes_pending(layer))


def _left(family: Family, modules: Sequence[tuple[str, Any]], trainable: bool) -> Iterator[Note]:
    """Yield a note for each module that is left unchanged, or has no gradients."""
    ours = {swap.by for swap in family.trainable.values()}
    trains = trainable or any(type(module) in ours for _, module in modules)
    untrained = family.untrained if trains else dict.fromkeys(family.trainable, _UNTRAINED)
    for path, module in modules:
        for kind, reason in (*family.left.items(), *untrained.items()):
            if isinstance(module, kind):
                yield Note(path, kind.__name__, reason)


def _swap(plan: Sequence[_Planned]) -> None:
    """Change all classes, or none if one fails."""
    try:
        for planned in plan:
            planned.module.__class__ = planned.swap.by
    except TypeError:
        for planned in plan:
            planned.module.__class__ = planned.kind
        raise
    for _, module, _, swap in plan:
        names = [name for name in swap.freeze if name in module.trainable_parameters()]
        for name in names:
            module.freeze(recurse=False, keys=name)
        if names:
            vars(module)[_FROZEN] = names
