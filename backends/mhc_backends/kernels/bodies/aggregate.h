// aggregate: h = sum_i h_pre_i x_i.
//
// x[T, n, C], h_pre[T or 1, n] -> h[T, C]. A threadgroup takes one token, or some of its channels.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/held.h"
#include "../common/load.h"
#include "../common/position.h"
#include "../common/store.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, typename X, typename HPre, typename H>
FUNCTION bool aggregate_aligned(X x, HPre h_pre, H h) {
    return vectors<W>(x) && vectors<W>(h) && vectors<N>(h_pre);
}

template <typename ACCESS, int N, int W, typename X, typename HPre, typename H>
FUNCTION void aggregate(X x, int64_t x_shape_0, int x_shape_2, HPre h_pre, int h_pre_shape_0, H h,
                        Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const auto streams = ACCESS::at(x) + token * N * C;
        const auto weights = hold<N>(ACCESS::at(h_pre) + row(h_pre_shape_0, token) * N);

        for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
            Floats<W> sum = zeros<W>();
            UNROLL for (int i = 0; i < N; i++)
                sum = add(sum, value(weights, i), load<W>(streams + i * C + c));
            store(ACCESS::at(h) + token * C + c, sum);
        }
    }
}
