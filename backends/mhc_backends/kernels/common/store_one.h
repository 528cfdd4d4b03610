// A single number to memory.

#pragma once

#include "dialect/words.h"

// v, rounded to the nearest of p's type.
template <typename T>
FUNCTION void store_one(DEVICE T* p, float v) {
    *p = T(v);
}
