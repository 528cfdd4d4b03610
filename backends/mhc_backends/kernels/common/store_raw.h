// Stores numbers without conversion.

#pragma once

#include "access.h"
#include "floats.h"
#include "raw.h"
#include "width.h"
#include "dialect/numbers.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

template <int W, typename T>
FUNCTION void write_raw(DEVICE T* p, Raw<T, W> v, bool by_vectors) {
    typedef Access<T, W> A;
    enum { PER_WORD = A::PER_WORD };
    if (A::ELEMENTS > 1 && by_vectors) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS)
            store_words((DEVICE typename A::type*)(p + k), v.word + k / PER_WORD);
    } else {
        UNROLL for (int k = 0; k < W; k++)
            p[k] = T(number(v.word[k / PER_WORD], k % PER_WORD, T(0.0f)));
    }
}

// store_raw(p, v): stores the numbers of v from p on.
template <typename P, typename T, int W>
FUNCTION void store_raw(P p, Raw<T, W> v) {
    write_raw(p, v, vectors<W>(p));
}
template <typename P, typename T, int W>
FUNCTION void store_raw(AlignedAddress<P> to, Raw<T, W> v) {
    write_raw(to.p, v, true);
}

// Converts v to p's type, in the format of memory; W is even.
template <int W, typename T>
FUNCTION Raw<T, W> packed(const DEVICE T*, Floats<W> v) {
    enum { PER_WORD = Raw<T, W>::PER_WORD };
    Raw<T, W> out;
    UNROLL for (int k = 0; k < W; k += PER_WORD)
        out.word[k / PER_WORD] = pack(v.at + k, T(0.0f));
    return out;
}
template <int W, typename P>
FUNCTION auto packed(AlignedAddress<P> like, Floats<W> v) {
    return packed(like.p, v);
}
