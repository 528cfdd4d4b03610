// Stores from registers to memory, rounded to the type of the memory.

#pragma once

#include "floats.h"
#include "width.h"
#include "dialect/numbers.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

template <int W, typename T>
FUNCTION void write(DEVICE T* p, Floats<W> v, bool by_vectors) {
    typedef Access<T, W> A;
    if (A::ELEMENTS > 1 && by_vectors) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
            uint words[A::WORDS];
            UNROLL for (int e = 0; e < A::WORDS; e++)
                words[e] = pack(v.at + k + e * A::PER_WORD, T(0.0f));
            store_words((DEVICE typename A::type*)(p + k), words);
        }
    } else {
        UNROLL for (int k = 0; k < W; k++)
            p[k] = T(v.at[k]);
    }
}
