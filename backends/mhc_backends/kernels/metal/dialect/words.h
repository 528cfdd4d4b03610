// The words that every kernel is written in, for mx.fast.metal_kernel; cuda/dialect has files with
// the same names and words.
//
// MLX passes an input of fewer than 8 elements in constant memory and the others in device memory.
// So no body spells the space of an input or casts its pointer: it takes `const auto p = x + ...`
// and calls load, of which there is one for each space.

#pragma once

#include <metal_stdlib>
using namespace metal;

#define FUNCTION inline
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define DEVICE device
#define UNROLL _Pragma("clang loop unroll(full)")
