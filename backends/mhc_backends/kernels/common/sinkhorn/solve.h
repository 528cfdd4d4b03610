// sinkhorn_knopp: each matrix takes steps until its largest error is under epsilon, then stays
// unchanged.

#pragma once

#include "../floats.h"
#include "../position.h"
#include "iterate.h"
#include "lanes.h"
#include "sums.h"
#include "dialect/precise.h"
#include "dialect/simd.h"
#include "dialect/words.h"

// The matrix of a lane after its `steps`; `most` is the most steps of any matrix in the simdgroup.
template <int N>
struct Solved {
    Floats<N> v;
    int steps, most;
};

// The largest distance of a line's sum from 1, over all lines of this lane's matrix.
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
        const float error = largest_error(values<SPACE>(out.v), here);  // all lanes must come here
        active = active && !(error < epsilon);
    }
    return out;
}

// Without LOG_SPACE the start is max(exp(logits), 1e-10), the same as from logits with this floor.
FUNCTION float smallest_logit() { return -23.025850929940457f; }

template <int N>
FUNCTION Floats<N> floored(Floats<N> logits) {
    UNROLL for (int a = 0; a < N; a++)  // NaN stays, which max would drop
        logits.at[a] = logits.at[a] <= smallest_logit() ? smallest_logit() : logits.at[a];
    return logits;
}
