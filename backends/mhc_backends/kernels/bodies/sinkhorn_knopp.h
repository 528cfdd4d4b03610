// sinkhorn_knopp: rows, then columns, until both add up to 1 within epsilon, as common/sinkhorn
// says.
//
// logits[T, n, n], epsilon[1] -> out[T, n, n]. ITERATIONS (at most) and LOG_SPACE are the op's. A
// simdgroup takes as many matrices as its lanes hold.

#pragma once

#include "../common/floats.h"
#include "../common/position.h"
#include "../common/sinkhorn/knopp.h"
#include "../common/sinkhorn/lanes.h"
#include "../common/sinkhorn/lines.h"
#include "dialect/words.h"

template <int N, int ITERATIONS, bool LOG_SPACE, typename Logits, typename Epsilon, typename Out>
FUNCTION void sinkhorn_knopp(Logits logits, int64_t logits_shape_0, Epsilon epsilon, Out out,
                             Position here) {
    const int64_t T = logits_shape_0;

    for (int64_t tokens = first_tokens<N>(T, here); tokens < T; tokens += next_tokens<N>(here)) {
        const int64_t token = tokens + own_token<N>(here);
        const bool there = token < T;
        const Floats<N> v = load_line<N, false, false>(logits + token * N * N, there, here);
        const Floats<N> res = knopp_matrix<N, LOG_SPACE>(v, here, ITERATIONS, float(epsilon[0]));
        store_line<N, false, false>(out + token * N * N, res, there, here);
    }
}
