// The vjp of sinkhorn: the iterations are run again and walked back, as common/sinkhorn says.
//
// logits, g[T, n, n], eps[1] -> out[T, n, n], the cotangent of the logits. Constants as in
// sinkhorn. A simdgroup takes as many matrices as its lanes hold; their divisors are in threadgroup
// memory.

#pragma once

#include "../common/floats.h"
#include "../common/position.h"
#include "../common/sinkhorn/lanes.h"
#include "../common/sinkhorn/lines.h"
#include "../common/sinkhorn/pull.h"
#include "../common/sinkhorn/sinkhorn_vjp.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
struct sinkhorn_vjp_memory {
    enum { kept = DIVISORS * DIVISOR_SIMDGROUPS };
};

template <int N, int ITERATIONS, bool LOG, bool FIRST_COLUMNS, typename Logits, typename G,
          typename Eps, typename Out>
FUNCTION void sinkhorn_vjp(Logits logits, int64_t logits_shape_0, G g, Eps eps, Out out,
                           threadgroup float* kept, Position here) {
    const int64_t T = logits_shape_0;
    const auto own = own_divisors(&kept[0], here);

    for (int64_t tokens = first_tokens<N, DIVISOR_SIMDGROUPS>(T, here); tokens < T;
         tokens += next_tokens<N, DIVISOR_SIMDGROUPS>(here)) {
        const int64_t token = tokens + own_token<N>(here);
        const bool there = token < T;
        const Floats<N> v = load_line<N, FIRST_COLUMNS, false>(logits + token * N * N, there, here);
        const Floats<N> dres = load_line<N, FIRST_COLUMNS, false>(g + token * N * N, there, here);
        const Floats<N> dv =
            sinkhorn_matrix_vjp<N, LOG>(v, dres, here, ITERATIONS, float(eps[0]), own);
        store_line<N, FIRST_COLUMNS, false>(out + token * N * N, dv, there, here);
    }
}
