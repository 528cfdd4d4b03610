// pre: the last stage, from the sums over n C in partials[T, P, m + 1] (project.h) to the mappings,
// as in mappings.h, and to h = sum_i h_pre_i x_i; if GIVEN, h = sum_i given_i x_i.
//
// x[T, n, C], given[T or 1, n], scale[3], bias[m] -> h[T, C], h_pre[T, n], h_post[T, n],
// h_res[T, n, n] and, for the vjp if SAVES, u[T, m] and r[T, 1]. A threadgroup takes TOKENS tokens,
// or some of their channels: then each threadgroup of a token adds up its partials, and the first
// one stores the mappings. The next access to the streams is loaded ahead.

#pragma once

#include "../common/activate.h"
#include "../common/channels.h"
#include "../common/collapse.h"
#include "../common/mix_matrices.h"
#include "../common/partials.h"
#include "../common/position.h"
#include "../common/raw.h"
#include "../common/store.h"
#include "../common/streams.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N, int TOKENS>
struct pre_memory {
    enum { sums = TOKENS * (N * N + 2 * N + 1) };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, typename X, typename H, typename HRes>
FUNCTION bool pre_aligned(X x, H h, HRes h_res) {
    return vectors<W>(x) && vectors<W>(h) && vectors<N>(h_res);
}

template <typename ACCESS, int N, int W, int TOKENS, bool GIVEN, bool SAVES, int ITERATIONS,
          bool LOG, bool FIRST_COLUMNS, bool TRANSPOSED, bool EXP_START, bool CLAMPED, typename X,
          typename Partials, typename Scale, typename Bias, typename Given, typename H,
          typename HPre, typename HPost, typename HRes, typename U, typename R>
FUNCTION void pre(X x, int x_shape_2, Partials partials, int64_t partials_shape_0,
                  int partials_shape_1, Scale scale, Bias bias, Given given, int given_shape_0, H h,
                  HPre h_pre, HPost h_post, HRes h_res, U u, R r, float norm_eps, float pre_eps,
                  float post_scale, float post_eps, float sinkhorn_eps, float clamp_low,
                  float clamp_high, threadgroup float* sums, Position here) {
    const int64_t T = partials_shape_0;
    const int C = x_shape_2, M = N * N + 2 * N;

    const int own = first_channel<W>(here), step = next_channel<W>(here);
    // in reverse order: the last tokens may still be in the cache
    const int64_t iterations = (T + TOKENS - 1) / TOKENS;
    for (int64_t k = here.group_x; k < iterations; k += here.groups_x) {
        const int64_t first = (iterations - 1 - k) * TOKENS;
        const int64_t end = first + TOKENS < T ? first + TOKENS : T;
        auto coming = load_raw_streams<N, W>(ACCESS::at(x) + first * N * C, C,
                                             own);  // in flight while the partials are summed
        sum_partials<TOKENS, M + 1>(partials, partials_shape_1, first, T, sums, here);
        BARRIER;
        activate<N, true, TOKENS, SAVES>(sums, scale, bias, norm_eps, pre_eps, post_scale, post_eps,
                                         float(N) * C, first, T, here.group_y == 0, u, r, h_pre,
                                         h_post, here);
        BARRIER;
        if (here.group_y == 0)
            mix_matrices<N, TOKENS, ITERATIONS, LOG, FIRST_COLUMNS, TRANSPOSED, EXP_START, CLAMPED>(
                sums, sinkhorn_eps, clamp_low, clamp_high, first, T, ACCESS::at(h_res), here);
        for (int64_t token = first; token < end; token++) {
            float weights[N];
            UNROLL for (int i = 0; i < N; i++)
                weights[i] = GIVEN ? float(given[row(given_shape_0, token) * N + i])
                                   : sums[(token - first) * (M + 1) + i];
            for (int c = own; c < C; c += step) {
                const auto streams = coming;
                const bool last = c + step >= C;
                const int64_t next = last ? token + 1 : token;
                if (next < end)
                    coming = load_raw_streams<N, W>(ACCESS::at(x) + next * N * C, C,
                                                    last ? own : c + step);
                store(ACCESS::at(h) + token * C + c, collapse(weights, floats(streams)));
            }
        }
        BARRIER;  // the next tokens use sums again
    }
}
