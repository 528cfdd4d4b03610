// sinkhorn_knopp: each matrix takes steps until its largest error is under epsilon, and then stays
// as it is.

#pragma once

#include "../floats.h"
#include "../position.h"
#include "iterate.h"
#include "lanes.h"
#include "sums.h"
#include "dialect/precise.h"
#include "dialect/simd.h"
#include "dialect/words.h"

// After `steps` of a lane's matrix, and `most` of any in the simdgroup.
template <int N>
struct Solved {
    Floats<N> v;
    int steps, most;
};

// How far the lines of this lane's matrix are from adding up to 1, at most.
template <int N>
FUNCTION float largest_error(Floats<N> v, Position here) {
    const float b = over_lines<Plus>(v, 0.0f, here);
    float error = inside<N>(here) ? precise::max(fabs(sum_a(v) - 1.0f), fabs(b - 1.0f)) : 0.0f;
    for (int step = 1; step < Lanes<N>::COUNT; step *= 2)
        error = precise::max(error, simd_partner(error, step));
    return error;
}

template <typename SPACE, int N>
FUNCTION Solved<N> solve(Floats<N> start, bool active, int most, float epsilon, Position here) {
    Solved<N> out;
    out.v = start, out.steps = 0, out.most = 0;
    while (out.most < most && simd_any(active)) {
        out.v = iterate<SPACE>(out.v, 0.0f, active, here).v;
        out.steps += active ? 1 : 0;
        out.most++;
        const float error = largest_error(values<SPACE>(out.v), here);  // which needs all lanes
        active = active && !(error < epsilon);
    }
    return out;
}

// Without LOG_SPACE it starts from exp(logits), no smaller than 1e-10: the same as from these
// logits.
FUNCTION float smallest_logit() { return -23.025850929940457f; }

template <int N>
FUNCTION Floats<N> floored(Floats<N> logits) {
    UNROLL for (int a = 0; a < N; a++)  // NaN stays, which max would drop
        logits.at[a] = logits.at[a] <= smallest_logit() ? smallest_logit() : logits.at[a];
    return logits;
}
