// From registers to memory.

#pragma once

#include "../../common/floats.h"
#include "numbers.h"
#include "vectors.h"
#include "words.h"

template <int W, typename T>
FUNCTION void write(device T* p, Floats<W> v, bool by_vectors) {
    typedef Access<T, W> A;
    if (A::ELEMENTS > 1 && by_vectors) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
            typename A::type words;
            UNROLL for (int e = 0; e < A::WORDS; e++)
                set_word(words, e, pack(v.at + k + e * A::PER_WORD, T(0.0f)));
            *(device typename A::type*)(p + k) = words;
        }
    } else {
        UNROLL for (int k = 0; k < W; k++) p[k] = T(v.at[k]);
    }
}
