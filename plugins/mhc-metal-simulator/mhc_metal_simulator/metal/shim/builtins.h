// Built-in functions of Apple's compiler that MLX's own headers use, for the front end alone: they are
// declared and never run. MLX makes the functions of bfloat from these (bf16_math.h), which Apple's
// library lacks. A custom kernel uses MLX's functions, or the shim's where MLX's headers are not read.
#pragma once
#include "types.h"

#define __METAL_MAYBE_FAST_MATH__ false
#define __METAL_PRECISE_MATH__ false
#define __METAL_FAST_MATH__ true

#define MHC_BUILTINS(F) \
    F(acos) F(acosh) F(asin) F(asinh) F(atan) F(atan2) F(atanh) F(ceil) F(cos) F(cosh) \
    F(cospi) F(divide) F(exp) F(exp10) F(exp2) F(fabs) F(floor) F(fma) F(fmax) F(fmax3) \
    F(fmedian3) F(fmin) F(fmin3) F(fmod) F(fract) F(frexp) F(get_simdgroup_size) \
    F(get_thread_index_in_simdgroup) F(ldexp) F(log) F(log10) F(log2) F(nextafter) F(pow) \
    F(powr) F(rint) F(round) F(rsqrt) F(simd_broadcast) F(simd_max) F(simd_min) \
    F(simd_prefix_exclusive_product) F(simd_prefix_exclusive_sum) \
    F(simd_prefix_inclusive_product) F(simd_prefix_inclusive_sum) F(simd_product) \
    F(simd_shuffle) F(simd_shuffle_and_fill_down) F(simd_shuffle_and_fill_up) \
    F(simd_shuffle_down) F(simd_shuffle_rotate_down) F(simd_shuffle_rotate_up) \
    F(simd_shuffle_up) F(simd_shuffle_xor) F(simd_sum) F(simd_xor) F(sin) F(sinh) F(sinpi) \
    F(sqrt) F(tan) F(tanh) F(tanpi) F(trunc)
#define MHC_BUILTIN(name)              \
    template <typename T, typename... A> \
    T __metal_##name(T, A...);
MHC_BUILTINS(MHC_BUILTIN)
#undef MHC_BUILTIN
#undef MHC_BUILTINS
