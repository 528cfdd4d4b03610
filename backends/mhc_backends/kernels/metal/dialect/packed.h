// Numbers in registers as they would be in memory.

#pragma once

#include "../../common/floats.h"
#include "../../common/raw.h"
#include "numbers.h"
#include "vectors.h"
#include "words.h"

// v as it would be in memory of p's type.
template <int W, typename T>
FUNCTION Raw<T, W> packed(const device T*, Floats<W> v) {
    enum { PER_WORD = Raw<T, W>::PER_WORD };
    Raw<T, W> out;
    UNROLL for (int k = 0; k < W; k += PER_WORD)
        out.word[k / PER_WORD] = pack(v.at + k, T(0.0f));
    return out;
}

template <int W, typename T>
FUNCTION void write_raw(device T* p, Raw<T, W> v, bool by_vectors) {
    typedef Access<T, W> A;
    enum { PER_WORD = A::PER_WORD };
    if (A::ELEMENTS > 1 && by_vectors) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
            typename A::type words;
            UNROLL for (int e = 0; e < A::WORDS; e++)
                set_word(words, e, v.word[k / PER_WORD + e]);
            *(device typename A::type*)(p + k) = words;
        }
    } else {
        UNROLL for (int k = 0; k < W; k++)
            p[k] = T(number(v.word[k / PER_WORD], k % PER_WORD, T(0.0f)));
    }
}
