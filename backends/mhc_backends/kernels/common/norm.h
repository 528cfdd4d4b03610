// The root mean square.

#pragma once

#include "floats.h"
#include "dialect/precise.h"
#include "dialect/words.h"

// Streams of 1e18 have squares of 1e36, and float32 cannot hold the sum of 341 such squares. So all
// sums of squares are kept times squares_unit(), 2^-16, which changes no other bit.
FUNCTION float squares_unit() { return 1.0f / 65536.0f; }

// sum + v . v in these units: v is scaled before it is squared.
template <int W>
FUNCTION float add_squares(float sum, Floats<W> v) {
    const Floats<W> scaled = times(1.0f / 256.0f, v);
    return add_dot(sum, scaled, scaled);
}

// 1 / sqrt(mean(x^2) + eps), from `squares`, the sum of `count` squares in these units.
FUNCTION float inverse_rms(float squares, float count, float eps) {
    return 1.0f / precise::sqrt(squares / count / squares_unit() + eps);
}
