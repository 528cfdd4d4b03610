// residual_add_aggregate: total = x + res; h = sum_i h_pre_i total_i, from the unrounded totals.
//
// x, res[T, n, C], h_pre[T or 1, n] -> total[T, n, C], h[T, C]. A threadgroup takes one token, or
// some of its channels.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/held.h"
#include "../common/position.h"
#include "../common/raw.h"
#include "../common/store.h"
#include "../common/streams.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, typename X, typename Res, typename HPre, typename Total, typename H>
FUNCTION bool residual_add_aggregate_aligned(X x, Res res, HPre h_pre, Total total, H h) {
    return vectors<W>(x) && vectors<W>(res) && vectors<W>(total) && vectors<W>(h) &&
           vectors<N>(h_pre);
}

template <typename ACCESS, int N, int W, typename X, typename Res, typename HPre, typename Total,
          typename H>
FUNCTION void residual_add_aggregate(X x, int64_t x_shape_0, int x_shape_2, Res res, HPre h_pre,
                                     int h_pre_shape_0, Total total, H h, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const int64_t at = token * N * C;
        const auto weights = hold<N>(ACCESS::at(h_pre) + row(h_pre_shape_0, token) * N);

        for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
            const auto raw_x = load_raw_streams<N, W>(ACCESS::at(x) + at, C, c);
            const auto raw_res = load_raw_streams<N, W>(ACCESS::at(res) + at, C, c);
            const Streams<N, W> xs = floats(raw_x), more = floats(raw_res);
            Floats<W> sum = zeros<W>();
            UNROLL for (int i = 0; i < N; i++) {
                const Floats<W> total_i = add(xs.at[i], 1.0f, more.at[i]);
                store(ACCESS::at(total) + at + int64_t(i) * C + c, total_i);
                sum = add(sum, value(weights, i), total_i);
            }
            store(ACCESS::at(h) + token * C + c, sum);
        }
    }
}
