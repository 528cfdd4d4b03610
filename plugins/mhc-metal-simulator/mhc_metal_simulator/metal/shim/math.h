// Scalar functions. One overload per type, as in Metal, so that a call that is ambiguous there is
// ambiguous here. half and bfloat16 are computed in float32 and rounded once.
#pragma once
#include "numbers.h"

namespace metal {
namespace precise {
#define MHC_1(name, expression) \
    MHC_INLINE float name(float x) { return expression; }
#define MHC_2(name, expression) \
    MHC_INLINE float name(float x, float y) { return expression; }

MHC_1(acos, __builtin_acosf(x))
MHC_1(acosh, __builtin_acoshf(x))
MHC_1(asin, __builtin_asinf(x))
MHC_1(asinh, __builtin_asinhf(x))
MHC_1(atan, __builtin_atanf(x))
MHC_1(atanh, __builtin_atanhf(x))
MHC_1(ceil, __builtin_ceilf(x))
MHC_1(cos, __builtin_cosf(x))
MHC_1(cosh, __builtin_coshf(x))
MHC_1(cospi, __builtin_cosf(M_PI_F * __builtin_fmodf(x, 2.0f)))
MHC_1(exp, __builtin_expf(x))
MHC_1(exp10, __builtin_powf(10.0f, x))
MHC_1(exp2, __builtin_exp2f(x))
MHC_1(fabs, __builtin_fabsf(x))
MHC_1(floor, __builtin_floorf(x))
MHC_1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
MHC_1(log, __builtin_logf(x))
MHC_1(log10, __builtin_log10f(x))
MHC_1(log2, __builtin_log2f(x))
MHC_1(rint, __builtin_rintf(x))
MHC_1(round, __builtin_roundf(x))
MHC_1(rsqrt, 1.0f / __builtin_sqrtf(x))
MHC_1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
MHC_1(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f)
MHC_1(sin, __builtin_sinf(x))
MHC_1(sinh, __builtin_sinhf(x))
MHC_1(sinpi, __builtin_sinf(M_PI_F * __builtin_fmodf(x, 2.0f)))
MHC_1(sqrt, __builtin_sqrtf(x))
MHC_1(tan, __builtin_tanf(x))
MHC_1(tanh, __builtin_tanhf(x))
MHC_1(tanpi, __builtin_tanf(M_PI_F * __builtin_fmodf(x, 1.0f)))
MHC_1(trunc, __builtin_truncf(x))
MHC_2(atan2, __builtin_atan2f(x, y))
MHC_2(copysign, __builtin_copysignf(x, y))
MHC_2(divide, x / y)
MHC_2(fdim, __builtin_fdimf(x, y))
MHC_2(fmax, __builtin_fmaxf(x, y))
MHC_2(fmin, __builtin_fminf(x, y))
MHC_2(fmod, __builtin_fmodf(x, y))
MHC_2(nextafter, __builtin_nextafterf(x, y))
MHC_2(pow, __builtin_powf(x, y))
MHC_2(powr, __builtin_powf(x, y))
MHC_2(step, y < x ? 0.0f : 1.0f)
// Metal's min and max return the number if the other argument is a NaN.
MHC_2(max, __builtin_fmaxf(x, y))
MHC_2(min, __builtin_fminf(x, y))
MHC_1(abs, __builtin_fabsf(x))
MHC_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MHC_INLINE float mix(float x, float y, float a) { return x + (y - x) * a; }
MHC_INLINE float clamp(float x, float low, float high) { return min(max(x, low), high); }
MHC_INLINE float smoothstep(float from, float to, float x) {
    const float t = clamp((x - from) / (to - from), 0.0f, 1.0f);
    return t * t * (3.0f - 2.0f * t);
}
MHC_INLINE float sincos(float x, float& cosine) {
    cosine = cos(x);
    return sin(x);
}
#undef MHC_1
#undef MHC_2
}  // namespace precise

// ---- the fast variants ---------------------------------------------------------------------------
// A call without a namespace may get these: MLX asks for safe maths, but leaves
// MTLCompileOptions.mathFloatingPointFunctions at its default, fast. So each has the largest error here that the
// Metal Shading Language Specification allows, "Accuracy of single-precision operations and functions with fast
// math enabled" (table 8.2). Other functions have the same bound in both tables, or are not simulated.
namespace fast {
// The exact result, off by `error`; the sign of the error depends on x alone.
MHC_INLINE float mhc_off(float exact, float error, float x) {
    uint h = __builtin_bit_cast(uint, x) * 0x9e3779b9u;
    h ^= h >> 15;
    return __builtin_isfinite(exact) && exact != 0.0f ? exact + (h & 1 ? error : -error) : exact;
}
MHC_INLINE float mhc_ulps(float exact, float count, float x) {
    const float size = __builtin_fabsf(exact);
    return mhc_off(exact, count * (__builtin_nextafterf(size, __builtin_inff()) - size), x);
}
#define MHC_1(name, expression) \
    MHC_INLINE float name(float x) { return expression; }
#define MHC_EXP(name) MHC_1(name, mhc_ulps(precise::name(x), 3.0f + precise::floor(precise::fabs(2.0f * x)), x))
#define MHC_LOG(name)                                                              \
    MHC_1(name, x >= 0.5f && x <= 2.0f ? mhc_off(precise::name(x), 0x1p-21f, x) \
                                       : mhc_ulps(precise::name(x), 3.0f, x))
MHC_EXP(exp)
MHC_EXP(exp2)
MHC_1(exp10, exp2(x * 3.32192809488736234787f))
MHC_LOG(log)
MHC_LOG(log2)
MHC_LOG(log10)
MHC_1(rsqrt, mhc_ulps(precise::rsqrt(x), 2.0f, x))
MHC_1(sqrt, x > 0.0f && x <= __FLT_MAX__ ? x * rsqrt(x) : precise::sqrt(x))
MHC_1(sin, mhc_off(precise::sin(x), 0x1p-13f, x))
MHC_1(cos, mhc_off(precise::cos(x), 0x1p-13f, x))
MHC_1(tan, sin(x) * (1.0f / cos(x)))
MHC_1(sinh, 0.5f * (exp(x) - exp(-x)))
MHC_1(cosh, 0.5f * (exp(x) + exp(-x)))
MHC_1(tanh, precise::fabs(x) > 10.0f ? precise::sign(x) : (exp(2.0f * x) - 1.0f) / (exp(2.0f * x) + 1.0f))
MHC_INLINE float pow(float x, float y) {
    return x > 0.0f && y != 0.0f ? exp2(y * log2(x)) : precise::pow(x, y);
}
MHC_INLINE float powr(float x, float y) { return pow(x, y); }
MHC_INLINE float sincos(float x, float& cosine) {
    cosine = cos(x);
    return sin(x);
}
// Undefined if an argument is a NaN (SPIRV-Cross uses precise::max where it must not be).
#define MHC_2(name)                                                           \
    MHC_INLINE float name(float x, float y) {                                 \
        return x == x && y == y ? precise::name(x, y) : __builtin_nanf("1"); \
    }
MHC_2(max)
MHC_2(min)
MHC_2(fmax)
MHC_2(fmin)
#undef MHC_1
#undef MHC_2
#undef MHC_EXP
#undef MHC_LOG
#define MHC_USE(name) using precise::name;
#define MHC_EXACT(F)                                                                          \
    F(acos) F(acosh) F(asin) F(asinh) F(atan) F(atanh) F(ceil) F(cospi) F(fabs) F(floor)      \
    F(fract) F(rint) F(round) F(saturate) F(sign) F(sinpi) F(tanpi) F(trunc) F(atan2)         \
    F(copysign) F(fdim) F(fmod) F(step) F(abs) F(clamp) F(divide) F(fma) F(mix) F(nextafter)  \
    F(smoothstep)
MHC_EXACT(MHC_USE)
#undef MHC_EXACT
#undef MHC_USE
}  // namespace fast

// ---- the same for half and bfloat16 ------------------------------------------------------------
// Apple's library has no functions of bfloat: MLX's headers, which come before each custom kernel, have.
#ifdef MHC_WITH_MLX_HEADERS
#define MHC_OF_BFLOAT(...)
#else
#define MHC_OF_BFLOAT(...) __VA_ARGS__
#endif
#define MHC_NARROW_1(name)                                                          \
    MHC_INLINE half name(half x) { return half(precise::name(float(x))); }          \
    MHC_OF_BFLOAT(MHC_INLINE bfloat name(bfloat x) { return bfloat(precise::name(float(x))); })
#define MHC_NARROW_2(name)                                                                      \
    MHC_INLINE half name(half x, half y) { return half(precise::name(float(x), float(y))); }    \
    MHC_OF_BFLOAT(MHC_INLINE bfloat name(bfloat x, bfloat y) {                                  \
        return bfloat(precise::name(float(x), float(y)));                                       \
    })
#define MHC_NARROW_3(name)                                                                      \
    MHC_INLINE half name(half x, half y, half z) {                                              \
        return half(precise::name(float(x), float(y), float(z)));                               \
    }                                                                                           \
    MHC_OF_BFLOAT(MHC_INLINE bfloat name(bfloat x, bfloat y, bfloat z) {                        \
        return bfloat(precise::name(float(x), float(y), float(z)));                             \
    })
#define MHC_FOR_1(F)                                                                             \
    F(acos) F(acosh) F(asin) F(asinh) F(atan) F(atanh) F(ceil) F(cos) F(cosh) F(cospi) F(exp)    \
    F(exp10) F(exp2) F(fabs) F(floor) F(fract) F(log) F(log10) F(log2) F(rint) F(round) F(rsqrt) \
    F(saturate) F(sign) F(sin) F(sinh) F(sinpi) F(sqrt) F(tan) F(tanh) F(tanpi) F(trunc)
#define MHC_FOR_2(F) \
    F(atan2) F(copysign) F(fdim) F(fmax) F(fmin) F(fmod) F(pow) F(powr) F(step)
// One by one, because metal::max(x, y) is not looked up in namespaces that metal merely uses.
#define MHC_USE(name) using fast::name;
MHC_FOR_1(MHC_USE)
MHC_FOR_2(MHC_USE)
using fast::abs, fast::clamp, fast::divide, fast::fma, fast::max, fast::min, fast::mix, fast::nextafter,
    fast::sincos, fast::smoothstep;
#undef MHC_USE
MHC_FOR_1(MHC_NARROW_1)
MHC_FOR_2(MHC_NARROW_2)
MHC_NARROW_1(abs)
MHC_NARROW_2(max)
MHC_NARROW_2(min)
MHC_NARROW_3(mix)
MHC_NARROW_3(clamp)
MHC_NARROW_3(smoothstep)
// In half, float32 would round the product a second time where a sum nearly cancels.
MHC_INLINE half fma(half a, half b, half c) { return half(double(a) * double(b) + double(c)); }
MHC_OF_BFLOAT(MHC_INLINE bfloat fma(bfloat a, bfloat b, bfloat c) {
    return bfloat(__builtin_fmaf(float(a), float(b), float(c)));
})
#undef MHC_NARROW_1
#undef MHC_NARROW_2
#undef MHC_NARROW_3

// ---- classification ----------------------------------------------------------------------------
#define MHC_TEST(name)                                                          \
    MHC_INLINE bool name(float x) { return __builtin_##name(x); }               \
    MHC_INLINE bool name(half x) { return __builtin_##name(float(x)); }         \
    MHC_OF_BFLOAT(MHC_INLINE bool name(bfloat x) { return __builtin_##name(float(x)); })
MHC_TEST(isnan)
MHC_TEST(isinf)
MHC_TEST(isfinite)
MHC_TEST(isnormal)
#undef MHC_TEST
MHC_INLINE bool signbit(float x) { return __builtin_bit_cast(uint, x) >> 31; }
MHC_INLINE bool signbit(half x) { return __builtin_bit_cast(ushort, x) >> 15; }
MHC_OF_BFLOAT(MHC_INLINE bool signbit(bfloat x) { return __builtin_bit_cast(ushort, x) >> 15; })
MHC_INLINE float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
MHC_INLINE half ldexp(half x, int k) { return half(__builtin_ldexpf(float(x), k)); }
MHC_INLINE float frexp(float x, int& exponent) { return __builtin_frexpf(x, &exponent); }
MHC_INLINE float modf(float x, float& whole) { return __builtin_modff(x, &whole); }
MHC_INLINE int ilogb(float x) { return __builtin_ilogbf(x); }

// ---- integers ----------------------------------------------------------------------------------
#define MHC_INTEGER(T)                                                                       \
    MHC_INLINE constexpr T max(T a, T b) { return a < b ? b : a; }                           \
    MHC_INLINE constexpr T min(T a, T b) { return b < a ? b : a; }                           \
    MHC_INLINE constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }      \
    MHC_INLINE constexpr T abs(T x) { return x < T(0) ? T(-x) : x; }                         \
    MHC_INLINE T popcount(T x) {                                                             \
        return T(__builtin_popcountl(ulong(x) & (~0ul >> (64 - 8 * sizeof(T)))));            \
    }                                                                                        \
    MHC_INLINE T clz(T x) {                                                                  \
        const ulong bits = ulong(x) & (~0ul >> (64 - 8 * sizeof(T)));                        \
        return T(bits ? __builtin_clzl(bits) - (64 - 8 * int(sizeof(T))) : 8 * sizeof(T));   \
    }                                                                                        \
    MHC_INLINE T ctz(T x) { return T(x ? __builtin_ctzl(ulong(x)) : 8 * sizeof(T)); }
MHC_INTEGER(mhc_char)
MHC_INTEGER(uchar)
MHC_INTEGER(short)
MHC_INTEGER(ushort)
MHC_INTEGER(int)
MHC_INTEGER(uint)
MHC_INTEGER(long)
MHC_INTEGER(ulong)
#undef MHC_INTEGER
MHC_INLINE int mulhi(int a, int b) { return int(long(a) * long(b) >> 32); }
MHC_INLINE uint mulhi(uint a, uint b) { return uint(ulong(a) * ulong(b) >> 32); }
MHC_INLINE uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
template <typename T>
MHC_INLINE T rotate(T x, T by) {
    constexpr uint bits = sizeof(T) * 8;
    const uint k = uint(by) % bits;
    return k ? T(x << k | x >> (bits - k)) : x;
}
template <typename T>
MHC_INLINE enable_if_t<is_arithmetic_v<T>, T> select(T no, T yes, bool which) {
    return which ? yes : no;
}
template <typename T>
MHC_INLINE T max3(T a, T b, T c) {
    return max(a, max(b, c));
}
template <typename T>
MHC_INLINE T min3(T a, T b, T c) {
    return min(a, min(b, c));
}
}  // namespace metal
