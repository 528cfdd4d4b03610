"""MaxText: its Sinkhorn, its layer's maths and its head, from a checkout."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

from mhc_peers.declaration import Peer

__all__ = ["PEERS"]

peer = Peer(
    name="maxtext",
    project="MaxText",
    where="maxtext.layers.mhc",
    library="jax",
    versions=("jax", "flax"),
    needs={"jax": "jax", "flax": "flax"},
    checkout="maxtext",
    reads="src/maxtext/layers/mhc.py",
)


def _stand_in(name: str, **members: Any) -> None:
    """Put a module in the place of one that the file imports and its maths does not use."""
    import sys

    module = ModuleType(name)
    module.__dict__.update(members)
    sys.modules.setdefault(name, module)


def _module() -> Any:
    import jax.numpy as jnp

    nnx: Any = import_module("flax.nnx")

    from mhc_peers.files import load_file

    class Norm(nnx.Module):
        """RMS norm with a weight, which stands for the library's with its sharding."""

        def __init__(self, num_features: int, epsilon: float, **_: Any) -> None:
            self.epsilon = epsilon

        def __call__(self, x: Any) -> Any:
            wide = x.astype(jnp.float32)
            mean = jnp.mean(wide * wide, -1, keepdims=True)
            return (wide / jnp.sqrt(mean + self.epsilon)).astype(x.dtype)

    def made(*_: Any, **__: Any) -> Any:
        def nothing(*_: Any, **__: Any) -> None:
            return None

        return nothing

    _stand_in("maxtext")
    _stand_in("maxtext.common")
    _stand_in(
        "maxtext.common.common_types",
        Array=Any,
        Config=Any,
        HyperConnectionType=SimpleNamespace(ATTENTION=0, MLP_DENSE=1, MLP_MOE=2),
    )
    _stand_in("maxtext.kernels")
    _stand_in("maxtext.kernels.mhc", api=SimpleNamespace(MhcWeights=Any))
    _stand_in("maxtext.layers", nnx_wrappers=SimpleNamespace(to_linen_class=made))
    names = ("default_bias_init", "default_scalar_init", "nd_dense_init")
    initializers = dict.fromkeys((*names, "variable_to_logically_partitioned"), made)
    _stand_in("maxtext.layers.initializers", **initializers)
    _stand_in("maxtext.layers.normalizations", RMSNorm=Norm)
    return load_file("src/maxtext/layers/mhc.py")


class _Given:
    """A parameter that is read by ``[...]``."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getitem__(self, _: Any) -> Any:
        return self.value


@peer.op(
    "sinkhorn", free=("iterations",), fixed={"eps": 1e-6, "first": "columns"}, dtypes=("float32",)
)
def _sinkhorn(logits: Any, iterations: int, eps: float, first: str) -> Any:
    return _module().sinkhorn(logits.swapaxes(-1, -2), iterations).swapaxes(-1, -2)


@peer.op(
    "head",
    released="DEEPSEEK_V4",
    note="norm_eps and pre_eps are constants of 1e-6",
)
def _head(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    head = object.__new__(_module().DeepSeek4HyperHead)
    members = {
        "config": SimpleNamespace(matmul_precision="highest"),
        "dtype": x.dtype,
        "mhc_expansion_rate": x.shape[-2],
        "emb_dim": x.shape[-1],
        "eps": 1e-6,
        "hc_fn": _Given(phi.T),
        "hc_base": _Given(bias),
        "hc_scale": _Given(scale),
    }
    for name, value in members.items():
        object.__setattr__(head, name, value)
    return type(head).__call__(head, x)


@peer.op("expand")
def _expand(h: Any, n: int) -> Any:
    return _module().get_functions(n)[0](h)


@peer.op("contract", fixed={"how": "sum"})
def _contract(x: Any, how: str) -> Any:
    return _module().get_functions(x.shape[-2])[1](x)


PEERS = (peer,)
