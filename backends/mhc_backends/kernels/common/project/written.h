// The streams that combine makes without H_res, x'_i = x_i + h_post_i y.

#pragma once

#include "../floats.h"
#include "../operands.h"
#include "../raw.h"
#include "../store_raw.h"
#include "layout.h"
#include "mix.h"
#include "starts.h"
#include "dialect/lanes.h"
#include "dialect/words.h"

// Adds the layer's output, weighted by entry `stream` of h_post, to a K block of that stream.
// Numbers are rounded to the type of `out`.
template <int STEPS, int TOKEN_TILES, typename R, typename O, typename P>
FUNCTION AOperand<R, STEPS, TOKEN_TILES> written(AOperand<R, STEPS, TOKEN_TILES> rows,
                                                 AOperand<R, STEPS, TOKEN_TILES> layers, O out,
                                                 Starts<TOKEN_TILES, P> h_post, int stream) {
    UNROLL for (int k = 0; k < 2 * TOKEN_TILES; k++) {
        const float post = float(h_post.at[k / 2][k % 2][stream]);
        UNROLL for (int b = 0; b < STEPS; b++) {
            const Floats<8> sum = add(floats(rows.at[b][k / 2].in_half[k % 2]), post,
                                      floats(layers.at[b][k / 2].in_half[k % 2]));
            rows.at[b][k / 2].in_half[k % 2] = packed(out, sum);
        }
    }
    return rows;
}

// Stores a K block of the first `tokens` tokens, `at` numbers after its rows' starts; the row has
// `rest` more channels.
template <int STEPS, int TOKEN_TILES, typename R, typename P>
FUNCTION void store_k_block(Starts<TOKEN_TILES, P> to, int64_t at,
                            AOperand<R, STEPS, TOKEN_TILES> rows, int64_t tokens, int rest,
                            int lane) {
    UNROLL for (int k = 0; k < 2 * TOKEN_TILES; k++) {
        UNROLL for (int b = 0; b < STEPS; b++) {
            if (8 * k + tile_row(lane) < tokens)
                store_raw_within(to.at[k / 2][k % 2] + at + b * STEP_CHANNELS,
                                 rows.at[b][k / 2].in_half[k % 2], rest - b * STEP_CHANNELS);
        }
    }
}
