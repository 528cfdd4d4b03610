// Sums over a threadgroup.

#pragma once

#include "position.h"
#include "dialect/simd.h"
#include "dialect/words.h"

// Sums COUNT numbers of each thread, in an order that depends only on the number of threads. All
// threads must come here. Thread k (or k + threads, ...) puts sum k into shared[k] and may read it
// at once; other threads need a BARRIER first. Another BARRIER must come before `shared` is used
// again. `shared` needs COUNT * MOST_SIMDGROUPS floats.
template <int COUNT, typename V, typename S>
FUNCTION void group_sums(V values, S shared, Position here) {
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD;
    UNROLL for (int k = 0; k < COUNT; k++) {
        const float sum = simd_sum(values[k]);
        if (lane == 0) shared[simdgroup * COUNT + k] = sum;
    }
    BARRIER;
    for (int k = here.id; k < COUNT; k += here.threads) {
        for (int s = 1; s < int(here.threads) / SIMD; s++) shared[k] += shared[s * COUNT + k];
    }
}
