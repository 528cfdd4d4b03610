// The lanes of a simdgroup, together.

#pragma once

// SIMD_BARRIER is a BARRIER of the lanes of a simdgroup. TOGETHER must come before products of matrices,
// whose instructions are of all lanes together: the loads and stores before may have parted them.
#define TOGETHER simdgroup_barrier(mem_flags::mem_none)

#define SIMD_BARRIER simdgroup_barrier(mem_flags::mem_threadgroup)
