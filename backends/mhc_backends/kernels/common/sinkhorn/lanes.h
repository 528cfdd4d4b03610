// Sinkhorn's matrices in the lanes of a simdgroup, as in mhc_core/math/sinkhorn.py: "a" is the axis
// that is normalised first, "b" the other one.
//
// A matrix takes Lanes<N>::COUNT adjacent lanes, so a simdgroup has MATRICES matrices. Lane b of a
// matrix holds its line along a, N numbers, in registers. So a lane sums along a by itself; of the
// N sums along b, lane a has number a. Lanes from N on are padding and add nothing to any sum. All
// 32 lanes must come to every function that has the parameter `here`.

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
        FEW = COUNT <= 4        // so few lanes that each computes every sum along b
    };
};

// This lane's b, and whether the matrix has that line.
template <int N>
FUNCTION int line(Position here) {
    return here.id % Lanes<N>::COUNT;
}

template <int N>
FUNCTION bool inside(Position here) {
    return N == Lanes<N>::COUNT || line<N>(here) < N;
}

// The sum of one number of each lane of a matrix, for all of these lanes.
template <int N>
FUNCTION float sum_lines(float v, Position here) {
    if (!inside<N>(here)) v = 0.0f;
    for (int step = 1; step < Lanes<N>::COUNT; step *= 2) v += simd_partner(v, step);
    return v;
}

// The tokens of a simdgroup: MATRICES adjacent tokens from first_tokens on, then as many every
// next_tokens further on. This lane's token is own_token after the first of them. At most
// SIMDGROUPS simdgroups of a threadgroup take part; the others get T, past the last token.
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
