// The lanes of a simdgroup, together.

#pragma once

// SIMD_BARRIER is a BARRIER of the lanes of a simdgroup. common/fragments.h says what TOGETHER is
// for.
#define TOGETHER simdgroup_barrier(mem_flags::mem_none)

#define SIMD_BARRIER simdgroup_barrier(mem_flags::mem_threadgroup)
