// sinkhorn: H_res of logits (eq. 9), as common/sinkhorn says.
//
// logits[T, n, n], eps[1] -> out[T, n, n]. ITERATIONS and FIRST_COLUMNS are the op's; LOG says
// whether eps is 0. A simdgroup takes as many matrices as its lanes hold.

#pragma once

#include "../common/floats.h"
#include "../common/position.h"
#include "../common/sinkhorn/lanes.h"
#include "../common/sinkhorn/lines.h"
#include "../common/sinkhorn/sinkhorn.h"
#include "dialect/words.h"

template <int N, int ITERATIONS, bool LOG, bool FIRST_COLUMNS, typename Logits, typename Eps,
          typename Out>
FUNCTION void sinkhorn(Logits logits, int64_t logits_shape_0, Eps eps, Out out, Position here) {
    const int64_t T = logits_shape_0;

    for (int64_t tokens = first_tokens<N>(T, here); tokens < T; tokens += next_tokens<N>(here)) {
        const int64_t token = tokens + own_token<N>(here);
        const bool there = token < T;
        const Floats<N> v = load_line<N, FIRST_COLUMNS, false>(logits + token * N * N, there, here);
        const Floats<N> res = sinkhorn_matrix<N, LOG>(v, here, ITERATIONS, float(eps[0]));
        store_line<N, FIRST_COLUMNS, false>(out + token * N * N, res, there, here);
    }
}
