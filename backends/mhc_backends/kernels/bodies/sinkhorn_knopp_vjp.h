// The vjp of sinkhorn_knopp, back through the steps that each matrix took.
//
// logits, g[T, n, n], epsilon[1] -> out[T, n, n], the cotangent of the logits. Constants and lanes
// as in sinkhorn_knopp; the divisors are in threadgroup memory.

#pragma once

#include "../common/floats.h"
#include "../common/position.h"
#include "../common/sinkhorn/knopp_vjp.h"
#include "../common/sinkhorn/lanes.h"
#include "../common/sinkhorn/lines.h"
#include "../common/sinkhorn/pull.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
struct sinkhorn_knopp_vjp_memory {
    enum { kept = DIVISORS * DIVISOR_SIMDGROUPS };
};

template <int N, int ITERATIONS, bool LOG_SPACE, typename Logits, typename G, typename Epsilon,
          typename Out>
FUNCTION void sinkhorn_knopp_vjp(Logits logits, int64_t logits_shape_0, G g, Epsilon epsilon,
                                 Out out, threadgroup float* kept, Position here) {
    const int64_t T = logits_shape_0;
    const auto own = own_divisors(&kept[0], here);

    for (int64_t tokens = first_tokens<N, DIVISOR_SIMDGROUPS>(T, here); tokens < T;
         tokens += next_tokens<N, DIVISOR_SIMDGROUPS>(here)) {
        const int64_t token = tokens + own_token<N>(here);
        const bool there = token < T;
        const Floats<N> v = load_line<N, false, false>(logits + token * N * N, there, here);
        const Floats<N> dres = load_line<N, false, false>(g + token * N * N, there, here);
        const Floats<N> dv =
            knopp_matrix_vjp<N, LOG_SPACE>(v, dres, here, ITERATIONS, float(epsilon[0]), own);
        store_line<N, false, false>(out + token * N * N, dv, there, here);
    }
}
