// B operands of phi in registers.

#pragma once

#include "../operands.h"
#include "phi.h"
#include "staged.h"
#include "dialect/words.h"

// The B operands of STEPS K steps; load_b_operands loads those from `k_step` on.
template <typename F, int STEPS>
struct BOperands {
    F at[STEPS];
};

template <typename F, int STEPS>
FUNCTION uint4 frag(BOperands<F, STEPS> operands, int k_step, int k) {
    return operands.at[k_step].frag[k];
}

template <int N, int RUN, int COLUMN_TILES, int STEPS, typename R, typename P>
FUNCTION auto load_b_operands(R like, P phi, int64_t K, int M, int C, int column, int begin,
                              int k_step, int lane) {
    BOperands<decltype(b_operand_for(like, BTiles<COLUMN_TILES>())), STEPS> out;
    UNROLL for (int b = 0; b < STEPS; b++)
        out.at[b] = b_operand_for(like, load_step_phi<N, RUN, COLUMN_TILES>(
                                            phi, K, M, C, column, begin, k_step + b, lane));
    return out;
}
