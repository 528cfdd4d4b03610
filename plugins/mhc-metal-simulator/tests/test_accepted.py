"""The simulator accepts what Apple's compiler does: MLX's headers, its documentation's examples.

They are read from the installed MLX when the tests run. A header's templates are instantiated for
the dtypes that MLX uses, so that their bodies are checked with types.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import mlx.core as mx
import pytest

from mhc_metal_simulator import front_ends, metal_kernel
from mhc_metal_simulator.headers import KERNELS, flattened


class Accepted(NamedTuple):
    """Headers of MLX, after its utilities, and kernels to make of them for each type ``T``."""

    headers: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


def steel(name: str, *more: str) -> str:
    return f"{name}<{', '.join(('T', *more))}>"


ACCEPTED = {
    "the utilities": Accepted(),
    # rms_norm.metal itself is not installed; it needs the utilities and Apple's own headers alone
    "softmax": Accepted(
        ("softmax.h",),
        ("softmax_single_row<T>", "softmax_looped<T>", "softmax_looped<T, float, 2>"),
    ),
    "logsumexp": Accepted(("logsumexp.h",), ("logsumexp<T>", "logsumexp_looped<T>")),
    "sort": Accepted(
        ("sort.h",),
        ("block_sort<T, T, false, 128, 8>", "block_sort<T, uint, true, 128, 8>",
         "mb_block_sort<T, uint, true, 128, 8>"),
    ),
    "steel GEMM": Accepted(
        ("steel/gemm/gemm.h", "steel/gemm/kernels/steel_gemm_fused.h"),
        ("gemm<T, 64, 64, 16, 2, 2, false, false, float>",
         "gemm<T, 32, 64, 16, 1, 2, false, true, float>"),
    ),
    "steel attention": Accepted(
        ("steel/attn/attn.h", "steel/attn/kernels/steel_attention.h"),
    ),
}  # fmt: skip
TYPES = ("float", "half", "bfloat")


@pytest.mark.parametrize("what", ACCEPTED)
def test_mlx_headers(what: str) -> None:
    case = ACCEPTED[what]
    text = "#include <metal_stdlib>\n" + flattened(
        f"{KERNELS}/utils.h", *(f"{KERNELS}/{name}" for name in case.headers)
    )
    for kernel in case.kernels:
        for name in TYPES:
            made = re.sub(r"\bT\b", name, kernel)
            text += f"\ntemplate decltype({made}) {made};"
    front_ends.metal(text, "mlx")


def test_what_an_accepted_header_must_not_have_is_seen() -> None:
    text = "#include <metal_stdlib>\n" + flattened(f"{KERNELS}/utils.h", f"{KERNELS}/softmax.h")
    broken = text.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", "barrier();", 1)
    assert broken != text
    with pytest.raises(Exception, match="'barrier'"):
        front_ends.metal(broken, "mlx")


def examples() -> list[str]:
    """Return the sources of kernels in the documentation that comes with MLX."""
    text = str(mx.fast.metal_kernel.__doc__)
    return re.findall(r"'''(.*?)'''", text, re.DOTALL)


def test_the_documentation_has_an_example() -> None:
    assert len(examples()) >= 1
    assert "thread_position_in_grid" in examples()[0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_the_examples_of_its_documentation(dtype: mx.Dtype) -> None:
    a = mx.random.normal(shape=(4, 16)).astype(dtype)
    for source in examples():
        kernel = metal_kernel("myexp", ["inp"], ["out"], source)
        (out,) = kernel(
            inputs=[a],
            template=[("T", dtype)],
            grid=(a.size, 1, 1),
            threadgroup=(256, 1, 1),
            output_shapes=[a.shape],
            output_dtypes=[a.dtype],
        )
        assert mx.allclose(out, mx.exp(a), rtol=1e-3).item()
