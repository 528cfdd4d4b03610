// static_mappings: h_pre = sigmoid(h_pre_raw), h_post = 2 sigmoid(h_post_raw), and h_res = sinkhorn
// of h_res_raw with rows first and eps 0.
//
// h_pre_raw, h_post_raw[T, n], h_res_raw[T, n, n] -> h_pre, h_post[T, n], h_res[T, n, n].
// ITERATIONS is the op's. A simdgroup takes as many tokens as its lanes hold: lane b has number b
// and column b.

#pragma once

#include "../common/floats.h"
#include "../common/position.h"
#include "../common/sigmoid.h"
#include "../common/sinkhorn/lanes.h"
#include "../common/sinkhorn/lines.h"
#include "../common/sinkhorn/sinkhorn.h"
#include "dialect/words.h"

template <int N, int ITERATIONS, typename HPreRaw, typename HPostRaw, typename HResRaw,
          typename HPre, typename HPost, typename HRes>
FUNCTION void static_mappings(HPreRaw h_pre_raw, HPostRaw h_post_raw, HResRaw h_res_raw,
                              int64_t h_res_raw_shape_0, HPre h_pre, HPost h_post, HRes h_res,
                              Position here) {
    const int64_t T = h_res_raw_shape_0;

    for (int64_t tokens = first_tokens<N>(T, here); tokens < T; tokens += next_tokens<N>(here)) {
        const int64_t token = tokens + own_token<N>(here);
        const bool there = token < T;
        const int64_t at = token * N + line<N>(here);
        if (there && inside<N>(here)) {
            h_pre[at] = sigmoid(float(h_pre_raw[at]));
            h_post[at] = 2.0f * sigmoid(float(h_post_raw[at]));
        }
        const Floats<N> v = load_line<N, false, false>(h_res_raw + token * N * N, there, here);
        const Floats<N> res = sinkhorn_matrix<N, true>(v, here, ITERATIONS, 0.0f);
        store_line<N, false, false>(h_res + token * N * N, res, there, here);
    }
}
