// The reciprocal of a sum.

#pragma once

#include "words.h"

// 1 / v for v > 0, to the last place or the one before.
FUNCTION float reciprocal(float v) {
    float out;
    asm("rcp.approx.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}
