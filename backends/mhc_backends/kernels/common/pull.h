// The root mean square's part of a gradient.

#pragma once

#include "dialect/words.h"

// The root mean square's gradient is x times a pull, r^3 dr / K, which underflows float32 for
// streams of 1e18. So the pull is kept times 2^24 and multiplied by x times 2^-24.
FUNCTION float pull_unit() { return 1.0f / 16777216.0f; }

// dr r^3 / K, multiplied in an order that stays in float32's range, which r^3 may leave.
FUNCTION float pull_of(float dr, float r, float K) {
    return dr * r * r * (r * (1.0f / pull_unit() / K));
}
