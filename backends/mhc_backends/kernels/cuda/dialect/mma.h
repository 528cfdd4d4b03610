// One product of fragments: [16, DEPTH] by [DEPTH, 8].

#pragma once

#include "../../common/floats.h"
#include "../../common/fragments.h"
#include "words.h"

struct BFragment {
    uint4 frag;
};

// The tensor cores multiply numbers of 11 significant bits (TF32) and ignore a float's last 13
// bits. So a float is written as the sum of two TF32 numbers, exact to float32's rounding: the
// nearest one and the rest. The product of two rests is smaller than that rounding and is left out.
// (cvt.rna.tf32 would take 5 instructions. If the bits of a NaN overflow here, the rest is a NaN.)
FUNCTION unsigned tensor_float(float v) { return (__float_as_uint(v) + 0x1000u) & 0xffffe000u; }

FUNCTION unsigned tensor_rest(float v, unsigned upper) {
    return __float_as_uint(v - __uint_as_float(upper));
}

FUNCTION Floats<4> tensor_multiply(Floats<4> sum, uint4 a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    return sum;
}

// The upper row's two numbers, then the lower row's.
FUNCTION AFragment a_fragment(float upper, float upper_next, float lower, float lower_next) {
    AFragment out;
    out.frag[0] = make_uint4(tensor_float(upper), tensor_float(lower), tensor_float(upper_next),
                             tensor_float(lower_next));
    out.frag[1] =
        make_uint4(tensor_rest(upper, out.frag[0].x), tensor_rest(lower, out.frag[0].y),
                   tensor_rest(upper_next, out.frag[0].z), tensor_rest(lower_next, out.frag[0].w));
    return out;
}

FUNCTION BFragment b_fragment(float first, float second) {
    BFragment out;
    out.frag.x = tensor_float(first), out.frag.y = tensor_float(second);
    out.frag.z = tensor_rest(first, out.frag.x), out.frag.w = tensor_rest(second, out.frag.y);
    return out;
}

// sum + a b in full float32, the smallest products first, because a tensor core truncates sums
// rather than rounds them.
FUNCTION Floats<4> multiply(Floats<4> sum, AFragment a, BFragment b) {
    sum = tensor_multiply(sum, a.frag[0], b.frag.z, b.frag.w);
    sum = tensor_multiply(sum, a.frag[1], b.frag.x, b.frag.y);
    return tensor_multiply(sum, a.frag[0], b.frag.x, b.frag.y);
}
