// Conversions of half and bfloat16, rounding to nearest even, which clang calls where the machine
// has no instruction for them. With them, the runtime needs no library of a compiler.
#pragma once
#include "abi.h"

static float float_of_bits(u32 bits) { return __builtin_bit_cast(float, bits); }
static u32 bits_of_float(float x) { return __builtin_bit_cast(u32, x); }

// Shifts right, rounding to nearest even.
static u64 shift_rounded(u64 value, u32 by) {
    if (by == 0) return value;
    if (by > 63) return 0;
    u64 kept = value >> by, rest = value & ((1ull << by) - 1), half = 1ull << (by - 1);
    return kept + (rest > half || (rest == half && (kept & 1)));
}

// A float64 becomes a 16-bit float with this many exponent and mantissa bits. A float32 becomes a
// float64 exactly first, so one narrowing routine serves both and rounds once.
template <int EXPONENT, int MANTISSA>
static u16 narrow(double x) {
    const u64 bits = __builtin_bit_cast(u64, x);
    const u16 sign = u16(bits >> 63) << 15;
    const int bias = (1 << (EXPONENT - 1)) - 1;
    const u16 infinity = u16(((1 << EXPONENT) - 1) << MANTISSA);
    const u64 fraction = bits & ((1ull << 52) - 1);
    const int biased = int(bits >> 52) & 0x7ff;
    if (biased == 0x7ff)
        return sign | infinity | (fraction ? 1 << (MANTISSA - 1) : 0);
    const int exponent = biased - 1023 + bias;
    if (exponent >= (1 << EXPONENT) - 1) return sign | infinity;
    if (biased == 0 || exponent < -MANTISSA) return sign;
    if (exponent > 0)  // a carry out of the mantissa rightly bumps the exponent
        return sign | u16(shift_rounded((u64(exponent) << 52) | fraction, 52 - MANTISSA));
    return sign | u16(shift_rounded((1ull << 52) | fraction, u32(52 - MANTISSA + 1 - exponent)));
}

static float widen_half(u16 h) {
    const u32 sign = u32(h >> 15) << 31, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent) return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
    const float subnormal = float(fraction) * 0x1p-24f;
    return float_of_bits(sign | bits_of_float(subnormal));
}

MHC_INTERNAL float __extendhfsf2(_Float16 x) { return widen_half(__builtin_bit_cast(u16, x)); }
MHC_INTERNAL _Float16 __truncdfhf2(double x) {
    return __builtin_bit_cast(_Float16, narrow<5, 10>(x));
}
MHC_INTERNAL _Float16 __truncsfhf2(float x) { return __truncdfhf2(x); }
MHC_INTERNAL __bf16 __truncdfbf2(double x) { return __builtin_bit_cast(__bf16, narrow<8, 7>(x)); }
MHC_INTERNAL __bf16 __truncsfbf2(float x) {
    const u32 bits = bits_of_float(x);
    if ((bits & 0x7fffffff) > 0x7f800000)  // a NaN stays one
        return __builtin_bit_cast(__bf16, u16(bits >> 16 | 64));
    return __builtin_bit_cast(__bf16, u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}
