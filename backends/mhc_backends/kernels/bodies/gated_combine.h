// gated_combine: out_i = h_post_i (y_i + sum_j H_res[i, j] h_pre_j x_j).
//
// x, y[T, n, C], h_pre, h_post[T or 1, n], h_res[T or 1, n, n] -> out[T, n, C]. A threadgroup takes
// one token, or some of its channels.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/held.h"
#include "../common/load.h"
#include "../common/position.h"
#include "../common/raw.h"
#include "../common/store.h"
#include "../common/streams.h"
#include "dialect/unroll.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, typename X, typename Y, typename HPre, typename HPost, typename HRes,
          typename Out>
FUNCTION bool gated_combine_aligned(X x, Y y, HPre h_pre, HPost h_post, HRes h_res, Out out) {
    return vectors<W>(x) && vectors<W>(y) && vectors<W>(out) && vectors<N>(h_pre) &&
           vectors<N>(h_post) && vectors<N * N>(h_res);
}

template <typename ACCESS, int N, int W, typename X, typename Y, typename HPre, typename HPost,
          typename HRes, typename Out>
FUNCTION void gated_combine(X x, int64_t x_shape_0, int x_shape_2, Y y, HPre h_pre,
                            int h_pre_shape_0, HPost h_post, int h_post_shape_0, HRes h_res,
                            int h_res_shape_0, Out out, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;
    const int YS = N <= 4 ? N : 1;  // streams of y that are loaded together with those of x

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const int64_t at = token * N * C;
        const auto pre = hold<N, N <= 4>(ACCESS::at(h_pre) + row(h_pre_shape_0, token) * N);
        const auto post = hold<N, N <= 4>(ACCESS::at(h_post) + row(h_post_shape_0, token) * N);
        const auto res = hold<N * N, N <= 4>(ACCESS::at(h_res) + row(h_res_shape_0, token) * N * N);

        for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
            const auto raw_x = load_raw_streams<N, W>(ACCESS::at(x) + at, C, c);
            const auto raw_y = load_raw_streams<YS, W>(ACCESS::at(y) + at, C, c);
            Floats<W> gated[N];  // h_pre_j x_j
            UNROLL for (int j = 0; j < N; j++)
                gated[j] = times(value(pre, j), floats(raw_x.at[j]));

            UNROLL_SMALL for (int i = 0; i < N; i++) {
                Floats<W> sum = YS == N ? floats(raw_y.at[YS == N ? i : 0])
                                        : load<W>(ACCESS::at(y) + at + int64_t(i) * C + c);
                UNROLL for (int j = 0; j < N; j++)
                    sum = add(sum, value(res, i * N + j), gated[j]);
                store(ACCESS::at(out) + at + int64_t(i) * C + c, times(value(post, i), sum));
            }
        }
    }
}
