// Copies of the streams' K blocks to pipeline buffers in threadgroup memory.

#pragma once

#include "../operands.h"
#include "../position.h"
#include "layout.h"
#include "pipeline.h"
#include "starts.h"
#include "dialect/copies.h"
#include "dialect/words.h"

// The size of a pipeline buffer. start_k_block starts the copies of a K block to it, and
// take_k_block reads the A operand from it.
template <int STEPS, int TOKEN_TILES, typename R>
struct Buffer {
    enum { FRAGMENTS = 2 * STEPS * TOKEN_TILES * RowFragments<R>::COUNT * SIMD };
};

template <int N, int STEPS, int TOKEN_TILES, typename R, typename S, typename P>
FUNCTION void start_k_block(R like, S buffer, Starts<TOKEN_TILES, P> starts, int C, int k_block,
                            int rest, int lane) {
    const int c = k_block / N * (STEPS * STEP_CHANNELS);
    const int64_t at = k_block % N * int64_t(C) + c;
    UNROLL for (int k = 0; k < 2 * TOKEN_TILES * STEPS; k++) {
        const int row = k / STEPS, more = k % STEPS * STEP_CHANNELS;
        const auto to = buffer + k * RowFragments<R>::COUNT * SIMD;
        if (rest > c + more)
            start_row(like, to, starts.at[row / 2][row % 2] + at + more, lane);
        else
            put_nothing(like, to, lane);
    }
    mark_copies();
}

template <int STEPS, int TOKEN_TILES, typename R, typename S>
FUNCTION AOperand<R, STEPS, TOKEN_TILES> take_k_block(R like, S buffer, int lane) {
    AOperand<R, STEPS, TOKEN_TILES> out;
    UNROLL for (int k = 0; k < 2 * TOKEN_TILES * STEPS; k++)
        out.at[k % STEPS][k / STEPS / 2].in_half[k / STEPS % 2] =
            take_row(like, buffer + k * RowFragments<R>::COUNT * SIMD, lane);
    return out;
}
