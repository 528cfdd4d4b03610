// Loads of the streams' K blocks.

#pragma once

#include "../load.h"
#include "../operands.h"
#include "layout.h"
#include "raw_within.h"
#include "starts.h"
#include "dialect/words.h"

// This lane's numbers of STEPS K steps that begin `at` farther on; `rest` channels are in a row.
template <int STEPS, int TOKEN_TILES, typename P>
FUNCTION auto load_steps(Starts<TOKEN_TILES, P> starts, int64_t at, int rest) {
    AOperand<decltype(load_raw<8>(starts.at[0][0])), STEPS, TOKEN_TILES> out;
    UNROLL for (int k = 0; k < 2 * TOKEN_TILES; k++) {
        const P from = starts.at[k / 2][k % 2] + at;
        UNROLL for (int b = 0; b < STEPS; b++)
            out.at[b][k / 2].in_half[k % 2] =
                load_raw_within<8>(from + b * STEP_CHANNELS, rest - b * STEP_CHANNELS);
    }
    return out;
}

// Those of K block number `k_block` of a split, whose STEPS are of one stream; from the split's
// first channel of this lane, `rest` are in a row.
template <int N, int STEPS, int TOKEN_TILES, typename P>
FUNCTION auto load_k_block(Starts<TOKEN_TILES, P> starts, int C, int k_block, int rest) {
    const int c = k_block / N * (STEPS * STEP_CHANNELS);
    return load_steps<STEPS>(starts, k_block % N * int64_t(C) + c, rest - c);
}
