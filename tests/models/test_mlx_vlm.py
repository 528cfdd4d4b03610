"""accelerate on mlx-vlm's DeepSeek-V4 and V4.1: short blocks, drafters, images, engrams."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

import mlx.core as mx
import mlx.nn as nn
import small
from mlx.utils import tree_flatten, tree_unflatten
from mlx_vlm.generate import generate_step
from mlx_vlm.models.deepseek_v4 import hyper_connection
from mlx_vlm.models.deepseek_v41 import engram

import mhc_core as mhc
from mhc_core.mlx import accelerate

SIMULATOR = "mlx-metal-simulator"  # the kernels of mlx-metal
VISION = {"vision_n_layers": 1, "vision_dim": 16, "vision_n_heads": 1, "vision_inter_dim": 16}
BLOCK = 4  # mlx-vlm calls up to 8 tokens a short block


@pytest.fixture(params=["mlx-vlm V4", "mlx-vlm V4.1"])
def family(request: pytest.FixtureRequest) -> small.Family:
    """Return each kind of model."""
    return small.FAMILIES[request.param]


def on(backend: str) -> contextlib.AbstractContextManager[None]:
    """Select a backend; the simulator is a plugin."""
    if backend == SIMULATOR:
        pytest.importorskip("mhc_metal_simulator", reason="the simulator is not installed")
    return mhc.use_backend(backend)


def test_generate_step_gives_the_same_64_tokens(family: small.Family) -> None:
    plain, fast = family.make(), family.make()
    accelerate(fast)
    prompt = small.tokens(1, small.LONG)

    def run(model: Any) -> list[int]:
        steps = generate_step(prompt, model, None, None, max_tokens=64, temperature=0.0)
        return [int(token) for token, _ in steps]

    expected = run(plain)
    with mhc.no_grad():
        assert run(fast) == expected
    assert len(set(expected)) > 10


def test_compiled_layers_give_the_same(family: small.Family) -> None:
    """Check that streams which one layer leaves to the next pass through mx.compile."""
    model = family.make(hc_sinkhorn_iters=1)
    accelerate(model)
    layers = [small.only_connections(layer) for layer in model.layers[:2]]
    h, mixes = mx.random.normal((1, 3, 4, 64)), mx.random.uniform(shape=(1, 3, 4))

    def through(h: mx.array, mixes: mx.array) -> tuple[mx.array, ...]:
        for layer in layers:
            h, *rest = small.call_layer(layer, h, mixes)
            mixes = rest[0] if rest else mixes
        return h.written(), mixes  # type: ignore[attr-defined]

    for got, expected in zip(mx.compile(through)(h, mixes), through(h, mixes), strict=True):
        assert small.apart(got, expected) < 1e-5


# ---------------------------------------------------------------------------------- short blocks


def block_and_single_tokens(model: Any) -> tuple[mx.array, mx.array]:
    """Return the logits of a block after a prompt, at once and token by token."""
    prompt, block = small.tokens(1, small.LONG), small.tokens(1, BLOCK, seed=8)
    caches = [model.make_cache() for _ in range(2)]
    for cache in caches:
        mx.eval(small.logits(model, prompt, cache))
    at_once = small.logits(model, block, caches[0])
    single = [small.logits(model, block[:, i : i + 1], caches[1]) for i in range(BLOCK)]
    return at_once, mx.concatenate(single, axis=1)


@pytest.mark.parametrize("backend", [SIMULATOR, "mlx-compiled"])
def test_a_block_of_v4_has_the_bits_of_its_tokens(backend: str) -> None:
    """Check equal bits, for speculative decoding; mlx-compiled has them on CPUs, unpromised."""
    fast = small.mlx_vlm_v4()
    accelerate(fast)
    with on(backend):
        at_once, single = block_and_single_tokens(fast)
    assert small.equal(at_once, single)
    plain_at_once, _ = block_and_single_tokens(small.mlx_vlm_v4())
    assert small.apart(at_once, plain_at_once) < 1e-4


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_hyper_connections_of_a_block_have_the_bits_of_its_tokens(
    family: small.Family, dtype: mx.Dtype
) -> None:
    """Compare a layer whose attention and experts do nothing, as a block and token by token."""
    fast = family.make(hidden_size=96)
    accelerate(fast)
    layer = small.only_connections(fast.layers[1])
    h = mx.random.normal((1, BLOCK, 4, 96)).astype(dtype)
    mixes = mx.random.uniform(shape=(1, BLOCK, 4))
    with on(SIMULATOR):
        whole = run(layer, h, mixes)
        parts = [run(layer, h[:, i : i + 1], mixes[:, i : i + 1]) for i in range(BLOCK)]
    for got, single in zip(whole, zip(*parts, strict=True), strict=True):
        assert small.equal(got, mx.concatenate(single, axis=1))


def run(layer: Any, h: mx.array, mixes: mx.array) -> tuple[mx.array, ...]:
    """Call a layer; return its streams, and its mixes if it has them."""
    pending, *rest = small.call_layer(layer, h, mixes)
    return pending.written(), *rest


def test_a_block_takes_no_more_launches_than_a_token() -> None:
    """Check that 4 tokens need as many kernels as one: mlx-vlm's projection alone needs more."""
    simulator = pytest.importorskip("mhc_metal_simulator", reason="the simulator is not installed")
    plain, fast = small.mlx_vlm_v4(), small.mlx_vlm_v4()
    accelerate(fast)
    counts: list[int] = []
    for length in (1, BLOCK):
        with simulator.record() as launches, on(SIMULATOR):
            mx.eval(small.logits(fast, small.tokens(1, length)))
        counts.append(len(launches))
    pre, combine_pre, combine, head = 2, 2, 1, 2
    sublayers = 2 * len(fast.layers)
    assert counts == [pre + (sublayers - 1) * combine_pre + combine + head] * 2
    connection = plain.layers[0].attn_hc
    flat = mx.random.normal((1, BLOCK, 4 * 64))
    one = mx.contiguous(flat[:, :1])
    mx.eval(flat, one)
    assert small.nodes(connection._mix(flat)) >= 2 * BLOCK > combine_pre
    assert small.nodes(connection._mix(one)) == 1


