// write_streams: combine without H_res, x'_i = x_i + h_post_i y.
//
// x[T, n, C], y[T, C], h_post[T or 1, n] -> out[T, n, C]. A threadgroup takes one token, or some of
// its channels.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/held.h"
#include "../common/load.h"
#include "../common/position.h"
#include "../common/store.h"
#include "dialect/unroll.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, typename X, typename Y, typename HPost, typename Out>
FUNCTION bool write_streams_aligned(X x, Y y, HPost h_post, Out out) {
    return vectors<W>(x) && vectors<W>(y) && vectors<W>(out) && vectors<N>(h_post);
}

template <typename ACCESS, int N, int W, typename X, typename Y, typename HPost, typename Out>
FUNCTION void write_streams(X x, int64_t x_shape_0, int x_shape_2, Y y, HPost h_post,
                            int h_post_shape_0, Out out, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const int64_t streams = token * N * C;
        const auto post = hold<N, N <= 4>(ACCESS::at(h_post) + row(h_post_shape_0, token) * N);

        for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
            const Floats<W> layer = load<W>(ACCESS::at(y) + token * C + c);
            UNROLL_SMALL for (int i = 0; i < N; i++) {
                const int64_t at = streams + int64_t(i) * C + c;
                store(ACCESS::at(out) + at,
                      add(load<W>(ACCESS::at(x) + at), value(post, i), layer));
            }
        }
    }
}
