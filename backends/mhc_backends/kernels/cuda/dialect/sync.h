// The lanes of a simdgroup, together.

#pragma once

// SIMD_BARRIER is a BARRIER of the lanes of a simdgroup. common/fragments.h says what TOGETHER is
// for.
#define TOGETHER __syncwarp()

#define SIMD_BARRIER __syncwarp()
