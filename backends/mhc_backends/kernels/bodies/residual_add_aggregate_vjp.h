// The vjp of residual_add_aggregate: dx_i = g_i + h_pre_i g_h, and dres is the same;
// dh_pre_i = (x + res)_i . g_h.
//
// x, res, g[T, n, C], g_h[T, C], h_pre[T or 1, n] -> dx[T, n, C], dh_pre[T, n], per token even if
// all tokens share h_pre. A threadgroup takes whole tokens.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/group_sums.h"
#include "../common/held.h"
#include "../common/load.h"
#include "../common/position.h"
#include "../common/raw.h"
#include "../common/store.h"
#include "../common/streams.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N>
struct residual_add_aggregate_vjp_memory {
    enum { shared = N * MOST_SIMDGROUPS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, typename X, typename Res, typename HPre, typename G, typename GH,
          typename Dx>
FUNCTION bool residual_add_aggregate_vjp_aligned(X x, Res res, HPre h_pre, G g, GH g_h, Dx dx) {
    return vectors<W>(x) && vectors<W>(res) && vectors<W>(g) && vectors<W>(g_h) && vectors<W>(dx) &&
           vectors<N>(h_pre);
}

template <typename ACCESS, int N, int W, typename X, typename Res, typename HPre, typename G,
          typename GH, typename Dx, typename DhPre>
FUNCTION void residual_add_aggregate_vjp(X x, int64_t x_shape_0, int x_shape_2, Res res, HPre h_pre,
                                         int h_pre_shape_0, G g, GH g_h, Dx dx, DhPre dh_pre,
                                         threadgroup float* shared, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const int64_t at = token * N * C;
        const auto weights = hold<N>(ACCESS::at(h_pre) + row(h_pre_shape_0, token) * N);

        float dweights[N];  // of this thread's channels
        UNROLL for (int i = 0; i < N; i++)
            dweights[i] = 0.0f;
        for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
            const auto raw_x = load_raw_streams<N, W>(ACCESS::at(x) + at, C, c);
            const auto raw_res = load_raw_streams<N, W>(ACCESS::at(res) + at, C, c);
            const auto raw_g = load_raw_streams<N, W>(ACCESS::at(g) + at, C, c);
            const Floats<W> dh = load<W>(ACCESS::at(g_h) + token * C + c);
            UNROLL for (int i = 0; i < N; i++) {
                const Floats<W> total = add(floats(raw_x.at[i]), 1.0f, floats(raw_res.at[i]));
                dweights[i] = add_dot(dweights[i], total, dh);
                store(ACCESS::at(dx) + at + int64_t(i) * C + c,
                      add(floats(raw_g.at[i]), value(weights, i), dh));
            }
        }

        group_sums<N>(dweights, shared, here);
        for (int i = here.id; i < N; i += here.threads) dh_pre[token * N + i] = shared[i];
        BARRIER;  // the next token uses shared again
    }
}
