// weights_norm_vjp: the cotangents of h = sum_i w_i x_i and of the weights w, through the RMS norm y
// = h r weight. With pulled = mean(h r weight g): dh = r (weight g - h r pulled), plus g_raw if RAW;
// dw_i = sum_C x_i dh; dweight = sum_T g h r. h is computed again, from the streams that dw needs.
//
// x[T, n, C], w[T or 1, n], h_norm_weight[C], g, g_raw[T, C] -> dh[T, C], dw[T, n] and
// dh_norm_weight[shares, C]: a threadgroup takes a share of the tokens and writes one row of sums.
// dw_i is r sum_C x_i weight g - r r pulled sum_C x_i h, so that the streams are read once; a thread
// keeps h and g of its first HELD accesses in registers, and if there is a REST, reads it again.

#pragma once

#include "../common/channels.h"
#include "../common/collapse.h"
#include "../common/floats.h"
#include "../common/group_sums.h"
#include "../common/load.h"
#include "../common/norm.h"
#include "../common/position.h"
#include "../common/raw.h"
#include "../common/rms_norm_vjp.h"
#include "../common/rounded.h"
#include "../common/store.h"
#include "../common/streams.h"
#include "../common/sums_for_all.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N, bool RAW>
struct weights_norm_vjp_memory {
    enum {
        SUMS = (RAW ? 3 : 2) * N,
        shared = SUMS * MOST_SIMDGROUPS,
        norms = 2 * 2 * MOST_SIMDGROUPS,
    };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int W, bool RAW, typename X, typename Weight, typename G, typename GRaw, typename Dh,
          typename Dweight>
FUNCTION bool weights_norm_vjp_aligned(X x, Weight h_norm_weight, G g, GRaw g_raw, Dh dh,
                                       Dweight dh_norm_weight) {
    return vectors<W>(x) && vectors<W>(h_norm_weight) && vectors<W>(g) &&
           (!RAW || vectors<W>(g_raw)) && vectors<W>(dh) && vectors<W>(dh_norm_weight);
}

// Adds a thread's channels to h . h and h . (weight g).
template <int W>
FUNCTION Floats<2> add_norm_sums(Floats<2> sums, Floats<W> h, Floats<W> weighted) {
    sums.at[0] = add_squares(sums.at[0], h);
    sums.at[1] = add_dot(sums.at[1], h, weighted);
    return sums;
}

// Adds a thread's channels to the sums over C: x_i . (weight g), x_i . h in squares_unit(), and, if
// RAW, x_i . g_raw.
template <int N, int W, bool RAW, typename S>
FUNCTION void add_weights_sums(S sums, Streams<N, W> x, Floats<W> h, Floats<W> weighted,
                               Floats<W> raw) {
    enum { LAST = weights_norm_vjp_memory<N, RAW>::SUMS - N };
    const Floats<W> scaled = times(1.0f / 256.0f, h);
    UNROLL for (int i = 0; i < N; i++) {
        sums[i] = add_dot(sums[i], x.at[i], weighted);
        sums[N + i] = add_dot(sums[N + i], times(1.0f / 256.0f, x.at[i]), scaled);
        if (RAW) sums[LAST + i] = add_dot(sums[LAST + i], x.at[i], raw);
    }
}

template <typename ACCESS, int N, int W, int HELD, bool REST, bool RAW, typename X,
          typename Weights, typename Weight, typename G, typename GRaw, typename Dh, typename Dw,
          typename Dweight>
FUNCTION void weights_norm_vjp(X x, int64_t x_shape_0, int x_shape_2, Weights w, int w_shape_0,
                               Weight h_norm_weight, G g, GRaw g_raw, Dh dh, Dw dw,
                               Dweight dh_norm_weight, float h_norm_eps, threadgroup float* shared,
                               threadgroup float* norms, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;
    enum { SUMS = weights_norm_vjp_memory<N, RAW>::SUMS };

    const int first = first_channel<W>(here), step = next_channel<W>(here);
    const int rest = REST ? first + HELD * step : C;
    const auto row_of_dweight = ACCESS::at(dh_norm_weight) + int64_t(here.group_x) * C;
    int buffer = 0;  // tokens take turns with the halves of `norms`

    Floats<W> dweights[HELD];
    UNROLL for (int k = 0; k < HELD; k++)
        dweights[k] = zeros<W>();

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const int64_t at = token * C;
        const auto streams = ACCESS::at(x) + at * N;
        float weights[N];
        UNROLL for (int i = 0; i < N; i++)
            weights[i] = float(w[row(w_shape_0, token) * N + i]);

        float sums[SUMS];  // of this thread's channels
        UNROLL for (int k = 0; k < SUMS; k++)
            sums[k] = 0.0f;
        Floats<2> norm = zeros<2>();  // h . h and (h weight) . g
        Floats<W> hs[HELD];
        decltype(load_raw_streams<1, W>(ACCESS::at(g), C, 0)) gs[HELD];
        UNROLL for (int k = 0; k < HELD; k++) {
            const int c = first + k * step;
            hs[k] = zeros<W>();
            gs[k] = load_raw_streams<1, W>(ACCESS::at(g) + at, C, c);
            if (c < C) {
                const auto xs = load_raw_streams<N, W>(streams, C, c);
                Floats<W> raw = zeros<W>();
                if (RAW) raw = load<W>(ACCESS::at(g_raw) + at + c);
                const Floats<W> weighted =
                    product(load<W>(ACCESS::at(h_norm_weight) + c), floats(gs[k]).at[0]);
                hs[k] = rounded(xs.at[0], collapse(weights, floats(xs)));
                norm = add_norm_sums(norm, hs[k], weighted);
                add_weights_sums<N, W, RAW>(sums, floats(xs), hs[k], weighted, raw);
            }
        }
        for (int c = rest; c < C; c += step) {
            const auto xs = load_raw_streams<N, W>(streams, C, c);
            Floats<W> raw = zeros<W>();
            if (RAW) raw = load<W>(ACCESS::at(g_raw) + at + c);
            const Floats<W> weighted =
                product(load<W>(ACCESS::at(h_norm_weight) + c), load<W>(ACCESS::at(g) + at + c));
            const Floats<W> again = rounded(xs.at[0], collapse(weights, floats(xs)));
            norm = add_norm_sums(norm, again, weighted);
            add_weights_sums<N, W, RAW>(sums, floats(xs), again, weighted, raw);
        }
        group_sums<SUMS>(sums, shared, here);
        norm = sums_for_all(norm, norms + buffer * 2 * MOST_SIMDGROUPS, here);  // has a barrier
        buffer = 1 - buffer;
        const float r = inverse_rms(norm.at[0], float(C), h_norm_eps);
        const float pulled = r * norm.at[1] / float(C);

        for (int i = here.id; i < N; i += here.threads) {
            const float along = r * shared[N + i] / squares_unit();
            float sum = r * shared[i] - along * (r * pulled);
            if (RAW) sum += shared[SUMS - N + i];
            dw[token * N + i] = sum;
        }
        UNROLL for (int k = 0; k < HELD; k++) {
            const int c = first + k * step;
            if (c < C) {
                const Floats<W> dy = floats(gs[k]).at[0];
                Floats<W> d =
                    rms_norm_pullback(hs[k], load<W>(ACCESS::at(h_norm_weight) + c), dy, r, pulled);
                if (RAW) d = plus(d, load<W>(ACCESS::at(g_raw) + at + c));
                store(ACCESS::at(dh) + at + c, d);
                dweights[k] = add(dweights[k], 1.0f, product(dy, times(r, hs[k])));
            }
        }
        for (int c = rest; c < C; c += step) {
            const auto xs = load_raw_streams<N, W>(streams, C, c);
            const Floats<W> again = rounded(xs.at[0], collapse(weights, floats(xs))),
                            dy = load<W>(ACCESS::at(g) + at + c);
            Floats<W> d =
                rms_norm_pullback(again, load<W>(ACCESS::at(h_norm_weight) + c), dy, r, pulled);
            if (RAW) d = plus(d, load<W>(ACCESS::at(g_raw) + at + c));
            store(ACCESS::at(dh) + at + c, d);
            // registers cannot be indexed: the sums of earlier tokens are in this thread's row
            Floats<W> sum = product(dy, times(r, again));
            if (token != here.group_x) sum = add(sum, 1.0f, load<W>(row_of_dweight + c));
            store(row_of_dweight + c, sum);
        }
        BARRIER;  // the next token uses shared again
    }

    UNROLL for (int k = 0; k < HELD; k++) {
        if (first + k * step < C) store(row_of_dweight + first + k * step, dweights[k]);
    }
}
