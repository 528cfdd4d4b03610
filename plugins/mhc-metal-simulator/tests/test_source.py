"""The text of MLX reaches clang line for line."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import pytest

import mhc_metal_simulator as simulator
from mhc_metal_simulator.capture import capture_source
from mhc_metal_simulator.errors import CompileError
from mhc_metal_simulator.source import prepare

FRAME = """\
[[kernel]] void custom_kernel_k(
  const device float* a [[buffer(0)]],
  const constant int& a_ndim [[buffer(1)]],
  device atomic<float>* o [[buffer(2)]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {{

{}
}}
"""


def body(text: str) -> str:
    """Prepare a kernel with this body and return its body as clang sees it."""
    original = FRAME.format(text)
    prepared = prepare(original, "k")
    lines = prepared.text.splitlines()
    first = lines.index('#line 1 "k.metal"') + 1
    assert len(lines[first:]) >= len(original.splitlines())
    assert lines[first] == original.splitlines()[0]
    return "\n".join(lines[first + 6 : first + 6 + len(text.splitlines())])


@pytest.mark.parametrize(
    "text",
    [
        "threadgroup float* p = x;",
        "const threadgroup float* p;",
        "threadgroup float& p = x[0];",
        "f((threadgroup float*)p, threadgroup_position_in_grid);",
        "// threadgroup float x[4];",
        "float4 v = w; float4 u{1, 2, 3, 4}; x.float4(1);",
        "auto p = (device float4*)q; sizeof(float4);",
        'x = "float4(1)";',
        "float x = 0x1.8p3f + 0xbf + 1e-3f + 2.5f;",
    ],
)
def test_left_alone(text: str) -> None:
    assert body(text).replace("x.mhc::make<float4>", "x.float4") == text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("threadgroup float x[4];", "x"),
        ("  threadgroup vec<T, 4> tile[A < B ? A : B][2 * N + 1], other, third[3];",
         "tile other third"),
        ("threadgroup alignas(16) half x[M(1, 2)];", "x"),
        ("threadgroup metal::vec<float, 2>\n  x[2];", "x"),
        ("{ threadgroup uint n; }", "n"),
    ],
)  # fmt: skip
def test_threadgroup_variables(text: str, names: str) -> None:
    made = body(text)
    assert "typedef" in made
    for name in names.split():
        assert f"mhc_type_{name}& {name} = mhc::shared<mhc_type_{name}, mhc_tag_{name}>();" in made
    assert made.count("struct mhc_tag_") == len(names.split())


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("x = float4(1, 2);", "x = mhc::make<float4>(1, 2);"),
        ("x = metal::half2(1);", "x = mhc::make<metal::half2>(1);"),
        ("x = vec<T, 4>(y);", "x = mhc::make<vec<T, 4>>(y);"),
        ("x = (float4)y * z;", "x = mhc::to<float4>()->*y * z;"),
        ("return (vec<T, 2>)(y);", "return mhc::to<vec<T, 2>>()->*(y);"),
        ("x = static_cast<int4>(y);", "x = mhc::make<int4>(y);"),
        ("using V = vec<T, 4>; x = V(1);", "using V = vec<T, 4>; x = mhc::make<V>(1);"),
        ("typedef float4 V; x = (V)y;", "typedef float4 V; x = mhc::to<V>()->*y;"),
        ("x = 0.5h + 2h + 1e-2bf;", "x = half(0.5f) + half(2.f) + bfloat(1e-2f);"),
    ],
)
def test_vectors_and_literals(text: str, made: str) -> None:
    assert body(text) == made


def test_parameters() -> None:
    prepared = prepare(FRAME.format("o[0];"), "k")
    assert [(p.name, p.type) for p in prepared.buffers] == [
        ("a", "const device float*"),
        ("a_ndim", "const constant int&"),
        ("o", "device atomic<float>*"),
    ]
    assert "*(const constant int*)(ulong)buffers[1]" in prepared.text


@pytest.mark.parametrize(
    "header",
    [
        "constant float x = 1;\n",
        "constexpr constant float x[2] = {1, 2};\nconstant int n = 3;\n",
        "template <typename T> T f(T x) { T y = x; return y; }\n",
        "struct S { float x; float get() const { float y = x; return y; } };\n",
        "using T = float;\ntypedef int I;\nenum E { A = 1 };\n#define N = 3;\n",
    ],
)
def test_sound_program_scope(header: str) -> None:
    prepare(header + FRAME.format("o[0];"), "k")


@pytest.mark.parametrize("header", ["float x = 1;\n", "constexpr int n[2] = {1, 2};\n"])
def test_variables_at_program_scope(header: str) -> None:
    with pytest.raises(CompileError, match=r"k\.metal:2: error: program scope variable"):
        prepare("\n" + header + FRAME.format("o[0];"), "k")


# ---- capturing ----------------------------------------------------------------------------------


def captured(name: str) -> str:
    kernel = mx.fast.metal_kernel(name=name, input_names=["a"], output_names=["o"],
                                  source="o[0] = a[0];")  # fmt: skip

    def call(a: mx.array) -> mx.array:
        return kernel(inputs=[a], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)],
                      output_dtypes=[mx.float32], verbose=True)[0]  # fmt: skip

    return capture_source(call, [((8,), mx.float32)])


def test_capture_gives_the_text_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    text = captured("quiet")
    assert text.startswith("[[kernel]] void custom_kernel_quiet")
    assert "const device float* a [[buffer(0)]]" in text
    assert "o[0] = a[0];" in text
    assert capfd.readouterr().out == ""


def test_what_others_print_meanwhile_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    kernel = mx.fast.metal_kernel(name="loud", input_names=["a"], output_names=["o"],
                                  source="o[0] = a[0];")  # fmt: skip

    def call(a: mx.array) -> mx.array:
        os.write(1, b"something else\n")
        return kernel(inputs=[a], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)],
                      output_dtypes=[mx.float32], verbose=True)[0]  # fmt: skip

    assert "custom_kernel_loud" in capture_source(call, [((8,), mx.float32)])
    assert capfd.readouterr().out == "something else\n"


def test_verbose_prints_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = simulator.metal_kernel("shown", [], ["o"], "o[0] = 1;")
    kernel(inputs=[], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)],
           output_dtypes=[mx.float32], verbose=True)  # fmt: skip
    assert "Generated source code for `shown`" in capsys.readouterr().out


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = """
import sys, mhc_metal_simulator
print([name for name in ("mlx.core", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
