"""HyperConnectedStack: its two orders, its arguments, its weights."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from numpy.typing import NDArray
from stacks import COUNT, DIMS, close, flat, gradients, hidden, made, orders, same

import mhc_core as mhc
from mhc_backends.mlx_nn import inside
from mhc_core.mlx import HyperConnectedBlock, HyperConnectedStack, HyperHead

# ---- the two orders -----------------------------------------------------------------------------


def by_blocks(stack: HyperConnectedStack, h: mx.array) -> mx.array:
    x = mhc.expand(h, 4)
    for block in stack.blocks:
        x = block(x)
    return stack.head(x) if "head" in stack else mhc.contract(x, "mean")


def in_a_single_pass(stack: HyperConnectedStack, h: mx.array) -> mx.array:
    """Return the output of DeepSeek-V4.1, op by op: each sublayer uses the previous one's mix."""
    x, mix = mhc.expand(h, 4), mx.array([1.0, 0.0, 0.0, 0.0])
    for block in stack.blocks:
        h_pre, h_post, h_res = block.connection.mappings(x)
        x = mhc.combine(x, block.transform(mhc.aggregate(x, mix)), h_post, h_res)
        mix = h_pre
    return mhc.aggregate(x, mix)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("head", [False, True], ids=["mean", "head"])
def test_a_stack_is_its_blocks_one_after_another(leading: tuple[int, ...], head: bool) -> None:
    stack, h = made(head=head, norm=nn.Identity), hidden(*leading)
    assert stack(h).shape == h.shape
    close(stack(h), by_blocks(stack, h))


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_the_single_pass_takes_the_mix_of_the_connection_before(leading: tuple[int, ...]) -> None:
    stack, h = made(single_pass=True, norm=nn.Identity), hidden(*leading)
    close(stack(h), in_a_single_pass(stack, h))
    assert not mx.allclose(stack(h), by_blocks(stack, h), rtol=1e-2, atol=1e-2)


def test_the_streams_are_read_once_between_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("pre", "mappings", "aggregate", "combine", "combine_pre"):
        op = getattr(mhc, name)

        def noted(*args: Any, op: Any = op, name: str = name, **kwargs: Any) -> Any:
            seen.append(name)
            return op(*args, **kwargs)

        monkeypatch.setattr(mhc, name, noted)
    made().eval()(hidden(2))
    assert seen == ["pre", *["combine_pre"] * (COUNT - 1), "combine"]


