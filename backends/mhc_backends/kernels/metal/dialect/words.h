// The words that all kernels use, for mx.fast.metal_kernel; cuda/dialect has files with
// the same names and words.
//
// MLX passes inputs of fewer than 8 elements in constant memory and the others in device memory. So
// no body names the address space of an input or casts its pointer: it writes
// `const auto p = x + ...` and calls load, which has an overload for each address space.

#pragma once

#include <metal_stdlib>
using namespace metal;

#define FUNCTION inline
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define DEVICE device
#define UNROLL _Pragma("clang loop unroll(full)")
