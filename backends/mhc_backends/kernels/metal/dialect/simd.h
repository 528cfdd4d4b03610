// Numbers of the other lanes of a simdgroup.

#pragma once

#include "words.h"

// The number of the lane whose place differs in the bits of `step`.
FUNCTION float simd_partner(float v, int step) { return simd_shuffle_xor(v, ushort(step)); }

// The number of a lane, which need not be the same for all.
FUNCTION float simd_from(float v, int lane) { return simd_shuffle(v, ushort(lane)); }
