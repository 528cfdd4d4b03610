"""HyperConnection and HyperHead: their numbers, their gradients, their start, their dtype."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn, utils
from numpy.typing import NDArray

import mhc_core as mhc
from mhc_conformance import oracle
from mhc_core.mlx import HyperConnectedBlock, HyperConnectedStack, HyperConnection, HyperHead

Array = NDArray[Any]

VARIANTS = {
    "paper": mhc.PAPER,
    "v4": mhc.DEEPSEEK_V4,
    "v41": mhc.DEEPSEEK_V41,
    "liger": mhc.LIGER,
}
DIMS = 6

by_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
modules = pytest.mark.parametrize("module", [HyperConnection, HyperHead])


def float64(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def trained(module: type[Any], n: int, variant: mhc.Variant, seed: int = 0) -> Any:
    """Return a module whose parameters are far from their initial values."""
    mx.random.seed(seed)
    made = module(DIMS, n, variant)
    made.apply(lambda p: p + 0.5 * mx.random.normal(p.shape))
    mx.eval(made.parameters())
    return made


def streams(n: int, *leading: int) -> mx.array:
    mx.random.seed(9)
    return mx.random.normal((*leading, n, DIMS))


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    want = np.asarray(want)
    error = float(np.abs(np.asarray(got) - want).max(initial=0.0))
    assert error <= tolerance * max(1.0, float(np.abs(want).max(initial=0.0)))


# ---- numbers ------------------------------------------------------------------------------------


@by_variant
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_a_connected_layer_is_the_oracles(
    variant: mhc.Variant, n: int, leading: tuple[int, ...]
) -> None:
    connection, x = trained(HyperConnection, n, variant), streams(n, *leading)
    arrays = [float64(a) for a in (x, *connection.projection)]
    h, h_post, h_res = oracle.forward("pre", arrays, variant=variant)
    want = oracle.forward("combine", [float64(x), np.tanh(h), h_post, h_res])
    close(connection(x, mx.tanh), want[0])
    for got, mapped in zip(
        connection.mappings(x), oracle.forward("mappings", arrays, variant=variant), strict=True
    ):
        close(got, mapped)


@by_variant
@pytest.mark.parametrize("n", [1, 4])
def test_a_head_is_the_oracles(variant: mhc.Variant, n: int) -> None:
    head, x = trained(HyperHead, n, variant), streams(n, 2, 3)
    arrays = [float64(a) for a in (x, *head.projection)]
    close(head(x), oracle.forward("head", arrays, variant=variant)[0])


@by_variant
def test_the_next_connection_takes_over_in_one_pass(variant: mhc.Variant) -> None:
    first, second = (trained(HyperConnection, 4, variant, seed) for seed in (1, 2))
    x = streams(4, 3)
    h, h_post, h_res = first.pre(x)
    want = first.combine(x, h, h_post, h_res)
    h_pre, *mapped = second.mappings(want)
    got = second.combine_pre(x, h, h_post, h_res)
    for one, other in zip(got, (want, second.pre(want)[0], h_pre, *mapped), strict=True):
        close(one, other)
    given = mx.random.uniform(shape=(3, 4))
    _, h_given, *_ = second.combine_pre(x, h, h_post, h_res, given)
    close(h_given, mhc.aggregate(want, given))


def test_what_the_layer_is_called_with_reaches_it() -> None:
    def layer(h: mx.array, factor: float, *, shift: float) -> mx.array:
        return factor * h + shift

    connection, x = trained(HyperConnection, 4, mhc.PAPER), streams(4, 2)
    close(connection(x, layer, 2.0, shift=1.0), connection(x, lambda h: 2.0 * h + 1.0))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_streams_of_half_precision_keep_their_dtype(dtype: mx.Dtype) -> None:
    connection, x = trained(HyperConnection, 4, mhc.DEEPSEEK_V4), streams(4, 3).astype(dtype)
    h, h_post, h_res = connection.pre(x)
    assert (h.dtype, h_post.dtype, h_res.dtype) == (dtype, mx.float32, mx.float32)
    got = connection(x, lambda h: h.astype(mx.float32))
    assert got.dtype == dtype
    close(float64(got), float64(connection(x.astype(mx.float32), lambda h: h)), 2e-2)


def test_they_ask_the_backend_that_is_chosen(plugins: Any) -> None:
    asked: list[str] = []

    def noted(name: str) -> Callable[..., str]:
        return lambda *_, **__: asked.append(name) or name

    functions = {name: noted(name) for name in (*mhc.math.OPS, "vjp")}
    plugins.backend("spy", functions, array_types=("mlx.core.array",))
    connection, head, x = HyperConnection(DIMS), HyperHead(DIMS), streams(4, 2)
    arrays = (x, mx.zeros((2, DIMS)), mx.ones(4), mx.eye(4))
    with mhc.use_backend("spy"):
        connection.mappings(x)
        connection.combine(*arrays)
        connection.combine_pre(*arrays)
        head(x)
    assert asked == ["mappings", "combine", "combine_pre", "head"]


# ---- gradients ----------------------------------------------------------------------------------


@by_variant
@pytest.mark.parametrize("n", [1, 2, 4])
def test_gradients_are_those_of_float64(variant: mhc.Variant, n: int) -> None:
    check_gradients(variant, n, lambda derived: derived)


def test_gradients_under_compile_are_those_of_float64() -> None:
    check_gradients(mhc.DEEPSEEK_V4, 2, mx.compile)


def check_gradients(variant: mhc.Variant, n: int, transform: Callable[..., Any]) -> None:
    connection, x = trained(HyperConnection, n, variant), streams(n, 3)
    cotangent = mx.random.normal(x.shape)

    def loss(x: mx.array) -> mx.array:
        return (cotangent * connection(x, mx.tanh)).sum()

    def step(parameters: Any, x: mx.array) -> Any:
        connection.update(parameters)
        return loss(x)

    before = connection.parameters()
    gradients, dx = transform(mx.grad(step, argnums=(0, 1)))(before, x)
    connection.update(before)

    primals = tuple(float64(a) for a in (x, *connection.projection))
    h, h_post, h_res = mhc.pre(*primals, variant)
    y = np.tanh(h)
    want_x, dy, dpost, dres = mhc.vjp("combine", (primals[0], y, h_post, h_res), float64(cotangent))
    more, *want = mhc.vjp("pre", primals, (dy * (1 - y * y), dpost, dres), variant=variant)
    close(dx, want_x + more, 2e-5)
    for name, gradient in zip(connection.names, want, strict=True):
        close(gradients[name], gradient, 2e-5)


@by_variant
def test_gradients_of_a_head_are_those_of_float64(variant: mhc.Variant) -> None:
    head, x = trained(HyperHead, 4, variant), streams(4, 3)
    cotangent = mx.random.normal((3, DIMS))
    _, gradients = nn.value_and_grad(head, lambda: (cotangent * head(x)).sum())()
    primals = tuple(float64(a) for a in (x, *head.projection))
    _, *want = mhc.vjp("head", primals, float64(cotangent), variant=variant)
    for name, gradient in zip(head.names, want, strict=True):
        close(gradients[name], gradient, 2e-5)


# ---- parameters ---------------------------------------------------------------------------------


def shapes(module: nn.Module) -> dict[str, Any]:
    return {name: (p.shape, p.dtype) for name, p in utils.tree_flatten(module.parameters())}


@pytest.mark.parametrize("variant", [mhc.DEEPSEEK_V4, mhc.DEEPSEEK_V41])
def test_deepseeks_layout_has_the_names_of_its_checkpoints(variant: mhc.Variant) -> None:
    f = mx.float32
    assert shapes(HyperConnection(6, 4, variant)) == {
        "fn": ((24, 24), f),
        "base": ((24,), f),
        "scale": ((3,), f),
    }
    assert shapes(HyperHead(6, 4, variant)) == {
        "fn": ((4, 24), f),
        "base": ((4,), f),
        "scale": ((1,), f),
    }


@pytest.mark.parametrize("variant", [mhc.PAPER, mhc.LIGER])
def test_the_papers_layout_has_the_papers_names(variant: mhc.Variant) -> None:
    assert set(shapes(HyperConnection(6, 4, variant))) == {"phi", "bias", "alpha"}
    assert set(shapes(HyperHead(6, 4, variant))) == {"phi", "bias", "alpha"}


def test_weights_of_one_layout_do_not_load_as_the_other() -> None:
    weights = list(HyperConnection(6, 4, mhc.DEEPSEEK_V4).parameters().items())
    with pytest.raises(ValueError, match="not in model"):
        HyperConnection(6, 4, mhc.PAPER).load_weights(weights)


@modules
@pytest.mark.parametrize("ending", ["safetensors", "npz"])
@by_variant
def test_weights_survive_a_file(
    module: type[Any], ending: str, variant: mhc.Variant, tmp_path: Path
) -> None:
    one, other = trained(module, 4, variant, 1), module(DIMS, 4, variant)
    one.save_weights(str(tmp_path / f"w.{ending}"))
    other.load_weights(str(tmp_path / f"w.{ending}"))
    for a, b in zip(one.projection, other.projection, strict=True):
        assert mx.array_equal(a, b)


@modules
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_are_the_same_and_apart(module: type[Any], clone: Any) -> None:
    one = trained(module, 4, mhc.DEEPSEEK_V4)
    other = clone(one)
    assert (other.dims, other.n, other.variant) == (DIMS, 4, mhc.DEEPSEEK_V4)
    for a, b in zip(one.projection, other.projection, strict=True):
        assert mx.array_equal(a, b)
    other.base = other.base + 1
    assert not mx.array_equal(one.base, other.base)


@modules
@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((0,), ValueError, "dims is 0; needs an integer of at least 1"),
        ((8.0,), TypeError, "dims is 8.0"),
        ((8, 0), ValueError, "n is 0"),
        ((8, True), TypeError, "n is True"),
        ((8, 4, "v4"), TypeError, "variant is 'v4'; needs a mhc_core.Variant"),
    ],
)
def test_bad_arguments_are_named(
    module: type[Any], arguments: tuple[Any, ...], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=f"{module.__name__}: {says}"):
        module(*arguments)


def test_streams_that_do_not_fit_are_refused_by_the_op() -> None:
    with pytest.raises(ValueError, match="pre: phi"):
        HyperConnection(DIMS, 4).pre(mx.zeros((2, 3, DIMS)))


# ---- float32 ------------------------------------------------------------------------------------


@modules
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_casting_a_model_leaves_them_float32_and_unrounded(
    module: type[Any], dtype: mx.Dtype
) -> None:
    connection = trained(module, 4, mhc.DEEPSEEK_V4)
    model = nn.Sequential(nn.Linear(4, 4), connection)
    before = [mx.array(p) for p in connection.projection]
    model.set_dtype(dtype)
    assert model.layers[0].weight.dtype == dtype
    for now, then in zip(connection.projection, before, strict=True):
        assert now.dtype == mx.float32
        assert mx.array_equal(now, then)


def test_what_comes_in_lower_precision_is_widened() -> None:
    connection = HyperConnection(DIMS, 4, mhc.DEEPSEEK_V4)
    fn = mx.random.normal(connection.fn.shape).astype(mx.bfloat16)
    connection.load_weights([("fn", fn)], strict=False)
    assert connection.fn.dtype == mx.float32
    assert mx.array_equal(connection.fn, fn.astype(mx.float32))


def assigned(module: Any, values: dict[str, mx.array]) -> None:
    for name, value in values.items():
        setattr(module, name, value)


def loaded(module: Any, values: dict[str, mx.array]) -> None:
    module.load_weights(list(values.items()))


def inside(wrap: Callable[[Any], nn.Module], prefix: str) -> Any:
    def load(module: Any, values: dict[str, mx.array]) -> None:
        weights = [(prefix + name, value) for name, value in values.items()]
        wrap(module).load_weights(weights, strict=False)

    return load


def in_a_stack(module: Any) -> nn.Module:
    other = HyperConnectedBlock(nn.Identity(), DIMS, 4, mhc.DEEPSEEK_V4)
    if isinstance(module, HyperHead):
        return nn.Sequential(HyperConnectedStack([other], 4, head=module))
    other.connection = module
    return nn.Sequential(HyperConnectedStack([other], 4))


WAYS: dict[str, Any] = {
    "load_weights": loaded,
    "update": lambda module, values: module.update(values),
    "assignment": assigned,
    "a model's load_weights": inside(lambda m: nn.Sequential(nn.Linear(2, 2), m), "layers.1."),
    "a stack's": lambda module, values: inside(
        in_a_stack,
        "layers.0.head." if isinstance(module, HyperHead) else "layers.0.blocks.0.connection.",
    )(module, values),
}


@modules
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_what_is_loaded_is_what_is_held(module: type[Any], way: str, dtype: mx.Dtype) -> None:
    """Check loading over weights that round to the loaded ones: a run may have begun there."""
    connection = trained(module, 4, mhc.DEEPSEEK_V4)
    values = {name: p.astype(dtype) for name, p in connection.parameters().items()}
    WAYS[way](connection, values)
    for name, value in values.items():
        assert connection[name].dtype == mx.float32
        assert mx.array_equal(connection[name], value.astype(mx.float32)), name


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_applying_a_cast_rounds_nothing_and_another_function_is_held(dtype: mx.Dtype) -> None:
    connection = trained(HyperConnection, 4, mhc.DEEPSEEK_V4)
    connection.base = 1e5 * connection.base  # float16 has no such numbers
    before = mx.array(connection.base)
    nn.Sequential(connection).apply(lambda p: p.astype(dtype))
    assert mx.array_equal(connection.base, before)
    scale = mx.array(connection.scale)
    connection.apply(lambda p: (2 * p).astype(dtype))
    assert mx.array_equal(connection.scale, (2 * scale).astype(dtype).astype(mx.float32))


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_casting_inside_a_loss_lets_gradients_through(compiled: bool) -> None:
    connection, x = trained(HyperConnection, 4, mhc.DEEPSEEK_V4), streams(4, 3)
    own = connection.parameters()

    def gradients(cast: Callable[[mx.array], mx.array]) -> Any:
        def loss(parameters: Any, x: mx.array) -> mx.array:
            connection.update(utils.tree_map(cast, parameters))
            return connection.mappings(x)[0].square().sum()

        derived = mx.grad(loss)
        result = (mx.compile(derived) if compiled else derived)(own, x)
        mx.eval(result)
        connection.update(own)
        return result

    plain, cast = gradients(lambda p: p), gradients(lambda p: p.astype(mx.bfloat16))
    for name in ("fn", "base", "scale"):
        assert mx.abs(plain[name]).max() > 1e-3
        close(cast[name], plain[name], 2e-2)


def test_what_is_no_float_is_refused() -> None:
    connection = HyperConnection(DIMS, 4, mhc.DEEPSEEK_V4)
    with pytest.raises(TypeError, match=r"HyperConnection: fn has dtype mlx\.core\.uint32"):
        connection.fn = mx.zeros(connection.fn.shape, mx.uint32)


def test_quantising_a_model_leaves_them_alone() -> None:
    block = HyperConnectedBlock(nn.Linear(64, 64), 64, 4, mhc.DEEPSEEK_V4)
    before = [mx.array(p) for p in block.connection.projection]
    nn.quantize(block)
    assert isinstance(block.layer, nn.QuantizedLinear)
    for now, then in zip(block.connection.projection, before, strict=True):
        assert mx.array_equal(now, then)


# ---- the start ----------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer that is not linear and not small."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.random.normal((DIMS, DIMS)) / DIMS**0.5

    def __call__(self, h: mx.array) -> mx.array:
        return mx.tanh(h @ self.weight)


def started(n: int, variant: mhc.Variant, single_pass: bool, head: bool) -> HyperConnectedStack:
    blocks = [HyperConnectedBlock(Layer(), DIMS, n, variant) for _ in range(8)]
    last = HyperHead(DIMS, n, variant) if head else None
    return HyperConnectedStack(blocks, n, single_pass, head=last)


orders = pytest.mark.parametrize(
    ("single_pass", "head"), [(False, False), (False, True), (True, False)]
)


@by_variant
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@orders
def test_a_stack_starts_as_the_plain_residual(
    variant: mhc.Variant, n: int, single_pass: bool, head: bool
) -> None:
    mx.random.seed(0)
    stack = started(n, variant, single_pass, head)
    h = mx.random.normal((16, DIMS))
    want = h
    for block in stack.blocks:
        want = want + block.layer(want)
    error = (stack(h) - want).square().mean() / (want - h).square().mean()
    assert error.item() ** 0.5 < (8e-3 if n == 1 else 1e-3)


@by_variant
@pytest.mark.parametrize("n", [2, 3, 4])
@orders
def test_nothing_starts_without_a_gradient(
    variant: mhc.Variant, n: int, single_pass: bool, head: bool
) -> None:
    mx.random.seed(0)
    stack = started(n, variant, single_pass, head)
    h, cotangent = mx.random.normal((2, 16, DIMS))
    _, gradients = nn.value_and_grad(stack, lambda: (cotangent * stack(h)).sum())()
    phi, scale, bias = stack.blocks[0].connection.names
    rows = {"pre": slice(0, n), "post": slice(n, 2 * n), "res": slice(2 * n, None)}
    for k, block in enumerate(gradients["blocks"]):
        own = block["connection"]
        for group, part in enumerate(rows):
            sizes = [mx.abs(own[name][rows[part]]).max().item() for name in (phi, bias)]
            sizes.append(abs(own[scale][group].item()))
            if part == "res" and k == without_effect(variant, single_pass or head):
                assert max(sizes) < 1e-6
            else:  # of two streams only phi tells one from the other
                assert min(sizes) > (1e-7 if part == "res" and n == 2 else 1e-5), (k, part, sizes)


def without_effect(variant: mhc.Variant, weighted: bool) -> int | None:
    """Return the sublayer whose H_res has no effect: it has equal streams, or the mean after it.

    Rows that sum to 1 leave equal streams alone, columns that do leave the mean alone. The lines
    normalised last sum to 1 whatever the parameters are.
    """
    if variant.sinkhorn_first == "columns":
        return 0
    return None if weighted else 7
