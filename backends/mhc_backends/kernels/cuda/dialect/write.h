// From registers to memory.

#pragma once

#include "../../common/floats.h"
#include "numbers.h"
#include "vectors.h"
#include "words.h"

template <int W, typename T>
FUNCTION void write(T* p, Floats<W> v, bool by_vectors) {
    typedef Access<T, W> A;
    if (A::ELEMENTS > 1 && by_vectors) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
            unsigned words[A::WORDS] = {};
            UNROLL for (int e = 0; e < A::ELEMENTS; e++)
                words[e / A::PER_WORD] |= bits(static_cast<T>(v.at[k + e]))
                                          << (e % A::PER_WORD * 16);
            store_words(reinterpret_cast<typename A::type*>(p + k), words);
        }
    } else {
        UNROLL for (int k = 0; k < W; k++) p[k] = static_cast<T>(v.at[k]);
    }
}
