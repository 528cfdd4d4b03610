// H_res of one token, in a kernel that may have none.

#pragma once

#include "floats.h"
#include "position.h"
#include "sinkhorn/clamped.h"
#include "sinkhorn/lanes.h"
#include "sinkhorn/lines.h"
#include "sinkhorn/sinkhorn.h"
#include "dialect/simd.h"
#include "dialect/words.h"

// Computes H_res in a simdgroup from the logits, which the lanes from 2 n on have in `mapped`;
// nothing without H_res, whose array is then none of a kernel's. All matrices of the simdgroup are
// the same one. If CLAMPED, the logits are kept between low and high.
template <bool MIXES, int N, int ITERATIONS, bool LOG, bool FIRST_COLUMNS, bool TRANSPOSED,
          bool EXP_START, bool CLAMPED>
struct MixedToken {
    template <typename P>
    static FUNCTION void mix(float mapped, float eps, float low, float high, P h_res,
                             Position here) {
        const int lane = here.id % SIMD;
        Floats<N> logits = zeros<N>();
        UNROLL for (int a = 0; a < N; a++) {
            const int b = line<N>(here) < N ? line<N>(here) : 0;
            const float one = simd_from(mapped, 2 * N + entry<N, FIRST_COLUMNS, TRANSPOSED>(a, b));
            if (inside<N>(here)) logits.at[a] = one;
        }
        if (CLAMPED) logits = clamped(logits, low, high);
        const Floats<N> mixed = sinkhorn_matrix<N, LOG, EXP_START>(logits, here, ITERATIONS, eps);
        store_line<N, FIRST_COLUMNS, false>(h_res, mixed, lane < Lanes<N>::COUNT, here);
    }
};
template <int N, int ITERATIONS, bool LOG, bool FIRST_COLUMNS, bool TRANSPOSED, bool EXP_START,
          bool CLAMPED>
struct MixedToken<false, N, ITERATIONS, LOG, FIRST_COLUMNS, TRANSPOSED, EXP_START, CLAMPED> {
    template <typename P>
    static FUNCTION void mix(float, float, float, float, P, Position) {}
};
