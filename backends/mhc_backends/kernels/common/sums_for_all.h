// Sums over a threadgroup, for all of its threads.

#pragma once

#include "floats.h"
#include "position.h"
#include "dialect/simd.h"
#include "dialect/words.h"

// Returns the sums of COUNT numbers of each thread to every thread, in an order that depends only
// on the number of threads. All threads must come here. There is one barrier, so two consecutive
// calls need two different `shared`, which may alternate; each has COUNT * MOST_SIMDGROUPS floats.
template <int COUNT, typename S>
FUNCTION Floats<COUNT> sums_for_all(Floats<COUNT> values, S shared, Position here) {
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD;
    UNROLL for (int k = 0; k < COUNT; k++) {
        const float sum = simd_sum(values.at[k]);
        if (lane == 0) shared[simdgroup * COUNT + k] = sum;
    }
    BARRIER;
    Floats<COUNT> sums = zeros<COUNT>();
    for (int s = 0; s < int(here.threads) / SIMD; s++) {
        UNROLL for (int k = 0; k < COUNT; k++)
            sums.at[k] += shared[s * COUNT + k];
    }
    return sums;
}
