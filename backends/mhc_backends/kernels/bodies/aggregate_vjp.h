// The vjp of aggregate: dx_i = h_pre_i g; dh_pre_i = sum_C x_i g.
//
// x[T, n, C], h_pre[T or 1, n], g[T, C] -> dx[T, n, C], dh_pre[T, n], per token even if all tokens
// share h_pre. A threadgroup takes whole tokens.

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
struct aggregate_vjp_memory {
    enum { shared = N * MOST_SIMDGROUPS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, typename X, typename HPre, typename G, typename Dx>
FUNCTION bool aggregate_vjp_aligned(X x, HPre h_pre, G g, Dx dx) {
    return vectors<W>(x) && vectors<W>(g) && vectors<W>(dx) && vectors<N>(h_pre);
}

template <typename ACCESS, int N, int W, typename X, typename HPre, typename G, typename Dx,
          typename DhPre>
FUNCTION void aggregate_vjp(X x, int64_t x_shape_0, int x_shape_2, HPre h_pre, int h_pre_shape_0,
                            G g, Dx dx, DhPre dh_pre, threadgroup float* shared, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const auto streams = ACCESS::at(x) + token * N * C;
        const auto dstreams = ACCESS::at(dx) + token * N * C;
        const auto weights = hold<N>(ACCESS::at(h_pre) + row(h_pre_shape_0, token) * N);

        float dweights[N];  // of this thread's channels
        UNROLL for (int i = 0; i < N; i++)
            dweights[i] = 0.0f;
        for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
            const Floats<W> dh = load<W>(ACCESS::at(g) + token * C + c);
            UNROLL for (int i = 0; i < N; i++) {
                dweights[i] = add_dot(dweights[i], load<W>(streams + i * C + c), dh);
                store(dstreams + i * C + c, times(value(weights, i), dh));
            }
        }

        group_sums<N>(dweights, shared, here);
        for (int i = here.id; i < N; i += here.threads) dh_pre[token * N + i] = shared[i];
        BARRIER;  // the next token uses shared again
    }
}
