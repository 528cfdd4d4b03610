// The lanes of a simdgroup, together.

#pragma once

// SIMD_BARRIER is a BARRIER for the lanes of one simdgroup. TOGETHER makes them converge:
// common/fragments.h.
#define TOGETHER __syncwarp()

#define SIMD_BARRIER __syncwarp()
