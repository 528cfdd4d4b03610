// Numbers in registers as they would be in memory.

#pragma once

#include "../../common/floats.h"
#include "../../common/raw.h"
#include "numbers.h"
#include "vectors.h"
#include "words.h"

FUNCTION unsigned pair(float first, float second, __half) {
    const __half2 both = __floats2half2_rn(first, second);
    return *reinterpret_cast<const unsigned*>(&both);
}

FUNCTION unsigned pair(float first, float second, __nv_bfloat16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const unsigned*>(&both);
}
FUNCTION unsigned pair(float first, float, float) { return bits(first); }

// v as it would be in memory of p's type.
template <int W, typename T>
FUNCTION Raw<T, W> packed(const T*, Floats<W> v) {
    enum { PER_WORD = Raw<T, W>::PER_WORD };
    Raw<T, W> out;
    UNROLL for (int k = 0; k < W; k += PER_WORD)
        out.word[k / PER_WORD] = pair(v.at[k], v.at[k + PER_WORD - 1], T(0.0f));
    return out;
}

template <int W, typename T>
FUNCTION void write_raw(T* p, Raw<T, W> v, bool by_vectors) {
    typedef Access<T, W> A;
    enum { PER_WORD = A::PER_WORD };
    if (A::ELEMENTS > 1 && by_vectors) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS)
            store_words(reinterpret_cast<typename A::type*>(p + k), v.word + k / PER_WORD);
    } else {
        UNROLL for (int k = 0; k < W; k++)
            p[k] = static_cast<T>(number(v.word[k / PER_WORD], k % PER_WORD, static_cast<T>(0.0f)));
    }
}
