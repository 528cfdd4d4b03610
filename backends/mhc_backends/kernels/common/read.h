// Loads from memory to registers, without conversion.

#pragma once

#include "raw.h"
#include "width.h"
#include "dialect/numbers.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

template <int W, typename T>
FUNCTION Raw<T, W> read(const DEVICE T* p, bool by_vectors) {
    typedef Access<T, W> A;
    enum { PER_WORD = Raw<T, W>::PER_WORD };
    Raw<T, W> out = {};
    if (A::ELEMENTS > 1 && by_vectors) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS)
            load_words(out.word + k / PER_WORD, (const DEVICE typename A::type*)(p + k));
    } else {
        UNROLL for (int k = 0; k < W; k++)
            out.word[k / PER_WORD] |= bits(p[k]) << (k % PER_WORD * 16);
    }
    return out;
}
