// The words that every kernel is written in, for mx.fast.metal_kernel; cuda/dialect has files with the
// same names and words.
//
// MLX passes an input of fewer than 8 elements in constant memory and the others in device memory.
// So no body spells the space of an input or casts its pointer: it takes `const auto p = x + ...`
// and calls load, of which there is one for each space.

#pragma once

#include <metal_stdlib>
using namespace metal;

#define FUNCTION inline
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define UNROLL _Pragma("clang loop unroll(full)")

// Where a thread is. Threadgroups are lines of whole simdgroups, and none is cut off at the end.
struct Position {
    uint group_x, group_y;    // the threadgroup's position
    uint groups_x, groups_y;  // how many there are
    uint id, threads;         // within the threadgroup
};

enum { SIMD = 32, MOST_SIMDGROUPS = 32 };
