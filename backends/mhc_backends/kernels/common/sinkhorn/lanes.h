// Sinkhorn's matrices in the lanes of a simdgroup, as in mhc_core/math/sinkhorn.py: "a" is the axis
// that is normalised first, "b" the other one.
//
// A matrix takes Lanes<N>::COUNT lanes side by side: a simdgroup has MATRICES of them. Lane b of a
// matrix holds the N numbers of its line along a in registers. So a sum along a is the lane's own;
// of the N sums along b, lane a has number a. Lanes from N on are padding, which adds nothing to
// any sum. All 32 lanes must come to every function that takes `here`.

#pragma once

#include "../position.h"
#include "dialect/simd.h"
#include "dialect/words.h"

template <int N>
struct Lanes {
    enum {
        COUNT = N <= 1 ? 1
        : N <= 2       ? 2
        : N <= 4       ? 4
        : N <= 8       ? 8
        : N <= 16      ? 16
                       : 32,
        MATRICES = 32 / COUNT,  // of a simdgroup
        FEW = COUNT <= 4        // lanes: each can have every sum over them at once
    };
};

// b, and whether it is a line of the matrix.
template <int N>
FUNCTION int line(Position here) {
    return here.id % Lanes<N>::COUNT;
}

template <int N>
FUNCTION bool inside(Position here) {
    return N == Lanes<N>::COUNT || line<N>(here) < N;
}

// The sum over the lanes of a matrix, of one number each, for all of them.
template <int N>
FUNCTION float sum_lines(float v, Position here) {
    if (!inside<N>(here)) v = 0.0f;
    for (int step = 1; step < Lanes<N>::COUNT; step *= 2) v += simd_partner(v, step);
    return v;
}

// A simdgroup takes MATRICES tokens side by side, its first ones from first_tokens on, then those
// that are next_tokens further on; this lane takes the one that is own_token further on than they.
// Of a threadgroup no more than SIMDGROUPS simdgroups take part; T tells the others that they are
// done.
template <int N, int SIMDGROUPS = MOST_SIMDGROUPS>
FUNCTION int64_t next_tokens(Position here) {
    const int simdgroups = here.threads / SIMD;
    const int64_t groups = here.groups_x;
    return groups * (simdgroups < SIMDGROUPS ? simdgroups : SIMDGROUPS) * Lanes<N>::MATRICES;
}

template <int N, int SIMDGROUPS = MOST_SIMDGROUPS>
FUNCTION int64_t first_tokens(int64_t T, Position here) {
    const int64_t simdgroup = here.id / SIMD;
    const int64_t each = next_tokens<N, SIMDGROUPS>(here) / here.groups_x;
    return simdgroup < SIMDGROUPS ? here.group_x * each + simdgroup * Lanes<N>::MATRICES : T;
}

template <int N>
FUNCTION int own_token(Position here) {
    return here.id % SIMD / Lanes<N>::COUNT;
}
