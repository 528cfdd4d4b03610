// The vjp of combine for few streams, in one pass over the streams: dx_j = sum_i H_res[i, j] g_i;
// dy = sum_i h_post_i g_i; dh_post_i = g_i . y; dH_res[i, j] = g_i . x_j.
//
// x, g[T, n, C], y[T, C], h_post[T or 1, n], h_res[T or 1, n, n] -> dx[T, n, C], dy[T, C],
// dh_post[T, n], dh_res[T, n, n], per token even if all tokens share a mapping. A threadgroup takes
// whole tokens. A thread keeps its n + n * n sums in registers; combine_vjp_wide is for larger n.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/group_sums.h"
#include "../common/held.h"
#include "../common/load.h"
#include "../common/position.h"
#include "../common/store.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N>
struct combine_vjp_memory {
    enum { shared = (N + N * N) * MOST_SIMDGROUPS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, typename X, typename Y, typename HPost, typename HRes, typename G,
          typename Dx, typename Dy>
FUNCTION bool combine_vjp_aligned(X x, Y y, HPost h_post, HRes h_res, G g, Dx dx, Dy dy) {
    return vectors<W>(x) && vectors<W>(y) && vectors<W>(g) && vectors<W>(dx) && vectors<W>(dy) &&
           vectors<N>(h_post) && vectors<N * N>(h_res);
}

template <typename ACCESS, int N, int W, typename X, typename Y, typename HPost, typename HRes,
          typename G, typename Dx, typename Dy, typename DhPost, typename DhRes>
FUNCTION void combine_vjp(X x, int64_t x_shape_0, int x_shape_2, Y y, HPost h_post,
                          int h_post_shape_0, HRes h_res, int h_res_shape_0, G g, Dx dx, Dy dy,
                          DhPost dh_post, DhRes dh_res, threadgroup float* shared, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;
    const int SUMS = N + N * N;  // dh_post, then dH_res

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const int64_t streams = token * N * C;
        const auto post = hold<N>(ACCESS::at(h_post) + row(h_post_shape_0, token) * N);
        const auto res = hold<N * N>(ACCESS::at(h_res) + row(h_res_shape_0, token) * N * N);

        float sums[SUMS];  // of this thread's channels
        UNROLL for (int k = 0; k < SUMS; k++)
            sums[k] = 0.0f;
        for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
            Floats<W> xs[N], dxs[N];
            UNROLL for (int j = 0; j < N; j++) {
                xs[j] = load<W>(ACCESS::at(x) + streams + j * C + c);
                dxs[j] = zeros<W>();
            }
            const Floats<W> layer = load<W>(ACCESS::at(y) + token * C + c);
            Floats<W> dlayer = zeros<W>();

            UNROLL for (int i = 0; i < N; i++) {
                const Floats<W> g_i = load<W>(ACCESS::at(g) + streams + i * C + c);
                dlayer = add(dlayer, value(post, i), g_i);
                sums[i] = add_dot(sums[i], g_i, layer);
                UNROLL for (int j = 0; j < N; j++) {
                    dxs[j] = add(dxs[j], value(res, i * N + j), g_i);
                    sums[N + i * N + j] = add_dot(sums[N + i * N + j], g_i, xs[j]);
                }
            }
            UNROLL for (int j = 0; j < N; j++)
                store(ACCESS::at(dx) + streams + j * C + c, dxs[j]);
            store(ACCESS::at(dy) + token * C + c, dlayer);
        }

        group_sums<SUMS>(sums, shared, here);
        for (int k = here.id; k < SUMS; k += here.threads) {
            if (k < N) {
                dh_post[token * N + k] = shared[k];
            } else {
                dh_res[token * N * N + k - N] = shared[k];
            }
        }
        BARRIER;  // the next token uses shared again
    }
}
