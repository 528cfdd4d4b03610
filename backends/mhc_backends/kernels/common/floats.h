// W numbers in registers.

#pragma once

#include "dialect/words.h"

template <int W>
struct Floats {
    float at[W];
};

template <int W>
FUNCTION Floats<W> zeros() {
    Floats<W> out;
    UNROLL for (int k = 0; k < W; k++)
        out.at[k] = 0.0f;
    return out;
}

// sum + factor * v
template <int W>
FUNCTION Floats<W> add(Floats<W> sum, float factor, Floats<W> v) {
    UNROLL for (int k = 0; k < W; k++)
        sum.at[k] = fma(factor, v.at[k], sum.at[k]);
    return sum;
}

// sum + a . b
template <int W>
FUNCTION float add_dot(float sum, Floats<W> a, Floats<W> b) {
    UNROLL for (int k = 0; k < W; k++)
        sum = fma(a.at[k], b.at[k], sum);
    return sum;
}

template <int W>
FUNCTION Floats<W> times(float factor, Floats<W> v) {
    UNROLL for (int k = 0; k < W; k++)
        v.at[k] *= factor;
    return v;
}

template <int W>
FUNCTION Floats<W> plus(Floats<W> a, Floats<W> b) {
    UNROLL for (int k = 0; k < W; k++)
        a.at[k] += b.at[k];
    return a;
}

template <int W>
FUNCTION Floats<W> product(Floats<W> a, Floats<W> b) {
    UNROLL for (int k = 0; k < W; k++)
        a.at[k] *= b.at[k];
    return a;
}
