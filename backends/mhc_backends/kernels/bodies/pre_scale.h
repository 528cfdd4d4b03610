// pre_scale: out_i = h_pre_i x_i.
//
// x[T, n, C], h_pre[T or 1, n] -> out[T, n, C]. A threadgroup takes one token, or some of its
// channels.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/held.h"
#include "../common/position.h"
#include "../common/store.h"
#include "../common/streams.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, typename X, typename HPre, typename Out>
FUNCTION bool pre_scale_aligned(X x, HPre h_pre, Out out) {
    return vectors<W>(x) && vectors<W>(out) && vectors<N>(h_pre);
}

template <typename ACCESS, int N, int W, typename X, typename HPre, typename Out>
FUNCTION void pre_scale(X x, int64_t x_shape_0, int x_shape_2, HPre h_pre, int h_pre_shape_0,
                        Out out, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const int64_t at = token * N * C;
        const auto weights = hold<N>(ACCESS::at(h_pre) + row(h_pre_shape_0, token) * N);

        for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
            const Streams<N, W> xs = load_streams<N, W>(ACCESS::at(x) + at, C, c);
            UNROLL for (int i = 0; i < N; i++)
                store(ACCESS::at(out) + at + int64_t(i) * C + c,
                      times(value(weights, i), xs.at[i]));
        }
    }
}
