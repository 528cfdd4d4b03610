// The vjp of sinkhorn.

#pragma once

#include "../floats.h"
#include "../position.h"
#include "iterate.h"
#include "lanes.h"
#include "pull.h"
#include "softmax.h"
#include "start.h"
#include "sums.h"
#include "dialect/simd.h"
#include "dialect/words.h"

// The vjp of v - largest_a(v): equal largest numbers share what the others pass on.
template <int N>
FUNCTION Floats<N> pull_largest(Floats<N> v, Floats<N> G) {
    const float largest = largest_a(v);
    float ties = 0.0f;
    UNROLL for (int a = 0; a < N; a++)
        ties += v.at[a] < largest ? 0.0f : 1.0f;
    const float each = sum_a(G) / ties;
    UNROLL for (int a = 0; a < N; a++)
        G.at[a] -= v.at[a] < largest ? 0.0f : each;
    return G;
}

// Returns the cotangent of the logits from g, the cotangent of H_res. The iterations run again;
// their divisors go into `kept`, this simdgroup's own DIVISORS floats of threadgroup memory.
template <int N, bool LOG, bool EXP_START = false, typename S>
FUNCTION Floats<N> sinkhorn_matrix_vjp(Floats<N> logits, Floats<N> g, Position here, int iterations,
                                       float eps, S kept) {
    Floats<N> out = zeros<N>();
    if (!inside<N>(here)) g = zeros<N>();
    if (LOG) {
        const bool linear = narrow(logits, here);
        if (simd_any(linear)) {
            const Floats<N> start = powers(logits, here);
            out = pull_steps<LinearSpace, false>(start, g, iterations, iterations, 0.0f, kept, here)
                      .G;
        }
        if (simd_any(!linear)) {
            const Floats<N> start = logarithms(logits, here);
            const Floats<N> other =
                pull_steps<LogSpace, false>(start, g, iterations, iterations, 0.0f, kept, here).G;
            if (!linear) out = other;
        }
    } else if (EXP_START) {
        const Floats<N> start = powers(logits, here);
        out = pull_steps<LinearSpace, false>(start, g, iterations, iterations, eps, kept, here).G;
        out = pull_largest(logits, out);
    } else {
        const Floats<N> soft = softmax(logits, here);
        const Floats<N> start = started(soft, eps, here);
        const int steps = iterations - 1;
        const Pulled<N> pulled =
            pull_steps<LinearSpace, false>(start, g, steps, steps, eps, kept, here);
        out = pull_b<LinearSpace>(pulled.G, pulled.v, sums_b(pulled.G, here));
        // the start, log(S + eps)
        UNROLL for (int a = 0; a < N; a++)
            out.at[a] *= soft.at[a] / (soft.at[a] + eps);
        out = pull_a<LinearSpace>(out, soft, sum_a(out));
    }
    return out;
}
