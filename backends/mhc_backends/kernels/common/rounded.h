// Numbers as they are read back from memory.

#pragma once

#include "floats.h"
#include "raw.h"
#include "dialect/words.h"

// v, each number rounded to the nearest in the type of `like`, some numbers in the format of memory.
template <typename T, int W>
FUNCTION Floats<W> rounded(Raw<T, W>, Floats<W> v) {
    UNROLL for (int k = 0; k < W; k++)
        v.at[k] = float(T(v.at[k]));
    return v;
}
