// The root mean square's part of a gradient.

#pragma once

#include "dialect/words.h"

// The pull of the root mean square on x, r^3 dr / K, is below float32's numbers for streams of
// 1e18. So it is kept times 2^24, and meets x times 2^-24.
FUNCTION float pull_unit() { return 1.0f / 16777216.0f; }

// dr r^3 / K, in an order in which nothing leaves float32: r^3 may be no float.
FUNCTION float pull_of(float dr, float r, float K) {
    return dr * r * r * (r * (1.0f / pull_unit() / K));
}
