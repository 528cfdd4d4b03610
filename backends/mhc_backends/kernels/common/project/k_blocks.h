// Loads of the streams' K blocks.

#pragma once

#include "../load.h"
#include "../operands.h"
#include "layout.h"
#include "raw_within.h"
#include "starts.h"
#include "dialect/words.h"

// Loads this lane's numbers of STEPS K steps, `at` numbers after its rows' starts; the row has
// `rest` more channels.
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

// Loads K block number `k_block` of a split: STEPS K steps of one stream. From this lane's first
// channel in the split, the row has `rest` more channels.
template <int N, int STEPS, int TOKEN_TILES, typename P>
FUNCTION auto load_k_block(Starts<TOKEN_TILES, P> starts, int C, int k_block, int rest) {
    const int c = k_block / N * (STEPS * STEP_CHANNELS);
    return load_steps<STEPS>(starts, k_block % N * int64_t(C) + c, rest - c);
}
