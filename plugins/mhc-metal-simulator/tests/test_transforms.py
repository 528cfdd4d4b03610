"""Under MLX's transformations a simulated kernel behaves as a real one."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mhc_metal_simulator as simulator


def doubling(name: str = "doubling") -> Callable[[Any], Any]:
    kernel = simulator.metal_kernel(
        name, ["a"], ["o"], "uint i = thread_position_in_grid.x; o[i] = 2 * a[i];"
    )

    def call(x: Any) -> Any:
        return kernel(
            inputs=[x],
            grid=(x.size, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
        )[0]

    return call


def with_vjp(kernel: Callable[[Any], Any]) -> Any:
    """Join a kernel and its vjp, itself a kernel, as a backend does."""
    joined: Any = mx.custom_function(kernel)

    def vjp(primals: Any, cotangent: Any, output: Any) -> Any:
        return kernel(cotangent)

    joined.vjp(vjp)
    return joined


X = mx.arange(12.0).reshape(3, 4)


def test_gradient_of_a_bare_kernel_raises() -> None:
    f = doubling()
    with pytest.raises(ValueError, match=r"\[Primitive::vjp\] Not implemented for CustomKernel"):
        mx.grad(lambda x: f(x * 3).sum())(X)
    with pytest.raises(ValueError, match=r"\[Primitive::jvp\] Not implemented for CustomKernel"):
        mx.jvp(f, [X], [X])


def test_gradient_past_a_bare_kernel_is_right() -> None:
    f = doubling()
    got = mx.grad(lambda y: (f(X) * y).sum())(X)
    np.testing.assert_array_equal(np.array(got), 2 * np.array(X))


@pytest.mark.parametrize("wrap", [lambda f: f, mx.checkpoint])
def test_gradient_through_a_custom_function(wrap: Any) -> None:
    f = wrap(with_vjp(doubling()))
    value, grad = mx.value_and_grad(lambda x: (f(x * 3) * X).sum())(X)
    np.testing.assert_array_equal(np.array(grad), 6 * np.array(X))
    assert value.item() == 6 * (np.array(X) ** 2).sum()


def test_first_call_inside_a_gradient() -> None:
    # The source is captured while MLX traces the gradient.
    f = with_vjp(doubling("met_in_grad"))
    got = mx.grad(lambda x: f(f(x)).sum())(X)
    np.testing.assert_array_equal(np.array(got), np.full(X.shape, 4))


@pytest.mark.parametrize("kernel", [doubling(), with_vjp(doubling())])
def test_vmap_raises_as_metal_does(kernel: Any) -> None:
    with pytest.raises(ValueError, match="Not implemented for CustomKernel"):
        mx.vmap(kernel)(X)


@pytest.mark.skipif(not shutil.which("g++"), reason="MLX's mx.compile does nothing without g++")
@pytest.mark.parametrize("kernel", [doubling(), with_vjp(doubling())])
def test_compile_is_refused(kernel: Any) -> None:
    with pytest.raises(simulator.TracedCallError, match=r"outside of mx\.compile"):
        mx.compile(kernel)(X)
    np.testing.assert_array_equal(np.array(kernel(X)), 2 * np.array(X))


def test_compiled_functions_run_where_compilation_is_off() -> None:
    mx.disable_compile()
    try:
        np.testing.assert_array_equal(np.array(mx.compile(doubling())(X)), 2 * np.array(X))
    finally:
        mx.enable_compile()


def test_many_threads_at_once() -> None:
    shared = doubling()
    failures: list[str] = []

    def work(seed: int) -> None:
        own = doubling(f"own_{seed % 3}")
        for k in range(5):
            x = np.arange(100.0) + seed * 1000 + k
            for f in (own, shared):
                if not np.array_equal(np.array(f(mx.array(x, mx.float32))), 2 * x):
                    failures.append(f"{seed} {k}")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_recorders_see_other_threads() -> None:
    f = doubling()
    with simulator.record() as launches:
        worker = threading.Thread(target=f, args=(X,))
        worker.start()
        worker.join()
    assert len(launches) == 1


def test_mlx_own_kernel_may_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.fast, "metal_kernel", simulator.metal_kernel)
    kernel = mx.fast.metal_kernel(name="put", input_names=["a"], output_names=["o", "q"],
                                  source="o[0] = a; q[0] = -a;")  # fmt: skip
    made = kernel(inputs=[2], template=[("T", mx.float16)], grid=(1, 1, 1), threadgroup=(1, 1, 1),
                  output_shapes=[(1,), (1,)], output_dtypes=[mx.float32, mx.int32])  # fmt: skip
    assert [x.item() for x in made] == [2, -2]


def test_mlx_checks_its_own_arguments() -> None:
    with pytest.raises(ValueError, match="output"):
        simulator.metal_kernel("none", ["a"], [], "")
    both = simulator.metal_kernel("both", ["a", "b"], ["o"], "o[0] = a[0] + b[0];")
    with pytest.raises(ValueError, match="input"):
        both(inputs=[X], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)],
             output_dtypes=[mx.float32])  # fmt: skip
