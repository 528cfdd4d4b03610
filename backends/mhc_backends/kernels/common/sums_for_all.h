// Sums over a threadgroup that all its threads use.

#pragma once

#include "floats.h"
#include "position.h"
#include "dialect/simd.h"
#include "dialect/words.h"

// Sums COUNT numbers of each thread for every thread, in an order that depends on nothing but the
// number of threads. All threads must come here. There is one barrier: the next call needs another
// `shared`, and the one after it may have this one again. It needs COUNT * MOST_SIMDGROUPS floats.
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
