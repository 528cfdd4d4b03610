// h = sum_i w_i x_i at all channels of a token.

#pragma once

#include "channels.h"
#include "floats.h"
#include "load.h"
#include "position.h"
#include "store.h"
#include "dialect/words.h"

// The weights w are in registers or in threadgroup memory.
template <int N, int W, typename X, typename V, typename H>
FUNCTION void collapse_token(X streams, V weights, H h, int C, Position here) {
    for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
        Floats<W> sum = zeros<W>();
        UNROLL for (int i = 0; i < N; i++)
            sum = add(sum, weights[i], load<W>(streams + int64_t(i) * C + c));
        store(h + c, sum);
    }
}
