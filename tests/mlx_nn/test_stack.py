"""HyperConnectedStack: its two orders, and recomputation that saves memory and nothing else."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn, utils
from numpy.typing import NDArray

import mhc_core as mhc
from mhc_core.mlx import HyperConnectedBlock, HyperConnectedStack, HyperHead

DIMS, COUNT = 8, 6

orders = pytest.mark.parametrize("single_pass", [False, True], ids=["two passes", "single pass"])


class Layer(nn.Module):
    """An MLP that counts how often it runs."""

    def __init__(self, dims: int = DIMS) -> None:
        super().__init__()
        self.weight = mx.random.normal((dims, dims)) / dims**0.5
        self.shift = 0.1 * mx.random.normal((dims,))
        self.runs = 0

    def __call__(self, h: mx.array, mask: mx.array | None = None, scale: float = 1.0) -> mx.array:
        self.runs += 1
        y = scale * mx.tanh(h @ self.weight + self.shift)
        return y if mask is None else y * mask


def made(
    single_pass: bool = False,
    recompute: Any = "auto",
    head: bool = False,
    variant: mhc.Variant = mhc.DEEPSEEK_V4,
    layer: Callable[[], nn.Module] = Layer,
    norm: Callable[[int], nn.Module] = nn.RMSNorm,
) -> HyperConnectedStack:
    """Return the same stack for the same arguments, its parameters far from the start."""
    mx.random.seed(3)
    blocks = [HyperConnectedBlock(layer(), DIMS, 4, variant, norm(DIMS)) for _ in range(COUNT)]
    last = HyperHead(DIMS, 4, variant) if head else None
    stack = HyperConnectedStack(blocks, 4, single_pass, recompute, last)
    stack.apply(lambda p: p + 0.3 * mx.random.normal(p.shape))
    mx.eval(stack.parameters())
    return stack


def hidden(*leading: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((*leading, DIMS), key=mx.random.key(5)).astype(dtype)


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(utils.tree_flatten(tree))


def gradients(
    stack: HyperConnectedStack,
    *arrays: mx.array,
    call: Callable[..., mx.array] | None = None,
    compiled: bool = False,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the loss, and its gradients by every parameter and by the arrays (by index)."""
    call = call or stack
    own = stack.trainable_parameters()

    def loss(parameters: Any, *arrays: mx.array) -> mx.array:
        stack.update(parameters)
        out = call(*arrays)
        return (out * mx.cos(mx.arange(out.size)).reshape(out.shape)).astype(mx.float32).sum()

    derived = mx.value_and_grad(loss, argnums=list(range(len(arrays) + 1)))
    value, (of_parameters, *of_arrays) = (mx.compile(derived) if compiled else derived)(
        own, *arrays
    )
    stack.update(own)
    result = flat(of_parameters) | {str(k): g for k, g in enumerate(of_arrays)}
    mx.eval(value, result)
    return value, result


def same(one: Any, other: Any, tolerance: float = 0.0) -> None:
    """Check equality, bit for bit without a tolerance, and that no array is zero everywhere."""
    assert set(one[1]) == set(other[1])
    for name, gradient in {"loss": one[0], **one[1]}.items():
        want = {"loss": other[0], **other[1]}[name]
        assert gradient.dtype == want.dtype
        assert mx.abs(gradient - want).max() <= tolerance * mx.abs(want).max(), name
        if not name.startswith("blocks.0.connection"):
            assert mx.abs(gradient).max() > 0, name


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


def close(got: mx.array, want: mx.array) -> None:
    assert mx.allclose(got, want, rtol=1e-4, atol=1e-5), mx.abs(got - want).max()


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
    assert seen == ["mappings", "aggregate", *["combine_pre"] * (COUNT - 1), "combine"]


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


# ---- recomputation changes no gradient ----------------------------------------------------------


@orders
@pytest.mark.parametrize("recompute", ["auto", 1, 2, 4, 5])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_recomputed_gradients_are_the_plain_ones(
    single_pass: bool, recompute: Any, dtype: mx.Dtype
) -> None:
    h = hidden(3, dtype=dtype)
    stack = made(single_pass, recompute)
    same(gradients(stack, h), gradients(made(single_pass, False), h))
    assert all(block.layer.runs == 2 for block in stack.blocks)


@pytest.mark.parametrize("variant", [mhc.PAPER, mhc.LIGER], ids=["paper", "liger"])
def test_so_they_are_for_other_variants_and_with_a_head(variant: mhc.Variant) -> None:
    plain, again = (made(False, r, True, variant) for r in (False, 2))
    same(gradients(again, hidden(3)), gradients(plain, hidden(3)))


