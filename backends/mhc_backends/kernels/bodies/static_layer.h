// static_layer: out_i = sum_j H_res[i, j] x_j + h_post_i y, with y = h r weight, the RMS norm of h
// = sum_i h_pre_i x_i: r = 1 / sqrt(mean(h^2) + eps).
//
// x[T, n, C], h_pre[n], h_post[n], h_res[n, n], weight[C], eps[1] -> out[T, n, C]. A threadgroup
// takes whole tokens. Between the two uses of the streams, a thread keeps its first HELD accesses
// in registers; if there is a REST, it reads the others again.

#pragma once

#include "../common/channels.h"
#include "../common/collapse.h"
#include "../common/floats.h"
#include "../common/load.h"
#include "../common/norm.h"
#include "../common/position.h"
#include "../common/raw.h"
#include "../common/static_layer.h"
#include "../common/streams.h"
#include "../common/sums_for_all.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N>
struct static_layer_memory {
    enum {
        pre = N,
        post = N,
        res = N * N,
        shared = 2 * MOST_SIMDGROUPS,
    };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int W, typename X, typename Weight, typename Out>
FUNCTION bool static_layer_aligned(X x, Weight weight, Out out) {
    return vectors<W>(x) && vectors<W>(weight) && vectors<W>(out);
}

template <typename ACCESS, int N, int W, int HELD, bool REST, typename X, typename HPre,
          typename HPost, typename HRes, typename Weight, typename Eps, typename Out>
FUNCTION void static_layer(X x, int64_t x_shape_0, int x_shape_2, HPre h_pre, HPost h_post,
                           HRes h_res, Weight weight, Eps eps, Out out, threadgroup float* pre,
                           threadgroup float* post, threadgroup float* res,
                           threadgroup float* shared, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;
    for (int k = here.id; k < N; k += here.threads) {
        pre[k] = float(h_pre[k]);
        post[k] = float(h_post[k]);
    }
    for (int k = here.id; k < N * N; k += here.threads) res[k] = float(h_res[k]);
    BARRIER;

    const int first = first_channel<W>(here), step = next_channel<W>(here);
    const int rest = REST ? first + HELD * step : C;
    int buffer = 0;  // tokens take turns with the halves of `shared`

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const auto streams = ACCESS::at(x) + token * N * C;
        const auto outs = ACCESS::at(out) + token * N * C;

        // h . h
        decltype(load_raw_streams<N, W>(streams, C, 0)) kept[HELD];
        Floats<1> squares = zeros<1>();
        UNROLL for (int k = 0; k < HELD; k++)
            kept[k] = load_raw_streams<N, W>(streams, C, first + k * step);
        UNROLL for (int k = 0; k < HELD; k++) {
            const Floats<W> h = collapse(pre, floats(kept[k]));
            squares.at[0] = add_squares(squares.at[0], h);
        }
        for (int c = rest; c < C; c += step) {
            const Floats<W> h = collapse(pre, load_streams<N, W>(streams, C, c));
            squares.at[0] = add_squares(squares.at[0], h);
        }
        squares = sums_for_all(squares, shared + buffer * MOST_SIMDGROUPS, here);
        buffer = 1 - buffer;
        const float r = inverse_rms(squares.at[0], float(C), float(eps[0]));

        UNROLL for (int k = 0; k < HELD; k++) {
            const int c = first + k * step;
            if (c < C) {
                const Streams<N, W> xs = floats(kept[k]);
                mix_static<N, W>(outs + c, C, xs, r, load<W>(ACCESS::at(weight) + c), pre, post,
                                 res);
            }
        }
        for (int c = rest; c < C; c += step) {
            const Streams<N, W> xs = load_streams<N, W>(streams, C, c);
            mix_static<N, W>(outs + c, C, xs, r, load<W>(ACCESS::at(weight) + c), pre, post, res);
        }
    }
}
