// Functions that have a fast form in Metal.

#pragma once

#include "words.h"

// The functions by the names that the Metal dialect needs, for floats.
struct precise {
    static FUNCTION float exp(float v) { return ::exp(v); }
    static FUNCTION float log(float v) { return ::log(v); }
    static FUNCTION float sqrt(float v) { return ::sqrt(v); }
    static FUNCTION float max(float u, float v) { return ::max(u, v); }
    static FUNCTION float min(float u, float v) { return ::min(u, v); }
};
