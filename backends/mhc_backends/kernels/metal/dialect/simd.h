// Numbers of the other lanes of a simdgroup.

#pragma once

#include "words.h"

// The number of the lane whose own number differs in the bits of `step`.
FUNCTION float simd_partner(float v, int step) { return simd_shuffle_xor(v, ushort(step)); }

// The number of a lane, which need not be the same for all.
FUNCTION float simd_from(float v, int lane) { return simd_shuffle(v, ushort(lane)); }

// simd_sum(v) is the sum over all lanes, and simd_any(q) whether any lane says so.

// The sum over the four lanes that hold a row of a matrix fragment.
FUNCTION float row_sum(float v) {
    v += simd_partner(v, 1);
    return v + simd_partner(v, 8);
}
