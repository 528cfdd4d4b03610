// The start of the iterations if eps > 0.

#pragma once

#include "../floats.h"
#include "../position.h"
#include "iterate.h"
#include "lanes.h"
#include "start.h"
#include "sums.h"
#include "dialect/reciprocal.h"
#include "dialect/words.h"

// S, a softmax along a. The iterations start from (S + eps) / (sum_b + eps).
template <int N>
FUNCTION Floats<N> softmax(Floats<N> logits, Position here) {
    const Floats<N> v = powers(logits, here);
    if (!inside<N>(here)) return v;
    return times(reciprocal(sum_a(v)), v);
}

template <int N>
FUNCTION Floats<N> started(Floats<N> softmax, float eps, Position here) {
    UNROLL for (int a = 0; a < N; a++)
        softmax.at[a] += inside<N>(here) ? eps : 0.0f;
    return LinearSpace::divide_b(softmax, eps, true, here).v;
}
