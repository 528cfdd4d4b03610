// The root mean square.

#pragma once

#include "floats.h"
#include "dialect/precise.h"
#include "dialect/words.h"

// Streams of 1e18 have squares of 1e36, of which float32 cannot hold the sum of 341. So all sums of
// squares are kept times 2^-16, which changes no other bit. sum + v . v, of few v that are not
// small:
FUNCTION float squares_unit() { return 1.0f / 65536.0f; }

template <int W>
FUNCTION float add_squares(float sum, Floats<W> v) {
    const Floats<W> scaled = times(1.0f / 256.0f, v);
    return add_dot(sum, scaled, scaled);
}

// 1 / sqrt(mean(x^2) + eps), over `count` numbers whose squares' sum is given
FUNCTION float inverse_rms(float squares, float count, float eps) {
    return 1.0f / precise::sqrt(squares / count / squares_unit() + eps);
}
