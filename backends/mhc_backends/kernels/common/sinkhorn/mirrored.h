// Iterations of matrices that take at most 4 lanes, without chains of sums over the lanes.

#pragma once

#include "../floats.h"
#include "../position.h"
#include "lanes.h"
#include "sums.h"
#include "dialect/reciprocal.h"
#include "dialect/simd.h"
#include "dialect/words.h"

// A lane holds two lines of its matrix: lane k has the line along a at b = k, and the line along b
// at a = k. So it sums along both axes by itself, and the lanes exchange only the factors: one
// exchange after each sum, where a sum over the lanes takes two, one after the other.
template <int N>
FUNCTION Floats<N> other_line(Floats<N> v, Position here) {
    const int first = here.id % SIMD - line<N>(here);
    Floats<N> out = zeros<N>();
    UNROLL for (int k = 0; k < N * N; k++) {
        const float one = simd_from(v.at[k % N], first + k / N);
        if (k % N == line<N>(here)) out.at[k / N] = one;
    }
    return out;
}

// eps + v . factors, in two parts that do not wait for each other; fma leaves the compiler no
// choice, so that all kernels have the same bits.
template <int N>
FUNCTION float scaled_sum(float eps, Floats<N> v, Floats<N> factors) {
    float sum = fma(v.at[0], factors.at[0], eps);
    if (N > 1) sum = fma(v.at[1 % N], factors.at[1 % N], sum);
    if (N == 3) sum = fma(v.at[2 % N], factors.at[2 % N], sum);
    if (N == 4) sum += fma(v.at[3 % N], factors.at[3 % N], v.at[2 % N] * factors.at[2 % N]);
    return sum;
}

// NORMAL: all divisors and their reciprocals are normal numbers.
template <bool NORMAL, int N>
FUNCTION float line_factor(float divisor, Position here) {
    if (!inside<N>(here)) divisor = 1.0f;
    return NORMAL ? normal_reciprocal(divisor) : reciprocal(divisor);
}

template <bool NORMAL, int N>
FUNCTION Floats<N> mirrored_steps(Floats<N> along_a, int steps, float eps, Position here) {
    Floats<N> along_b = other_line(along_a, here);
    float sum = sum_a(along_a) + eps;
    for (int k = 0; k < steps; k++) {
        const float own_a = line_factor<NORMAL, N>(sum, here);
        const Floats<N> all_a = of_lanes<N>(own_a, here);
        sum = scaled_sum(eps, along_b, all_a);
        along_a = times(own_a, along_a);
        along_b = product(along_b, all_a);
        const float own_b = line_factor<NORMAL, N>(sum, here);
        const Floats<N> all_b = of_lanes<N>(own_b, here);
        sum = scaled_sum(eps, along_a, all_b);
        along_a = product(along_a, all_b);
        along_b = times(own_b, along_b);
    }
    return along_a;
}
