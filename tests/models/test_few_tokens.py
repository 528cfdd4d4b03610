"""No model gets slower: what accelerate leaves to the library, counted and not timed."""

from __future__ import annotations

import sys
from typing import Any, cast

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

import mlx.core as mx
import mlx.nn as nn
import small
from mlx.utils import tree_flatten

import mhc_core as mhc
from mhc_backends.mlx_nn import inside
from mhc_backends.mlx_nn.models import mlx_vlm_qwen4_exp, mlx_vlm_xing4_0, sublayers
from mhc_core.mlx import accelerate

FORMULAS, SIMULATOR = "mlx-compiled", "mlx-metal-simulator"
STREAMS = 4
BOUND = 8 * STREAMS * 64  # 8 tokens of the small models


@pytest.fixture(autouse=True)
def _bound(monkeypatch: pytest.MonkeyPatch, _every_stream_runs_on_the_ops: None) -> None:
    """Set a bound that a small model can reach."""
    monkeypatch.setattr(sublayers, "FEW", BOUND)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the ops that are called from now on, wherever they were imported."""
    made: list[str] = []

    def counting(name: str) -> Any:
        op = getattr(mhc, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return op(*args, **kwargs)

        return call

    names = ("mappings", "aggregate", "pre", "combine", "combine_pre", "head")
    for name in (*names, "gated_pre", "gated_head"):
        op, counted = getattr(mhc, name), counting(name)
        for module in (mhc, *_ours()):
            if vars(module).get(name) is op:
                monkeypatch.setattr(module, name, counted)
    return made


def _ours() -> list[Any]:
    start = "mhc_backends.mlx_nn.models."
    return [module for name, module in sys.modules.items() if name.startswith(start)]


@pytest.mark.parametrize("name", list(small.MAKE))
def test_few_tokens_stay_on_the_librarys_code(name: str, calls: list[str]) -> None:
    """Compare bits and nodes: one token and a short block run what the plain model runs."""
    plain, fast = small.MAKE[name](), small.MAKE[name]()
    sentence = "where no kernels run, "
    assert sentence in str(accelerate(fast))
    for length in (1, 7):
        ids = small.tokens(1, length)
        expected, got = small.logits(plain, ids), small.logits(fast, ids)
        assert not calls
        assert small.nodes(got) == small.nodes(expected) > 0
        assert small.equal(got, expected)
    calls.clear()
    times = {"Qwen4-Exp": mlx_vlm_qwen4_exp.TIMES, "Xing4.0": mlx_vlm_xing4_0.TIMES}.get(name, 1)
    if times < float("inf"):
        small.logits(fast, small.tokens(1, int(8 * times) - 1))
        assert not calls
        small.logits(fast, small.tokens(1, int(8 * times)))
        assert len(calls) >= 2 * len(fast.layers)
    calls.clear()
    small.logits(fast.train(), small.tokens(1, 1))
    assert len(calls) >= 2 * len(fast.layers)


def test_kernels_run_few_tokens_too() -> None:
    """Check that the bound is for the formulas alone, and follows the backend of each call."""
    simulator = pytest.importorskip("mhc_metal_simulator", reason="the simulator is not installed")
    fast = small.mlx_vlm_xing4_0()
    accelerate(fast)
    ids = small.tokens(1, 1)
    expected = small.logits(fast, ids)
    for backend, some in ((FORMULAS, False), (SIMULATOR, True), (FORMULAS, False)):
        with simulator.record() as launches, mhc.use_backend(backend):
            got = small.logits(fast, ids)
            mx.eval(got)
        assert bool(launches) is some
        inside = [launch for launch in launches if "pre_norm" in launch.kernel]
        assert len(inside) == (2 * len(fast.layers) if some else 0)
        assert small.apart(got, expected) < 1e-4


NORMS = ("attn_norm", "ffn_norm", "input_layernorm", "post_attention_layernorm")


@pytest.mark.parametrize("name", [name for name in small.MAKE if name != "Qwen4-Exp"])
def test_where_kernels_run_they_take_in_the_layers_norms(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make the formulas do what kernels would. The first h of V4.1 has a given mix, and no pre."""
    fast, called = small.MAKE[name](), list[int]()
    accelerate(fast, trainable=True)
    norms = {id(layer[norm]) for layer in fast.layers for norm in NORMS if norm in layer}
    assert len(norms) == 2 * len(fast.layers)
    run: Any = nn.RMSNorm.__call__

    def recorded(norm: Any, x: mx.array) -> mx.array:
        called.extend({id(norm)} & norms)
        return run(norm, x)

    monkeypatch.setattr(nn.RMSNorm, "__call__", recorded)
    ids = small.tokens(1, small.LONG)
    _, expected = small.gradients(fast.train(), ids)
    assert len(called) == len(norms)
    called.clear()
    monkeypatch.setattr(inside, "runs_formulas", lambda _: False)
    monkeypatch.setattr(inside, "_inside", {})
    _, got = small.gradients(fast, ids)
    first = (fast.layers[0][norm] for norm in NORMS[::2] if norm in fast.layers[0])
    assert called == ([id(next(first))] if "V4.1" in name else [])
    want = dict(tree_flatten(expected))
    for path, gradient in tree_flatten(got):
        assert mx.abs(gradient - want[path]).max() <= 1e-4 * mx.abs(want[path]).max() + 1e-9, path


def test_other_norms_and_dtypes_stay_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a norm that is a subclass, and one whose weight widens the dtype of its output."""
    fast = small.mlx_vlm_xing4_0()
    accelerate(fast)
    monkeypatch.setattr(inside, "runs_formulas", lambda _: False)
    monkeypatch.setattr(inside, "_inside", {})
    projection = fast.layers[0].attn_hc.projection
    x = mx.random.normal((1, 2, STREAMS, 64))

    class Twice(nn.RMSNorm):
        def __call__(self, x: mx.array) -> mx.array:
            return 2 * cast("mx.array", super().__call__(x))

    h = sublayers.enter(x, projection).h
    for norm in (Twice(64), nn.RMSNorm(64)):
        assert small.apart(sublayers.enter_layer(x, projection, norm).h, norm(h)) < 1e-6
    half = sublayers.enter_layer(x.astype(mx.bfloat16), projection, nn.RMSNorm(64)).h
    assert half.dtype == mx.float32


def test_pending_streams_are_written_before_the_library_gets_them() -> None:
    """Check a layer that trains, and leaves its streams, before one that does not."""
    plain, fast = small.mlx_vlm_xing4_0(), small.mlx_vlm_xing4_0()
    accelerate(fast)
    fast.layers[0].train()
    ids = small.tokens(1, 3)
    assert small.apart(small.logits(fast, ids), small.logits(plain, ids)) < 1e-5


def test_a_layer_asks_for_its_backend_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = small.mlx_vlm_hy_v4()
    accelerate(fast)
    small.logits(fast, small.tokens(1, 1))
    monkeypatch.delattr(inside, "selected")
    small.logits(fast, small.tokens(1, 2))
