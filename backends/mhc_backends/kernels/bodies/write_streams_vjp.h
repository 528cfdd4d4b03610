// The vjp of combine without H_res, in one pass over the cotangent: dy = sum_i h_post_i g_i and
// dh_post_i = g_i . y. dx = g: it is stored only if ROUNDS, where g has another type than x.
//
// y[T, C], h_post[T or 1, n], g[T, n, C] -> dx[T, n, C] if ROUNDS, dy[T, C], dh_post[T, n], per
// token even if all tokens share h_post. A threadgroup takes whole tokens.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/group_sums.h"
#include "../common/held.h"
#include "../common/load.h"
#include "../common/optional.h"
#include "../common/position.h"
#include "../common/store.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N>
struct write_streams_vjp_memory {
    enum { shared = N * MOST_SIMDGROUPS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, bool ROUNDS, typename Y, typename HPost, typename G, typename Dx,
          typename Dy>
FUNCTION bool write_streams_vjp_aligned(Y y, HPost h_post, G g, Dx dx, Dy dy) {
    return vectors<W>(y) && vectors<W>(g) && Optional<ROUNDS, W>::by_vectors(dx) &&
           vectors<W>(dy) && vectors<N>(h_post);
}

template <typename ACCESS, int N, int W, bool ROUNDS, typename Y, typename HPost, typename G,
          typename Dx, typename Dy, typename DhPost>
FUNCTION void write_streams_vjp(Y y, int64_t y_shape_0, int y_shape_1, HPost h_post,
                                int h_post_shape_0, G g, Dx dx, Dy dy, DhPost dh_post,
                                threadgroup float* shared, Position here) {
    const int64_t T = y_shape_0;
    const int C = y_shape_1;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const int64_t streams = token * N * C;
        const auto post = hold<N>(ACCESS::at(h_post) + row(h_post_shape_0, token) * N);

        float sums[N];  // of this thread's channels
        UNROLL for (int i = 0; i < N; i++)
            sums[i] = 0.0f;
        for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
            const Floats<W> layer = load<W>(ACCESS::at(y) + token * C + c);
            Floats<W> dlayer = zeros<W>();
            UNROLL for (int i = 0; i < N; i++) {
                const int64_t at = streams + int64_t(i) * C + c;
                const Floats<W> g_i = load<W>(ACCESS::at(g) + at);
                dlayer = add(dlayer, value(post, i), g_i);
                sums[i] = add_dot(sums[i], g_i, layer);
                Optional<ROUNDS, W>::put(ACCESS::at(dx) + at, g_i);
            }
            store(ACCESS::at(dy) + token * C + c, dlayer);
        }

        group_sums<N>(sums, shared, here);
        for (int i = here.id; i < N; i += here.threads) dh_post[token * N + i] = shared[i];
        BARRIER;  // the next token uses shared again
    }
}
