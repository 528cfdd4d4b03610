// gated_low_vjp: back through the gates' low rank and H_post to the products with u, and to r.
// With z = sum_i r_i products_i / n and s = sigmoid(z): dz = dlow s (1 + z (1 - s)) / n for the low
// rank, where dlow is the sum of gated_dlow's partials, and dz = g_post 2 s (1 - s) / n for H_post.
//
// partials[T, P, R], products[T, n, M], r[T, n], sums[T, n, S] and, if it INJECTS, g_post[T, n] ->
// dz[T, D], in which those of H_post begin at the next multiple of 32 and zeros fill the gaps;
// scaled[n, T, M] = r_i dz; pulled[T, n] = u_i . du_i, the sums of S and those through the products.
// A threadgroup takes whole tokens.

#pragma once

#include "../common/group_sums.h"
#include "../common/partials.h"
#include "../common/position.h"
#include "../common/project/layout.h"
#include "../common/sigmoid.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N>
struct gated_low_vjp_memory {
    enum { shared = N * MOST_SIMDGROUPS };
};

template <int N, bool INJECTS, typename Partials, typename Products, typename R, typename S,
          typename GPost, typename Dz, typename Scaled, typename Pulled>
FUNCTION void gated_low_vjp(Partials partials, int64_t partials_shape_0, int partials_shape_1,
                            int partials_shape_2, Products products, R r, S sums, int sums_shape_2,
                            GPost g_post, Dz dz, Scaled scaled, Pulled pulled,
                            threadgroup float* shared, Position here) {
    const int64_t T = partials_shape_0;
    const int P = partials_shape_1, RANK = partials_shape_2, parts = sums_shape_2;
    const int splits = P / N;  // of a stream
    const int M = INJECTS ? RANK + N : RANK;
    const int injected = (RANK + STEP_CHANNELS - 1) / STEP_CHANNELS * STEP_CHANNELS;
    const int D =
        INJECTS ? injected + (N + STEP_CHANNELS - 1) / STEP_CHANNELS * STEP_CHANNELS : injected;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        float pulls[N];  // of this thread's columns and parts
        UNROLL for (int i = 0; i < N; i++)
            pulls[i] = 0.0f;
        for (int at = here.id; at < D; at += here.threads) {
            const bool inject = INJECTS && at >= injected;
            const int column = inject ? at - injected + RANK : at;
            float d = 0.0f;
            if (inject ? column < M : column < RANK) {
                float z = 0.0f;
                for (int i = 0; i < N; i++)
                    z = fma(float(r[token * N + i]), products[(token * N + i) * M + column], z);
                z /= float(N);
                const float s = sigmoid(z);
                if (inject) {
                    d = float(g_post[token * N + column - RANK]) * 2.0f * s * (1.0f - s);
                } else {
                    for (int i = 0; i < N; i++)
                        d += sum_one_by_one<PARTIALS_AT_ONCE>(
                            partials + (token * P + i * splits) * RANK + column, splits, RANK);
                    d *= s * (1.0f + z * (1.0f - s));
                }
                d /= float(N);
                UNROLL for (int i = 0; i < N; i++) {
                    const float own = float(r[token * N + i]) * d;
                    scaled[(i * T + token) * M + column] = own;
                    pulls[i] = fma(own, products[(token * N + i) * M + column], pulls[i]);
                }
            }
            dz[token * D + at] = d;
        }
        for (int part = here.id; part < parts; part += here.threads) {
            UNROLL for (int i = 0; i < N; i++)
                pulls[i] += sums[(token * N + i) * parts + part];
        }
        group_sums<N>(pulls, shared, here);
        for (int i = here.id; i < N; i += here.threads) pulled[token * N + i] = shared[i];
        BARRIER;  // the next token uses shared again
    }
}
