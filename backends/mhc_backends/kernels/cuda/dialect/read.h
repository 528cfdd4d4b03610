// From memory to registers.

#pragma once

#include "../../common/raw.h"
#include "numbers.h"
#include "vectors.h"
#include "words.h"

template <int W, typename T>
FUNCTION Raw<T, W> read(const T* p, bool by_vectors) {
    typedef Access<T, W> A;
    enum { PER_WORD = A::PER_WORD };
    Raw<T, W> out;
    if (A::ELEMENTS > 1 && by_vectors) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
            const typename A::type words = *reinterpret_cast<const typename A::type*>(p + k);
            UNROLL for (int e = 0; e < A::WORDS; e++)
                out.word[k / PER_WORD + e] = word(words, e);
        }
    } else {
        UNROLL for (int k = 0; k < Raw<T, W>::WORDS; k++) out.word[k] = 0;
        UNROLL for (int k = 0; k < W; k++)
            out.word[k / PER_WORD] |= bits(p[k]) << (k % PER_WORD * 16);
    }
    return out;
}
