// Computes u, r, h_pre and h_post from the sums over n C, where there is no H_res.

#pragma once

#include "activate.h"
#include "norm.h"
#include "position.h"
#include "dialect/words.h"

// As activate, for M = 2 n products. h_pre and h_post replace the products in `sums`: a BARRIER
// must come before they are read.
template <int N, int TOKENS, bool SAVES, typename S, typename A, typename B, typename P, typename Q>
FUNCTION void activate_unmixed(S sums, A scale, B bias, float norm_eps, float pre_eps,
                               float post_scale, float post_eps, float count, int64_t first,
                               int64_t T, bool stores, Q u, Q r, P h_pre, P h_post, Position here) {
    const int M = 2 * N;
    const int tokens = T - first < TOKENS ? int(T - first) : TOKENS;
    for (int item = here.id; item < tokens * M; item += here.threads) {
        const int k = item / M, column = item % M, group = column / N;
        const int64_t token = first + k;
        const float product = sums[k * (M + 1) + column];
        const float inverse = inverse_rms(sums[k * (M + 1) + M], count, norm_eps);
        const float mapped = activated(group, product, inverse, float(scale[group]),
                                       float(bias[column]), pre_eps, post_scale, post_eps);
        if (stores) {
            if (SAVES) u[token * M + column] = product;
            if (SAVES && column == 0) r[token] = inverse;
            if (group == 0)
                h_pre[token * N + column] = mapped;
            else
                h_post[token * N + column - N] = mapped;
        }
        sums[k * (M + 1) + column] = mapped;
    }
}
