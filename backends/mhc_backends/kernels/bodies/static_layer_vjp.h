// The vjp of static_layer for few streams, in one pass over the streams. With dy = sum_i h_post_i
// g_i and dh that of the RMS norm: dx_j = sum_i H_res[i, j] g_i + h_pre_j dh; dh_pre_j = x_j . dh;
// dh_post_i = g_i . y; dH_res[i, j] = g_i . x_j; dweight = sum_T dy h r.
//
// x, g[T, n, C], h_pre[n], h_post[n], h_res[n, n], weight[C], eps[1] -> dx[T, n, C] and
// sums[shares, 2 n + n * n + C], of dh_pre, dh_post, dH_res and dweight: a threadgroup takes a
// share of the tokens and writes one row of sums. Registers are used as in static_layer.

#pragma once

#include "../common/channels.h"
#include "../common/collapse.h"
#include "../common/floats.h"
#include "../common/group_sums.h"
#include "../common/load.h"
#include "../common/norm.h"
#include "../common/position.h"
#include "../common/raw.h"
#include "../common/static_layer_vjp.h"
#include "../common/store.h"
#include "../common/streams.h"
#include "../common/sums_for_all.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N>
struct static_layer_vjp_memory {
    enum {
        pre = N,
        post = N,
        res = N * N,
        shared = (2 * N + N * N) * MOST_SIMDGROUPS,
        norms = 2 * 2 * MOST_SIMDGROUPS,
    };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, typename X, typename Weight, typename G, typename Dx, typename SumRows>
FUNCTION bool static_layer_vjp_aligned(X x, Weight weight, G g, Dx dx, SumRows sums) {
    const int SUMS = 2 * N + N * N;
    return vectors<W>(x) && vectors<W>(weight) && vectors<W>(g) && vectors<W>(dx) &&
           SUMS % W == 0 && vectors<W>(sums + SUMS);
}

template <typename ACCESS, int N, int W, int HELD, bool REST, typename X, typename HPre,
          typename HPost, typename HRes, typename Weight, typename Eps, typename G, typename Dx,
          typename SumRows>
FUNCTION void static_layer_vjp(X x, int64_t x_shape_0, int x_shape_2, HPre h_pre, HPost h_post,
                               HRes h_res, Weight weight, Eps eps, G g, Dx dx, SumRows sums,
                               threadgroup float* pre, threadgroup float* post,
                               threadgroup float* res, threadgroup float* shared,
                               threadgroup float* norms, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;
    const int SUMS = 2 * N + N * N;  // sums over C
    for (int k = here.id; k < N; k += here.threads) {
        pre[k] = float(h_pre[k]);
        post[k] = float(h_post[k]);
    }
    for (int k = here.id; k < N * N; k += here.threads) res[k] = float(h_res[k]);
    BARRIER;

    const int first = first_channel<W>(here), step = next_channel<W>(here);
    const int rest = REST ? first + HELD * step : C;
    const auto row_of_sums = ACCESS::at(sums) + int64_t(here.group_x) * (SUMS + C);
    const auto row_of_dweight = row_of_sums + SUMS;
    int buffer = 0;  // tokens take turns with the halves of `norms`

    float own[SUMS];  // of this thread's channels, over the tokens
    UNROLL for (int k = 0; k < SUMS; k++)
        own[k] = 0.0f;
    Floats<W> dweights[HELD];
    UNROLL for (int k = 0; k < HELD; k++)
        dweights[k] = zeros<W>();

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const int64_t at = token * N * C;

        // h . h and (h weight) . dy
        decltype(load_raw_streams<N, W>(ACCESS::at(x) + at, C, 0)) xs[HELD];
        decltype(load_raw_streams<N, W>(ACCESS::at(g) + at, C, 0)) gs[HELD];
        Floats<2> norm = zeros<2>();
        UNROLL for (int k = 0; k < HELD; k++) {
            const int c = first + k * step;
            xs[k] = load_raw_streams<N, W>(ACCESS::at(x) + at, C, c);
            gs[k] = load_raw_streams<N, W>(ACCESS::at(g) + at, C, c);
        }
        UNROLL for (int k = 0; k < HELD; k++) {
            const int c = first + k * step;
            const Floats<W> h = collapse(pre, floats(xs[k])), dy = collapse(post, floats(gs[k]));
            norm.at[0] = add_squares(norm.at[0], h);
            if (c < C)
                norm.at[1] = add_dot(norm.at[1], product(h, load<W>(ACCESS::at(weight) + c)), dy);
        }
        for (int c = rest; c < C; c += step) {
            const Floats<W> h = collapse(pre, load_streams<N, W>(ACCESS::at(x) + at, C, c));
            const Floats<W> dy = collapse(post, load_streams<N, W>(ACCESS::at(g) + at, C, c));
            norm.at[0] = add_squares(norm.at[0], h);
            norm.at[1] = add_dot(norm.at[1], product(h, load<W>(ACCESS::at(weight) + c)), dy);
        }
        norm = sums_for_all(norm, norms + buffer * 2 * MOST_SIMDGROUPS, here);
        buffer = 1 - buffer;
        const float r = inverse_rms(norm.at[0], float(C), float(eps[0]));
        const float pulled = r * norm.at[1] / float(C);

        UNROLL for (int k = 0; k < HELD; k++) {
            const int c = first + k * step;
            if (c < C) {
                const Streams<N, W> x_c = floats(xs[k]), g_c = floats(gs[k]);
                const Floats<W> dweight =
                    static_pullback<N, W>(ACCESS::at(dx) + at + c, C, x_c, g_c, r, pulled,
                                          load<W>(ACCESS::at(weight) + c), own, pre, post, res);
                dweights[k] = add(dweights[k], 1.0f, dweight);
            }
        }
        for (int c = rest; c < C; c += step) {
            const Streams<N, W> x_c = load_streams<N, W>(ACCESS::at(x) + at, C, c);
            const Streams<N, W> g_c = load_streams<N, W>(ACCESS::at(g) + at, C, c);
            Floats<W> dweight =
                static_pullback<N, W>(ACCESS::at(dx) + at + c, C, x_c, g_c, r, pulled,
                                      load<W>(ACCESS::at(weight) + c), own, pre, post, res);
            // registers cannot be indexed: the sums of earlier tokens are in this thread's row
            if (token != here.group_x) dweight = add(dweight, 1.0f, load<W>(row_of_dweight + c));
            store(row_of_dweight + c, dweight);
        }
    }

    UNROLL for (int k = 0; k < HELD; k++) {
        if (first + k * step < C) store(row_of_dweight + first + k * step, dweights[k]);
    }
    group_sums<SUMS>(own, shared, here);
    for (int k = here.id; k < SUMS; k += here.threads) row_of_sums[k] = shared[k];
}
