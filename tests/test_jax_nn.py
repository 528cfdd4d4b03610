"""mhc_core.jax: the connection of mhc_core.mlx as pure functions."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mhc_core as mhc
from mhc_core.jax import GatedConnection, GatedHead, HyperConnection, HyperHead

DIMS = 64
PAPER = replace(mhc.PAPER, sinkhorn_iterations=2)
QUICK = replace(mhc.DEEPSEEK_V4, sinkhorn_iterations=2, norm_eps=1e-3, pre_eps=1e-2)


@pytest.mark.parametrize("variant", [PAPER, QUICK], ids=["paper", "deepseek"])
def test_start_outputs_and_gradients_are_those_of_mlx(variant: mhc.Variant) -> None:
    mx = pytest.importorskip("mlx.core", reason="compares with MLX")
    from mhc_core import mlx as theirs

    x = np.random.default_rng(0).normal(size=(3, 4, DIMS)).astype(np.float32)
    for ours, cls in ((HyperConnection, theirs.HyperConnection), (HyperHead, theirs.HyperHead)):
        module, other = ours(DIMS, 4, variant), cls(DIMS, 4, variant)
        params = module.init(jax.random.key(0))
        for name, array in other.parameters().items():
            if name in ("phi", "fn"):
                assert params[name].std() == pytest.approx(np.array(array).std(), rel=0.1)
            else:
                assert np.array_equal(params[name], np.array(array))
        assert set(params) == set(other.parameters())
        params = jax.tree.map(
            lambda a: a + 0.3 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), params
        )
        other.update({name: mx.array(np.array(array)) for name, array in params.items()})
        layer, their_layer = ((jnp.tanh,), (mx.tanh,)) if ours is HyperConnection else ((), ())

        def loss(params, x, module=module, layer=layer):
            return (module(params, x, *layer) ** 3).sum()

        def their_loss(params, x, other=other, layer=their_layer):
            other.update(params)
            return (other(x, *layer) ** 3).sum()

        got = jax.jit(jax.value_and_grad(loss))(params, jnp.array(x))
        want = mx.value_and_grad(their_loss)(other.parameters(), mx.array(x))
        assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-4)
        for name, gradient in got[1].items():
            expected = np.array(want[1][name])
            assert np.abs(gradient - expected).max() <= 1e-3 * np.abs(expected).max(), name


def test_a_sublayer_ends_and_the_next_begins_in_one_pass() -> None:
    one, two = HyperConnection(DIMS, 2, QUICK), HyperConnection(DIMS, 2, QUICK)
    params = [c.init(jax.random.key(k)) for k, c in enumerate((one, two))]
    x = jax.random.normal(jax.random.key(5), (3, 2, DIMS))

    @jax.jit
    def fused(params, x):
        h, h_post, h_res = one.pre(params[0], x)
        x, h, _, h_post, h_res = two.combine_pre(params[1], x, jnp.tanh(h), h_post, h_res)
        return mhc.combine(x, jnp.tanh(h), h_post, h_res)

    want = two(params[1], one(params[0], x, jnp.tanh), jnp.tanh)
    assert jnp.allclose(fused(params, x), want, rtol=1e-5, atol=1e-5)
    assert hash(one) == hash(two)
    assert len(two.mappings(params[1], x)) == 3


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="HyperConnection: dims is 0"):
        HyperConnection(0)
    with pytest.raises(TypeError, match="HyperHead: n is 'x'"):
        HyperHead(8, "x")


def test_gated_residuals_are_those_of_mlx() -> None:
    mx = pytest.importorskip("mlx.core", reason="compares with MLX")
    from mhc_core import mlx as theirs

    x = np.random.default_rng(0).normal(size=(3, 2, DIMS)).astype(np.float32)
    names = {
        "norm": "hc_norm",
        "down": "input_mix_weight_down",
        "up": "input_mix_weight_up",
        "inject": "block_inject_weight",
    }
    sizes = DIMS, 2, 8, 1e-3
    for ours, cls in ((GatedConnection, theirs.GatedConnection), (GatedHead, theirs.GatedHead)):
        module, other = ours(*sizes), cls(*sizes)
        params = module.init(jax.random.key(0))
        assert {names[name] for name in params} == set(other.children())
        for name, array in params.items():
            start = other[names[name]].weight
            assert array.shape == start.shape
            assert float(array.std()) == pytest.approx(start.std().item(), rel=0.2)
        params = {
            name: a + 0.1 * jnp.cos(jnp.arange(a.size)).reshape(a.shape)
            for name, a in params.items()
        }
        other.update({names[n]: {"weight": mx.array(np.array(a))} for n, a in params.items()})
        layer = ((jnp.tanh,), (mx.tanh,)) if ours is GatedConnection else ((), ())
        got = jax.jit(lambda p, x, m=module, f=layer[0]: m(p, x, *f))(params, jnp.array(x))
        want = np.array(other(mx.array(x), *layer[1]))
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    with pytest.raises(ValueError, match="GatedHead: rank is 0"):
        GatedHead(8, 2, 0)


def test_a_module_of_flax_in_three_lines() -> None:
    nn = pytest.importorskip("flax.linen", reason="wraps it in flax")

    class Connected(nn.Module):
        layer: nn.Module
        connection: HyperConnection

        @nn.compact
        def __call__(self, x):
            params = self.param("connection_params", self.connection.init)
            return self.connection(params, x, self.layer)

    x = jnp.ones((2, 4, 8))
    model = Connected(nn.Dense(8), HyperConnection(8, 4, QUICK))
    variables = model.init(jax.random.key(0), x)
    gradients = jax.grad(lambda v: model.apply(v, x).sum())(variables)
    assert jnp.abs(gradients["params"]["connection_params"]["base"]).max() > 0
