// sinkhorn: a given number of iterations.

#pragma once

#include "../floats.h"
#include "../position.h"
#include "iterate.h"
#include "lanes.h"
#include "mirrored.h"
#include "softmax.h"
#include "start.h"
#include "dialect/simd.h"
#include "dialect/words.h"

template <typename SPACE, int N>
FUNCTION Floats<N> take_steps(Floats<N> v, int steps, float eps, Position here) {
    for (int k = 0; k < steps; k++) v = iterate<SPACE>(v, eps, true, here).v;
    return values<SPACE>(v);
}

// The steps in LinearSpace. The start's entries are at most 1, and so are all others.
template <int N>
FUNCTION Floats<N> take_linear_steps(Floats<N> v, int steps, float eps, Position here) {
    if (!Lanes<N>::FEW) return take_steps<LinearSpace>(v, steps, eps, here);
    if (eps > 2e-38f && eps < 1.0f) return mirrored_steps<true>(v, steps, eps, here);
    return mirrored_steps<false>(v, steps, eps, here);
}

// Returns H_res of logits, after at least one iteration. LOG: eps is 0, and a matrix whose entries
// might underflow is iterated in LogSpace; the others in LinearSpace, which is faster. EXP_START:
// all iterations are alike, from shifted exponentials; with eps = 0 there is no difference.
template <int N, bool LOG, bool EXP_START = false>
FUNCTION Floats<N> sinkhorn_matrix(Floats<N> logits, Position here, int iterations, float eps) {
    Floats<N> out = zeros<N>();
    if (LOG) {
        const bool linear = narrow(logits, here);
        if (simd_any(linear)) out = take_linear_steps(powers(logits, here), iterations, 0.0f, here);
        if (simd_any(!linear)) {
            const Floats<N> start = logarithms(logits, here);
            const Floats<N> other = take_steps<LogSpace>(start, iterations, 0.0f, here);
            if (!linear) out = other;
        }
    } else if (EXP_START) {
        out = take_linear_steps(powers(logits, here), iterations, eps, here);
    } else {
        const Floats<N> start = started(softmax(logits, here), eps, here);
        out = take_linear_steps(start, iterations - 1, eps, here);
    }
    return out;
}
