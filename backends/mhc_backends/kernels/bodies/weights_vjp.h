// weights_vjp: the cotangents of the weights of h = sum_i w_i x_i: dw_i = sum_C x_i dh.
//
// x[T, n, C], dh[T, C] -> dw[T, n]. A threadgroup takes whole tokens.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/group_sums.h"
#include "../common/load.h"
#include "../common/position.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N>
struct weights_vjp_memory {
    enum { shared = N * MOST_SIMDGROUPS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int W, typename X, typename Dh>
FUNCTION bool weights_vjp_aligned(X x, Dh dh) {
    return vectors<W>(x) && vectors<W>(dh);
}

template <typename ACCESS, int N, int W, typename X, typename Dh, typename Dw>
FUNCTION void weights_vjp(X x, int64_t x_shape_0, int x_shape_2, Dh dh, Dw dw,
                          threadgroup float* shared, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        float sums[N];  // of this thread's channels
        UNROLL for (int i = 0; i < N; i++)
            sums[i] = 0.0f;
        for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
            const Floats<W> layer = load<W>(ACCESS::at(dh) + token * C + c);
            UNROLL for (int i = 0; i < N; i++)
                sums[i] = add_dot(sums[i], load<W>(ACCESS::at(x) + (token * N + i) * C + c), layer);
        }
        group_sums<N>(sums, shared, here);
        for (int i = here.id; i < N; i += here.threads) dw[token * N + i] = shared[i];
        BARRIER;  // the next token uses shared again
    }
}
