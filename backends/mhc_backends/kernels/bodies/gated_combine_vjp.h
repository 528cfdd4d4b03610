// The vjp of gated_combine for few streams, in one pass over the streams. Every sum over C is one
// of G[i, j] = g_i . x_j and Y_i = g_i . y_i: dx_j = h_pre_j sum_i H_res[i, j] h_post_i g_i; dy_i =
// h_post_i g_i; dh_pre_j = sum_i H_res[i, j] h_post_i G[i, j]; dh_post_i = Y_i + sum_j H_res[i, j]
// h_pre_j G[i, j]; dH_res[i, j] = h_post_i h_pre_j G[i, j].
//
// x, y, g[T, n, C], h_pre, h_post[T or 1, n], h_res[T or 1, n, n] -> dx, dy[T, n, C], dh_pre,
// dh_post[T, n], dh_res[T, n, n], per token even if all tokens share a mapping. A threadgroup takes
// whole tokens.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/group_sums.h"
#include "../common/held.h"
#include "../common/position.h"
#include "../common/raw.h"
#include "../common/store.h"
#include "../common/streams.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N>
struct gated_combine_vjp_memory {
    enum { shared = (N + N * N) * MOST_SIMDGROUPS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, typename X, typename Y, typename HPre, typename HPost, typename HRes,
          typename G, typename Dx, typename Dy>
FUNCTION bool gated_combine_vjp_aligned(X x, Y y, HPre h_pre, HPost h_post, HRes h_res, G g, Dx dx,
                                        Dy dy) {
    return vectors<W>(x) && vectors<W>(y) && vectors<W>(g) && vectors<W>(dx) && vectors<W>(dy) &&
           vectors<N>(h_pre) && vectors<N>(h_post) && vectors<N * N>(h_res);
}

template <typename ACCESS, int N, int W, typename X, typename Y, typename HPre, typename HPost,
          typename HRes, typename G, typename Dx, typename Dy, typename DhPre, typename DhPost,
          typename DhRes>
FUNCTION void gated_combine_vjp(X x, int64_t x_shape_0, int x_shape_2, Y y, HPre h_pre,
                                int h_pre_shape_0, HPost h_post, int h_post_shape_0, HRes h_res,
                                int h_res_shape_0, G g, Dx dx, Dy dy, DhPre dh_pre, DhPost dh_post,
                                DhRes dh_res, threadgroup float* shared, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;
    const int SUMS = N + N * N;  // Y, then G

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const int64_t at = token * N * C;
        const auto pre = hold<N>(ACCESS::at(h_pre) + row(h_pre_shape_0, token) * N);
        const auto post = hold<N>(ACCESS::at(h_post) + row(h_post_shape_0, token) * N);
        const auto res = hold<N * N>(ACCESS::at(h_res) + row(h_res_shape_0, token) * N * N);

        float sums[SUMS];  // of this thread's channels
        UNROLL for (int k = 0; k < SUMS; k++)
            sums[k] = 0.0f;
        for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
            const auto raw_x = load_raw_streams<N, W>(ACCESS::at(x) + at, C, c);
            const auto raw_y = load_raw_streams<N, W>(ACCESS::at(y) + at, C, c);
            const auto raw_g = load_raw_streams<N, W>(ACCESS::at(g) + at, C, c);
            const Streams<N, W> xs = floats(raw_x);
            Streams<N, W> dgated;  // of h_pre_j x_j
            UNROLL for (int j = 0; j < N; j++)
                dgated.at[j] = zeros<W>();

            UNROLL for (int i = 0; i < N; i++) {
                const Floats<W> g_i = floats(raw_g.at[i]);
                const Floats<W> dz_i = times(value(post, i), g_i);
                store(ACCESS::at(dy) + at + int64_t(i) * C + c, dz_i);
                sums[i] = add_dot(sums[i], g_i, floats(raw_y.at[i]));
                UNROLL for (int j = 0; j < N; j++) {
                    dgated.at[j] = add(dgated.at[j], value(res, i * N + j), dz_i);
                    sums[N + i * N + j] = add_dot(sums[N + i * N + j], g_i, xs.at[j]);
                }
            }
            UNROLL for (int j = 0; j < N; j++)
                store(ACCESS::at(dx) + at + int64_t(j) * C + c, times(value(pre, j), dgated.at[j]));
        }

        group_sums<SUMS>(sums, shared, here);
        BARRIER;
        const auto p = ACCESS::at(h_pre) + row(h_pre_shape_0, token) * N;
        const auto q = ACCESS::at(h_post) + row(h_post_shape_0, token) * N;
        const auto h = ACCESS::at(h_res) + row(h_res_shape_0, token) * N * N;
        for (int j = here.id; j < N; j += here.threads) {
            float dpre = 0.0f, dpost = shared[j];
            for (int i = 0; i < N; i++) {
                dpre = fma(float(h[i * N + j]) * float(q[i]), shared[N + i * N + j], dpre);
                dpost = fma(float(h[j * N + i]) * float(p[i]), shared[N + j * N + i], dpost);
            }
            dh_pre[token * N + j] = dpre;
            dh_post[token * N + j] = dpost;
        }
        for (int k = here.id; k < N * N; k += here.threads)
            dh_res[token * N * N + k] = float(q[k / N]) * float(p[k % N]) * shared[N + k];
        BARRIER;  // the next token uses shared again
    }
}
