// Inputs of fewer than 8 elements, which MLX passes in constant memory: read number by number.

#pragma once

#include "../../common/raw.h"
#include "numbers.h"
#include "words.h"

template <int W, typename T>
FUNCTION Raw<T, W> read(const constant T* p, bool) {
    enum { PER_WORD = Raw<T, W>::PER_WORD };
    Raw<T, W> out = {};
    UNROLL for (int k = 0; k < W; k++)
        out.word[k / PER_WORD] |= bits(p[k]) << (k % PER_WORD * 16);
    return out;
}
