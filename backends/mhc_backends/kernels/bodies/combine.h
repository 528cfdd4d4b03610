// combine: x'_i = sum_j H_res[i, j] x_j + h_post_i y (eq. 3).
//
// x[T, n, C], y[T, C], h_post[T or 1, n], h_res[T or 1, n, n] -> out[T, n, C]. A threadgroup takes
// one token, or some of its channels.

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
template <int N, int W, typename X, typename Y, typename HPost, typename HRes, typename Out>
FUNCTION bool combine_aligned(X x, Y y, HPost h_post, HRes h_res, Out out) {
    return vectors<W>(x) && vectors<W>(y) && vectors<W>(out) && vectors<N>(h_post) &&
           vectors<N * N>(h_res);
}

template <typename ACCESS, int N, int W, typename X, typename Y, typename HPost, typename HRes,
          typename Out>
FUNCTION void combine(X x, int64_t x_shape_0, int x_shape_2, Y y, HPost h_post, int h_post_shape_0,
                      HRes h_res, int h_res_shape_0, Out out, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const auto streams = ACCESS::at(x) + token * N * C;
        const auto post = hold<N, N <= 4>(ACCESS::at(h_post) + row(h_post_shape_0, token) * N);
        const auto res = hold<N * N, N <= 4>(ACCESS::at(h_res) + row(h_res_shape_0, token) * N * N);

        for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
            Floats<W> xs[N];
            UNROLL for (int j = 0; j < N; j++)
                xs[j] = load<W>(streams + j * C + c);
            const Floats<W> layer = load<W>(ACCESS::at(y) + token * C + c);

            UNROLL_SMALL for (int i = 0; i < N; i++) {
                Floats<W> sum = times(value(post, i), layer);
                UNROLL for (int j = 0; j < N; j++)
                    sum = add(sum, value(res, i * N + j), xs[j]);
                store(ACCESS::at(out) + (token * N + i) * C + c, sum);
            }
        }
    }
}