@orders
@pytest.mark.parametrize("recompute", [2, False])
def test_where_kernels_run_they_apply_the_norms(
    single_pass: bool, recompute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make the formulas do what kernels would. The single pass has no op that makes its first h."""
    stack, h = made(single_pass, recompute), hidden(2, 3)
    wanted, names = gradients(stack, h), list(flat(stack.parameters()))
    called: list[nn.Module] = []
    run: Any = nn.RMSNorm.__call__

    def recorded(norm: nn.Module, x: mx.array) -> mx.array:
        called.append(norm)
        return run(norm, x)

    monkeypatch.setattr(nn.RMSNorm, "__call__", recorded)
    block, x = stack.blocks[1], mx.random.normal((3, 4, DIMS))
    expected = block(x), block.eval()(x)
    close(*expected)
    assert len(called) == 2
    called.clear()
    monkeypatch.setattr(inside, "runs_formulas", lambda _: False)
    monkeypatch.setattr(inside, "_inside", {})
    close(block(x), expected[1])
    block.train()
    same(gradients(stack, h), wanted, 1e-4)
    assert len(called) == (single_pass and (2 if recompute else 1))
    assert list(flat(stack.parameters())) == names
    stack.blocks[2].norm.set_dtype(mx.bfloat16)  # narrower than the streams, which keep their dtype
    stack.blocks[3].norm.__class__ = Doubled
    called.clear()
    assert stack.eval()(h).dtype == mx.float32
    assert called[-1] is stack.blocks[3].norm
    half = stack.blocks[0].eval()(x.astype(mx.bfloat16))  # whose h the norm widens
    assert called[-1] is stack.blocks[0].norm
    assert half.dtype == mx.bfloat16


class Doubled(nn.RMSNorm):
    """A norm that is not the library's."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(2 * x)


@orders
def test_gradients_are_those_of_float64(single_pass: bool) -> None:
    """Compare with a float64 NumPy stack's differences, along a random direction per parameter."""
    stack, h = made(single_pass), hidden(3)
    _, derived = gradients(stack, h)
    rng = np.random.default_rng(0)
    values = {
        name: np.array(p).astype(np.float64) for name, p in flat(stack.parameters()).items()
    } | {"0": np.array(h).astype(np.float64)}
    weight = np.cos(np.arange(h.size)).reshape(h.shape)
    for name, value in values.items():
        direction = rng.normal(size=value.shape)
        step = 1e-6 * direction / np.linalg.norm(direction)
        ends = [in_float64(values | {name: value + sign * step}, single_pass) for sign in (1, -1)]
        want = (weight * (ends[0] - ends[1])).sum() / 2e-6
        got = (np.array(derived[name]) * direction).sum() / np.linalg.norm(direction)
        size = np.linalg.norm(np.array(derived[name]))
        assert abs(got - want) < 1e-4 * max(size, 1.0), name


def in_float64(values: dict[str, NDArray[Any]], single_pass: bool) -> NDArray[Any]:
    x = np.repeat(values["0"][..., None, :], 4, axis=-2)
    mix = np.eye(4)[0]
    for k in range(COUNT):
        own = {name: values[f"blocks.{k}.{name}"] for name in PARAMETERS}
        projection = [own[f"connection.{name}"] for name in ("fn", "scale", "base")]
        h_pre, h_post, h_res = mhc.mappings(x, *projection, mhc.DEEPSEEK_V4)
        h = mhc.aggregate(x, mix if single_pass else h_pre)
        h = mhc.rms_norm(h, own["norm.weight"], 1e-5)
        y = np.tanh(h @ own["layer.weight"] + own["layer.shift"])
        x, mix = mhc.combine(x, y, h_post, h_res), h_pre
    return mhc.aggregate(x, mix) if single_pass else mhc.contract(x, "mean")


PARAMETERS = (
    "connection.fn",
    "connection.scale",
    "connection.base",
    "norm.weight",
    "layer.weight",
    "layer.shift",
)


# ---- arguments ----------------------------------------------------------------------------------


def block(dims: int = DIMS, n: int = 4) -> HyperConnectedBlock:
    return HyperConnectedBlock(nn.Identity(), dims, n)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: HyperConnectedStack([]), ValueError, "blocks is empty"),
        (lambda: HyperConnectedStack([block(), nn.Identity()]), TypeError, "blocks[1] is a Ident"),
        (lambda: HyperConnectedStack([block(n=2)]), ValueError, "blocks[0] has n=2 and dims=8"),
        (lambda: HyperConnectedStack([block(), block(4)]), ValueError, "blocks[1] has n=4 and dim"),
        (lambda: HyperConnectedStack([block()], 0), ValueError, "n is 0"),
        (lambda: HyperConnectedStack([block()], 4, "yes"), TypeError, "single_pass is 'yes'"),
        (lambda: HyperConnectedStack([block()], 4, recompute="yes"), ValueError, "recompute is 'y"),
        (lambda: HyperConnectedStack([block()], 4, recompute=True), ValueError, "recompute is Tr"),
        (lambda: HyperConnectedStack([block()], 4, recompute=0), ValueError, "recompute is 0"),
        (
            lambda: HyperConnectedStack([block()], 4, True, head=HyperHead(DIMS)),
            ValueError,
            "head is given; the single-pass order has no head",
        ),
        (
            lambda: HyperConnectedStack([block()], 4, head=HyperHead(DIMS, 2)),
            ValueError,
            "head has n=2 and dims=8; needs n=4 and dims=8",
        ),
        (
            lambda: HyperConnectedStack([block()], 4, head=nn.Linear(2, 2)),
            TypeError,
            "head is a Linear; needs a HyperHead",
        ),
        (lambda: made()(hidden(2), each=[{}]), ValueError, "each has 1 entries; needs one for ea"),
        (
            lambda: HyperConnectedBlock(mx.tanh, DIMS),
            TypeError,
            "layer is a nb_func; needs an ml",
        ),
        (
            lambda: HyperConnectedBlock(nn.Identity(), DIMS, norm=mx.tanh),
            TypeError,
            "norm is a nb_func",
        ),
        (lambda: HyperConnectedBlock(nn.Identity(), 0), ValueError, "dims is 0"),
    ],
)
def test_bad_arguments_are_named(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert says in str(raised.value)


def test_weights_survive_a_file(tmp_path: Any) -> None:
    one, other = made(head=True), made(head=True)
    other.apply(lambda p: p + 1)
    one.save_weights(str(tmp_path / "w.safetensors"))
    other.load_weights(str(tmp_path / "w.safetensors"))
    assert mx.array_equal(one(hidden(2)), other(hidden(2)))
