// Numbers in the format of memory, in words of 32 bits: one float, or two of a narrow type. An
// argument without a name only selects the type.

#pragma once

#include "words.h"

FUNCTION uint bits(float v) { return __float_as_uint(v); }
FUNCTION uint bits(__half v) { return __half_as_ushort(v); }
FUNCTION uint bits(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }

// Number k of a word.
FUNCTION float number(uint word, int, float) { return __uint_as_float(word); }
FUNCTION float number(uint word, int k, __half) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(k ? word >> 16 : word)));
}
FUNCTION float number(uint word, int k, __nv_bfloat16) {
    return __uint_as_float(k ? word & 0xffff0000u : word << 16);
}

// The word of the numbers from `from` on, each rounded to the nearest.
FUNCTION uint pack(const float* from, float) { return __float_as_uint(from[0]); }
FUNCTION uint pack(const float* from, __half) {
    const __half2 both = __floats2half2_rn(from[0], from[1]);
    return *reinterpret_cast<const uint*>(&both);
}
FUNCTION uint pack(const float* from, __nv_bfloat16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(from[0], from[1]);
    return *reinterpret_cast<const uint*>(&both);
}
