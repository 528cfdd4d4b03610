"""A second front end: the texts are C++ for OpenCL, whose keywords and address spaces are clang's.

That they are C++14 and nothing later, test_vocabulary.py asks together with the names that they
declare.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from mhc_backends.kernels import KERNELS
from text_sample import chosen

from mhc_metal_simulator import CompileError, front_ends
from mhc_metal_simulator.headers import utilities
from mhc_metal_simulator.texts import complete


@pytest.fixture(autouse=True)
def opencl() -> None:
    if reason := front_ends.missing_opencl():
        pytest.skip(reason)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_text_is_cpp_for_opencl(kernel: str) -> None:
    front_ends.opencl(chosen(kernel).text, kernel)


SLIPS = {
    "half as a name": ("const Place here", "float half = 1;\nconst Place here", "cannot combine"),
    "kernel as a name": ("const Place here", "float kernel = 1;\nconst Place here", "expected"),
    "constant as a name": ("const Place here", "float constant = 1;\nconst Place here", "expected"),
    "a cast to another space": (
        "const Place here",
        "(void)(device int*)logits_shape;\nconst Place here",
        "address space",
    ),
    "memory of a threadgroup in a function": (
        "struct Place {",
        "inline void f() { threadgroup float x[4]; }\nstruct Place {",
        "non-kernel function",
    ),
    "quad as a function": ("struct Place {", "inline int quad(int);\nstruct Place {", "quad"),
}


@pytest.mark.parametrize("what", SLIPS)
def test_a_slip_is_refused(what: str) -> None:
    right, wrong, says = SLIPS[what]
    text = chosen("sinkhorn", "float32").text
    assert right in text
    text = text.replace(right, wrong, 1)
    if "logits_shape [[" not in text:
        shape = "const constant int* logits_shape [[buffer(9)]],\nuint thread_index"
        text = text.replace("uint thread_index", shape, 1)
    with pytest.raises(CompileError) as caught:
        front_ends.opencl(text, "slip")
    first = next(line for line in str(caught.value).splitlines() if "error: " in line)
    assert re.search(says, first), first


# ---- whole files ---------------------------------------------------------------------------------


def test_a_whole_file_passes_with_mlx_utilities_before_it() -> None:
    text = chosen("combine_project_few", "bfloat16")
    whole = complete(text)
    assert whole.startswith(utilities())
    assert whole.endswith(f"{text.text}\n")
    front_ends.metal(whole, text.kernel)


def test_a_name_of_mlx_utilities_would_be_found() -> None:
    text = chosen("sum_rows")
    assert "struct Limits" in utilities()
    slip = complete(text).replace("struct Place {", "struct Limits { int k; };\nstruct Place {", 1)
    with pytest.raises(CompileError, match="Limits"):
        front_ends.metal(slip, text.kernel)
