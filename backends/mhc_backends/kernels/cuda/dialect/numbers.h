// Numbers as they are in words of 32 bits: one float, or two of a narrow type.

#pragma once

#include "words.h"

FUNCTION unsigned bits(float v) { return __float_as_uint(v); }
FUNCTION unsigned bits(__half v) { return __half_as_ushort(v); }
FUNCTION unsigned bits(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }

// Number k of a word of 32 bits, which is one float or two of the narrow types; the last argument
// only names the type.
FUNCTION float number(unsigned word, int, float) { return __uint_as_float(word); }
FUNCTION float number(unsigned word, int k, __half) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(k ? word >> 16 : word)));
}
FUNCTION float number(unsigned word, int k, __nv_bfloat16) {
    return __uint_as_float(k ? word & 0xffff0000u : word << 16);
}
