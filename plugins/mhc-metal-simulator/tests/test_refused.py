"""Snippets that Apple's compiler refuses, each refused here for its own reason.

Each cites a public issue or a log with the message, or a rule of the Metal Shading Language
specification, whose sections have the numbers of version 3.1.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from mhc_metal_simulator import CompileError, front_ends

AIR = "air.simdgroup_matrix_8x8_multiply_accumulate.v64f32 in MLX's mlx.metallib"


class Refused(NamedTuple):
    """Statements in a kernel, or a whole text, and what the message must contain."""

    text: str
    says: str
    source: str
    before: str = ""  # what stands before the kernel


KERNEL = """
[[kernel]] void tested(
    const device float* a [[buffer(0)]],
    const constant float* c [[buffer(1)]],
    device float* o [[buffer(2)]],
    uint3 at [[thread_position_in_grid]]) {{
    float x = a[at.x], y = c[0];
    float4 v = float4(x, y, x, y);
    threadgroup float shared[4];
    {}
    o[at.x] = x + y + v.x + shared[0];
}}
"""


def keyword(name: str, source: str) -> Refused:
    return Refused(f"float {name} = x;", f"expected unqualified-id.*'{name}'", source)


def not_in_metal(word: str, text: str, before: str = "", source: str = "MSL 1.4.4") -> Refused:
    return Refused(text, f"'{word}' is not supported in Metal", source, before)


WITHOUT_SPACE = "{} type must have explicit address space qualifier"
POINTER, REFERENCE = WITHOUT_SPACE.format("pointer"), WITHOUT_SPACE.format("reference")
RESERVED = "typedef redefinition|conflicts with typedef|redefinition of|different kind of symbol"

REFUSED = {
    # ---- keywords as names -----------------------------------------------------------------------
    "half as a variable": Refused("float half = x;", "half|cannot combine", "gfx-rs/wgpu #5072"),
    "half as a member": Refused(
        "", "half|cannot combine", "gfx-rs/wgpu #4545", "struct S { float half; };"
    ),
    "half as a parameter": Refused(
        "", "half|cannot combine", "gfx-rs/naga #2559", "float f(float half) { return 1; }"
    ),
    "bfloat as a variable": Refused("float bfloat = x;", "bfloat|cannot combine", "MSL 2.1"),
    "thread as a variable": keyword("thread", "KhronosGroup/SPIRV-Cross #2073"),
    "device as a variable": keyword("device", "MSL 4"),
    "constant as a variable": keyword("constant", "MSL 4"),
    "threadgroup as a variable": keyword("threadgroup", "MSL 4"),
    "threadgroup_imageblock as a variable": keyword("threadgroup_imageblock", "MSL 4"),
    "kernel as a variable": keyword("kernel", "MSL 5.1"),
    "vertex as a variable": keyword("vertex", "MSL 5.1"),
    "fragment as a variable": keyword("fragment", "MSL 5.1"),
    "new as a variable": not_in_metal("new", "float new = x;", source="gfx-rs/naga #264"),
    # ---- names that metal_types keeps ------------------------------------------------------------
    "complex as a struct": Refused(
        "", RESERVED, "gfx-rs/naga #702", "struct complex { float r; };"
    ),
    "imaginary as a struct": Refused(
        "", RESERVED, "gfx-rs/naga #702, naga's keywords.rs", "struct imaginary { float r; };"
    ),
    "quad as a function": Refused(
        "",
        RESERVED,
        "naga's keywords.rs: reserved in metal_types",
        "float quad(float r) { return r; }",
    ),
    "llong as a function": Refused(
        "",
        RESERVED,
        "naga's keywords.rs: reserved in metal_types",
        "float llong(float r) { return r; }",
    ),
    # ---- what C++ has and Metal has not ----------------------------------------------------------
    "new": not_in_metal("new", "thread float* p = new float;"),
    "delete": not_in_metal("delete", "delete &x;"),
    "goto": not_in_metal("goto", "again: x += 1; if (x < 9) goto again;"),
    "register": not_in_metal("register", "register float z = x;"),
    "thread_local": not_in_metal("thread_local", "thread_local float z;"),
    "virtual": not_in_metal("virtual", "", "struct S { virtual float f() { return 1; } };"),
    "dynamic_cast": not_in_metal("dynamic_cast", "dynamic_cast<thread float*>(&x);"),
    "typeid": not_in_metal("typeid", "typeid(x);"),
    "throw": not_in_metal("throw", "throw 1;"),
    "try": not_in_metal("try", "try { x = 1; } catch (...) {}"),
    "a function main": Refused("", "called main", "MSL 1.4.4", "float main() { return 1; }"),
    "the C++ library": Refused("x = std::max(x, y);", "undeclared identifier 'std'", "MSL 1.4.4"),
    "a header of it": Refused("", "'vector' file not found", "MSL 1.4.4", "#include <vector>"),
    "double": not_in_metal("double", "double z = x;", source="apache/tvm #7118"),
    "long double": not_in_metal(
        "long double", "long double z = x;", source="MSL 2.1, cited in JuliaGPU/Metal.jl #84"
    ),
    "long long": not_in_metal(
        "long long", "long long z = 1;", source="MSL 2.1, cited in JuliaGPU/Metal.jl #84"
    ),
    "unsigned long long": not_in_metal(
        "long long", "unsigned long long z = 1;", source="MSL 2.1, cited in JuliaGPU/Metal.jl #84"
    ),
    # ---- address spaces --------------------------------------------------------------------------
    "a variable at program scope": Refused(
        "",
        "program scope variable must reside in constant",
        "AdaptiveCpp #864",
        "constexpr int k = 2;",
    ),
    "one in a namespace": Refused(
        "",
        "program scope variable must reside in constant",
        "AliceO2Group/AliceO2 #15802",
        "namespace n {\nconstexpr int k = 2;\n}",
    ),
    "a constant without a value": Refused(
        "", "default initialization", "ml-explore/mlx #14", "constant int k;"
    ),
    "a pointer parameter without a space": Refused(
        "", POINTER, "ggml-org/llama.cpp #3898", "void f(float * p) {}"
    ),
    "a cast to a pointer without a space": Refused(
        "x = ((uint *) &x)[0];", POINTER, "hashcat/hashcat #4237"
    ),
    "a cast to void without a space": Refused("(void*)shared;", POINTER, "tile-ai/tilelang #2766"),
    "a pointer of a struct without a space": Refused(
        "", POINTER, "hashcat/hashcat #3540", "struct S { int k; };\nvoid f(S* p) {}"
    ),
    "a reference without a space": Refused("", REFERENCE, "MSL 4", "void f(float& p) {}"),
    "device to thread": Refused("const thread float* p = a;", "device", "MSL 4"),
    "thread to device": Refused("const device float* p = &x;", "device", "MSL 4"),
    "constant to device": Refused("const device float* p = c;", "constant", "MSL 4"),
    "threadgroup to device": Refused("device float* p = shared;", "threadgroup", "MSL 4"),
    "a cast of constant to device": Refused(
        "x = ((const device float*)c)[0];", "mismatching address spaces", "MSL 4"
    ),
    "a constant argument for a device parameter": Refused(
        "x = f(c);",
        "no matching function",
        "MSL 4",
        "float f(const device float* p) { return *p; }",
    ),
    "a store to constant": Refused("c[0] = x;", "read-only", "MSL 4.3; mathiasbourgoin/Sarek #316"),
    "threadgroup memory with a value": Refused(
        "threadgroup float z = 1;", "automatic variable|address space", "MSL 4.4"
    ),
    "threadgroup memory outside of a kernel": Refused(
        "", "declared in a kernel", "MSL 4.4", "void f() { threadgroup float z[4]; z[0] = 1; }"
    ),
    # ---- vectors ---------------------------------------------------------------------------------
    "the address of a component": Refused(
        "thread float* p = &v.w;", "address of vector element", "gpuweb/gpuweb #1931"
    ),
    "the address of an element": Refused(
        "thread float* p = &v[3];", "address of vector element", "gpuweb/gpuweb #1931"
    ),
    "a reference to a component": Refused(
        "x = modf(x, v.x);",
        "no matching function|bind to vector element",
        "KhronosGroup/SPIRV-Cross #1096",
    ),
    "a component of a scalar": Refused(
        "float2 z = x.xy;", "not a structure or union", "gfx-rs/naga #760"
    ),
    "a component twice": Refused("v.xx = float2(x, y);", "duplicate components", "MSL 2.2"),
    "a component beyond": Refused("float2 z; x = z.z;", "exceeds type", "MSL 2.2"),
    "components of both kinds": Refused("float2 z = v.xg;", "illegal vector component", "MSL 2.2"),
    "too few scalars": Refused("float4 z = float4(1, 2, 3);", "one value for each", "MSL 2.2.1"),
    "a vector of another type": Refused("float4 z = int4(1);", "vector of 4 'int'", "MSL 2.2"),
    "a vector of another length": Refused(
        "float2 z = v;", "cannot initialize|cannot convert", "MSL 2.2"
    ),
    "a vector as a pointer": Refused(
        "x = *(device float*)uint2(1, 2);", "uint2|vector", "shader-slang/slang #11313"
    ),
    "as_type of another size": Refused("x = as_type<float>(ushort(1));", "one size", "MSL 2.20"),
    # ---- calls -----------------------------------------------------------------------------------
    "min of int and long": Refused(
        "x = metal::min(1, -2147483648);", "call to 'min' is ambiguous", "gfx-rs/wgpu #3212"
    ),
    "max of uchar and int": Refused(
        "uchar z = 1; x = max(z, int(x));", "call to 'max' is ambiguous", "tinygrad/tinygrad #7036"
    ),
    "min of half and float": Refused(
        "x = min(half(x), y);", "call to 'min' is ambiguous", "halide/Halide #8245"
    ),
    "float becomes bfloat": Refused(
        "bfloat z = x;", r"write bfloat\(x\)", "ml-explore/mlx-lm #814"
    ),
    "bfloat becomes half": Refused(
        "half z = bfloat(x);", "cannot initialize|bfloat", "MLX's bf16_math.h, which cites MSL 3.1"
    ),
    "an unknown name": Refused("x = ramp_mix;", "'ramp_mix'", "ggml-org/llama.cpp #3898"),
    # ---- matrices --------------------------------------------------------------------------------
    "a lane's share of a matrix is no pair": Refused(
        "simdgroup_float8x8 m; m.thread_elements() = float2(x, y);", "vector of|incompatible", AIR
    ),
    "a matrix of 4 by 4": Refused("simdgroup_matrix<float, 4, 4> m;", "8 by 8", "MSL 2.4"),
}


def text(case: Refused) -> str:
    kernel = KERNEL.format(case.text)
    return f"#include <metal_stdlib>\nusing namespace metal;\n{case.before}\n{kernel}"


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    with pytest.raises(CompileError) as caught:
        front_ends.metal(text(REFUSED[what]), "tested")
    first = next(line for line in str(caught.value).splitlines() if "error: " in line)
    assert re.search(REFUSED[what].says, first), first
    assert "tested.metal:" in str(caught.value), caught.value


def test_there_are_enough_and_each_cites() -> None:
    assert len(REFUSED) >= 40
    for what, case in REFUSED.items():
        assert re.search(r"#\d+|MSL \d|keywords\.rs|air\.", case.source), what


def test_the_same_kernel_without_them() -> None:
    front_ends.metal(text(Refused("", "", "")), "tested")


def test_the_rules_leave_sound_texts_alone() -> None:
    sound = """
        struct S { int k; int at() const thread { return k; } };
        template <typename T> T first(const device T* p) { return p[0]; }
        constant int k = 2;
        float twice(thread const float& z) { return sizeof(float) * 0 + 2 * z; }
        [[kernel]] void other(device S* s [[buffer(0)]], device float* o [[buffer(1)]]) {
            threadgroup float one[2], two;
            threadgroup float* p = one;
            thread S mine;
            mine.k = s[0].k;
            float own[2] = {1, 2};
            thread float* q = own;
            p[0] = two = twice(q[1]) * mine.at() + first(o) + k;
            o[0] = p[0];
        }
    """
    front_ends.metal(sound, "sound")