@orders
def test_under_compile_they_are_so_but_for_what_is_fused_otherwise(single_pass: bool) -> None:
    h = hidden(3)
    plain, again = (gradients(made(single_pass, r), h, compiled=True) for r in (False, "auto"))
    same(again, plain, 1e-6)


def test_what_a_stack_is_called_with_gets_its_gradient_too() -> None:
    h, mask, other = hidden(3), mx.random.uniform(shape=(3, 1)), mx.random.uniform(shape=(3, DIMS))

    def through(stack: HyperConnectedStack, h: mx.array, mask: mx.array, other: mx.array) -> Any:
        each: list[dict[str, Any]] = [{"mask": other}, {"scale": 2.0}, *[{}] * (COUNT - 2)]
        return stack(h, mask=mask, each=each)

    results = [
        gradients(stack, h, mask, other, call=lambda *arrays, s=stack: through(s, *arrays))
        for stack in (made(True, 2), made(True, False))
    ]
    same(*results)
    assert {"0", "1", "2"} <= set(results[0][1])


class Choosing(nn.Module):
    """A layer that takes rows of h by index, which MLX cannot differentiate, and weights them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.random.normal((DIMS,))

    def __call__(self, h: mx.array, rows: mx.array, mask: mx.array) -> mx.array:
        return mx.where(mask, mx.tanh(h[rows] * self.weight), 0)


def test_positional_arguments_and_arrays_without_gradients_pass() -> None:
    arrays = mx.array([2, 0, 1]), mx.array([[True], [False], [True]])
    plain, again = (made(False, recompute, layer=Choosing) for recompute in (False, 2))
    same(
        gradients(again, hidden(3), call=lambda h: again(h, *arrays)),
        gradients(plain, hidden(3), call=lambda h: plain(h, *arrays)),
    )


@orders
def test_frozen_parameters_stay_without_a_gradient(single_pass: bool) -> None:
    results: list[Any] = []
    for recompute in (False, 2):
        stack = made(single_pass, recompute)
        for block in stack.blocks:
            block.layer.freeze()
        results.append(gradients(stack, hidden(3)))
    same(*results)
    assert not any("layer" in name for name in results[0][1])


def test_quantised_layers_pass_gradients_on() -> None:
    def quantised(recompute: Any) -> HyperConnectedStack:
        mx.random.seed(1)
        blocks = [HyperConnectedBlock(nn.Linear(64, 64), 64) for _ in range(4)]
        stack = HyperConnectedStack(blocks, 4, recompute=recompute)
        nn.quantize(stack)
        for block in stack.blocks:
            block.layer.freeze()
        return stack

    h = mx.random.normal((3, 64))
    same(gradients(quantised(2), h), gradients(quantised(False), h))


def test_layers_that_are_shared_get_the_sum_of_their_gradients() -> None:
    def shared(recompute: Any) -> HyperConnectedStack:
        stack = made(recompute=recompute)
        for k in (1, 2, 5):  # twice in one part, and in another
            stack.blocks[k].layer = stack.blocks[0].layer
            stack.blocks[k].norm = stack.blocks[0].norm
        return stack

    again, plain = (gradients(shared(recompute), hidden(3))[1] for recompute in (3, False))
    for name in ("layer.weight", "layer.shift", "norm.weight"):
        # MLX gives a parameter that has four names its gradient under one of them
        got, want = (sum(g[f"blocks.{k}.{name}"] for k in (0, 1, 2, 5)) for g in (again, plain))
        assert mx.abs(want).max() > 1e-3
        close(got, want)


def test_nothing_that_was_traced_stays_in_the_modules() -> None:
    stack, h = made(recompute=2), hidden(3)
    before = flat(stack.parameters())
    step = mx.compile(lambda h: mx.grad(lambda h: stack(h).sum())(h))
    mx.eval(step(h))
    after = flat(stack.parameters())
    assert all(after[name] is before[name] for name in before)
    mx.eval(stack(h))


def test_a_training_step_of_mlx_works_as_it_is_written_everywhere() -> None:
    from mlx import optimizers

    losses: dict[Any, list[float]] = {}
    for recompute in (False, 2):
        stack, h = made(recompute=recompute), hidden(16)
        optimizer = optimizers.Adam(1e-2)
        state = [stack.state, optimizer.state]

        def step(stack: Any = stack, h: mx.array = h, optimizer: Any = optimizer) -> mx.array:
            loss, grads = nn.value_and_grad(
                stack, lambda: (stack(h) - mx.roll(h, 1)).square().mean()
            )()
            optimizer.update(stack, grads)
            return loss

        compiled = mx.compile(step, inputs=state, outputs=state)
        losses[recompute] = [compiled().item() for _ in range(4)]
    assert np.allclose(losses[2], losses[False], rtol=1e-5)
    assert losses[2][3] < losses[2][0]


# ---- when a layer is not run again --------------------------------------------------------------


def runs(stack: HyperConnectedStack, **kwargs: Any) -> int:
    """Return how often each layer runs for a loss and its gradients."""
    for block in stack.blocks:
        block.layer.runs = 0
    gradients(stack, hidden(3), call=lambda h: stack(h, **kwargs))
    (count,) = {block.layer.runs for block in stack.blocks}
    return count


def test_layers_run_twice_in_training_alone() -> None:
    stack = made(recompute=2)
    assert runs(stack) == 2
    with mhc.no_grad():
        assert runs(stack) == 1
    stack.eval()
    assert runs(stack) == 1
    assert runs(made(recompute=False)) == 1
    assert runs(made(recompute=COUNT)) == 1


class Cached(nn.Module):
    """A layer that returns the mean of all tokens so far, with their sum in a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.random.normal((DIMS, DIMS)) / DIMS**0.5
        self.runs = 0

    def __call__(self, h: mx.array, cache: Cache | None = None) -> mx.array:
        self.runs += 1
        total = mx.cumsum(h, axis=-2)
        start = 0
        if cache is not None:
            total, start = total + cache.total, cache.count
            cache.total, cache.count = total[..., -1:, :], start + h.shape[-2]
        counts = mx.arange(start + 1, start + 1 + h.shape[-2])[:, None]
        return mx.tanh((total / counts) @ self.weight)


