// sinkhorn: a given number of iterations.

#pragma once

#include "../floats.h"
#include "../position.h"
#include "iterate.h"
#include "softmax.h"
#include "start.h"
#include "dialect/simd.h"
#include "dialect/words.h"

template <typename SPACE, int N>
FUNCTION Floats<N> take_steps(Floats<N> v, int steps, float eps, Position here) {
    for (int k = 0; k < steps; k++) v = iterate<SPACE>(v, eps, true, here).v;
    return values<SPACE>(v);
}

// Returns H_res of logits, after at least one iteration. LOG: eps is 0, and a matrix whose entries
// might underflow is iterated in LogSpace; the others in LinearSpace, which is faster. EXP_START:
// all iterations are alike, from shifted exponentials; with eps = 0 there is no difference.
template <int N, bool LOG, bool EXP_START = false>
FUNCTION Floats<N> sinkhorn_matrix(Floats<N> logits, Position here, int iterations, float eps) {
    Floats<N> out = zeros<N>();
    if (LOG) {
        const bool linear = narrow(logits, here);
        if (simd_any(linear))
            out = take_steps<LinearSpace>(powers(logits, here), iterations, 0.0f, here);
        if (simd_any(!linear)) {
            const Floats<N> start = logarithms(logits, here);
            const Floats<N> other = take_steps<LogSpace>(start, iterations, 0.0f, here);
            if (!linear) out = other;
        }
    } else if (EXP_START) {
        out = take_steps<LinearSpace>(powers(logits, here), iterations, eps, here);
    } else {
        const Floats<N> start = started(softmax(logits, here), eps, here);
        out = take_steps<LinearSpace>(start, iterations - 1, eps, here);
    }
    return out;
}
