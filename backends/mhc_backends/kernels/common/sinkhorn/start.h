// The start of the iterations.

#pragma once

#include "../floats.h"
#include "../position.h"
#include "lanes.h"
#include "sums.h"
#include "dialect/infinity.h"
#include "dialect/precise.h"
#include "dialect/simd.h"
#include "dialect/words.h"

// Whether the logits of this lane's matrix are so close to each other that with eps = 0 no entry
// can underflow in any iteration: all are at least exp(-2 * NARROW) / N.
enum { NARROW = 40 };

template <int N>
FUNCTION bool narrow(Floats<N> logits, Position here) {
    float high = largest_a(logits), low = -largest_a(times(-1.0f, logits));
    if (!inside<N>(here)) high = MINUS_INFINITY, low = -MINUS_INFINITY;
    for (int step = 1; step < Lanes<N>::COUNT; step *= 2) {
        high = precise::max(high, simd_partner(high, step));
        low = precise::min(low, simd_partner(low, step));
    }
    return high - low <= float(NARROW);  // false for infinities
}

// The start in LinearSpace, shifted exponentials; zeros for padding.
template <int N>
FUNCTION Floats<N> powers(Floats<N> logits, Position here) {
    if (!inside<N>(here)) return zeros<N>();
    return exps(logits, largest_a(logits));
}

// The start in LogSpace, half the logits; -inf for padding.
template <int N>
FUNCTION Floats<N> logarithms(Floats<N> logits, Position here) {
    UNROLL for (int a = 0; a < N; a++)
        logits.at[a] = inside<N>(here) ? 0.5f * logits.at[a] : MINUS_INFINITY;
    return logits;
}