class Cache:
    """The sum and the number of tokens, which a layer keeps between calls."""

    def __init__(self) -> None:
        self.total = mx.zeros((1, DIMS))
        self.count = 0


@orders
@pytest.mark.parametrize("training", [False, True])
def test_decoding_with_a_cache_is_the_whole_sequence(single_pass: bool, training: bool) -> None:
    stack = made(single_pass, 2, layer=Cached).train(training)
    h = hidden(5)
    caches = [Cache() for _ in range(COUNT)]
    each = [{"cache": cache} for cache in caches]
    tokens = [stack(h[k : k + 1], each=each) for k in range(5)]
    close(mx.concatenate(tokens), stack(h))
    assert all(cache.count == 5 for cache in caches)


def test_a_cache_is_not_filled_twice_for_gradients() -> None:
    stack = made(recompute=2, layer=Cached)
    caches = [Cache() for _ in range(COUNT)]
    assert runs(stack, each=[{"cache": cache} for cache in caches]) == 1
    assert all(cache.count == 3 for cache in caches)


class Dropping(nn.Module):
    """Dropout that records what it dropped, or drops what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.random.normal((DIMS,))
        self.runs = 0
        self.told: list[Any] = []

    def __call__(self, h: mx.array, mask: mx.array | None = None) -> mx.array:
        self.runs += 1
        mask = mx.random.bernoulli(0.5, h.shape).astype(h.dtype) if mask is None else mask
        self.told = [mask]
        return mx.tanh(h * self.weight) * mask


def test_layers_that_draw_random_numbers_keep_what_they_drew() -> None:
    stack, plain = made(recompute=2, layer=Dropping), made(recompute=False, layer=Dropping)
    got = gradients(stack, hidden(3))
    masks = [{"mask": mx.stop_gradient(block.layer.told[0])} for block in stack.blocks]
    same(got, gradients(plain, hidden(3), call=lambda h: plain(h, each=masks)))


# ---- memory -------------------------------------------------------------------------------------


class Scale(nn.Module):
    """A layer that keeps only its input."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.weight = mx.full((dims,), 0.02)

    def __call__(self, h: mx.array) -> mx.array:
        return h * self.weight


@pytest.fixture
def _evaluated_one_by_one() -> Any:
    """Evaluate one by one: on a CPU, MLX otherwise schedules work ahead and frees memory late."""
    before = mx.set_memory_limit(1)
    yield
    mx.set_memory_limit(before)


