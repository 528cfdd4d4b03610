// A variant's bounds of the logits.

#pragma once

#include "../floats.h"
#include "dialect/words.h"

// Logits within bounds, NaN for NaN; and their gradient, 0 where the bounds replaced them.
template <int N>
FUNCTION Floats<N> clamped(Floats<N> logits, float low, float high) {
    UNROLL for (int a = 0; a < N; a++) {
        const float z = logits.at[a];
        logits.at[a] = z < low ? low : z > high ? high : z;
    }
    return logits;
}

template <int N>
FUNCTION Floats<N> clamped_vjp(Floats<N> logits, Floats<N> g, float low, float high) {
    UNROLL for (int a = 0; a < N; a++) {
        const float z = logits.at[a];
        g.at[a] = z < low || z > high ? 0.0f : g.at[a];
    }
    return g;
}
