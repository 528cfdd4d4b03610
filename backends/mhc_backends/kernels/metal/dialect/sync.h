// The lanes of a simdgroup, together.

#pragma once

// SIMD_BARRIER is a BARRIER for the lanes of one simdgroup. TOGETHER makes them converge:
// common/fragments.h.
#define TOGETHER simdgroup_barrier(mem_flags::mem_none)

#define SIMD_BARRIER simdgroup_barrier(mem_flags::mem_threadgroup)
