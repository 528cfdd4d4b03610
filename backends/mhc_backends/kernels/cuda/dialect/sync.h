// The lanes of a simdgroup, together.

#pragma once

// SIMD_BARRIER is a BARRIER of the lanes of a simdgroup. TOGETHER must come before products of matrices,
// whose instructions are of all lanes together: the loads and stores before may have parted them.
#define TOGETHER __syncwarp()

#define SIMD_BARRIER __syncwarp()
