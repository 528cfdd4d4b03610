// head: the last stage, from the sums over n C in partials[T, P, n + 1] (project.h) to h = sum_i
// w_i x_i with w = sigmoid(u r scale + bias) + pre_eps.
//
// x[T, n, C], scale[1], bias[n] -> h[T, C] and, for the vjp if SAVES, w[T, n], u[T, n] and r[T, 1].
// A threadgroup takes TOKENS tokens, or some of their channels, as in pre.h.

#pragma once

#include "../common/collapse_token.h"
#include "../common/norm.h"
#include "../common/partials.h"
#include "../common/position.h"
#include "../common/sigmoid.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N, int TOKENS>
struct head_memory {
    enum { sums = TOKENS * (N + 1) };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int W, typename X, typename H>
FUNCTION bool head_aligned(X x, H h) {
    return vectors<W>(x) && vectors<W>(h);
}

template <typename ACCESS, int N, int W, int TOKENS, bool SAVES, typename X, typename Partials,
          typename Scale, typename Bias, typename H, typename U, typename Weights, typename R>
FUNCTION void head(X x, int x_shape_2, Partials partials, int64_t partials_shape_0,
                   int partials_shape_1, Scale scale, Bias bias, H h, U u, Weights w, R r,
                   float norm_eps, float pre_eps, threadgroup float* sums, Position here) {
    const int64_t T = partials_shape_0;
    const int C = x_shape_2;

    for (int64_t first = int64_t(here.group_x) * TOKENS; first < T;
         first += int64_t(here.groups_x) * TOKENS) {
        sum_partials<TOKENS, N + 1>(partials, partials_shape_1, first, T, sums, here);
        BARRIER;
        for (int k = 0; k < TOKENS && first + k < T; k++) {
            const int64_t token = first + k;
            const float inverse = inverse_rms(sums[k * (N + 1) + N], float(N) * C, norm_eps);
            float weights[N];
            UNROLL for (int i = 0; i < N; i++)
                weights[i] =
                    sigmoid(sums[k * (N + 1) + i] * inverse * float(scale[0]) + float(bias[i])) +
                    pre_eps;
            collapse_token<N, W>(ACCESS::at(x) + token * N * C, weights, ACCESS::at(h) + token * C,
                                 C, here);

            for (int i = here.id; i < N && SAVES && here.group_y == 0; i += here.threads) {
                const float product = sums[k * (N + 1) + i];
                u[token * N + i] = product;
                w[token * N + i] =
                    sigmoid(product * inverse * float(scale[0]) + float(bias[i])) + pre_eps;
                if (i == 0) r[token] = inverse;
            }
        }
        BARRIER;  // the next tokens use sums again
    }
}
