// phi's numbers in registers.

#pragma once

#include "../operands.h"
#include "phi.h"
#include "phi_registers.h"
#include "staged.h"
#include "dialect/words.h"

// phi's numbers of STEPS K steps: they take half the registers of the B operands made of them.
template <int COLUMN_TILES, int STEPS>
struct PhiNumbers {
    BTiles<COLUMN_TILES> at[STEPS];
};

template <int N, int RUN, int COLUMN_TILES, int STEPS, typename P>
FUNCTION PhiNumbers<COLUMN_TILES, STEPS> load_phi_numbers(P phi, int64_t K, int M, int C,
                                                          int column, int begin, int k_step,
                                                          int lane) {
    PhiNumbers<COLUMN_TILES, STEPS> out;
    UNROLL for (int b = 0; b < STEPS; b++)
        out.at[b] =
            load_step_phi<N, RUN, COLUMN_TILES>(phi, K, M, C, column, begin, k_step + b, lane);
    return out;
}

template <int COLUMN_TILES, int STEPS, typename R>
FUNCTION auto b_operands_for(R like, PhiNumbers<COLUMN_TILES, STEPS> numbers) {
    BOperands<decltype(b_operand_for(like, BTiles<COLUMN_TILES>())), STEPS> out;
    UNROLL for (int b = 0; b < STEPS; b++)
        out.at[b] = b_operand_for(like, numbers.at[b]);
    return out;
}
