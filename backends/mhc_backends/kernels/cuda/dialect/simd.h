// Numbers of the other lanes of a simdgroup.

#pragma once

#include "words.h"

// Every thread of the warp must come here; all get the same sum, added in the same order.
FUNCTION float simd_sum(float v) {
    UNROLL for (int step = 16; step > 0; step /= 2)
        v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

// The number of the lane whose own number differs in the bits of `step`.
FUNCTION float simd_partner(float v, int step) { return __shfl_xor_sync(0xffffffffu, v, step); }

// The number of lane `lane`; lanes may ask for different lanes.
FUNCTION float simd_from(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }

// simd_any(q): whether q is true in any lane.
FUNCTION bool simd_any(bool q) { return __any_sync(0xffffffffu, q); }

// The sum over the four lanes that hold a row of a matrix fragment.
FUNCTION float row_sum(float v) {
    v += simd_partner(v, 1);
    return v + simd_partner(v, 2);
}