def test_connections_and_head_called_by_themselves() -> None:
    plain, fast = small.mlx_vlm_v4(), small.mlx_vlm_v4()
    accelerate(fast)
    x, y = mx.random.normal((2, 3, 4, 64)), mx.random.normal((2, 3, 64))
    expected = plain.layers[2].ffn_hc(x)
    got = fast.layers[2].ffn_hc(x)
    for mine, theirs in zip(got, expected, strict=True):
        assert small.apart(mine, theirs) < 1e-5
    joined = hyper_connection.hc_expand(y, x, *got[1:])
    assert small.apart(joined, hyper_connection.hc_expand(y, x, *expected[1:])) < 1e-5
    head = fast.language_model.model.hc_head(x)
    assert small.apart(head, plain.language_model.model.hc_head(x)) < 1e-5


def test_apply_branch_called_by_itself() -> None:
    plain, fast = small.mlx_vlm_v4().train(), small.mlx_vlm_v4().train()
    accelerate(fast)
    x = mx.random.normal((2, 3, 4, 64))
    got, expected = (
        m.layers[2].ffn_hc.apply_branch(x, m.layers[2].ffn_norm, mx.tanh) for m in (fast, plain)
    )
    assert small.apart(got, expected) < 1e-5


# -------------------------------------------------------------------------- drafters and images


def test_what_drafters_read_is_the_same() -> None:
    """Compare the streams before the head, and their mean after some layers."""
    plain, fast = small.mlx_vlm_v4().language_model, small.mlx_vlm_v4()
    accelerate(fast)
    ids = small.tokens(1, small.LONG)
    for options in ({"capture_layer_ids": [0, 3, 4]}, {"return_hidden": True}):
        expected = plain(ids, **options).hidden_states
        got = fast.language_model(ids, **options).hidden_states
        assert len(got) == len(expected) == len(options.get("capture_layer_ids", [0]))
        for mine, theirs in zip(got, expected, strict=True):
            assert small.apart(mine, theirs) < 1e-4
    hidden = fast.language_model(ids, return_hidden=True).hidden_states[0]
    readout = fast.language_model.logits_from_hidden(hidden)
    assert small.equal(readout, small.logits(fast, ids))


