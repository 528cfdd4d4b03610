"""Recomputation saves memory and changes nothing else."""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from stacks import COUNT, DIMS, Layer, close, flat, gradients, hidden, made, orders, same

import mhc_core as mhc
from mhc_core.mlx import HyperConnectedBlock, HyperConnectedStack

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
        for k in (1, 2, 5):  # twice in one segment, and in another
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
    plain, recomputed = (found[recompute] for recompute in (False, "auto"))
    same((recomputed[0], flat(recomputed[1])), (plain[0], flat(plain[1])), 1e-5)
    unit = tokens * dims * 4
    assert peaks[False] > 6 * count * unit  # (n + 2) C for each sublayer: it really is plain
    assert peaks["auto"] < 0.45 * 6 * count * unit
    assert peaks["auto"] < 0.3 * peaks[False]  # 0.33 where gradients come when nobody needs them


@pytest.mark.parametrize(
    ("count", "n", "recompute", "segment"),
    [(48, 4, "auto", 6), (86, 4, "auto", 8), (1, 4, "auto", 1), (48, 1, "auto", 4), (6, 4, 9, 6)],
)
def test_segments_have_about_the_square_root(
    count: int, n: int, recompute: Any, segment: int
) -> None:
    blocks = [HyperConnectedBlock(nn.Identity(), 2, n) for _ in range(count)]
    stack = HyperConnectedStack(blocks, n, recompute=recompute)
    assert stack.segment == segment
    assert recompute != "auto" or abs(segment - math.sqrt(n * count / (n + 2))) <= 0.5


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
