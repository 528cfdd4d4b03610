// mappings: the last stage, from the sums over n C in partials[T, P, m + 1] (project.h) to the
// mappings (eqs. 16-19): z = u r scale + bias; H_pre = sigmoid(z) + pre_eps; H_post = post_scale
// sigmoid(z) + post_eps; H_res = sinkhorn(z).
//
// scale[3], bias[m] -> h_pre[T, n], h_post[T, n], h_res[T, n, n] and, for the vjp if SAVES, u[T, m]
// and r[T, 1]. A threadgroup takes TOKENS tokens. CHANNELS is C.

#pragma once

#include "../common/activate.h"
#include "../common/mix_matrices.h"
#include "../common/partials.h"
#include "../common/position.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N, int TOKENS>
struct mappings_memory {
    enum { sums = TOKENS * (N * N + 2 * N + 1) };
};

template <int N, int TOKENS, int CHANNELS, bool SAVES, int ITERATIONS, bool LOG, bool FIRST_COLUMNS,
          bool TRANSPOSED, bool EXP_START, bool CLAMPED, typename Partials, typename Scale,
          typename Bias, typename HPre, typename HPost, typename HRes, typename U, typename R>
FUNCTION void mappings(Partials partials, int64_t partials_shape_0, int partials_shape_1,
                       Scale scale, Bias bias, HPre h_pre, HPost h_post, HRes h_res, U u, R r,
                       float norm_eps, float pre_eps, float post_scale, float post_eps,
                       float sinkhorn_eps, float clamp_low, float clamp_high,
                       threadgroup float* sums, Position here) {
    const int64_t T = partials_shape_0;
    const int M = N * N + 2 * N;

    for (int64_t first = int64_t(here.group_x) * TOKENS; first < T;
         first += int64_t(here.groups_x) * TOKENS) {
        sum_partials<TOKENS, M + 1>(partials, partials_shape_1, first, T, sums, here);
        BARRIER;
        activate<N, true, TOKENS, SAVES>(sums, scale, bias, norm_eps, pre_eps, post_scale, post_eps,
                                         float(N) * CHANNELS, first, T, true, u, r, h_pre, h_post,
                                         here);
        BARRIER;
        mix_matrices<N, TOKENS, ITERATIONS, LOG, FIRST_COLUMNS, TRANSPOSED, EXP_START, CLAMPED>(
            sums, sinkhorn_eps, clamp_low, clamp_high, first, T, h_res, here);
        BARRIER;  // the next tokens use sums again
    }
}
