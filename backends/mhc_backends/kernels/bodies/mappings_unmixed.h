// mappings_unmixed: mappings.h without H_res: from the sums over n C in partials[T, P, 2 n + 1] to
// H_pre = sigmoid(z) + pre_eps and H_post = post_scale sigmoid(z) + post_eps.
//
// scale[2], bias[2 n] -> h_pre[T, n], h_post[T, n] and, for the vjp if SAVES, u[T, 2 n] and r[T, 1].
// A threadgroup takes TOKENS tokens. CHANNELS is C.

#pragma once

#include "../common/activate.h"
#include "../common/partials.h"
#include "../common/position.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N, int TOKENS>
struct mappings_unmixed_memory {
    enum { sums = TOKENS * (2 * N + 1) };
};

template <int N, int TOKENS, int CHANNELS, bool SAVES, typename Partials, typename Scale,
          typename Bias, typename HPre, typename HPost, typename U, typename R>
FUNCTION void mappings_unmixed(Partials partials, int64_t partials_shape_0, int partials_shape_1,
                               Scale scale, Bias bias, HPre h_pre, HPost h_post, U u, R r,
                               float norm_eps, float pre_eps, float post_scale, float post_eps,
                               threadgroup float* sums, Position here) {
    const int64_t T = partials_shape_0;

    for (int64_t first = int64_t(here.group_x) * TOKENS; first < T;
         first += int64_t(here.groups_x) * TOKENS) {
        sum_partials<TOKENS, 2 * N + 1>(partials, partials_shape_1, first, T, sums, here);
        BARRIER;
        activate<N, false, TOKENS, SAVES>(sums, scale, bias, norm_eps, pre_eps, post_scale,
                                          post_eps, float(N) * CHANNELS, first, T, true, u, r,
                                          h_pre, h_post, here);
        BARRIER;  // the next tokens use sums again
    }
}
