// B operands of phi in threadgroup memory.

#pragma once

#include "../operands.h"
#include "../position.h"
#include "phi.h"
#include "staged.h"
#include "dialect/words.h"

// Puts the B operands of `count` K steps, from `k_step` on, into threadgroup memory. It waits until
// all threads have read the operands before them. A simdgroup loads FEW K steps at once. All
// threads must come here.
template <int N, int RUN, int COLUMN_TILES, int FEW, typename R, typename S, typename P>
FUNCTION void stage_phi(S shared, R like, P phi, int64_t K, int M, int C, int column, int begin,
                        int k_step, int count, Position here) {
    const int lane = here.id % SIMD, simdgroups = here.threads / SIMD;
    BARRIER;
    for (int k = here.id / SIMD; k < count; k += FEW * simdgroups) {
        BTiles<COLUMN_TILES> numbers[FEW];
        UNROLL for (int e = 0; e < FEW; e++)
            if (k + e * simdgroups < count)
                numbers[e] = load_step_phi<N, RUN, COLUMN_TILES>(phi, K, M, C, column, begin,
                                                                 k_step + k + e * simdgroups, lane);
        UNROLL for (int e = 0; e < FEW; e++) {
            const auto operand = b_operand_for(like, numbers[e]);
            const int at =
                (k + e * simdgroups) * decltype(b_operand_for(like, numbers[0]))::FRAGMENTS;
            if (k + e * simdgroups < count) put(shared + at * SIMD, operand, lane);
        }
    }
    BARRIER;
}
