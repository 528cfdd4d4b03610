// The vjp of static_mappings: a sigmoid's is s (1 - s), and sinkhorn's as in sinkhorn_vjp.
//
// h_pre_raw, h_post_raw[T, n], h_res_raw[T, n, n], and the cotangents g_pre, g_post[T, n] and
// g_res[T, n, n] -> d_pre, d_post[T, n], d_res[T, n, n]. ITERATIONS is the op's. A simdgroup takes
// as many tokens as its lanes hold: lane b has number b and a line of the matrix.

#pragma once

#include "../common/floats.h"
#include "../common/position.h"
#include "../common/sigmoid.h"
#include "../common/sinkhorn/lanes.h"
#include "../common/sinkhorn/lines.h"
#include "../common/sinkhorn/pull.h"
#include "../common/sinkhorn/sinkhorn_vjp.h"
#include "../common/store_one.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
struct static_mappings_vjp_memory {
    enum { kept = DIVISORS * DIVISOR_SIMDGROUPS };
};

template <int N, int ITERATIONS, typename HPreRaw, typename HPostRaw, typename HResRaw,
          typename GPre, typename GPost, typename GRes, typename DPre, typename DPost,
          typename DRes>
FUNCTION void static_mappings_vjp(HPreRaw h_pre_raw, HPostRaw h_post_raw, HResRaw h_res_raw,
                                  int64_t h_res_raw_shape_0, GPre g_pre, GPost g_post, GRes g_res,
                                  DPre d_pre, DPost d_post, DRes d_res, threadgroup float* kept,
                                  Position here) {
    const int64_t T = h_res_raw_shape_0;
    const auto own = own_divisors(&kept[0], here);

    for (int64_t tokens = first_tokens<N, DIVISOR_SIMDGROUPS>(T, here); tokens < T;
         tokens += next_tokens<N, DIVISOR_SIMDGROUPS>(here)) {
        const int64_t token = tokens + own_token<N>(here);
        const bool there = token < T;
        const int64_t at = token * N + line<N>(here);
        if (there && inside<N>(here)) {
            const float pre = sigmoid(float(h_pre_raw[at])), post = sigmoid(float(h_post_raw[at]));
            store_one(d_pre + at, float(g_pre[at]) * pre * (1.0f - pre));
            store_one(d_post + at, 2.0f * float(g_post[at]) * post * (1.0f - post));
        }
        const Floats<N> v = load_line<N, false, false>(h_res_raw + token * N * N, there, here);
        const Floats<N> dres = load_line<N, false, false>(g_res + token * N * N, there, here);
        const Floats<N> dv = sinkhorn_matrix_vjp<N, true>(v, dres, here, ITERATIONS, 0.0f, own);
        store_line<N, false, false>(d_res + token * N * N, dv, there, here);
    }
}
