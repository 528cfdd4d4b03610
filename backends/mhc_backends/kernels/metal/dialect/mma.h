// One product of fragments: [16, DEPTH] by [DEPTH, 8].

#pragma once

#include "../../common/floats.h"
#include "../../common/fragments.h"
#include "words.h"

struct BFragment {
    float2 pair;
};

// The upper row's two numbers, then the lower row's.
FUNCTION AFragment a_fragment(float upper, float upper_next, float lower, float lower_next) {
    AFragment out;
    out.frag[0] = as_type<uint4>(float4(upper, upper_next, lower, lower_next));
    return out;
}

FUNCTION BFragment b_fragment(float first, float second) {
    BFragment out;
    out.pair = float2(first, second);
    return out;
}

// sum + a b, by matrices of 8 by 8, which MLX's kernels fill and read in the same way.
FUNCTION Floats<4> multiply(Floats<4> sum, AFragment a, BFragment b) {
    const float4 rows = as_type<float4>(a.frag[0]);
    simdgroup_float8x8 upper, lower, other, above, below;
    UNROLL for (int k = 0; k < 2; k++) {
        upper.thread_elements()[k] = rows[k], lower.thread_elements()[k] = rows[2 + k];
        other.thread_elements()[k] = b.pair[k];
        above.thread_elements()[k] = sum.at[k], below.thread_elements()[k] = sum.at[2 + k];
    }
    simdgroup_multiply_accumulate(above, upper, other, above);
    simdgroup_multiply_accumulate(below, lower, other, below);
    UNROLL for (int k = 0; k < 2; k++) {
        sum.at[k] = above.thread_elements()[k], sum.at[2 + k] = below.thread_elements()[k];
    }
    return sum;
}
