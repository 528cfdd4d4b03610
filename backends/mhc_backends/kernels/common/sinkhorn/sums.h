// Sums along a, in a lane, and along b, over the lanes of a matrix.

#pragma once

#include "../floats.h"
#include "../position.h"
#include "lanes.h"
#include "dialect/precise.h"
#include "dialect/simd.h"
#include "dialect/words.h"

template <int N>
FUNCTION float sum_a(Floats<N> v) {
    Floats<4> parts = zeros<4>();  // four sums that do not wait for each other
    UNROLL for (int a = 0; a < N; a++)
        parts.at[a % 4] = a < 4 ? v.at[a] : parts.at[a % 4] + v.at[a];
    return (parts.at[0] + parts.at[1]) + (parts.at[2] + parts.at[3]);
}

template <int N>
FUNCTION float largest_a(Floats<N> v) {
    float out = v.at[0];
    UNROLL for (int a = 1; a < N; a++)
        out = precise::max(out, v.at[a]);
    return out;
}

template <int N>
FUNCTION Floats<N> exps(Floats<N> v, float shift) {
    UNROLL for (int a = 0; a < N; a++)
        v.at[a] = precise::exp(v.at[a] - shift);
    return v;
}

struct Plus {
    static FUNCTION float of(float u, float v) { return u + v; }
};
struct Larger {
    static FUNCTION float of(float u, float v) { return precise::max(u, v); }
};

// Returns to lane a v.at[a] reduced over all lanes of the matrix: in each round two lanes swap the
// halves that the other needs, and half of the numbers are left.
template <typename OPERATION>
FUNCTION float fold(Floats<1> v, int) {
    return v.at[0];
}

template <typename OPERATION, int COUNT>
FUNCTION float fold(Floats<COUNT> v, int lane) {
    const bool upper = (lane & (COUNT / 2)) != 0;
    Floats<COUNT / 2> kept;
    UNROLL for (int a = 0; a < COUNT / 2; a++) {
        const float lower_one = v.at[a], upper_one = v.at[COUNT / 2 + a];
        const float other = simd_partner(upper ? lower_one : upper_one, COUNT / 2);
        kept.at[a] = OPERATION::of(upper ? upper_one : lower_one, other);
    }
    return fold<OPERATION>(kept, lane);
}

template <typename OPERATION, int N>
FUNCTION float over_lines(Floats<N> v, float nothing, Position here) {
    Floats<Lanes<N>::COUNT> padded;
    UNROLL for (int a = 0; a < Lanes<N>::COUNT; a++)
        padded.at[a] = a < N ? v.at[a] : nothing;
    return fold<OPERATION>(padded, here.id);
}

// Returns the v of lane a, for every a.
template <int N>
FUNCTION Floats<N> of_lanes(float v, Position here) {
    const int first = here.id % SIMD - line<N>(here);
    Floats<N> out;
    UNROLL for (int a = 0; a < N; a++)
        out.at[a] = simd_from(v, first + a);
    return out;
}

// Returns all sums along b, to every lane.
template <int N>
FUNCTION Floats<N> sums_b(Floats<N> v, Position here) {
    if (Lanes<N>::FEW) {
        UNROLL for (int a = 0; a < N; a++) {
            if (Lanes<N>::COUNT >= 2) v.at[a] += simd_partner(v.at[a], 1);
            if (Lanes<N>::COUNT >= 4) v.at[a] += simd_partner(v.at[a], 2);
        }
    } else {
        v = of_lanes<N>(over_lines<Plus>(v, 0.0f, here), here);
    }
    return v;
}
