// The vjp of sinkhorn_knopp.

#pragma once

#include "../floats.h"
#include "../position.h"
#include "iterate.h"
#include "lanes.h"
#include "pull.h"
#include "solve.h"
#include "start.h"
#include "dialect/simd.h"
#include "dialect/words.h"

template <typename SPACE, int N, typename S>
FUNCTION Floats<N> solution_vjp(Floats<N> start, Floats<N> g, bool active, int most, float epsilon,
                                S kept, Position here) {
    const Solved<N> solved = solve<SPACE>(start, active, most, epsilon, here);
    return pull_steps<SPACE, true>(start, g, solved.steps, solved.most, 0.0f, kept, here).G;
}

// Returns the cotangent of the logits, back through the steps taken; `kept` as in sinkhorn_vjp.h.
template <int N, bool LOG_SPACE, typename S>
FUNCTION Floats<N> knopp_matrix_vjp(Floats<N> logits, Floats<N> g, Position here, int most,
                                    float epsilon, S kept) {
    Floats<N> from = logits;
    if (!LOG_SPACE) from = floored(logits);
    Floats<N> out = zeros<N>();
    if (!inside<N>(here)) g = zeros<N>();
    const bool linear = narrow(from, here);
    if (simd_any(linear)) {
        const Floats<N> start = powers(from, here);
        out = solution_vjp<LinearSpace>(start, g, linear, most, epsilon, kept, here);
    }
    if (simd_any(!linear)) {
        const Floats<N> start = logarithms(from, here);
        const Floats<N> other =
            solution_vjp<LogSpace>(start, g, !linear, most, epsilon, kept, here);
        if (!linear) out = other;
    }
    if (!LOG_SPACE) {
        UNROLL for (int a = 0; a < N; a++)
            out.at[a] = logits.at[a] <= smallest_logit() ? 0.0f : out.at[a];
    }
    return out;
}
