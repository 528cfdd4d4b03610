"""jax-cuda: the kernels of mlx-cuda on JAX arrays on NVIDIA GPUs, through XLA's FFI.

``ops.py`` has the ops and ``functions.py`` makes them; ``replay.py`` traces a plan as JAX
operations, ``partition.py`` has devices share its arrays, and ``library.py`` finds or builds the
handler that launches its kernels, ``cuda.cpp``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from mhc_backends.kernels.nvidia import OLDEST, devices
from mhc_backends.kernels.ops import OPS
from mhc_core.backend import BackendSpec
from mhc_core.hookspecs import hookimpl

__all__ = ["MIXERS", "in_shard_map", "missing", "takes"]

MIXERS = ("sinkhorn", "identity")  # whose mappings kernels make
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
NEEDED = (0, 10)


def missing() -> str | None:
    """Return why CUDA kernels cannot run here, or None; this starts no CUDA context."""
    if find_spec("jax") is None or find_spec("jaxlib") is None:
        return "JAX is not installed: pip install 'jax[cuda13]'"
    if _version() < NEEDED:
        return f"needs JAX {'.'.join(map(str, NEEDED))} or later"
    if not any(find_spec(plugin) for plugin in PLUGINS):
        return "this JAX has no plugin for CUDA: pip install 'jax[cuda13]'"
    try:
        count = devices()
    except OSError as error:
        return f"no NVIDIA driver is installed ({error})"
    if not count:
        return "NVIDIA's driver finds no GPU"
    library = import_module("mhc_backends.jax_cuda.library")
    if library.prebuilt() is None and library.compiler() is None:
        return (
            "the handler that XLA calls is not there: pip install -e plugins/mhc-jax-cuda, or "
            "install a C++ compiler (g++, c++, clang++ or CXX), which builds it at first use"
        )
    return import_module("mhc_backends.kernels.nvrtc").missing()


def _version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version("jax").split(".")[:2])
    except (PackageNotFoundError, ValueError):  # a checkout, or a version like 0.12.dev0
        return NEEDED


@functools.cache
def _jax() -> Any:
    return import_module("jax")  # at every call, that would cost a microsecond


_REFUSED: dict[Any, str | None] = {}  # by sharding, or by the device that a trace is for

MIXED = (
    "takes arrays on a mesh whose axes are all Auto, all Explicit, or all mapped by shard_map, and "
    "these are {}; backend='jax' takes any"
)


def takes(arrays: Sequence[Any]) -> str | None:
    """Return why the kernels do not take these arrays, or None."""
    jax = _jax()
    for one in arrays:
        if isinstance(one, jax.Array):
            break
    else:  # NumPy's, which go to a GPU
        return None if _gpus() else "takes arrays on NVIDIA GPUs, and JAX finds none here"
    if isinstance(one, jax.core.Tracer):
        default = jax.config.jax_default_device
        if not _known(default, [default if hasattr(default, "platform") else _first()]):
            return _REFUSED[default]
        return None if jax.device_count() == 1 else _mixed(arrays)
    sharding = one.sharding
    return None if _known(sharding, one.devices()) else _REFUSED[sharding]


def _known(key: Any, on: Any) -> bool:
    """Return whether kernels run on these devices; if not, the reason is kept under the key."""
    if key not in _REFUSED:
        _REFUSED[key] = _refusal(list(on))
    return _REFUSED[key] is None


def _refusal(on: Sequence[Any]) -> str | None:
    return next(filter(None, map(_refused_device, on)), None)


def _refused_device(device: Any) -> str | None:
    name = import_module("mhc_backends.jax_cuda.library").architecture(device)
    if name is None:
        return f"takes arrays on NVIDIA GPUs, not those on {device.platform}"
    capability = device.compute_capability
    if int(capability.partition(".")[0]) < OLDEST:
        kind = device.device_kind
        return f"needs compute capability {OLDEST}.0 or later, and {kind} has {capability}"
    return None


@functools.cache
def _gpus() -> bool:
    jax = _jax()
    try:
        found = jax.local_devices(backend="gpu")
    except RuntimeError:
        return False
    return bool(found) and _refusal(found[:1]) is None


@functools.cache
def _first() -> Any:
    return _jax().local_devices()[0]


def in_shard_map() -> bool:
    """Return whether this is traced inside shard_map, for the shards of one device."""
    jax = _jax()
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)


def _mixed(arrays: Sequence[Any]) -> str | None:
    """Return why arrays that are traced for several devices are not taken."""
    jax = _jax()
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [jax.typeof(one).sharding.mesh for one in arrays if isinstance(one, jax.Array)]
    for mesh in meshes:
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        if len(set(kinds.values())) > 1:
            return MIXED.format(", ".join(f"{name} {kind.name}" for name, kind in kinds.items()))
    return None


def _device() -> str:
    jax = _jax()
    first = jax.local_devices(backend="gpu")[0]
    return f"{first.platform}, {first.device_kind}"


SPEC = BackendSpec(
    name="jax-cuda",
    module="mhc_backends.jax_cuda.ops",
    array_types=("jax.Array",),
    ops=OPS,
    dtypes=("float32", "float16", "bfloat16"),
    mixers=MIXERS,
    sizes=(1, 32),
    priority=10,
    channels="jax",
    protocol="__jax_array__",
    missing=missing,
    takes=takes,
    device=_device,
)


@hookimpl
def mhc_backend_specs() -> list[BackendSpec]:
    """Return the backend's spec."""
    return [SPEC]
