// pre_norm: `pre`, with the RMS norm of h: y = h r weight, r = 1 / sqrt(mean(h^2) + h_norm_eps). The
// norm reads h as rounded to its type.
//
// x[T, n, C], given[T or 1, n], scale[3], bias[m], h_norm_weight[C] -> y[T, C], h_pre[T, n],
// h_post[T, n], h_res[T, n, n]; if RAW, h[T, C]; and, for the vjp if SAVES, u[T, m] and r[T, 1].
// Unless it MIXES, there is no h_res, m is 2 n and scale has 2 entries. A threadgroup takes TOKENS
// whole tokens. Between the two uses of h, a thread keeps its first HELD
// accesses in registers; if there is a REST, it reads the streams again.

#pragma once

#include "../common/activate.h"
#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/kept_h.h"
#include "../common/mixed_tokens.h"
#include "../common/norm.h"
#include "../common/optional.h"
#include "../common/partials.h"
#include "../common/position.h"
#include "../common/streams.h"
#include "../common/sums_for_all.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N, bool MIXES, int TOKENS>
struct pre_norm_memory {
    enum { sums = TOKENS * (MIXES * N * N + 2 * N + 1), shared = 2 * MOST_SIMDGROUPS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, bool MIXES, bool RAW, typename X, typename Weight, typename Y, typename H,
          typename HRes>
FUNCTION bool pre_norm_aligned(X x, Weight h_norm_weight, Y y, H h, HRes h_res) {
    return vectors<W>(x) && vectors<W>(h_norm_weight) && vectors<W>(y) &&
           Optional<RAW, W>::by_vectors(h) && Optional<MIXES, N>::by_vectors(h_res);
}

template <typename ACCESS, int N, int W, bool MIXES, int TOKENS, int HELD, bool REST, bool GIVEN,
          bool RAW, bool SAVES, int ITERATIONS, bool LOG, bool FIRST_COLUMNS, bool TRANSPOSED,
          bool EXP_START, bool CLAMPED, typename X, typename Partials, typename Scale,
          typename Bias, typename Given, typename Weight, typename Y, typename HPre, typename HPost,
          typename HRes, typename H, typename U, typename R>
FUNCTION void pre_norm(X x, int x_shape_2, Partials partials, int64_t partials_shape_0,
                       int partials_shape_1, Scale scale, Bias bias, Given given, int given_shape_0,
                       Weight h_norm_weight, Y y, HPre h_pre, HPost h_post, HRes h_res, H h, U u,
                       R r, float norm_eps, float pre_eps, float post_scale, float post_eps,
                       float sinkhorn_eps, float clamp_low, float clamp_high, float h_norm_eps,
                       threadgroup float* sums, threadgroup float* shared, Position here) {
    const int64_t T = partials_shape_0;
    const int C = x_shape_2, M = MIXES ? N * N + 2 * N : 2 * N;

    const int own = first_channel<W>(here), step = next_channel<W>(here);
    const int rest = REST ? own + HELD * step : C;
    int buffer = 0;  // tokens take turns with the halves of `shared`
    // in reverse order: the last tokens may still be in the cache
    const int64_t iterations = (T + TOKENS - 1) / TOKENS;
    for (int64_t k = here.group_x; k < iterations; k += here.groups_x) {
        const int64_t first = (iterations - 1 - k) * TOKENS;
        const int64_t end = first + TOKENS < T ? first + TOKENS : T;
        auto coming = load_raw_streams<N, W>(ACCESS::at(x) + first * N * C, C,
                                             own);  // in flight while the partials are summed
        sum_partials<TOKENS, M + 1>(partials, partials_shape_1, first, T, sums, here);
        BARRIER;
        activate<N, MIXES, TOKENS, SAVES>(sums, scale, bias, norm_eps, pre_eps, post_scale,
                                          post_eps, float(N) * C, first, T, true, u, r, h_pre,
                                          h_post, here);
        BARRIER;
        MixedTokens<MIXES, N, TOKENS, ITERATIONS, LOG, FIRST_COLUMNS, TRANSPOSED, EXP_START,
                    CLAMPED>::mix(sums, sinkhorn_eps, clamp_low, clamp_high, first, T,
                                  ACCESS::at(h_res), here);
        for (int64_t token = first; token < end; token++) {
            float weights[N];
            UNROLL for (int i = 0; i < N; i++)
                weights[i] = GIVEN ? float(given[row(given_shape_0, token) * N + i])
                                   : sums[(token - first) * (M + 1) + i];
            const auto from = ACCESS::at(x) + token * N * C;
            const auto to = ACCESS::at(y) + token * C;

            const auto kept = keep_h<HELD, N, W>(from, coming, weights, C, own, step, rest);
            if (token + 1 < end)
                coming = load_raw_streams<N, W>(ACCESS::at(x) + (token + 1) * N * C, C, own);
            const Floats<1> squares =
                sums_for_all(kept.squares, shared + buffer * MOST_SIMDGROUPS, here);
            buffer = 1 - buffer;
            const float inverse = inverse_rms(squares.at[0], float(C), h_norm_eps);

            store_normed<RAW, N>(kept, inverse, from, weights, ACCESS::at(h_norm_weight), to,
                                 ACCESS::at(h) + token * C, C, own, step, rest);
        }
        BARRIER;  // the next tokens use sums again
    }
}
