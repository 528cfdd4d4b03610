// The vjp of the iterations. G = P g is the cotangent of log P. The vjp of a division along an axis
// is G -= P sum(G), with the sum along that axis.

#pragma once

#include "../floats.h"
#include "../held.h"
#include "../position.h"
#include "iterate.h"
#include "sums.h"
#include "dialect/words.h"

template <typename SPACE, int N>
FUNCTION Floats<N> pull_a(Floats<N> G, Floats<N> v, float sum) {
    UNROLL for (int a = 0; a < N; a++)
        G.at[a] = fma(-SPACE::value(v.at[a]), sum, G.at[a]);
    return G;
}

template <typename SPACE, int N>
FUNCTION Floats<N> pull_b(Floats<N> G, Floats<N> v, Floats<N> sums) {
    UNROLL for (int a = 0; a < N; a++)
        G.at[a] = fma(-SPACE::value(v.at[a]), sums.at[a], G.at[a]);
    return G;
}

enum {
    SEGMENT = 20,                   // iterations whose divisors are kept at a time
    DIVISORS = 2 * SEGMENT * SIMD,  // floats of threadgroup memory that a simdgroup needs for them
    DIVISOR_SIMDGROUPS = 2          // simdgroups of a threadgroup that have such memory
};

// This simdgroup's own DIVISORS floats of the threadgroup memory `kept`.
template <typename S>
FUNCTION S own_divisors(S kept, Position here) {
    return kept + here.id / SIMD % DIVISOR_SIMDGROUPS * DIVISORS;
}

template <int N>
struct Pulled {
    Floats<N> G, v;
};

// Pulls g, the cotangent of the iterations' result, back to `start`: returns G and the matrix at
// the start. All matrices of the simdgroup took `most` iterations; if FROZEN, this lane's matrix
// took `steps`. The divisors of one segment are kept at a time, so the iterations run again for
// each segment. A lane reads only divisors that it wrote.
template <typename SPACE, bool FROZEN, int N, typename S>
FUNCTION Pulled<N> pull_steps(Floats<N> start, Floats<N> g, int steps, int most, float eps, S kept,
                              Position here) {
    const int lane = here.id % SIMD;
    Pulled<N> out;
    int end = most;
    do {
        const int begin = end > SEGMENT ? end - SEGMENT : 0;
        out.v = start;
        for (int k = 0; k < end; k++) {
            const bool active = !FROZEN || k < steps;
            const Step<N> taken = iterate<SPACE>(out.v, eps, active, here);
            out.v = taken.v;
            if (k >= begin) {
                kept[2 * (k - begin) * SIMD + lane] = taken.a;
                kept[(2 * (k - begin) + 1) * SIMD + lane] = taken.b;
            }
        }
        if (end == most) out.G = product(values<SPACE>(out.v), g);
        for (int k = end - 1; k >= begin; k--) {
            const bool active = !FROZEN || k < steps;
            const Floats<N> sums = sums_b(out.G, here);
            if (active) out.G = pull_b<SPACE>(out.G, out.v, sums);
            out.v = scale_b<SPACE>(out.v, kept[(2 * (k - begin) + 1) * SIMD + lane], here);
            if (active) out.G = pull_a<SPACE>(out.G, out.v, sum_a(out.G));
            out.v = scale_a<SPACE>(out.v, kept[2 * (k - begin) * SIMD + lane]);
        }
        end = begin;
    } while (end > 0);
    return out;
}
