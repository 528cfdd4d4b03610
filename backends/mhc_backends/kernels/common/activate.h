// Computes u, r, h_pre, h_post and the logits of an H_res from the sums over n C.

#pragma once

#include "norm.h"
#include "position.h"
#include "sigmoid.h"
#include "dialect/words.h"

// The mapping of a column: H_pre's have group 0, H_post's 1, H_res's 2.
template <int N>
FUNCTION int column_group(int column) {
    return column < N ? 0 : column < 2 * N ? 1 : 2;
}

// h_pre, h_post or the logit of a column, from the product, r and the column's scale and bias.
FUNCTION float activated(int group, float product, float inverse, float scale, float bias,
                         float pre_eps, float post_scale, float post_eps) {
    const float z = product * inverse * scale + bias;
    return group == 0 ? sigmoid(z) + pre_eps : group == 1 ? post_scale * sigmoid(z) + post_eps : z;
}

// `sums` has M products and the sum of squares of each of TOKENS tokens; M is n n + 2 n, or 2 n
// where nothing MIXES the streams. Computes u (the products), r (1 / rms), h_pre and h_post, and
// stores them if `stores`. h_pre, h_post and the logits of H_res replace the products in `sums`: a
// BARRIER must come before they are read.
template <int N, bool MIXES, int TOKENS, bool SAVES, typename S, typename A, typename B, typename P,
          typename Q>
FUNCTION void activate(S sums, A scale, B bias, float norm_eps, float pre_eps, float post_scale,
                       float post_eps, float count, int64_t first, int64_t T, bool stores, Q u, Q r,
                       P h_pre, P h_post, Position here) {
    const int M = MIXES ? N * N + 2 * N : 2 * N;
    const int tokens = T - first < TOKENS ? int(T - first) : TOKENS;
    for (int item = here.id; item < tokens * M; item += here.threads) {
        const int k = item / M, column = item % M;
        const int64_t token = first + k;
        const int group = column_group<N>(column);
        const float product = sums[k * (M + 1) + column];
        const float inverse = inverse_rms(sums[k * (M + 1) + M], count, norm_eps);
        const float mapped = activated(group, product, inverse, float(scale[group]),
                                       float(bias[column]), pre_eps, post_scale, post_eps);
        if (stores) {
            if (SAVES) u[token * M + column] = product;
            if (SAVES && column == 0) r[token] = inverse;
            if (group == 0) h_pre[token * N + column] = mapped;
            if (group == 1) h_post[token * N + column - N] = mapped;
        }
        sums[k * (M + 1) + column] = mapped;
    }
}