IMAGE = mx.array([[3, 7, 64, 66, 66, 67, 66, 66, 67, 68, 9, 30]])  # start, image, line, end


def test_v4_with_images_trains() -> None:
    """Check its choice among experts for images: compiled, with indices that have no gradient."""
    with pytest.raises(ValueError, match="VJP with respect to indices"):
        image_gradients(small.mlx_vlm_v4(**VISION))
    fast, model = small.mlx_vlm_v4(**VISION), small.mlx_vlm_v4(**VISION)
    accelerate(fast)
    accelerate(model, trainable=True)
    assert small.equal(small.logits(model, IMAGE), small.logits(fast, IMAGE))
    value, gradient = image_gradients(model)
    mx.eval(value, gradient)
    flat = dict(tree_flatten(gradient))
    for i in range(5):
        assert mx.abs(flat[f"language_model.model.layers.{i}.ffn.gate.weight"]).max().item() > 0
    check_slope(model, flat, ".ffn.gate.weight")


def image_gradients(model: Any) -> Any:
    return nn.value_and_grad(model, image_loss)(model)


def image_loss(model: Any) -> mx.array:
    return mx.square(small.logits(model, IMAGE)).mean()


def check_slope(model: Any, gradient: dict[str, mx.array], suffix: str) -> None:
    """Compare the gradient of some parameters with differences of the loss along it."""
    along = {path: g for path, g in gradient.items() if path.endswith(suffix)}
    at = {path: v for path, v in tree_flatten(model.parameters()) if path in along}
    norm = sum(mx.square(g).sum() for g in along.values()).item() ** 0.5
    values: list[float] = []
    for step in (1e-3, -1e-3):
        moved = [(path, at[path] + step / norm * along[path]) for path in along]
        model.update(tree_unflatten(moved))
        values.append(image_loss(model).item())
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(norm, rel=2e-2)


# -------------------------------------------------------------------------------------- engrams

ENGRAMS: dict[str, Any] = {
    "engram_layer_ids": [0, 2],
    "engram_vocab_size": 20,
    "engram_num_embeddings": [400, 800],
    "engram_max_ngram_size": 3,
    "engram_n_heads": 2,
    "engram_head_dim": 32,
}


def with_engrams(model: Any, ids: mx.array) -> mx.array:
    """Run a V4.1 with engrams, on hashes of its own."""
    shape = (*ids.shape, 2, 4)
    hashes = mx.random.randint(0, 100, shape, key=mx.random.key(5))
    return model.language_model(ids, engram_hashes=hashes).logits


def test_engrams_get_streams_that_are_written() -> None:
    plain, fast = small.mlx_vlm_v41(**ENGRAMS), small.mlx_vlm_v41(**ENGRAMS)
    report = accelerate(fast)
    ids = small.tokens(2, small.LONG)
    expected = with_engrams(plain, ids)
    assert small.apart(with_engrams(fast, ids), expected) < 1e-4
    assert small.apart(expected, small.logits(plain, ids)) > 1e-2  # they do something
    left = [note.path for note in report.left if "adds to the streams" in note.text]
    assert left == ["language_model.layers.0.engram", "language_model.layers.2.engram"]


def test_engrams_train() -> None:
    model = small.mlx_vlm_v41(**ENGRAMS)
    report = accelerate(model, trainable=True)
    assert [n.path for n in report.replaced if n.class_name == "Engram"] == [
        "language_model.layers.0.engram",
        "language_model.layers.2.engram",
    ]
    ids = small.tokens(2, small.LONG)
    gradient = nn.value_and_grad(model, lambda m: mx.square(with_engrams(m, ids)).mean())(model)[1]
    flat = {path: g for path, g in tree_flatten(gradient) if ".engram." in path}
    assert len(flat) == 2 * 4
    assert all(mx.abs(g).max().item() > 0 for g in flat.values())
    assert isinstance(model.layers[2].engram, engram.Engram)
