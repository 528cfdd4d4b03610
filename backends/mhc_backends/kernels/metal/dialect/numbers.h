// Numbers in the format of memory, in words of 32 bits: one float, or two of a narrow type. An
// argument without a name only selects the type.

#pragma once

#include "words.h"

FUNCTION uint bits(float v) { return as_type<uint>(v); }
FUNCTION uint bits(half v) { return as_type<ushort>(v); }
FUNCTION uint bits(bfloat v) { return as_type<ushort>(v); }

// Number k of a word.
FUNCTION float number(uint word, int, float) { return as_type<float>(word); }
FUNCTION float number(uint word, int k, half) {
    return float(as_type<half>(ushort(k ? word >> 16 : word & 0xffff)));
}
FUNCTION float number(uint word, int k, bfloat) {
    return as_type<float>(k ? word & 0xffff0000 : word << 16);
}

// The word of the numbers from `from` on, each rounded to the nearest.
FUNCTION uint pack(const thread float* from, float) { return as_type<uint>(from[0]); }
FUNCTION uint pack(const thread float* from, half) {
    return as_type<uint>(half2(half(from[0]), half(from[1])));
}
FUNCTION uint pack(const thread float* from, bfloat) {
    return as_type<uint>(bfloat2(bfloat(from[0]), bfloat(from[1])));
}
