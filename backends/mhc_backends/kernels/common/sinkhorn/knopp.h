// The result of sinkhorn_knopp.

#pragma once

#include "../floats.h"
#include "../position.h"
#include "iterate.h"
#include "solve.h"
#include "start.h"
#include "dialect/simd.h"
#include "dialect/words.h"

template <typename SPACE, int N>
FUNCTION Floats<N> solution(Floats<N> start, bool active, int most, float epsilon, Position here) {
    return values<SPACE>(solve<SPACE>(start, active, most, epsilon, here).v);
}

template <int N, bool LOG_SPACE>
FUNCTION Floats<N> knopp_matrix(Floats<N> logits, Position here, int most, float epsilon) {
    if (!LOG_SPACE) logits = floored(logits);
    Floats<N> out = zeros<N>();
    const bool linear = narrow(logits, here);
    if (simd_any(linear))
        out = solution<LinearSpace>(powers(logits, here), linear, most, epsilon, here);
    if (simd_any(!linear)) {
        const Floats<N> start = logarithms(logits, here);
        const Floats<N> other = solution<LogSpace>(start, !linear, most, epsilon, here);
        if (!linear) out = other;
    }
    return out;
}
