// The reciprocal of a sum.

#pragma once

#include "words.h"

// 1 / v for v > 0, to the last place or the one before.
FUNCTION float reciprocal(float v) { return 1.0f / v; }

// The same bits where v and 1 / v are normal numbers.
FUNCTION float normal_reciprocal(float v) { return reciprocal(v); }
