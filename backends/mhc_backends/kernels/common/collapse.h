// h = sum_i w_i x_i at some channels.

#pragma once

#include "floats.h"
#include "streams.h"
#include "dialect/words.h"

// sum_i weights_i x_i
template <int N, int W, typename H>
FUNCTION Floats<W> collapse(H weights, Streams<N, W> x) {
    Floats<W> sum = zeros<W>();
    UNROLL for (int i = 0; i < N; i++)
        sum = add(sum, weights[i], x.at[i]);
    return sum;
}
