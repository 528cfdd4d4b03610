// H_res of some tokens.

#pragma once

#include "floats.h"
#include "position.h"
#include "sinkhorn/clamped.h"
#include "sinkhorn/lanes.h"
#include "sinkhorn/lines.h"
#include "sinkhorn/sinkhorn.h"
#include "dialect/words.h"

// Computes H_res of TOKENS tokens from the logits in `sums`; a simdgroup takes as many matrices as
// its lanes hold. If CLAMPED, the logits are kept between low and high.
template <int N, int TOKENS, int ITERATIONS, bool LOG, bool FIRST_COLUMNS, bool TRANSPOSED,
          bool EXP_START, bool CLAMPED, typename S, typename P>
FUNCTION void mix_matrices(S sums, float eps, float low, float high, int64_t first, int64_t T,
                           P h_res, Position here) {
    enum { NUMBERS = N * N + 2 * N + 1, AT_ONCE = SIMD / Lanes<N>::COUNT };
    const int lane = here.id % SIMD, b = line<N>(here);
    const int tokens = T - first < TOKENS ? int(T - first) : TOKENS;
    const int step = here.threads / SIMD * AT_ONCE;
    for (int begin = here.id / SIMD * AT_ONCE; begin < tokens; begin += step) {
        const int k = begin + lane / Lanes<N>::COUNT;
        const bool there = k < tokens && inside<N>(here);
        Floats<N> logits = zeros<N>();
        UNROLL for (int a = 0; a < N; a++) {
            const int at = 2 * N + entry<N, FIRST_COLUMNS, TRANSPOSED>(a, b);
            if (there) logits.at[a] = sums[k * NUMBERS + at];
        }
        if (CLAMPED) logits = clamped(logits, low, high);
        const Floats<N> mixed = sinkhorn_matrix<N, LOG, EXP_START>(logits, here, ITERATIONS, eps);
        store_line<N, FIRST_COLUMNS, false>(h_res + (first + k) * N * N, mixed, there, here);
    }
}
