// Stores a single number.

#pragma once

#include "dialect/words.h"

// Stores v, rounded to the nearest in p's type.
template <typename T>
FUNCTION void store_one(DEVICE T* p, float v) {
    *p = T(v);
}
