// Limits and constants.
#pragma once
#include "types.h"

#define INFINITY __builtin_inff()
#define HUGE_VALF __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT __FLT_MAX__
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define FLT_DIG __FLT_DIG__
#define HALF_MAX half(65504.0f)
#define MAXHALF half(65504.0f)
#define HALF_MIN half(6.103515625e-05f)
#define HALF_EPSILON half(9.765625e-04f)
#define CHAR_BIT 8
#define SHRT_MAX 32767
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 9223372036854775807l
#define ULONG_MAX 18446744073709551615ul
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.78539816339744830962f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f

namespace metal {
template <typename T>
struct numeric_limits {
    static_assert(__is_integral(T), "numeric_limits of a type without limits");
    static constexpr bool is_signed = __is_signed(T);
    static constexpr int digits = int(sizeof(T)) * 8 - is_signed;
    static constexpr T max() {
        return is_signed ? T((T(1) << (digits - 1)) - 1 + (T(1) << (digits - 1))) : T(~T(0));
    }
    static constexpr T min() { return is_signed ? T(-max() - 1) : T(0); }
    static constexpr T lowest() { return min(); }
};
template <>
struct numeric_limits<bool> {
    static constexpr bool max() { return true; }
    static constexpr bool min() { return false; }
    static constexpr bool lowest() { return false; }
};

template <typename T, unsigned long largest, unsigned long smallest, unsigned long step,
          unsigned long inf, unsigned long nan, typename Bits>
struct floating_limits {
    static constexpr T of(unsigned long bits) { return __builtin_bit_cast(T, Bits(bits)); }
    static constexpr T max() { return of(largest); }
    static constexpr T lowest() { return -of(largest); }
    static constexpr T min() { return of(smallest); }
    static constexpr T epsilon() { return of(step); }
    static constexpr T infinity() { return of(inf); }
    static constexpr T quiet_NaN() { return of(nan); }
    static constexpr bool has_infinity = true, is_signed = true;
};
template <>
struct numeric_limits<float>
    : floating_limits<float, 0x7f7fffff, 0x00800000, 0x34000000, 0x7f800000, 0x7fc00000, uint> {};
template <>
struct numeric_limits<half>
    : floating_limits<half, 0x7bff, 0x0400, 0x1400, 0x7c00, 0x7e00, ushort> {};
template <>
struct numeric_limits<bfloat>
    : floating_limits<bfloat, 0x7f7f, 0x0080, 0x3c00, 0x7f80, 0x7fc0, ushort> {};
}  // namespace metal
