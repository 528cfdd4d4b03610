// H_res of some tokens, in a kernel that may have none.

#pragma once

#include "mix_matrices.h"
#include "position.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// As mix_matrices; nothing without H_res, whose array is then none of a kernel's.
template <bool MIXES, int N, int TOKENS, int ITERATIONS, bool LOG, bool FIRST_COLUMNS,
          bool TRANSPOSED, bool EXP_START, bool CLAMPED>
struct MixedTokens {
    template <typename S, typename P>
    static FUNCTION void mix(S sums, float eps, float low, float high, int64_t first, int64_t T,
                             P h_res, Position here) {
        mix_matrices<N, TOKENS, ITERATIONS, LOG, FIRST_COLUMNS, TRANSPOSED, EXP_START, CLAMPED>(
            sums, eps, low, high, first, T, h_res, here);
    }
};
template <int N, int TOKENS, int ITERATIONS, bool LOG, bool FIRST_COLUMNS, bool TRANSPOSED,
          bool EXP_START, bool CLAMPED>
struct MixedTokens<false, N, TOKENS, ITERATIONS, LOG, FIRST_COLUMNS, TRANSPOSED, EXP_START,
                   CLAMPED> {
    template <typename S, typename P>
    static FUNCTION void mix(S, float, float, float, int64_t, int64_t, P, Position) {}
};