@orders
@pytest.mark.usefixtures("_evaluated_one_by_one")
def test_48_sublayers_train_in_less_than_45_percent_of_the_memory(single_pass: bool) -> None:
    """Measure MLX's peak memory during a compiled step, above what it held at the start.

    That is the streams, h and y, all that the layers here keep, and whatever else a step needs:
    gradients, and the ops' temporary arrays.
    """
    dims, tokens, count = 128, 256, 48
    peaks: dict[Any, int] = {}
    found: dict[Any, Any] = {}
    for recompute in (False, "auto"):
        mx.random.seed(0)
        blocks = [HyperConnectedBlock(Scale(dims), dims, 4, mhc.DEEPSEEK_V4) for _ in range(count)]
        stack = HyperConnectedStack(blocks, 4, single_pass, recompute)
        h = mx.random.normal((tokens, dims))
        step = mx.compile(nn.value_and_grad(stack, lambda h, s=stack: s(h).square().mean()))
        mx.eval(stack.parameters(), h)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found[recompute] = step(h)
        mx.eval(found[recompute])
        peaks[recompute] = mx.get_peak_memory() - before
    plain, again = (found[recompute] for recompute in (False, "auto"))
    same((again[0], flat(again[1])), (plain[0], flat(plain[1])), 1e-5)
    unit = tokens * dims * 4
    assert peaks[False] > 6 * count * unit  # (n + 2) C for each sublayer: it really is plain
    assert peaks["auto"] < 0.45 * 6 * count * unit
    assert peaks["auto"] < 0.3 * peaks[False]  # 0.33 where gradients come when nobody needs them


@pytest.mark.parametrize(
    ("count", "n", "recompute", "part"),
    [(48, 4, "auto", 6), (86, 4, "auto", 8), (1, 4, "auto", 1), (48, 1, "auto", 4), (6, 4, 9, 6)],
)
def test_parts_are_of_about_the_square_root(count: int, n: int, recompute: Any, part: int) -> None:
    blocks = [HyperConnectedBlock(nn.Identity(), 2, n) for _ in range(count)]
    stack = HyperConnectedStack(blocks, n, recompute=recompute)
    assert stack.part == part
    assert recompute != "auto" or abs(part - math.sqrt(n * count / (n + 2))) <= 0.5


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
            "head is given; the single-pass order has none",
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
        (lambda: HyperConnectedBlock(mx.tanh, DIMS), TypeError, "layer is a nb_func; needs a mlx."),
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


# ---- threads, what knows a layer by itself, second derivatives -------------------------------


def test_threads_take_gradients_through_one_stack_and_leave_it_as_it_was() -> None:
    stack, h = made(recompute=2), hidden(3)
    before = flat(stack.parameters())

    def gradient() -> mx.array:
        of_h = mx.grad(lambda h: (stack(h) ** 2).sum())(h)
        mx.eval(of_h)
        return of_h

    want, start = gradient(), threading.Barrier(2)

    def several(_: int) -> list[mx.array]:
        start.wait()
        return [gradient() for _ in range(5)]

    with ThreadPoolExecutor(2) as threads:
        for got in itertools.chain(*threads.map(several, range(2))):
            assert mx.array_equal(got, want)
    after = flat(stack.parameters())
    assert all(after[name] is array for name, array in before.items())


class Known(Layer):
    """A layer that something else refers to: a method, or a closure."""

    def __init__(self, closure: bool) -> None:
        super().__init__()
        self.method = (lambda h: super(Known, self).__call__(h)) if closure else self.other

    def other(self, h: mx.array) -> mx.array:
        return super().__call__(h)

    def __call__(self, h: mx.array, mask: Any = None, scale: float = 1.0) -> mx.array:
        return self.method(h)


@pytest.mark.parametrize("closure", [False, True], ids=["a method", "a closure"])
def test_what_knows_a_layer_by_itself_loses_no_gradient(closure: bool) -> None:
    def gradients(recompute: Any) -> dict[str, mx.array]:
        stack = made(recompute=recompute, layer=lambda: Known(closure))
        return flat(nn.value_and_grad(stack, lambda h: (stack(h) ** 2).sum())(hidden(3))[1])

    want = gradients(False)
    for name, gradient in gradients(2).items():
        assert mx.array_equal(gradient, want[name])
        assert float(mx.abs(gradient).max()) > 0


@pytest.mark.parametrize("recompute", [2, False])
def test_a_gradient_penalty_is_the_difference_of_gradients(recompute: Any) -> None:
    stack, h = made(recompute=recompute), hidden(2)
    along = mx.random.normal(h.shape, key=mx.random.key(6))

    def gradient(h: mx.array) -> mx.array:
        return mx.grad(lambda h: mx.sin(stack(h)).sum())(h)

    product = mx.grad(lambda h: (along * gradient(h)).sum())(h)
    step = 1e-2
    want = (gradient(h + step * along) - gradient(h - step * along)) / (2 * step)
    assert float(mx.abs(product - want).max()) < 2e-3 * float(mx.abs(want).max())
