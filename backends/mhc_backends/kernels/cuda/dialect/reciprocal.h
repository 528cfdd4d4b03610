// The reciprocal of a sum.

#pragma once

#include "words.h"

// 1 / v for v > 0, to the last place or the one before.
FUNCTION float reciprocal(float v) {
    float out;
    asm("rcp.approx.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}

// The same bits where v and 1 / v are normal numbers; a step of the processor less before and after.
FUNCTION float normal_reciprocal(float v) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}
