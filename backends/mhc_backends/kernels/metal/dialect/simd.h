// Numbers of the other lanes of a simdgroup.

#pragma once

#include "words.h"

// The number of the lane whose own number differs in the bits of `step`.
FUNCTION float simd_partner(float v, int step) { return simd_shuffle_xor(v, ushort(step)); }

// The number of lane `lane`; lanes may ask for different lanes.
FUNCTION float simd_from(float v, int lane) { return simd_shuffle(v, ushort(lane)); }

// Metal itself has simd_sum(v), the sum over all lanes, and simd_any(q), whether q is true in any.

// The sum over the four lanes that hold a row of a matrix fragment.
FUNCTION float row_sum(float v) {
    v += simd_partner(v, 1);
    return v + simd_partner(v, 8);
}
